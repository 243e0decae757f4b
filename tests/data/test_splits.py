"""Folders with several splits, and with files that describe the data."""

import json
import shutil
from pathlib import Path

import pytest

from unigen.data.containers import BadData
from unigen.data.finding import find_files
from unigen.data.splits import LeftOut, is_side_file, of_splits, split_of


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({}))
    return path


def taken(path: Path, split="train") -> list[str]:
    return [name for _, name in find_files([path], split=split)]


def asked(path: Path, name: str) -> list[str]:
    return [found for _, found in find_files([path], asked=name)]


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
        ("evaluation/a.jsonl", "validation"),
        ("testdev.jsonl", "test"),
        ("评测/a.jsonl", "validation"),
        ("训练集.jsonl", "train"),
        ("数据_验证集.jsonl", "validation"),
        ("测试/a.jsonl", "test"),
        ("testA.jsonl", "test"),
        ("minival.jsonl", "validation"),
        ("holdout.jsonl", "test"),
        ("testABC.jsonl", None),
        ("tests.jsonl", None),
        ("testa.jsonl", None),
        ("latest.jsonl", None),
        ("trainer.jsonl", None),
        ("devices/validate.jsonl", None),
    ],
)
def test_splits_are_words_of_names(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


def test_splits_of_other_names_are_not_mixed(tmp_path: Path) -> None:
    chinese = folder(tmp_path / "zh", "训练集.jsonl", "验证集.jsonl", "测试集.jsonl")
    assert taken(chinese) == ["训练集.jsonl"] and taken(chinese, "validation") == ["验证集.jsonl"]
    assert asked(chinese, "测试集") == asked(chinese, "测试") == asked(chinese, "test") == ["测试集.jsonl"]
    other = folder(tmp_path / "en", "trainA.jsonl", "testA.jsonl", "test.jsonl", "heldout.jsonl")
    assert taken(other) == ["trainA.jsonl"] and asked(other, "heldout") == ["heldout.jsonl"]


FIXTURES = Path(__file__).parent / "fixtures"
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
        assert "NAME), or name the files" in str(caught.value)
    assert taken(tmp_path / "a" / "test.jsonl") == ["test.jsonl"]


def test_files_about_the_data_are_left_out_and_listed(tmp_path: Path) -> None:
    sides = [
        ".gitattributes", "README.md", "dataset_infos.json", "generation_config.json", "parquet_info/edit.json",
        "train_stats.json",
    ]  # fmt: skip
    folder(tmp_path, *sides, "a.jsonl", "pictures/a.png")
    left: list[LeftOut] = []
    assert [name for _, name in find_files([tmp_path], left_out=left)] == ["a.jsonl"]
    assert left == [LeftOut(tmp_path / name, "") for name in sides]
    assert not is_side_file(Path("infos.json"))
    assert taken(tmp_path / "dataset_infos.json") == ["dataset_infos.json"]  # who names it means it


def test_a_split_is_taken_by_its_name_and_an_unknown_one_named(tmp_path: Path) -> None:
    made = folder(tmp_path / "hub", *HF, *HELD)
    assert asked(made, "test") == [HELD[0]]
    assert asked(made, "val+test") == list(HELD)
    assert asked(folder(tmp_path / "lines", "train.jsonl", "more_sft.jsonl"), "more_sft") == [
        "more_sft.jsonl"
    ]
    assert asked(folder(tmp_path / "folders", "a/x.jsonl", "b/x.jsonl"), "b") == ["b/x.jsonl"]
    with pytest.raises(BadData, match="no split dpo; it has test, train, validation"):
        asked(made, "dpo")
    with pytest.raises(BadData, match="no split test; no file names one"):
        asked(folder(tmp_path / "plain", "a.jsonl"), "test")
    with pytest.raises(BadData, match="this is one file"):
        asked(made / HELD[0], "test")


def test_two_train_splits_are_not_one(tmp_path: Path) -> None:
    names = [f"data/{name}-00000-of-00001.parquet" for name in ("test_sft", "train_gen", "train_sft")]
    with pytest.raises(BadData, match=r"several train splits, train_gen and train_sft.*--split"):
        taken(folder(tmp_path, *names))
    assert asked(tmp_path, "train_sft") == [names[2]]
    folder(tmp_path, "data/train-00000-of-00001.parquet")
    assert taken(tmp_path) == ["data/train-00000-of-00001.parquet"]
    assert taken(folder(tmp_path / "one", names[0], names[2])) == [names[2]]


def test_saved_splits_are_told_by_their_names(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    for split in ("train", "test", "prompts"):
        shutil.copytree(FIXTURES / "saved_dict" / "train", saved / split)
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test", "prompts"]}')
    assert [Path(name).parent.name for name in taken(saved)] == ["train"]
    left: list[LeftOut] = []
    ((path, _),) = find_files([saved], left_out=left, asked="prompts")
    assert path.parent.name == "prompts" and {reason for _, reason in left} == {"train", "test"}
    assert "train/data-00000-of-00001.arrow (train)" in of_splits(left)
    with pytest.raises(BadData, match=r"no validation split.*--val_split"):
        taken(saved, "validation")
    with pytest.raises(BadData, match="no split x; it has prompts, test, train"):
        asked(saved, "x")
    shutil.rmtree(saved / "test")
    with pytest.raises(BadData, match=r"the split test.* is missing"):
        taken(saved)
