"""Folders with several splits, and with files that describe the data."""

import json
from pathlib import Path

import pytest

from unigen.data.containers import BadData
from unigen.data.finding import find_files
from unigen.data.splits import LeftOut, is_side_file, split_of


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({}))
    return path


def taken(path: Path, split="train") -> list[str]:
    return [name for _, name in find_files([path], split=split)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("my_val.json", "validation"),
        ("val2017.jsonl", "validation"),
        ("dev/a.jsonl", "validation"),
        ("train/val_captions.jsonl", "validation"),
        ("Test.jsonl", "test"),
        ("training_a.jsonl.gz", "train"),
        ("a.jsonl", None),
        ("latest.jsonl", None),
        ("trainer.jsonl", None),
        ("devices/validate.jsonl", None),
    ],
)
def test_splits_are_words_of_names(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


HF = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
HELD = ("data/test-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet")


def test_each_takes_its_own_split_and_says_what_it_leaves(tmp_path: Path) -> None:
    folder(tmp_path, *HF, *HELD)
    assert taken(tmp_path) == list(HF)
    assert taken(tmp_path, "validation") == [HELD[1]]
    assert taken(tmp_path, None) == sorted([*HF, *HELD])
    left: list[LeftOut] = []
    find_files([tmp_path], left_out=left)
    assert left == [LeftOut(tmp_path / HELD[0], "test"), LeftOut(tmp_path / HELD[1], "validation")]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (("val/a.jsonl", "val/b.jsonl"), "train", ["val/a.jsonl", "val/b.jsonl"]),  # one split: it is meant
        (("a.jsonl", "train.jsonl"), "train", ["a.jsonl", "train.jsonl"]),
        (("a.jsonl", "val.jsonl"), "train", ["a.jsonl"]),
        (("a.jsonl", "train.jsonl", "val.jsonl"), "train", ["train.jsonl"]),
        (("a.jsonl", "train.jsonl", "val.jsonl"), "validation", ["val.jsonl"]),
        (("a.jsonl", "val.jsonl"), "validation", ["val.jsonl"]),
    ],
)
def test_files_that_name_no_split(tmp_path: Path, names, split, expected) -> None:
    assert taken(folder(tmp_path, *names), split) == expected


def test_a_split_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    folder(tmp_path / "a", "val.jsonl", "test.jsonl")
    folder(tmp_path / "b", "train.jsonl", "test.jsonl")
    folder(tmp_path / "c", "train.jsonl", "a.jsonl")
    for path, split in (("a", "train"), ("b", "validation"), ("c", "validation")):
        path = tmp_path / path
        with pytest.raises(BadData, match=f"no {split} split") as caught:
            taken(path, split)
        assert "Fix: name the files" in str(caught.value)
    assert taken(tmp_path / "a" / "test.jsonl") == ["test.jsonl"]


def test_files_about_the_data_are_left_out_and_listed(tmp_path: Path) -> None:
    sides = [".gitattributes", "README.md", "dataset_infos.json", "parquet_info/edit.json"]
    folder(tmp_path, *sides, "a.jsonl", "pictures/a.png")
    left: list[LeftOut] = []
    assert [name for _, name in find_files([tmp_path], left_out=left)] == ["a.jsonl"]
    assert left == [LeftOut(tmp_path / name, "") for name in sides]
    assert not is_side_file(Path("infos.json"))
    assert taken(tmp_path / "dataset_infos.json") == ["dataset_infos.json"]  # who names it means it
