"""The data set: what is read, what is refused, and that the index finds every record again."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from unigen.config import ConfigError
from unigen.data import indexing
from unigen.data.dataset import BadData, UnifiedGenerationDataset, task
from unigen.model.weights import load_bagel, load_planner
from unigen.sequence.images import Confined, image_size, open_image
from unigen.sequence.lengths import BLOCK_DTYPE, RecordLengths
from unigen.sequence.types import BadRecord, Record, Text
from unigen.sequence.types import Image as Picture

EXAMPLE = Path(__file__).parents[2] / "examples" / "sample_data_format.json"
FIXTURES = Path(__file__).parent / "fixtures"


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


def of_texts(*tokens: int) -> RecordLengths:
    return RecordLengths(np.zeros(1, BLOCK_DTYPE), list(tokens), [])


def texts_of(dataset: UnifiedGenerationDataset) -> list[list[int]]:
    assert dataset.lengths is not None
    return [lengths.texts for lengths in dataset.lengths]


def refused(path, **options) -> BadData:
    with pytest.raises(BadData) as caught:
        UnifiedGenerationDataset(path, **options)
    return caught.value


# ---- arguments


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"on_bad_record": "ignore"}, "on_bad_record is 'ignore'. Fix: give one of error, skip"),
        ({"check_pictures": "yes"}, "check_pictures is 'yes'. Fix: give one of auto, full, headers"),
        ({"split": "val"}, "split is 'val'. Fix: give one of train, validation"),
        ({"max_bad_share": 30}, "max_bad_share is 30.0; it is out of range"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"paths": None}, "paths is None"),
    ],
)
def test_an_argument_that_cannot_be_is_named(tmp_path: Path, given: dict, words: str):
    paths = given.pop("paths", write(tmp_path / "val.jsonl", talk("a")))
    with pytest.raises(ConfigError) as error:
        UnifiedGenerationDataset(paths, **given)
    assert words in str(error.value)


@pytest.mark.parametrize("index", ["a", slice(0, 2), 1.5])
def test_a_record_is_named_by_a_number(tmp_path: Path, index):
    dataset = UnifiedGenerationDataset(write(tmp_path / "a.jsonl", talk("a"), talk("b")))
    assert dataset[np.int64(1)].sample[-1].text == "b"
    with pytest.raises(TypeError, match=r"whole number, found .*Fix: "):
        dataset[index]


# ---- reading


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
    (tmp_path / "list.json").write_bytes(
        bom + json.dumps(values, indent=indent, ensure_ascii=False).encode() + b"\r\n"
    )
    dataset = UnifiedGenerationDataset(str(tmp_path / "list.json"))
    assert answers(dataset) == ["é", "猫 [] {} , \\", "c"]
    assert [dataset.origin(i).index for i in range(3)] == [0, 1, 2]
    text = (tmp_path / "list.json").read_text("utf-8-sig").splitlines()
    for i in range(3):
        at = dataset.origin(i).line
        assert (at is None) == (indent is None)  # one line for all would not say which
        assert at is None or (
            text[at - 1].strip() == "{" and str(dataset.origin(i)).endswith(f"list.json:{at}")
        )
    (tmp_path / "one.json").write_text("\n" + json.dumps(values[0], indent=indent))
    assert answers(UnifiedGenerationDataset(tmp_path / "one.json")) == ["é"]
    assert UnifiedGenerationDataset(tmp_path / "one.json").origin(0).line == 2


def test_folder_is_searched_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.json", "a/c.jsonl", ".hidden/x.jsonl", "a/.x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(line(name))
    (tmp_path / "notes.txt").write_text("no record")
    assert answers(UnifiedGenerationDataset(tmp_path)) == ["a/c.jsonl", "a/z.json", "b.jsonl"]
    assert answers(UnifiedGenerationDataset([tmp_path / "b.jsonl", str(tmp_path / "a")])) == [
        "b.jsonl",
        "a/c.jsonl",
        "a/z.json",
    ]


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


@pytest.mark.slow
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


def test_reads_that_return_less_than_asked_for_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("a") + b"\n" + line("b"))
    dataset = UnifiedGenerationDataset(tmp_path)
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda descriptor, length, offset: pread(descriptor, min(length, 7), offset)
    )
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


# ---- refusing


@pytest.mark.parametrize(
    ("data", "code", "where"),
    [
        (b'{"text_prompt": "a"', "bad_json", "line 2, column 20"),
        (b'{"caption": "a", "b": NaN}', "bad_json", "NaN at line 2, column 23"),
        (b'{"a": "NaN", "b": [-Infinity]}', "bad_json", "-Infinity at line 2, column 20"),
        (b'{"a": "caf\xe9"}', "bad_utf8", "line 2, byte 11"),
        (b'{"caption": "a", "caption": "b"}', "duplicate_key", '"caption" twice'),
        (b"[" * 100000, "bad_json", "more than 100 objects"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad_json", "digits"),
        (b"[]", "not_an_object", "[]"),
        (b'{"caption": "a"}', "missing_field", "image_path"),
    ],
)
def test_broken_lines(tmp_path: Path, data: bytes, code: str, where: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("a") + b"\n" + data + b"\n" + line("b"))
    error = refused(tmp_path)
    assert [r.code for r in error.records] == [code]
    assert (
        where in str(error)
        and f"{tmp_path}/a.jsonl:2: {code}" in str(error)
        and "1 of 3 records" in str(error)
    )
    dataset = UnifiedGenerationDataset(tmp_path, on_bad_record="skip", max_bad_share=0.5)
    assert answers(dataset) == ["a", "b"] and [r.code for r in dataset.bad] == [code]


def test_wrong_values_in_a_json_list_spoil_their_record_alone(tmp_path: Path) -> None:
    text = '[\n {"caption": "a",\n  "b": NaN},\n' + json.dumps(talk("x")) + ",\n3]"
    (tmp_path / "a.json").write_text(text)
    dataset = UnifiedGenerationDataset(tmp_path, on_bad_record="skip", max_bad_share=1)
    assert answers(dataset) == ["x"]
    assert [(r.code, r.origin.line, r.origin.index) for r in dataset.bad] == [
        ("bad_json", 2, 0),
        ("not_an_object", 5, 2),
    ]
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
    assert error.records[0].code == "bad_json" and where in str(error) and "a.json" in str(error)
    assert "on_bad_record" not in str(error)


def test_paths_that_hold_no_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("{}")
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "a.json").write_text("[ ]")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, words in {
        "none.jsonl": "no such file",
        "empty": "holds no .json or .jsonl",
        "a.txt": "name it after what it holds",
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
    assert (
        str(error).count("bad_json") == 4
        and "and 27 more of bad_json" in str(error)
        and "30 of 31" in str(error)
    )
    assert "on_bad_record" not in str(error)  # it would not help: that is for one in a hundred
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([b"x"] + [line("a")] * 99))
    assert "--on_bad_record skip" in str(refused(tmp_path / "b.jsonl"))
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) and len(copy.records) == 30


def test_skip_lists_counts_and_stops_above_one_percent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, listing = tmp_path / "a.jsonl", tmp_path / "out" / "bad_records.jsonl"
    path.write_bytes(b"\n".join([line("a")] * 99 + [b"{"]))
    # exactly 1 % may go
    dataset = UnifiedGenerationDataset(path, on_bad_record="skip", bad_records_path=listing)
    assert (
        len(dataset) == 99
        and dataset.statistics()["bad_records"] == 1
        and "1 bad ones left out" in dataset.describe()
    )
    assert "1 of 100 records" in caplog.text
    path.write_bytes(b"\n".join([line("a")] * 98 + [b"{"]))
    error = refused(path, on_bad_record="skip", bad_records_path=listing)
    assert "more than the 1%" in str(error) and "--max_bad_share" in str(error) and len(error.records) == 1
    assert len(UnifiedGenerationDataset(path, on_bad_record="skip", max_bad_share=0.02)) == 98
    written = [json.loads(row) for row in listing.read_text().splitlines()]
    assert [(row["code"], row["line"], row["file"]) for row in written] == [
        ("bad_json", 100, str(path)),
        ("bad_json", 99, str(path)),
    ]


# ---- pictures


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_truncated_pictures_are_found_by_decoding(tmp_path: Path, format: str) -> None:
    data = png(64, format)
    (tmp_path / "good").write_bytes(data)
    (tmp_path / "cut").write_bytes(data[: len(data) * 3 // 4])
    path = write(tmp_path / "a.jsonl", caption("good"), talk("x"), caption("cut"), caption("good"))
    for check in ("auto", "full"):
        error = refused(path, check_pictures=check)
        assert [(r.code, r.origin.line, r.field) for r in error.records] == [
            ("broken_picture", 3, "image_path")
        ]
    assert len(UnifiedGenerationDataset(path, check_pictures="headers")) == 4

    counted = []
    options = {
        "on_bad_record": "skip",
        "max_bad_share": 0.5,
        "token_lengths": lambda r: counted.append(r) or of_texts(r.origin.line),
    }
    dataset = UnifiedGenerationDataset(path, **options)
    assert texts_of(dataset) == [[1], [2], [4]] and [r.origin.line for r in dataset] == [1, 2, 4]
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
    assert f"{tmp_path}/none.png" in str(error) and "Fix: " in str(error)


def test_token_lengths_may_refuse_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line(a) for a in ("a", "bbb", "cc")))

    def token_lengths(record: Record) -> RecordLengths:
        size = len(record.sample[-1].text)
        if size > 2:
            raise BadRecord("too_long", "conversations", f"{size} letters", "at most 2", "shorten it")
        return of_texts(size)

    error = refused(tmp_path, token_lengths=token_lengths)
    assert [(r.code, r.origin.line) for r in error.records] == [("too_long", 2)]
    kept = UnifiedGenerationDataset(
        tmp_path, token_lengths=token_lengths, on_bad_record="skip", max_bad_share=0.4
    )
    assert texts_of(kept) == [[1], [2]]


def test_what_token_lengths_say_of_a_segment_names_the_field_it_came_from(tmp_path: Path) -> None:
    def token_lengths(record: Record) -> RecordLengths:
        raise BadRecord("too_large", None, "this", "that", "do so", segment=len(record.sample) - 1)

    (tmp_path / "a.jsonl").write_bytes(line("a"))
    assert [r.field for r in refused(tmp_path, token_lengths=token_lengths).records] == [
        "conversations[1].content"
    ]


def test_a_header_is_read_once_and_its_size_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png(40))
    (tmp_path / "b.png").write_bytes(png(24))
    path = write(
        tmp_path / "a.jsonl", *(caption(name) for name in ("a.png", "b.png", "a.png", "none.png", "none.png"))
    )
    looked = []
    monkeypatch.setattr(
        "unigen.data.examine.image_size", lambda source: looked.append(source.name) or image_size(source)
    )
    options = {"on_bad_record": "skip", "max_bad_share": 0.5, "check_pictures": "headers"}
    dataset = UnifiedGenerationDataset(
        path, token_lengths=lambda record: of_texts(*record.sample[0].size), **options
    )
    assert looked == ["a.png", "b.png", "none.png"]
    assert texts_of(dataset) == [[40, 40], [24, 24], [40, 40]] and len(dataset.bad) == 2
    assert dataset.statistics()["distinct_pictures"] == 2


# ---- tables and compressed files


def table(path: Path, *pictures: bytes, **columns) -> Path:
    made = {
        "image": [{"bytes": data, "path": None} for data in pictures],
        "captions": [f"c{i}" for i in range(len(pictures))],
    }
    pq.write_table(pa.table(made | columns), path, row_group_size=2)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIGEN_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_records_of_every_kind_of_file_in_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line("a") + b"\n" + line("b")))
    with pa.CompressedOutputStream(str(tmp_path / "b.json.zst"), "zstd") as out:
        out.write(json.dumps([talk("c"), talk("d")]).encode())
    table(tmp_path / "c.parquet", png(24), png(32), png(40))
    shutil.copytree(FIXTURES / "saved", tmp_path / "d")
    dataset = UnifiedGenerationDataset(tmp_path, token_lengths=lambda record: of_texts(len(record.sample)))
    texts = [
        record.sample[-1].text if record.format == "conversation" else record.sample[0].text
        for record in dataset
    ]
    assert texts == ["a", "b", "c", "d", "c0", "c1", "c2", "c4", "c0", "c2"]
    assert dataset[7].sample[0].others == ("caption 4",) and open_image(dataset[7].sample[1].source).size == (
        40,
        30,
    )
    assert (
        str(dataset.origin(1)) == f"{tmp_path}/a.jsonl.gz:2"
        and str(dataset.origin(5)) == f"{tmp_path}/c.parquet[1]"
    )
    assert dataset.runs == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 6), (6, 7), (7, 9), (9, 10)]
    assert dataset.statistics()["distinct_pictures"] == 6 and texts_of(dataset) == [[2]] * 10
    again = pickle.loads(pickle.dumps(dataset))
    assert [record.sample for record in again] == [record.sample for record in dataset]


def test_records_of_one_cost_have_no_runs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("a"))
    assert UnifiedGenerationDataset(tmp_path).runs is None
    assert UnifiedGenerationDataset(FIXTURES / "saved").runs is None  # Arrow files are mapped
    assert UnifiedGenerationDataset(FIXTURES / "exported.parquet").runs == [(0, 2)]


@pytest.mark.parametrize("check", ["headers", "full"])
def test_pictures_inside_a_table_are_checked_like_files(tmp_path: Path, check: str) -> None:
    good = png(48)
    path = table(tmp_path / "a.parquet", good, good[: len(good) // 2], b"no picture", good, good[:-200])
    error = refused(path, check_pictures=check)
    broken = {
        "headers": [("not_a_picture", 2)],
        "full": [("broken_picture", 1), ("not_a_picture", 2), ("broken_picture", 4)],
    }[check]
    assert [(r.code, r.origin.index) for r in error.records] == broken
    assert {r.field for r in error.records} == {"image"} and "the given bytes" in str(error)
    dataset = UnifiedGenerationDataset(
        path,
        check_pictures=check,
        on_bad_record="skip",
        max_bad_share=1,
        token_lengths=lambda r: of_texts(r.origin.index),
    )
    assert [texts[0] for texts in texts_of(dataset)] == [
        i for i in range(5) if i not in dict(map(reversed, broken))
    ]
    assert dataset.statistics()["distinct_pictures"] == dataset.statistics()["pictures"] == len(dataset)
    assert dataset.runs == ([(0, 2), (2, 3), (3, 4)] if check == "headers" else [(0, 1), (1, 2)])


def test_paths_in_a_table_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(png())
    rows = pa.table({"image": [{"bytes": None, "path": "x.png"}], "captions": ["c"]})
    pq.write_table(rows, tmp_path / "data" / "a.parquet")
    assert UnifiedGenerationDataset(tmp_path / "data")[0].sample[1].source == tmp_path / "data" / "x.png"


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_damaged_file_stops_a_run_and_is_named(tmp_path: Path, on_bad_record: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line("a") for _ in range(1000)))
    path = table(tmp_path / "b.parquet", *[png()] * 5)
    os.truncate(path, path.stat().st_size - 9)
    error = refused(tmp_path, on_bad_record=on_bad_record)
    assert [(r.code, r.field, r.origin.file) for r in error.records] == [("broken_file", "(file)", path)]


def test_the_fingerprint_follows_what_tables_and_compressed_files_hold(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return UnifiedGenerationDataset(tmp_path).fingerprint

    table(tmp_path / "a.parquet", png(24), png(32))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line("a"), mtime=0))
    found = [fingerprint(), fingerprint()]
    table(tmp_path / "a.parquet", png(24), png(32), score=[1, 2])
    found.append(fingerprint())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line("b"), mtime=0))
    found.append(fingerprint())
    assert found[0] == found[1] and len(set(found)) == 3


def test_every_picture_named_by_a_path_must_lie_in_data_root(tmp_path: Path) -> None:
    for name in ("root", "root2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png())
    inside, outside = tmp_path / "root" / "x.png", tmp_path / "root2" / "x.png"
    path = write(
        tmp_path / "a.jsonl",
        caption("root/x.png"),
        caption(str(inside)),
        caption("root/../root2/x.png"),
        caption(str(outside)),
    )
    error = refused(path, data_root=tmp_path / "root")
    assert [(r.code, r.origin.line, r.field) for r in error.records] == [
        ("outside_root", n, "image_path") for n in (3, 4)
    ]
    assert len(refused(path, data_root=tmp_path / "root", check_pictures="headers").records) == 2
    dataset = UnifiedGenerationDataset(
        path, data_root=str(tmp_path / "root"), on_bad_record="skip", max_bad_share=0.5
    )
    assert [record.sample[0].source for record in dataset] == [
        Confined(tmp_path / "root/x.png", tmp_path / "root"),
        Confined(inside, tmp_path / "root"),
    ]
    assert open_image(dataset[0].sample[0].source).size == (32, 32)
    assert "data_root is no folder" in str(refused(path, data_root=tmp_path / "none"))
    assert len(UnifiedGenerationDataset(path)) == 4
    embedded = UnifiedGenerationDataset(table(tmp_path / "b.parquet", png()), data_root=tmp_path / "root")
    assert isinstance(embedded[0].sample[1].source, bytes)


def test_a_truncated_picture_inside_data_root_takes_all_its_records_along(tmp_path: Path) -> None:
    data = png(64)
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "good.png").write_bytes(data)
    path = write(tmp_path / "a.jsonl", *(caption(name) for name in ("cut.png", "good.png", "cut.png")))
    error = refused(path, data_root=tmp_path)
    assert [(r.code, r.origin.line) for r in error.records] == [("broken_picture", 1), ("broken_picture", 3)]


def test_a_bad_record_is_listed_once_however_often_a_run_starts(tmp_path: Path) -> None:
    path, listing = tmp_path / "a.jsonl", tmp_path / "bad_records.jsonl"
    path.write_bytes(b"\n".join([line("a")] * 8 + [b"{", b"["]))
    options = {"on_bad_record": "skip", "max_bad_share": 1, "bad_records_path": listing}
    UnifiedGenerationDataset(path, **options)
    with listing.open("a") as file:
        file.write('{"code": "broken_picture"}\n{"code": "half a li')  # by the trainer, killed at last
    UnifiedGenerationDataset(path, **options)
    path.write_bytes(path.read_bytes() + b"\n{]")
    UnifiedGenerationDataset(path, **options)
    lines = listing.read_text().splitlines()
    assert [json.loads(row).get("line") for i, row in enumerate(lines) if i != 3] == [9, 10, None, 11]
    assert lines[2:4] == ['{"code": "broken_picture"}', '{"code": "half a li']


# ---- fingerprint, statistics


def test_fingerprint_follows_contents_not_places(tmp_path: Path) -> None:
    for folder, data in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(line(data))
    one, two, three = (
        UnifiedGenerationDataset(tmp_path / name).fingerprint for name in ("one", "two", "three")
    )
    assert one == two != three and len(one) == 64 and int(one, 16)
    (tmp_path / "two" / "a.jsonl").rename(tmp_path / "two" / "b.jsonl")
    assert UnifiedGenerationDataset(tmp_path / "two").fingerprint == one
    (tmp_path / "two" / "a.jsonl").write_bytes(line("b"))  # and now two in this order, or in the other
    both = [
        [tmp_path / "two" / name for name in names]
        for names in (("a.jsonl", "b.jsonl"), ("b.jsonl", "a.jsonl"))
    ]
    found = {UnifiedGenerationDataset(paths).fingerprint for paths in both}
    assert len(found) == 2 and one not in found


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
            (
                "conversation",
                "direct",
                "text_to_image",
                "image_to_text",
                "editing",
                "interleaved",
                "messages",
            ),
            1,
        ),
        "tasks": {"understand": 1, "generate": 1, "edit": 1, "interleaved": 4},
        "text_targets": 5,
        "image_targets": 8,
        "pictures": 12,
        "distinct_pictures": 4,
        "unread": {},
        "no_picture": {},
        "unlearnt": {},
    }
    assert "interleaved 4 (57%)" in dataset.describe() and "5 texts, 8 images" in dataset.describe()


def test_what_reading_left_out_is_counted_and_said(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"conversations": turns, "image": "", "id": i, "label": 2} for i in range(3)]
    write(tmp_path / "a.jsonl", *records, {"conversations": turns})
    dataset = UnifiedGenerationDataset(tmp_path / "a.jsonl")
    statistics = dataset.statistics()
    assert statistics["unread"] == {"id": 3, "label": 3} and statistics["no_picture"] == {"image": 3}
    told = dataset.describe()
    assert "nothing reads" in told and "id 3 of 4, label 3 of 4" in told and "image 3 of 4" in told


def test_a_folder_of_splits_is_read_by_split_and_says_so(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(line(name))
    (tmp_path / "README.md").write_text("About the data")
    dataset = UnifiedGenerationDataset(tmp_path)
    assert answers(dataset) == ["train"]
    told = dataset.describe()
    assert "test.jsonl (test), validation.jsonl (validation)" in told and "README.md" in told
    held_out = UnifiedGenerationDataset(tmp_path, split="validation")
    assert answers(held_out) == ["validation"] and "train.jsonl (train)" in held_out.describe()


def test_tasks() -> None:
    a, a_target, x, x_target = Text("a"), Text("a", True), Picture("x"), Picture("x", True)
    assert task([a, a_target]) == "text"
    assert task([x, a, a_target]) == "understand"
    assert task([a, x_target, x_target]) == "generate"
    assert task([x, a, x_target]) == "edit"
    assert task([a, a_target, x_target]) == task([x, x_target, a_target]) == "interleaved"


# ---- bad records in bounds


@pytest.mark.slow
def test_bad_records_keep_no_traceback_and_take_little_memory(tmp_path: Path) -> None:
    """Each line has a megabyte; what is kept of each is a message."""
    with (tmp_path / "a.jsonl").open("wb") as file:
        for i in range(60):
            name = f"{i}".encode() + b"x" * 1_000_000
            file.write(b'{"%s": 1}\n' % name)
    tracemalloc.start()
    error = refused(tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(error.records) == 60 and held < 10 << 20
    for record in error.records:
        assert record.__traceback__ is None and record.__context__ is None and record.__cause__ is None
        assert len(str(record)) < 5000
    assert len(str(error)) < 100_000


def test_where_most_is_bad_the_rest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "BAD_BYTES", 100_000)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 10_000)
    for mode in ("error", "skip"):
        error = refused(tmp_path, on_bad_record=mode)
        assert 50 < len(error.records) < 100 and "Fix: " in str(error)
        assert "no more are looked at" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("n", [200_000])
def test_repeated_keys_and_unknown_names_take_linear_time(tmp_path: Path, n: int) -> None:
    """A quadratic search takes minutes for so many."""
    many = ",".join(f'"k{i}":1' for i in range(n))
    lines = ["{" + many + f',"k{n - 1}":2}}', "{" + many + "}"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    error = refused(tmp_path)
    assert [record.code for record in error.records] == ["duplicate_key", "no_format"]
    assert f"k{n - 1}" in error.records[0].found and len(str(error)) < 5000


@pytest.mark.parametrize("depth", [101, 900, 5000, 200_000])
@pytest.mark.parametrize("where", ["metadata", "conversations", "messages", "captions", "x"])
def test_deep_json_is_a_bad_record(tmp_path: Path, depth: int, where: str) -> None:
    deep = "[" * depth + "]" * depth
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png"})[:-1] + f', "{where}": {deep}}}\n')
    (record,) = refused(tmp_path).records
    assert record.code == "bad_json" and len(str(record)) < 1000


def test_brackets_in_texts_are_not_deep(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("[{" * 5000 + '\\"'))
    assert len(UnifiedGenerationDataset(tmp_path)) == 1


def test_with_a_planner_items_are_inputs_of_the_model_with_masks_of_the_loss(small_model: Path) -> None:
    planner = load_planner(small_model)
    records, inputs = (UnifiedGenerationDataset(EXAMPLE, **how) for how in ({}, {"planner": planner}))
    assert isinstance(inputs, Dataset) and len(inputs) == len(records) == 7
    model = load_bagel(small_model)
    for record, pack in zip(records, DataLoader(inputs, batch_size=None), strict=True):
        learnt = [segment for segment in record.sample if segment.target]
        texts = [segment.text for segment in learnt if isinstance(segment, Text)]
        said = planner.tokenizer.decode(pack.label[pack.label_rows].tolist())
        assert all(text in said for text in texts), (texts, said)
        assert (pack.label != -100).sum() == len(pack.label_rows)
        assert (len(pack.noised_rows) > 0) == any(isinstance(segment, Picture) for segment in learnt)
        output = model(pack)
        assert output.ce.shape == pack.label_rows.shape and output.ce.isfinite().all()
    drawing = next(i for i, pack in enumerate(inputs) if len(pack.noised_rows))
    first, again = inputs[drawing], inputs[drawing]
    inputs.epoch = 1
    assert first.noise.equal(again.noise) and not first.noise.equal(inputs[drawing].noise)
