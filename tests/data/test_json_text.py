"""What is wrong with JSON text is named as what it is."""

import json
from pathlib import Path

import pytest

from unigen.data.dataset import BadData, UnifiedGenerationDataset
from unigen.data.json_text import decode, parse_json, split_json
from unigen.sequence.types import BadRecord

RECORD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LINE = json.dumps(RECORD)


def problems(path: Path) -> list[BadRecord]:
    with pytest.raises(BadData) as caught:
        UnifiedGenerationDataset(path)
    return caught.value.records


@pytest.mark.parametrize(
    ("text", "code", "found", "fix"),
    [
        (json.dumps([RECORD] * 3, indent=1), "bad_json", "one JSON list", "name it .json"),
        (json.dumps([RECORD] * 3), "bad_json", "one JSON list", "name it .json"),
        (f"[{LINE},\n{LINE},\n{LINE}]\n", "bad_json", "one JSON list", "name it .json"),
        (f"{json.dumps(RECORD, indent=1)}\n" * 3, "bad_json", "several lines", "on one line"),
        (f"{LINE}\n".encode("utf-16"), "bad_utf8", "UTF-16", "iconv -f UTF-16"),
        pytest.param(f"{LINE}\n".encode("utf-16-le"), "bad_utf8", "UTF-16", "iconv -f UTF-16LE", id="le"),
        ("version https://git-lfs.github.com/spec/v1\noid x\n", "broken_file", "LFS pointer", "git lfs pull"),
        ("image,text\na.png,A disc\n", "bad_json", "'image,text'", "name it .csv"),
        (bytes(200), "broken_file", "zero bytes", "copy the file again"),
        (b"PAR1\x15\x04", "broken_file", "Parquet", "name it .parquet"),
        (b"\x1f\x8b\x08\x00", "broken_file", "gzip", "add .gz"),
        (b"PK\x03\x04\x14", "broken_file", "zip archive", "unpack it"),
        ("<!DOCTYPE html>\n<html>\n</html>\n", "broken_file", "web page", "download"),
    ],
)
def test_a_file_without_a_record_a_line_is_one_problem(tmp_path: Path, text, code, found, fix) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (problem,) = problems(path)
    assert (problem.code, problem.field) == (code, "(file)")
    assert found in problem.found and fix in problem.fix


def test_lines_that_only_look_alike_are_judged_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"[1]\n{LINE}\n[2]\n")
    assert [problem.code for problem in problems(path)] == ["not_an_object"] * 2
    path.write_text(f'{{"cut": \n{LINE}\n')
    assert [(problem.code, problem.origin.line) for problem in problems(path)] == [("bad_json", 1)]


def test_a_comma_at_the_end_of_a_line() -> None:
    with pytest.raises(BadRecord) as caught:
        parse_json(f"{LINE},".encode(), 3)
    assert "a comma after the record" in caught.value.found and "take it out" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("[1, 2,]", "a comma before the end", "take the comma out"),
        ('{"a": 1,}', "a comma before the end", "take the comma out"),
        ("{'a': 1}", "as Python prints it", "json.dumps"),
        ('{"a": True}', "as Python prints it", "json.dumps"),
        ("{“a”: 1}", "a curly quote", "in its place"),
        ("# made by hand", "a comment", "take it out"),
        ('{"a": 1}{"a": 2}', "another record on the same line", "new line"),
    ],
)
def test_slips_are_named(text: str, found: str, fix: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_json(text.encode())
    assert found in caught.value.found and fix in caught.value.fix and "line 1" in caught.value.found
    if text.startswith("["):
        assert found in split_json(text.encode())[1].found


def test_chinese_encodings_are_recognised() -> None:
    for data, fix in (("红色的房子".encode("gbk"), "GB18030"), (b"caf\xe9", "iconv -f ENCODING")):
        with pytest.raises(BadRecord) as caught:
            decode(data, 1)
        assert caught.value.code == "bad_utf8" and fix in caught.value.fix


def test_the_records_before_a_cut_are_counted() -> None:
    spans, broken = split_json(f"[{LINE}, {LINE}".encode())
    assert len(spans) == 2 and broken is not None and "after 2 records" in broken.found
    assert split_json(f"[{LINE}]".encode())[1] is None


def test_lines_in_a_json_file_and_utf16_are_named() -> None:
    _, error = split_json(b'{"a": 1}\n{"a": 2}\n')
    assert "name it .jsonl" in error.fix
    with pytest.raises(BadRecord, match="UTF-16"):
        decode("image,text".encode("utf-16"), 1)
