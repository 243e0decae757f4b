"""The files of a checkpoint that a run holds open: read whatever becomes of their names, never once
rewritten."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unigen.model.source import Source, SourceChanged
from unigen.model.storage import WEIGHTS, CheckpointFolderError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / WEIGHTS)
    return tmp_path


def reads_well(source: Source) -> bool:
    return all(torch.equal(source.read(name), value) for name, value in TENSORS.items())


def other(folder: Path) -> Path:
    save_file({name: value * 0 + 7 for name, value in TENSORS.items()}, folder / "other")
    return folder / "other"


@pytest.mark.parametrize("change", ["unlink", "replace", "rmtree", "rename"])
def test_names_may_come_and_go(folder: Path, change: str):
    source = Source(folder)
    assert source.moved() == [] and source.rewritten() == []
    if change == "unlink":
        (folder / WEIGHTS).unlink()
    elif change == "replace":
        os.replace(other(folder), folder / WEIGHTS)
    elif change == "rmtree":
        shutil.rmtree(folder)
    else:
        folder.rename(folder.with_name(f"{folder.name}-elsewhere"))
    assert source.moved() == [WEIGHTS] and source.rewritten() == []
    assert reads_well(source)
    source.close()


@pytest.mark.parametrize("keeps_time", [False, True])
@pytest.mark.parametrize("change", ["truncate", "copy", "append"])
def test_what_is_rewritten_in_place_is_known(folder: Path, change: str, keeps_time: bool):
    source, path = Source(folder), folder / WEIGHTS
    before = path.stat()
    if change == "truncate":
        os.truncate(path, 100)
    elif change == "copy":  # the same inode and size, other values
        path.write_bytes(other(folder).read_bytes())
    else:
        with open(path, "ab") as file:
            file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (not keeps_time)))
    assert source.rewritten() == [WEIGHTS]
    if not keeps_time and change != "truncate":
        with pytest.raises(SourceChanged):
            source.read("a")
    source.close()


def test_weights_of_two_moments_are_refused(folder: Path):
    source = Source(folder)
    source.settle()
    os.replace(other(folder), folder / WEIGHTS)
    with pytest.raises(SourceChanged, match="Fix:"):
        source.settle()


def test_a_folder_without_weights_is_named(tmp_path: Path):
    with pytest.raises(CheckpointFolderError):
        Source(tmp_path)


def test_a_set_of_several_files(tmp_path: Path, folder: Path):
    import json

    os.replace(folder / WEIGHTS, folder / "ema-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(TENSORS, "ema-00001-of-00001.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    source = Source(folder)
    assert source.files_of("a") == {"ema-00001-of-00001.safetensors"}
    shutil.rmtree(folder)
    assert reads_well(source)
