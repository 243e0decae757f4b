"""``unigen fetch``: the new data trains, nothing is asked twice, and what ended a run at whatever moment
costs nothing."""

import base64
import copy
import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_server import PNG, picture

from unigen import cli
from unigen.commands.fetch.command import FetchOptions, _Turns
from unigen.commands.fetch.rewrite import places
from unigen.commands.fetch.store import PictureStore, picture_kind
from unigen.config import UserError
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.formats import FORMATS, parse_with_fields
from unigen.sequence.images import open_image
from unigen.sequence.types import Image, Origin

ROOT = Path(__file__).parents[3]
EXAMPLES = json.loads((ROOT / "examples" / "sample_data_format.json").read_text(encoding="utf-8"))


def caption(image: str, **more) -> dict:
    return {"image_path": image, "caption": "Text", **more}


def write(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path


def lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(data: Path, out: Path, *flags: str) -> int:
    return cli.main(
        [
            "fetch",
            str(data),
            "--output_dir",
            str(out),
            "--allow_network",
            "127.0.0.0/8",
            "--timeout",
            "10",
            *flags,
        ]
    )


# Where pictures are named


TALK = [{"role": "assistant", "content": "That."}]
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
RECORDS = [
    *EXAMPLES,
    {"conversations": TURNS, "image": "a.png"},
    {"conversations": TURNS, "image": ["a.png", "b.png"]},
    {"conversations": TURNS, "images": ["a.png"]},
    {"image": "a.png", "captions": ["Text"]},
    {"image": {"bytes": None, "path": "a.png"}, "captions": ["Text"]},
    {"image": {"bytes": PNG, "path": "a.png"}, "captions": ["Text"]},
    {"image_list": ["a.png", PNG, {"bytes": PNG}], "instruction_list": [["x"], ["y"]]},
    {"file_name": "a.png", "text": "Text"},
    {"image": {"url": "http://a/b.png"}, "text": "Text"},
    {"input_images": ["a.png", {"bytes": PNG}], "instruction": "x", "output_image": "http://a/b.png"},
    {"query": "q", "response": "r", "images": ["a.png"]},
    {"instruction": "q", "output": "r", "image": "a.png"},
    {"conversations": [{"role": "assistant", "content": "<image>"}], "image": "a.png"},
    {
        "Question": "<image_start>[problem_image_1]<image_end>",
        "Text Reasoning Trace": "t",
        "Final Answer": "a",
        "problem_image_1": "a.png",
    },
    {"texts": ["a", None], "images": [None, "a.png"]},
    {"texts": [{"user": "q", "assistant": "r"}], "images": ["a.png"]},
    {"text_list": ["a"], "image_info": [{"raw_url": "http://a/b.png", "matched_text_index": 0}]},
    {
        "files": [
            {"id": "original_input_image", "url": "http://a/b.png"},
            {"id": "final_image", "url": "a.png"},
        ],
        "metadata_edit_turn_prompts": ["i"],
    },
]
ORIGIN = Origin(ROOT / "examples" / "sample_data_format.json")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: ",".join(record))
def test_every_picture_of_every_format_is_found(record):
    """Where fetch looks is where the format has its pictures; what it puts there is read as the picture."""
    record = copy.deepcopy(record)
    parsed, fields = parse_with_fields(record, ORIGIN, addresses=True)
    sources = [segment.source for segment in parsed.sample if isinstance(segment, Image)]
    found = list(places(record, parsed, fields))
    assert sources and len(found) == len(sources)
    for number, (place, source) in enumerate(zip(found, sources)):
        assert place.value == source or ORIGIN.file.parent / place.value == source
        place.holder[place.key] = f"new/{number}.png"
    sources = [s.source for s in parse_with_fields(record, ORIGIN)[0].sample if isinstance(s, Image)]
    assert sources == [ORIGIN.file.parent / f"new/{number}.png" for number in range(len(sources))]


def test_every_format_is_in_the_test_above():
    """A new format needs a record there."""
    assert {parse_with_fields(record, ORIGIN, addresses=True)[0].format for record in RECORDS} == set(FORMATS)


def found_in(record) -> list[tuple[str, object]]:
    parsed, fields = parse_with_fields(record, ORIGIN, addresses=True)
    return [(place.field, place.value) for place in places(record, parsed, fields)]


def test_the_other_ways_to_name_a_picture_are_found_and_texts_are_not():
    parts = [
        {"type": "image_url", "image_url": {"url": "1"}},
        {"type": "image", "image": "2"},
        {"type": "text", "text": "http://a/b"},
    ]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "http://a/b"}],
        "images": ["3", {"bytes": None, "path": "4"}, {"bytes": b"5", "path": "no"}, b"6"],
        "caption_url": "http://a/b",
        "metadata": {"image_path": "http://a/b", "images": ["http://a/b"]},
        "other": {"image_path": "http://a/b"},
    }
    assert found_in(record) == [
        ("images[0]", "3"),
        ("images[1]", "4"),
        ("images[2]", b"5"),
        ("images[3]", b"6"),
        ("messages[0].content[0].image_url.url", "1"),
        ("messages[0].content[1].image", "2"),
    ]


def test_pictures_in_json_stay_where_they_are():
    inside = base64.b64encode(PNG).decode()
    assert found_in({"image": f"data:image/png;base64,{inside}", "text": "Text"}) == []
    assert found_in({"image": {"bytes": inside}, "text": "Text"}) == []


def test_mapped_records_are_written_under_the_names_that_formats_know(server, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PNG)
    records = [
        {"u": server.url("/good.png"), "meta": '{"said": "Text"}'},
        {"u": "a.png", "meta": {"said": "Text"}},
    ]
    data = write(tmp_path / "in" / "d.jsonl", records)
    flags = ("--fields", "image=u", "text=meta.said", "--image_root", tmp_path / "pictures")
    assert run(data, tmp_path / "out", *map(str, flags)) == 0
    found = UnifiedGenerationDataset(tmp_path / "out" / "d.jsonl")
    assert (
        found.statistics()["formats"] == {"image_and_text": 2}
        and found.statistics()["distinct_pictures"] == 2
    )


def test_records_that_training_refuses_are_failures(server, tmp_path, capsys):
    bad = {"url": server.url("/good.png"), "caption": "Text"}
    assert run(write(tmp_path / "data.jsonl", [bad]), tmp_path / "out") == 1 and not server.asked
    assert "Train with" not in capsys.readouterr().out
    assert [(e["field"], e["reason"]) for e in lines(tmp_path / "out" / "failed.log")] == [
        ("image_path", "missing_field")
    ]
    assert run(write(tmp_path / "two.jsonl", [caption("/a.png"), bad]), tmp_path / "two") == 1
    assert "1 written, 1 with failures" in (told := capsys.readouterr().out) and "Train with" in told


# The whole way


def test_the_new_data_trains_and_means_the_same(server, tmp_path, capsys):
    """Every format with addresses, local paths beside them: the data set reads the same samples from the new
    file."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pictures").symlink_to(ROOT / "examples" / "pictures")
    records = json.loads(json.dumps(EXAMPLES))
    for number, record in enumerate(records):
        parsed, fields = parse_with_fields(record, ORIGIN)
        for place in list(places(record, parsed, fields))[:1]:
            place.holder[place.key] = server.url(f"/colour/{number}")
    records.append(caption("pictures/house_day.png", metadata={"source": "http://a/b"}))
    data = write(tmp_path / "data" / "train.jsonl", records)
    assert run(data, tmp_path / "new" / "out") == 0
    new = tmp_path / "new" / "out" / "train.jsonl"
    assert "127.0.0.1" not in new.read_text(encoding="utf-8") and lines(new)[-1]["metadata"] == {
        "source": "http://a/b"
    }
    found = UnifiedGenerationDataset(new)
    assert len(found) == len(records) and not found.bad
    plain = UnifiedGenerationDataset(ROOT / "examples" / "sample_data_format.json")
    for number, (record, old) in enumerate(zip(found, plain)):
        assert [type(piece) for piece in record.sample] == [type(piece) for piece in old.sample]
        assert [piece.target for piece in record.sample] == [piece.target for piece in old.sample]
        pictures = [piece.source for piece in record.sample if isinstance(piece, Image)]
        colours = [open_image(path).getpixel((0, 0)) for path in pictures]
        assert (number, 0, 77) in colours
        assert sum("/pictures/house" in str(path) for path in pictures) == len(pictures) - 1
    assert f"--train_data_path {new}" in capsys.readouterr().out
    stored = [path for path in (tmp_path / "new" / "out" / "pictures").rglob("*.*") if path.is_file()]
    assert len(stored) == len(EXAMPLES) == sum(server.asked.values())
    for path in stored:
        assert (
            path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
            and path.parent.name == path.stem[:2]
            and path.suffix == ".png"
        )


def test_failures_are_listed_and_their_records_left_out(server, tmp_path, capsys):
    urls = [server.url(path) for path in ("/good.png", "/404", "/page", "/bomb")]
    urls += ["http://user:secret@a.b/x.png", "http://10.0.0.1/x.png", "s3://b/x.png", "http:///x"]
    data = write(tmp_path / "data.jsonl", [caption(url) for url in urls])
    with data.open("a", encoding="utf-8") as file:
        file.write('{"caption": \n' + json.dumps({"images": [urls[0], urls[1]], "messages": TALK}) + "\n")
    out = tmp_path / "out"
    assert run(data, out) == 1
    assert [record["image_path"][:9] for record in lines(out / "data.jsonl")] == ["pictures/"]
    failed = lines(out / "failed.log")
    assert [(entry["line"], entry["field"], entry["reason"]) for entry in failed] == [
        (2, "image_path", "http_404"),
        (3, "image_path", "html"),
        (4, "image_path", "huge_picture"),
        (5, "image_path", "credentials"),
        (6, "image_path", "refused_address"),
        (7, "image_path", "bad_path"),
        (8, "image_path", "bad_address"),
        (9, "(record)", "bad_json"),
        (10, "images[1]", "http_404"),
    ]
    assert all(entry["file"] == str(data) and entry["problem"] and entry["cure"] for entry in failed)
    assert failed[0]["url"] == urls[1] and failed[3]["url"] == "http://***@a.b/x.png"
    told = capsys.readouterr().out
    assert "addresses  1 of 5 fetched" in told and "records    1 written, 9 with failures" in told
    assert f"{data}:2, image_path, {urls[1]}: the server answers 404" in told
    assert "secret" not in told and not any("secret" in path.read_text() for path in out.glob("*.jsonl"))
    assert {entry["status"] for entry in lines(out / "fetched.log")} == {
        "fetched",
        "http_404",
        "html",
        "huge_picture",
        "refused_address",
    }


def test_with_on_failure_error_no_data_is_written(server, tmp_path):
    data = write(tmp_path / "data.jsonl", [caption(server.url("/good.png")), caption(server.url("/404"))])
    assert run(data, tmp_path / "out", "--on_failure", "error") == 1
    assert not (tmp_path / "out" / "data.jsonl").exists() and len(lines(tmp_path / "out" / "failed.log")) == 1
    write(data, [caption(server.url("/good.png"))])
    assert (
        run(data, tmp_path / "out", "--on_failure", "error") == 0
        and lines(tmp_path / "out" / "failed.log") == []
    )


def test_each_picture_is_asked_for_once_whatever_its_spelling(server, tmp_path):
    host = f"127.0.0.1:{server.port}"
    urls = [f"http://{host}/good.png", f"HTTP://{host}/good.png#top", f"http://{host}/no-type"]
    data = write(tmp_path / "data.jsonl", [caption(url) for url in urls * 5])
    assert run(data, tmp_path / "out") == 0
    assert server.asked == {"/good.png": 1, "/no-type": 1}
    assert len({record["image_path"] for record in lines(tmp_path / "out" / "data.jsonl")}) == 1, (
        "one content, one file"
    )


def test_a_second_run_asks_only_for_what_is_missing_damaged_or_failed(server, tmp_path, capsys):
    urls = [server.url(f"/colour/{i}") for i in range(4)] + [server.url("/then-good/404/1")]
    data, out = write(tmp_path / "data.jsonl", [caption(url) for url in urls]), tmp_path / "out"
    assert run(data, out) == 1
    files = [out / record["image_path"] for record in lines(out / "data.jsonl")]
    server.asked.clear()
    server.asked["/then-good/404/1"] = 1
    assert run(data, out, "--no_retry_failed") == 1 and sum(server.asked.values()) == 1
    files[1].unlink()
    damaged = files[2].read_bytes()
    files[2].write_bytes(damaged[:-1] + b"x")
    with (out / "fetched.log").open("a") as log:
        log.write('{"url": "http://a.b/", "sta')  # a line that a killed run did not finish
    assert run(data, out) == 0
    assert server.asked == {"/colour/1": 1, "/colour/2": 1, "/then-good/404/1": 2}
    assert files[2].read_bytes() == damaged and "damaged    1 pictures" in capsys.readouterr().out
    assert len(lines(out / "data.jsonl")) == 5
    assert sorted((entry["url"], entry["status"]) for entry in lines(out / "fetched.log")) == sorted(
        (url, "fetched") for url in urls
    )


@pytest.mark.slow
def test_a_run_that_was_killed_is_continued(server, tmp_path):
    """kill -9 with five pictures there and others on their way: the next run asks for those that are missing
    alone."""
    urls = [server.url(f"/colour/{i}") for i in range(5)] + [server.url(f"/gated/{i}") for i in range(90, 95)]
    data, out = write(tmp_path / "data.jsonl", [caption(url) for url in urls]), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "unigen",
        "fetch",
        str(data),
        "--output_dir",
        str(out),
        "--allow_network",
        "127.0.0.0/8",
    ]
    process = subprocess.Popen([*command, "--connections_per_host", "2"], cwd=ROOT, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not ((out / "fetched.log").exists() and (out / "fetched.log").read_bytes().count(b"\n") == 5):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        with pytest.raises(UserError, match="another unigen fetch is writing there"):
            cli.load_name(cli.COMMANDS["fetch"].run)(FetchOptions([str(data)], str(out)))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert not (out / "data.jsonl").exists() and (out / ".new").exists()
    (out / ".new" / "half").write_bytes(PNG[:9])
    server.gate.set()
    server.asked.clear()
    assert run(data, out) == 0
    assert server.asked == {f"/gated/{i}": 1 for i in range(90, 95)}
    colours = [
        open_image(out / record["image_path"]).getpixel((0, 0))[0] for record in lines(out / "data.jsonl")
    ]
    assert colours == [0, 1, 2, 3, 4, *range(90, 95)]
    assert not (out / ".new").exists() and all(
        picture_kind(path.read_bytes(), deep=True) for path in out.glob("pictures/*/*")
    )


def test_a_full_disk_ends_the_run_with_its_cause(server, tmp_path, monkeypatch, capsys):
    def full(self, path, parts):
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, path, parts)

    save = PictureStore.save
    monkeypatch.setattr(PictureStore, "save", full)
    data = write(tmp_path / "data.jsonl", [caption(server.url(f"/colour/{i}")) for i in range(9)])
    assert run(data, tmp_path / "out") == 2 and "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(PictureStore, "save", save)
    assert run(data, tmp_path / "out") == 0


def test_one_host_gets_few_connections_and_all_hosts_their_turn(server, tmp_path):
    data = write(tmp_path / "data.jsonl", [caption(server.url(f"/resting/{i}")) for i in range(20)])
    assert run(data, tmp_path / "out", "--connections", "8", "--connections_per_host", "3") == 0
    assert 1 < server.most <= 3  # how many meet at once depends on the machine; never more than allowed
    turns = _Turns([f"http://{host}.test/{i}" for host in "ab" for i in range(3)], 2)
    taken = [turns.take() for _ in range(4)]
    assert [host for host, _ in taken] == ["a.test", "b.test", "a.test", "b.test"]
    turns.done("b.test")
    assert turns.take() == ("b.test", "http://b.test/2")
    turns.done("a.test")
    assert turns.take() == ("a.test", "http://a.test/2") and turns.take() is None


def test_deep_finds_what_the_header_does_not_show(server, tmp_path):
    data = write(tmp_path / "data.jsonl", [caption(server.url("/damaged"))])
    assert run(data, tmp_path / "a") == 0
    assert run(data, tmp_path / "b", "--deep") == 1
    assert [entry["reason"] for entry in lines(tmp_path / "b" / "failed.log")] == ["broken_picture"]


# Files


def test_packed_files_lists_and_tables_become_jsonl(server, tmp_path):
    folder, url = tmp_path / "data", server.url("/good.png")
    write(folder / "sub" / "a.jsonl", [caption(url)])
    (folder / "b.json").write_text(json.dumps([caption(url), caption("x\ny.png")], indent=1))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(caption(url)).encode()))
    rows = [
        {"image": {"bytes": picture("JPEG"), "path": "a.jpg"}, "captions": '{"a": "b"}'},
        {"image": {"bytes": b"GIF", "path": None}, "captions": "b"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    out = folder / "fetched"
    assert run(folder, out) == 1
    assert lines(out / "sub" / "a.jsonl")[0]["image_path"].startswith("../pictures/")
    first, second = (record["image_path"] for record in lines(out / "b.jsonl"))
    assert first.startswith("pictures/") and second == "../x\ny.png"
    assert [record["image_path"][:9] for record in lines(out / "c.jsonl")] == ["pictures/"]
    assert [(record["image"][-4:], record["captions"]) for record in lines(out / "d.jsonl")] == [
        (".jpg", '{"a": "b"}')
    ]
    assert [(entry["file"], entry["field"], entry["reason"]) for entry in lines(out / "failed.log")] == [
        (str(folder / "d.parquet"), "image", "not_a_picture")
    ]
    assert run(folder, out) == 1 and server.asked["/good.png"] == 1
    assert not (out / "fetched").exists(), "what an earlier run wrote is no source"


def test_records_without_pictures_keep_their_bytes(server, tmp_path):
    text = '{"text_prompt": "é \\u00e8",  "image_path": "/a/b.png", "x": 1e999, "y": 1.50}\n'
    data = tmp_path / "data.jsonl"
    data.write_text(
        text + f'{{"caption": "é", "x": "\\ud800", "image_path": "{server.url("/good.png")}"}}\n',
        encoding="utf-8",
    )
    assert run(data, tmp_path / "out") == 0
    first, second = (tmp_path / "out" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert first == text.strip() and json.loads(second)["x"] == "\ud800"


def test_a_record_that_is_not_to_be_learnt_is_no_failure(server, tmp_path):
    data = write(tmp_path / "data.jsonl", [caption("/a/b.png", weight=0), caption(server.url("/good.png"))])
    assert run(data, tmp_path / "out") == 0
    assert lines(tmp_path / "out" / "data.jsonl")[0] == caption("/a/b.png", weight=0)


def test_pictures_of_records_that_are_not_learnt_are_named_from_the_new_place(server, tmp_path):
    talk = [{"role": "user", "content": "<image> q"}, {"role": "assistant", "content": "a", "loss": 0}]
    gone = caption(server.url("/gone.png"), weight=0)
    unlearnt = [caption("b.png", weight=0), {"messages": talk, "images": ["b.png"]}, gone]
    unlearnt.append({"image_path": "b.png", "caption": "", "weight": 0})
    data = write(tmp_path / "old" / "data.jsonl", [*unlearnt, caption(server.url("/good.png"))])
    assert run(data, tmp_path / "out") == 0
    first, second, third, *_ = lines(tmp_path / "out" / "data.jsonl")
    assert (first["image_path"], second["images"], third) == ("../old/b.png", ["../old/b.png"], gone)


def test_what_nobody_could_train_on_is_not_blessed(tmp_path, capsys):
    for text, words in (
        (caption("/a/b.png", weight=0), "weight of 0 in all 1 records"),
        ("", "no record in"),
    ):
        data = tmp_path / "data.jsonl"
        data.write_text(text and json.dumps(text))
        assert run(data, tmp_path / "out") == 1
        said = capsys.readouterr().out
        assert words in said and "Train with" not in said


def test_files_that_training_would_leave_out_are_named(tmp_path, capsys):
    write(tmp_path / "in" / "a.jsonl", [caption("/a/b.png")])
    (tmp_path / "in" / "b.csv").write_text("image,text\na.png,A dot\n")
    assert run(tmp_path / "in", tmp_path / "in" / "out") == 0
    said = capsys.readouterr().out
    assert "left out: b.csv" in said and "fetched.log" not in said


def test_local_paths_stay_valid_through_links_and_odd_ones_are_failures(tmp_path):
    (tmp_path / "disk" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "deep" / "er")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "disk" / "deep")
    for path in ("data/a.png", "disk/b.png"):
        (tmp_path / path).write_bytes(PNG)
    paths = ["a.png", "./a.png", "../data/a.png", "link/../b.png", str(tmp_path / "data" / "a.png")]
    odd = ["", "a\0b", "x\ud800.png"]  # no paths at all
    data = write(tmp_path / "data" / "data.jsonl", [caption(path) for path in paths])
    with data.open("a") as file:
        file.writelines(json.dumps(caption(path)) + "\n" for path in odd)
    assert run(data, tmp_path / "out") == 1
    assert [e["field"] for e in lines(tmp_path / "out" / "failed.log")] == ["image_path"] * 3
    new = [record["image_path"] for record in lines(tmp_path / "out" / "data.jsonl")]
    for old, path in zip(paths, new):
        assert os.path.samefile(tmp_path / "data" / old, os.path.join(tmp_path / "out", path))
    assert len(new) == len(paths)


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ({}, ["nothing.jsonl"], "there is no such file"),
        ({"a.jsonl": "", "b/a.jsonl": ""}, ["a.jsonl", "b/a.jsonl"], "would be written for it and for"),
        ({"out/a.jsonl": ""}, ["out/a.jsonl"], "lies in the output folder"),
        ({"out/a.jsonl": ""}, ["out"], "lies in the output folder"),
        ({"out/a.jsonl": "", "a.jsonl": ""}, ["a.jsonl"], "holds a.jsonl, which unigen fetch did not write"),
        ({"a.json": '[{"a": 1}, {'}, ["a.json"], "bad_json"),
        ({"a.jsonl": ""}, ["a.jsonl", "--allow_network", "localnet"], "'localnet' is no network"),
        ({"a.jsonl": ""}, ["a.jsonl", "--timeout", "0"], "--timeout is 0"),
        ({"a.jsonl": ""}, ["a.jsonl", "--timeout", "1e9"], "--timeout is 1000000000.0"),
        ({"a.jsonl": ""}, ["a.jsonl", "--max_redirects", "-1"], "--max_redirects is -1"),
        ({"a.jsonl": "", "out": ""}, ["a.jsonl"], "cannot be written (it is no folder)"),
    ],
)
def test_what_cannot_run_ends_with_2_and_its_cause(files, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    assert cli.main(["fetch", *words, "--output_dir", "out"]) == 2
    assert message in capsys.readouterr().err


def test_training_refuses_addresses_and_names_the_command(tmp_path):
    data = write(tmp_path / "data.jsonl", [caption("http://example.org/x.png")])
    with pytest.raises(UserError, match="unigen fetch"):
        UnifiedGenerationDataset(data)


def test_the_output_folder_itself_is_training_data(tmp_path):
    """The lists that fetch keeps beside the records are not taken for records."""
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "data.jsonl").write_text(json.dumps({"image_path": "a.png", "caption": "A dot"}) + "\n")
    assert run(tmp_path / "data.jsonl", tmp_path / "out") == 0
    assert (tmp_path / "out" / "fetched.log").exists()
    assert len(UnifiedGenerationDataset(tmp_path / "out")) == 1


def test_a_failure_is_told_in_chinese(tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", [caption("http://127.0.0.1:9/a.png")])
    assert cli.main(["fetch", str(data), "--output_dir", str(tmp_path / "out"), "--language", "zh"]) == 1
    told = capsys.readouterr().out
    assert "环回地址。解决办法：" in told and "Fix" not in told and "http://127.0.0.1:9/a.png" in told
