"""The data set: what is read, what is refused, and that the index finds every record again."""

import io
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unigen.data.dataset import BadData, UnifiedGenerationDataset, task
from unigen.sequence.types import BadRecord, Record, Text
from unigen.sequence.types import Image as Picture

EXAMPLE = Path(__file__).parents[2] / "examples" / "sample_data_format.json"


def png(size: int = 32, format: str = "PNG") -> bytes:
    noise = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()


def talk(answer: str) -> dict:
    return {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}


def line(answer: str) -> bytes:
    return json.dumps(talk(answer), ensure_ascii=False).encode()


def answers(dataset: UnifiedGenerationDataset) -> list[str]:
    return [record.sample[-1].text for record in dataset]


def caption(path: str) -> dict:
    return {"image_path": path, "caption": "c"}


def write(path: Path, *values: dict) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def refused(path, **options) -> BadData:
    with pytest.raises(BadData) as caught:
        UnifiedGenerationDataset(path, **options)
    return caught.value


# ---- reading ----


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_jsonl_lines_of_every_kind(tmp_path: Path, bom: bytes, newline: bytes, last: bool) -> None:
    lines = [line("é"), b"", line("猫\u2028x"), b"  ", b" " + line("c") + b"\t"]
    (tmp_path / "a.jsonl").write_bytes(bom + newline.join(lines) + newline * last)
    dataset = UnifiedGenerationDataset(tmp_path / "a.jsonl")
    assert answers(dataset) == ["é", "猫\u2028x", "c"]
    assert [dataset.origin(i).line for i in range(3)] == [1, 3, 5]
    assert [record.origin for record in dataset] == [dataset.origin(i) for i in range(3)]
    assert str(dataset[1].origin) == f"{tmp_path}/a.jsonl:3"


def test_files_joined_with_their_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(b"\xef\xbb\xbf" + line(a) + b"\n" for a in "ab"))
    assert answers(UnifiedGenerationDataset(tmp_path / "a.jsonl")) == ["a", "b"]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_list_and_single_record(tmp_path: Path, bom: bytes, indent: int | None) -> None:
    values = [talk(a) for a in ("é", "猫 [] {} , \\", "c")]
    (tmp_path / "list.json").write_bytes(bom + json.dumps(values, indent=indent, ensure_ascii=False).encode() + b"\r\n")
    dataset = UnifiedGenerationDataset(str(tmp_path / "list.json"))
    assert answers(dataset) == ["é", "猫 [] {} , \\", "c"]
    assert [dataset.origin(i).index for i in range(3)] == [0, 1, 2]
    text = (tmp_path / "list.json").read_text("utf-8-sig").splitlines()
    for i in range(3):
        at = dataset.origin(i).line
        assert (at is None) == (indent is None)  # one line for all would not say which
        assert at is None or (text[at - 1].strip() == "{" and str(dataset.origin(i)).endswith(f"list.json:{at}"))
    (tmp_path / "one.json").write_text("\n" + json.dumps(values[0], indent=indent))
    assert answers(UnifiedGenerationDataset(tmp_path / "one.json")) == ["é"]
    assert UnifiedGenerationDataset(tmp_path / "one.json").origin(0).line == 2


def test_folder_is_searched_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.json", "a/c.jsonl", ".hidden/x.jsonl", "a/.x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(line(name))
    (tmp_path / "notes.txt").write_text("no record")
    assert answers(UnifiedGenerationDataset(tmp_path)) == ["a/c.jsonl", "a/z.json", "b.jsonl"]
    assert answers(UnifiedGenerationDataset([tmp_path / "b.jsonl", str(tmp_path / "a")])) == ["b.jsonl", "a/c.jsonl", "a/z.json"]


def test_index_and_negative_index(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line(a) for a in "abc"))
    dataset = UnifiedGenerationDataset(tmp_path)
    assert len(dataset) == 3 and dataset[-1].sample == dataset[2].sample
    for i in (3, -4):
        with pytest.raises(IndexError):
            dataset[i]
        with pytest.raises(IndexError):
            dataset.origin(i)


def test_paths_do_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "x.png").write_bytes(png())
    write(tmp_path / "data" / "a.jsonl", caption("../x.png"), caption(str(tmp_path / "x.png")))
    monkeypatch.chdir(tmp_path)
    dataset = UnifiedGenerationDataset("data/a.jsonl")
    monkeypatch.chdir("/")
    assert all(record.sample[0].source.read_bytes() == png() for record in dataset)


def read_all(dataset: UnifiedGenerationDataset, queue) -> None:
    for _ in range(20):
        queue.put(answers(dataset))


def test_threads_and_forks_do_not_disturb_each_other(tmp_path: Path) -> None:
    expected = [str(i) * (i + 1) for i in range(50)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(line, expected)))
    dataset = UnifiedGenerationDataset(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(lambda _: answers(dataset), range(40)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=read_all, args=(dataset, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert all(queue.get(timeout=30) == expected for _ in range(40))
    for worker in workers:
        worker.join()
    assert answers(pickle.loads(pickle.dumps(dataset))) == expected


def test_reads_that_return_less_than_asked_for_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("a") + b"\n" + line("b"))
    dataset = UnifiedGenerationDataset(tmp_path)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: pread(descriptor, min(length, 7), offset))
    assert answers(dataset) == ["a", "b"]


def test_no_parsed_record_and_no_open_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line("x" * 1000) for _ in range(1000)))
    dataset = UnifiedGenerationDataset(tmp_path)
    before = len(os.listdir("/dev/fd"))
    answers(dataset)
    assert len(os.listdir("/dev/fd")) == before
    assert len(pickle.dumps(dataset)) < 60 * 1000


def test_a_file_changed_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("aa") + b"\n" + line("b"))
    dataset = UnifiedGenerationDataset(path)
    path.write_bytes(line("ab") + b"\n" + line("b"))
    assert dataset[1].sample[-1].text == "b"
    with pytest.raises(BadData, match="changed while it was in use"):
        dataset[0]


# ---- refusing ----


@pytest.mark.parametrize(
    ("data", "code", "where"),
    [
        (b'{"text_prompt": "a"', "bad_json", "line 2, column 20"),
        (b'{"caption": "a", "b": NaN}', "bad_json", "NaN at line 2, column 23"),
        (b'{"a": "NaN", "b": [-Infinity]}', "bad_json", "-Infinity at line 2, column 20"),
        (b'{"a": "caf\xe9"}', "bad_utf8", "line 2, byte 11"),
        (b'{"caption": "a", "caption": "b"}', "duplicate_key", '"caption" twice'),
        (b"[" * 100000, "bad_json", "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad_json", "digits"),
        (b"[]", "not_an_object", "[]"),
        (b'{"caption": "a"}', "missing_field", "image_path"),
    ],
)
def test_broken_lines(tmp_path: Path, data: bytes, code: str, where: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("a") + b"\n" + data + b"\n" + line("b"))
    error = refused(tmp_path)
    assert [r.code for r in error.records] == [code]
    assert where in str(error) and f"{tmp_path}/a.jsonl:2: {code}" in str(error) and "1 of 3 records" in str(error)
    dataset = UnifiedGenerationDataset(tmp_path, on_bad_record="skip", max_bad_share=0.5)
    assert answers(dataset) == ["a", "b"] and [r.code for r in dataset.bad] == [code]


def test_wrong_values_in_a_json_list_spoil_their_record_alone(tmp_path: Path) -> None:
    text = '[\n {"caption": "a",\n  "b": NaN},\n' + json.dumps(talk("x")) + ",\n3]"
    (tmp_path / "a.json").write_text(text)
    dataset = UnifiedGenerationDataset(tmp_path, on_bad_record="skip", max_bad_share=1)
    assert answers(dataset) == ["x"]
    assert [(r.code, r.origin.line, r.origin.index) for r in dataset.bad] == [("bad_json", 2, 0), ("not_an_object", 5, 2)]
    assert "line 3, column 8" in dataset.bad[0].found


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[{"a": 1},\n {"a" 2}]', "line 2, column 7"),
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2"),
        ('[{"a": 1},]', "line 1, column 11"),
        ('[{"a": 1}', "line 1, column 10"),
        ("[", "line 1, column 2"),
        ('[{"a": 1}] x', "line 1, column 12"),
        ('{"a": 1}\n{"a": 2}', ".jsonl"),
    ],
)
@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_syntax_error_spoils_a_json_file(tmp_path: Path, text: str, where: str, on_bad_record: str) -> None:
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(line("a") for _ in range(1000)))
    error = refused(tmp_path, on_bad_record=on_bad_record)  # skipping would silently lose all that follows
    assert [r.code for r in error.records] == ["bad_json"] and where in str(error) and "a.json" in str(error)


def test_paths_that_hold_no_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("{}")
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "a.json").write_text("[ ]")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, words in {
        "none.jsonl": "no such file",
        "empty": "holds no .json or .jsonl",
        "a.txt": "Rename it",
        "a.jsonl": "there is no record",
        "a.json": "there is no record",
        "pipe.jsonl": "not a regular file",
    }.items():
        assert words in str(refused(tmp_path / path)), path
    assert "no data is named" in str(refused([]))


def test_error_collects_all_and_shows_twenty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b"x"] * 30 + [line("a")]))
    error = refused(tmp_path)
    assert len(error.records) == 30 and all(isinstance(r, BadRecord) for r in error.records)
    assert str(error).count("bad_json") == 20 and "and 10 more" in str(error) and "30 of 31" in str(error)
    assert "on_bad_record=skip" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and len(copy.records) == 30


def test_skip_lists_counts_and_stops_above_one_percent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, listing = tmp_path / "a.jsonl", tmp_path / "out" / "bad_records.jsonl"
    path.write_bytes(b"\n".join([line("a")] * 99 + [b"{"]))
    dataset = UnifiedGenerationDataset(path, on_bad_record="skip", bad_records_path=listing)  # exactly 1 % may go
    assert len(dataset) == 99 and dataset.statistics()["bad_records"] == 1 and "1 bad ones left out" in dataset.describe()
    assert "1 of 100 records" in caplog.text
    path.write_bytes(b"\n".join([line("a")] * 98 + [b"{"]))
    error = refused(path, on_bad_record="skip", bad_records_path=listing)
    assert "more than the 1%" in str(error) and len(error.records) == 1
    written = [json.loads(row) for row in listing.read_text().splitlines()]
    assert [(row["code"], row["line"], row["file"]) for row in written] == [("bad_json", 100, str(path)), ("bad_json", 99, str(path))]


# ---- pictures ----


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_truncated_pictures_are_found_by_decoding(tmp_path: Path, format: str) -> None:
    data = png(64, format)
    (tmp_path / "good").write_bytes(data)
    (tmp_path / "cut").write_bytes(data[: len(data) * 3 // 4])
    path = write(tmp_path / "a.jsonl", caption("good"), talk("x"), caption("cut"), caption("good"))
    for check in ("auto", "full"):
        error = refused(path, check_pictures=check)
        assert [(r.code, r.origin.line, r.field) for r in error.records] == [("broken_picture", 3, "image_path")]
    assert len(UnifiedGenerationDataset(path, check_pictures="headers")) == 4

    measured = []
    options = {"on_bad_record": "skip", "max_bad_share": 0.5, "measure": lambda r: measured.append(r) or [r.origin.line]}
    dataset = UnifiedGenerationDataset(path, **options)
    assert dataset.sizes == [[1], [2], [4]] and [r.origin.line for r in dataset] == [1, 2, 4]
    statistics = dataset.statistics()
    assert statistics["formats"] == {"conversation": 1, "image_to_text": 2}
    assert (statistics["pictures"], statistics["distinct_pictures"], statistics["text_targets"]) == (2, 1, 3)


def test_auto_reads_headers_alone_of_many_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unigen.data.dataset.AUTO_FULL_CHECK", 2)
    data = png(64)
    for name in "abc":
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    assert len(UnifiedGenerationDataset(write(tmp_path / "many.jsonl", *map(caption, "abc")))) == 3
    assert len(refused(write(tmp_path / "few.jsonl", *map(caption, "aabb"))).records) == 4


def test_missing_and_unreadable_pictures_name_their_field(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    turns = [
        {"role": "user", "content": "q"},
        {"role": "user", "type": "image", "image_path": "none.png"},
        {"role": "assistant", "content": "a"},
    ]
    messages = {"messages": [{"role": "assistant", "content": "<image>"}], "images": ["text.png"]}
    error = refused(write(tmp_path / "a.jsonl", {"conversations": turns}, messages), check_pictures="headers")
    assert [(r.code, r.field) for r in error.records] == [
        ("missing_picture", "conversations[1].image_path"),
        ("not_a_picture", "images[0]"),
    ]
    assert f"{tmp_path}/none.png" in str(error) and "Cure: " in str(error)


def test_measure_may_refuse_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line(a) for a in ("a", "bbb", "cc")))

    def measure(record: Record) -> list[int]:
        size = len(record.sample[-1].text)
        if size > 2:
            raise BadRecord("too_long", "conversations", f"{size} letters", "at most 2", "shorten it")
        return [size]

    error = refused(tmp_path, measure=measure)
    assert [(r.code, r.origin.line) for r in error.records] == [("too_long", 2)]
    assert UnifiedGenerationDataset(tmp_path, measure=measure, on_bad_record="skip", max_bad_share=0.4).sizes == [[1], [2]]


# ---- fingerprint, statistics ----


def test_fingerprint_follows_contents_not_places(tmp_path: Path) -> None:
    for folder, data in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(line(data))
    one, two, three = (UnifiedGenerationDataset(tmp_path / name).fingerprint for name in ("one", "two", "three"))
    assert one == two != three and len(one) == 64 and int(one, 16)
    (tmp_path / "two" / "a.jsonl").rename(tmp_path / "two" / "b.jsonl")
    assert UnifiedGenerationDataset(tmp_path / "two").fingerprint != one


def test_fingerprint_follows_which_records_are_in_use(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png())
    path = write(tmp_path / "a.jsonl", caption("x.png"), talk("a"))
    whole = UnifiedGenerationDataset(path, on_bad_record="skip", max_bad_share=1).fingerprint
    (tmp_path / "x.png").unlink()
    assert UnifiedGenerationDataset(path, on_bad_record="skip", max_bad_share=1).fingerprint != whole


def test_statistics_of_the_example() -> None:
    dataset = UnifiedGenerationDataset(EXAMPLE)
    statistics = dataset.statistics()
    assert statistics == {
        "records": 7,
        "files": 1,
        "bad_records": 0,
        "formats": dict.fromkeys(
            ("conversation", "direct", "text_to_image", "image_to_text", "editing", "interleaved", "messages"),
            1,
        ),
        "tasks": {"understand": 1, "generate": 1, "edit": 1, "interleaved": 4},
        "text_targets": 5,
        "image_targets": 8,
        "pictures": 12,
        "distinct_pictures": 4,
    }
    assert "interleaved 4 (57%)" in dataset.describe() and "5 texts, 8 images" in dataset.describe()


def test_tasks() -> None:
    a, a_target, x, x_target = Text("a"), Text("a", True), Picture("x"), Picture("x", True)
    assert task([a, a_target]) == "text"
    assert task([x, a, a_target]) == "understand"
    assert task([a, x_target, x_target]) == "generate"
    assert task([x, a, x_target]) == "edit"
    assert task([a, a_target, x_target]) == task([x, x_target, a_target]) == "interleaved"
