"""A flood of bad records: each is read, or refused with what, where, why and the fix; and its neighbours
stay as they are.

The cases are generated, by hypothesis with a fixed seed or one by one; each test counts its own and fails
when there were fewer than CASES says. Every case is read through the data set, from a file whose first and
last line are sound.
"""

import copy
import json
import os
import stat
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cases import run
from hypothesis import strategies as st
from PIL import Image

from unigen.data.dataset import BadData, UnifiedGenerationDataset
from unigen.sequence.types import BadRecord, Record, Text
from unigen.sequence.types import Image as Picture

CASES = {"bytes": 1024, "text": 400, "values": 300, "fields": 900, "specials": 50, "files": 300, "paths": 90}
SECONDS = 60.0  # for one case: only a hang takes longer
CONTROL = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n"}

TALK = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "sound"}]}
GOOD = json.dumps(TALK).encode()
TEMPLATES: dict[str, dict] = {
    "conversation": {
        "conversations": [
            {"role": "user", "type": "image", "image_path": "a.png"},
            {"role": "assistant", "type": "text", "content": "an answer", "target": True},
        ],
        "metadata": {"id": 1},
    },
    "direct": {
        "input_sequence": [{"type": "text", "content": "q"}, {"type": "image", "image_path": "a.png"}],
        "target_sequence": [{"type": "text", "content": "an answer"}],
    },
    "text_to_image": {"text_prompt": "a cat", "image_path": "a.png"},
    "image_to_text": {"image_path": "a.png", "caption": "a cat"},
    "editing": {
        "input_image": "a.png",
        "editing_steps": [{"step": 1, "instruction": "more", "result_image": "a.png"}],
    },
    "interleaved": {
        "sequence": [
            {"type": "text", "content": "t"},
            {"type": "image", "image_path": "a.png", "target": True},
        ]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": "<image> what?"},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "t"},
                ],
            },
            {"role": "assistant", "content": "a cat"},
        ],
        "images": ["a.png"],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}],
        "image": "a.png",
    },
    "captioned": {"image": "a.png", "captions": {"short": "a cat", "long": "a large cat"}},
    "edit_list": {"image_list": ["a.png", "a.png"], "instruction_list": [["more", "larger"]]},
}
WEIRD = [
    None, True, False, 0, -1, 1.5, 10**400, 1e308, "", " ", "x", "<image>", "<image>" * 50, "user", "image",
    "\0", "a\0b", "\ud800",
    "\udfff\ud800", "\u202e\u200b\ufeff", "\x1b[2J", "\x9b2J\x7f", "../a.png", "/dev/zero", "/dev/stdin",
    "/proc/self/environ", "pipe",
    ".", "a.png/", "http://x.y/a.png", "data:image/png;base64,AA", "file:///etc/passwd", "a" * 5000,
    [], {}, [[]], [None], [{}], {"": ""}, {"\x1b[2J": 1}, [[[["x"]]]], {"type": "text"},
    {"bytes": "x", "path": "a.png"}, ["a.png"], {"role": "assistant", "content": "x"}, [1, "x", None, {}],
]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def check_refusal(error: BadRecord, path: Path, lines: range | None = None) -> None:
    assert error.code.isidentifier() and error.field and error.found and error.expected and error.fix, (
        error.to_dict()
    )
    assert error.origin is not None and error.origin.file == path
    assert lines is None or error.origin.line in lines, f"{error.origin} is not in {lines}"
    message = str(error)
    assert message.startswith(f"{error.origin}: {error.code} in field '")
    assert message.encode() and json.dumps(error.to_dict()).encode()
    assert not CONTROL & set(message), f"a terminal would obey {message!r}"
    assert len(message) < 1500 + 4 * len(str(path)), f"{len(message)} characters"


def check_record(record: Record) -> None:
    assert record.sample and any(piece.target for piece in record.sample)
    for piece in record.sample:
        assert isinstance(piece, Text | Picture)
        if isinstance(piece, Text):
            assert all(
                isinstance(text, str) and text.encode() is not None for text in (piece.text, *piece.others)
            )
            assert piece.text or not piece.target
        else:
            assert Path(str(piece.source)).is_file()
    json.dumps(record.metadata)


def judge(place: Path, line: bytes) -> str:
    """``read``, the code of the refusal, or ``empty``, for the second line (or the lines that are in it) of a
    file of three or more."""
    path, inner = (
        place / "data.jsonl",
        [part for part in line.split(b"\n") if part.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r")],
    )
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = UnifiedGenerationDataset(
            path, on_bad_record="skip", max_bad_share=1.0, check_pictures="headers"
        )
        records = list(dataset)
    assert time.perf_counter() - start < SECONDS
    unlearnt = sum(dataset.statistics()["unlearnt"].values())  # left out, as the record says so itself
    assert len(records) + len(dataset.bad) + unlearnt == 2 + len(inner)
    last = line.count(b"\n") + 3
    assert [records[0].sample[1].text, records[-1].sample[1].text] == ["sound", "sound"], (
        "a neighbour was changed"
    )
    assert [records[0].origin.line, records[-1].origin.line] == [1, last]
    for error in dataset.bad:
        check_refusal(error, path, range(2, last))
    for record in records[1:-1]:
        check_record(record)
    if dataset.bad:
        with pytest.raises(BadData) as strict:
            UnifiedGenerationDataset(path, check_pictures="headers")
        assert [str(error) for error in strict.value.records] == [str(error) for error in dataset.bad]
        assert str(dataset.bad[0]) in str(strict.value)
    return dataset.bad[0].code if dataset.bad else "unlearnt" if unlearnt else "read" if inner else "empty"


def dumped(value: object) -> bytes:
    """As JSON in UTF-8; lone surrogates as escapes, as a file can hold them."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def test_the_templates_are_sound(place: Path) -> None:
    for name, record in TEMPLATES.items():
        assert judge(place, dumped(record)) == "read", name


# ---- bytes


@pytest.mark.slow
def test_every_byte_at_every_kind_of_place(place: Path) -> None:
    """Inside a text, between two fields, in a field's name, and alone on its line."""
    around = [
        (b'{"text_prompt": "a', b'cat", "image_path": "a.png"}'),
        (b'{"text_prompt": "a"', b', "image_path": "a.png"}'),
    ]
    around += [(b'{"text_pr', b'ompt": "a", "image_path": "a.png"}'), (b"", b"")]
    verdicts = {
        (byte, i): judge(place, a + bytes([byte]) + b)
        for byte in range(256)
        for i, (a, b) in enumerate(around)
    }
    assert len(verdicts) >= CASES["bytes"]
    for byte in range(256):
        inside = (
            {"read"}
            if 32 <= byte < 128 and byte not in b'"\\'
            else {"bad_utf8"}
            if byte > 127
            else {"bad_json"}
        )
        assert verdicts[byte, 0] in inside, f"byte {byte} in a text"
        assert verdicts[byte, 1] in ({"read"} if byte in b" \t\r" else {"bad_json", "bad_utf8"}), (
            f"byte {byte} between fields"
        )
        assert verdicts[byte, 2] != "read", f"byte {byte} in a name"
        assert (verdicts[byte, 3] == "empty") == (byte in b" \t\r\n"), f"byte {byte} alone"


def damaged(data: bytes, how: str, at: float, seed: int) -> bytes:
    rng, a, out = np.random.default_rng(seed), int(at * len(data)), bytearray(data)
    if how == "cut":
        return data[:a]
    if how == "flip":
        for place in rng.integers(0, len(out), 1 + seed % 4):
            out[place] ^= 1 << rng.integers(0, 8)
    elif how == "insert":
        out[a:a] = rng.bytes(1 + seed % 20)
    elif how == "delete":
        del out[a : a + 1 + seed % 20]
    elif how == "double":
        out = bytearray(data + (b"", b" ", b",", b"\n", b"\xef\xbb\xbf")[seed % 5] + data)
    elif how == "noise":
        return rng.bytes(1 + seed % 200)
    elif how == "brackets":
        out[a:a] = bytes(rng.choice(list(b'{}[]",:\\'), 1 + seed % 6).tolist())
    return bytes(out)


@pytest.mark.slow
def test_damaged_lines(place: Path) -> None:
    lines = [dumped(record) for record in TEMPLATES.values()]
    hows = ["cut", "flip", "insert", "delete", "double", "noise", "brackets"]
    drawn = st.tuples(
        st.sampled_from(lines),
        st.sampled_from(hows),
        st.floats(0, 1, exclude_max=True, width=32),
        st.integers(0, 999),
    )
    total = run(CASES["text"], drawn, lambda case: judge(place, damaged(*case)))
    assert total["bad_json"] > 100 and total["bad_utf8"] > 20 and total["read"] > 5, total


# ---- values

WORDS = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "image_path",
        "conversations",
        "messages",
        "images",
        "sequence",
        "caption",
        "x",
        "",
        "é",
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["text", "image", "user", "a.png"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
def test_random_values(place: Path) -> None:
    """Any JSON at all, NaN and infinities among it."""
    codes = run(CASES["values"], VALUES, lambda value: judge(place, dumped(value)))
    assert len(codes) >= 4, codes


def nodes(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


def with_value(record: dict, path: tuple, value: object) -> dict:
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_odd_value_in_every_field(place: Path, name: str) -> None:
    """A refusal names the field itself, one around it or one inside it, or another that the odd value
    contradicts."""
    codes, record = Counter(), TEMPLATES[name]
    for path in nodes(record):
        if path[:1] == ("metadata",) and len(path) > 1:
            continue
        for value in WEIRD:
            codes[judge(place, dumped(with_value(record, path, value)))] += 1
    assert codes.total() >= CASES["fields"] // len(TEMPLATES), codes
    assert codes["read"] < codes.total() / 2 and len(codes) >= 4, codes


def deep(text: bytes, close: bytes) -> list[bytes]:
    return [
        text * depth + (close * depth if closed else b"")
        for depth in (100, 1000, 100_000)
        for closed in (True, False)
    ]


@pytest.mark.slow
def test_special_lines(place: Path) -> None:
    start, end = b'{"text_prompt": "a", "image_path": "a.png", "metadata": {"x": ', b"}}"
    numbers = [
        b"1" * 5000,
        b"-" + b"9" * 4301,
        b"1e999",
        b"1e-999",
        b"0." + b"3" * 9999,
        b"-0",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"01",
    ]
    numbers += [
        b"+1",
        b".5",
        b"0x10",
        b"1_000",
        b"\xef\xbc\x91",
        b"1e",
        b"--1",
        b"nan",
        b"tru",
        b"None",
        b"undefined",
        b"'x'",
    ]
    strings = [
        rb'"\ud800"',
        rb'"\udc00\ud800"',
        rb'"\ud83d\ude00"',
        rb'"\u0000"',
        rb'"\x41"',
        rb'"\u12"',
        b'"\xed\xa0\x80"',
        b'"\xc0\x80"',
    ]
    strings += [
        b'"\xf5\x80\x80\x80"',
        b'"\xff\xfe"',
        '"\u2028\u2029\u0085"'.encode(),
        b'"\t"',
        b'"\x7f"',
        b'"' + b"a" * 1_000_000 + b'"',
    ]
    lines = [start + value + end for value in numbers + strings + deep(b"[", b"]") + deep(b'{"a":', b"}")]
    lines += [
        b"[]",
        b"{}",
        b'""',
        b"0",
        b"null",
        b"//x",
        b"# x",
        b"\0",
        b"\0" * 1000,
        b"\xef\xbb\xbf",
        b"\xef\xbb\xbf" + GOOD,
        GOOD + GOOD,
    ]
    lines += [
        b'{"caption": "a", "caption": "b", "image_path": "a.png"}',
        b'{"conversations": [{"role": "user", "role": "user"}]}',
    ]
    lines += [
        GOOD.decode().encode("utf-16"),
        GOOD.decode().encode("utf-16-le"),
        GOOD.decode().encode("utf-32"),
        b"\x1f\x8b" + bytes(50),
    ]
    lines += [
        b"PAR1" + bytes(50),
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b'{"a":' * 50 + b"\n" * 50,
        b"\x85",
        b"\x0b",
        b"\x0c",
        b"\xc2\xa0",
        b"[" + GOOD + b"]",
    ]
    assert len(lines) >= CASES["specials"]
    codes = [judge(place, line) for line in lines]
    for bad in (b"NaN", b"Infinity", b"-Infinity", b"01", b"1" * 5000, b"\xef\xbc\x91"):
        assert codes[numbers.index(bad)] == "bad_json", bad
    assert (
        codes[lines.index(b"\xef\xbb\xbf" + GOOD)] == "read" and codes[lines.index(GOOD + GOOD)] == "bad_json"
    )
    assert codes[lines.index(b'{"caption": "a", "caption": "b", "image_path": "a.png"}')] == "duplicate_key"


# ---- whole files


def judge_file(place: Path, data: bytes) -> str:
    path = place / "data.json"
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        dataset = UnifiedGenerationDataset(
            path, on_bad_record="skip", max_bad_share=1.0, check_pictures="headers"
        )
    except BadData as error:
        assert str(path) in str(error) and str(error).endswith(".") and not CONTROL & set(str(error))
        for record in error.records:
            check_refusal(record, path)
        return error.records[0].code if error.records else "empty"
    finally:
        assert time.perf_counter() - start < SECONDS
    for error in dataset.bad:
        check_refusal(error, path)
    for record in dataset:
        check_record(record)
    return "read"


@pytest.mark.slow
def test_damaged_json_files(place: Path) -> None:
    records = list(TEMPLATES.values())
    files = [
        json.dumps(records).encode(),
        json.dumps(records, indent=2).encode(),
        json.dumps(records[0]).encode(),
    ]
    hows = ["cut", "flip", "insert", "delete", "double", "noise", "brackets"]
    drawn = st.tuples(
        st.sampled_from(files),
        st.sampled_from(hows),
        st.floats(0, 1, exclude_max=True, width=32),
        st.integers(0, 999),
    )
    total = run(CASES["files"], drawn, lambda case: judge_file(place, damaged(*case)))
    assert total["bad_json"] > 100 and total["read"] > 10, total


# ---- paths

_opened: list[str] | None = None
LOOK = getattr(os, "O_PATH", 0)


def _hook(event: str, arguments: tuple) -> None:
    if (
        event == "open"
        and _opened is not None
        and not (isinstance(arguments[2], int) and arguments[2] & LOOK)
    ):
        path = arguments[0] if isinstance(arguments[0], str | bytes) else f"/proc/self/fd/{arguments[0]}"
        _opened.append(os.path.realpath(os.fsdecode(path)))


sys.addaudithook(_hook)


@pytest.mark.skipif(not LOOK, reason="the paths of this test exist on Linux")
@pytest.mark.parametrize("confined", [False, True])
def test_tricks_with_paths_in_records(place: Path, confined: bool) -> None:
    """With ``data_root`` no file outside of it is opened but the records' own; without it nothing that is no
    ordinary file."""
    global _opened
    root, outside = place / "data", place / "data2"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    for folder in (root, root / "sub", outside):
        (folder / "a.png").write_bytes((place / "a.png").read_bytes())
    links = {
        "out": "../data2/a.png",
        "folder": "../data2",
        "top": "/",
        "zero": "/dev/zero",
        "magic": "/proc/self/root",
        "loop": "loop",
        "in": "a.png",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    inside = [
        "a.png",
        "./a.png",
        "sub/a.png",
        "sub/../a.png",
        "in",
        f"{root}/a.png",
        f"top{root}/a.png",
        "../data/a.png",
        "folder/../data/a.png",
        "a.png/",  # a slash at the end of a path goes when the folder is put before it
    ]
    escapes = [
        "../a.png",
        "../data2/a.png",
        "out",
        "folder/a.png",
        f"{outside}/a.png",
        f"top{outside}/a.png",
        "sub/../../data2/a.png",
    ]
    never = [
        "pipe",
        "zero",
        "/dev/zero",
        "/dev/stdin",
        "/dev/fd/0",
        "/proc/self/environ",
        "/proc/self/fd/0",
        "/proc/version",
        "top/dev/zero",
    ]
    never += [
        "sub",
        ".",
        "..",
        "/",
        f"magic{root}/a.png",
        f"/proc/self/root{root}/a.png",
        "loop",
        "none.png",
        "a.png/../a.png",
    ]
    never += [
        "a.png\0",
        "\0",
        "\ud800",
        "",
        "a.png\0../../data2/a.png",
        "．．/data2/a.png",
        "..\\data2\\a.png",
        "%2e%2e/data2/a.png",
        "a" * 300,
    ]
    never += ["http://127.0.0.1/a.png", "file:///dev/zero", "data:,a", "a\n.png", "\x1b]0;a\x07"]
    (root / "data.jsonl").write_bytes(
        b"\n".join(dumped({"image_path": path, "caption": "c"}) for path in inside + escapes + never)
    )
    assert 2 * len(inside + escapes + never) >= CASES["paths"]
    options = {"data_root": root} if confined else {}
    _opened = opened = []
    try:
        dataset = UnifiedGenerationDataset(
            root / "data.jsonl", on_bad_record="skip", max_bad_share=1.0, check_pictures="full", **options
        )
    finally:
        _opened = None
    read = len(inside) + (0 if confined else len(escapes))
    assert [record.origin.line for record in dataset] == list(range(1, read + 1))
    refused = {error.origin.line: error for error in dataset.bad}
    assert len(refused) == len(inside + escapes + never) - read
    for error in refused.values():
        check_refusal(error, root / "data.jsonl")
    if confined:
        assert {refused[len(inside) + 1 + i].code for i in range(len(escapes))} == {"outside_root"}
    system = {"/proc/self/mountinfo", os.path.realpath("/proc/self/mountinfo")}
    for path in set(opened) - system:
        assert stat.S_ISREG(os.stat(path).st_mode) and not path.startswith(("/dev/", "/proc/")), (
            f"{path} was opened"
        )
        assert not confined or path.startswith(f"{root}/"), f"{path} was opened"
    assert f"{root}/a.png" in opened, "the hook sees nothing"


def test_there_are_as_many_cases_as_were_promised() -> None:
    assert sum(CASES.values()) >= 3000
