"""Files of strangers: what is opened, what is read, and what is said of the rest."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from unigen.foreign import (
    ForeignFileError,
    copy_file,
    known_mistake,
    open_file,
    parse_json,
    read_bytes,
    read_json,
    roots_of,
)
from unigen.schema import Items, Maybe, String, Table, whole


def code_of(path: Path, root: Path, limit: int = 1000) -> str:
    try:
        with open_file(path, [root], limit):
            return ""
    except ForeignFileError as error:
        assert "Fix: " in str(error) and str(path) in str(error)
        return error.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


def test_only_regular_files_inside_of_the_folder_are_opened(folder: Path, tmp_path: Path):
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("../secret")
    (folder / "in").symlink_to("a")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "huge").write_bytes(b"")
    os.truncate(folder / "huge", 1001)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        names = ("a", "in", "pipe", "socket", "sub", "zero", "out", "up", "dangling", "none", "huge")
        found = {name: code_of(folder / name, folder) for name in names}
    assert found == {
        "a": "", "in": "", "pipe": "not_a_file", "socket": "not_a_file", "sub": "not_a_file",
        "zero": "outside", "out": "outside", "up": "outside", "dangling": "missing", "none": "missing",
        "huge": "huge",
    }  # fmt: skip


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(folder)
    assert read_bytes(tmp_path / "link" / "a", roots_of(tmp_path / "link")) == b"inside"


def test_a_snapshot_of_a_hub_cache_may_link_to_its_blobs_and_nowhere_else(tmp_path: Path):
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(b"blob")
    (repository / "refs").write_bytes(b"no blob")
    for name, target in (("a", "../../blobs/1"), ("b", "../../refs"), ("c", "../../blobs/../refs")):
        (snapshot / name).symlink_to(target)
    roots = roots_of(snapshot)
    assert read_bytes(snapshot / "a", roots) == b"blob"
    for name in ("b", "c"):
        with pytest.raises(ForeignFileError, match="outside"):
            read_bytes(snapshot / name, roots)
    # elsewhere, a folder called blobs two levels up means nothing
    other = tmp_path / "x" / "model"
    other.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_bytes(b"blob")
    (other / "a").symlink_to("../../blobs/1")
    with pytest.raises(ForeignFileError, match="outside"):
        read_bytes(other / "a", roots_of(other))


def test_a_copy_follows_no_link_out(folder: Path, tmp_path: Path):
    copy_file(folder / "a", tmp_path / "copy", [folder])
    assert (tmp_path / "copy").read_bytes() == b"inside"
    (folder / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(ForeignFileError):
        copy_file(folder / "out", tmp_path / "leak", [folder])
    assert not (tmp_path / "leak").exists()


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<HTML lang=en>", "web page"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"PK\x03\x04", "pickled"),
        (b"\x80\x02}q\0", "pickle"),
        (b'{"a": 1}', None),
        (b"\x98\0\0\0\0\0\0\0{", None),
    ],
)
def test_what_commonly_stands_in_a_files_place_is_named(start: bytes, said: str | None):
    found = known_mistake(start)
    assert (found is None) if said is None else (found is not None and said in found[0])


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a": 1, "a": 2}', "[" * 65 + "]" * 65, '{"a":' * 100_000, b"\xff\xfe{", "1" * 5000],
    ids=range(7),
)
def test_no_json_or_too_deep(text: str | bytes):
    with pytest.raises(ValueError):
        parse_json(text)


SCHEMA = Table({"n": whole(1, 9)}, {"names": Maybe(Items(String(("a", "b")), 1))}, rest=None)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"n": 1, "other": [None]}, ""),
        ({"n": 1, "names": None}, ""),
        ([], "it holds a list, not a JSON object"),
        ({}, "n is missing"),
        ({"n": True}, "n is true; it must be a whole number from 1 to 9"),
        ({"n": 1.0}, "n is 1.0; it must be a whole number"),
        ({"n": 10**30}, "n is 10000"),
        ({"n": 1, "names": []}, "names has 0 items"),
        ({"n": 1, "names": ["a", "c"]}, r"names\[1\] is 'c'; it must be a or b"),
        ({"n": 1, "other": {"deep": [1, float("inf")]}}, r"other\.deep\[1\] is no finite number"),
    ],
)
def test_a_schema_names_file_and_key(folder: Path, value: Any, said: str):
    path = folder / "x.json"
    path.write_text(json.dumps(value))
    if not said:
        assert read_json(path, [folder], SCHEMA) == value
        return
    with pytest.raises(ForeignFileError, match=rf"x\.json: {said}.*Fix: "):
        read_json(path, [folder], SCHEMA)
