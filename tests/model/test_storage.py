"""safetensors files and sets of them: any run of elements is read, whatever file it lies in; what makes no
sense is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unigen.model import storage
from unigen.model.storage import (
    DTYPES,
    CheckpointFolderError,
    Stored,
    code_of,
    scan_folder,
    scan_safetensors,
    scan_set,
    write_safetensors,
)

TORCH_DTYPES = [getattr(torch, name) for name, _ in DTYPES.values()]


def sample(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    bits = torch.randint(
        0, 256, (torch.Size(shape).numel() * dtype.itemsize,), generator=torch.Generator().manual_seed(seed)
    )
    return (bits % 2 if dtype == torch.bool else bits).to(torch.uint8).view(dtype).view(shape)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    return write_safetensors(
        path, {name: (t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
    )


def write_pieces(
    folder: Path, tensors: dict[str, Tensor], cuts: dict[str, list[int]], files: int = 2
) -> Path:
    """Every tensor in as many parts as its cuts make, the parts dealt to files in turn; the index."""
    held: list[dict[str, Tensor]] = [{} for _ in range(files)]
    pieces: dict[str, Any] = {}
    for name, tensor in tensors.items():
        ends, parts = [0, *sorted(cuts[name]), tensor.numel()], []
        for number, (start, stop) in enumerate(pairwise(ends)):
            held[number][name] = tensor.reshape(-1)[start:stop]
            parts.append([f"w-{number}.safetensors", start, stop])
        pieces[name] = {"dtype": code_of(tensor.dtype), "shape": list(tensor.shape), "parts": parts}
    for number, part in enumerate(held):
        write(folder / f"w-{number}.safetensors", part)
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {}, "pieces": pieces}))
    return index


# ---- reading


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_run_of_elements_is_read_however_the_tensor_is_cut(data: st.DataObject):
    """Every dtype, any shape, any cut into up to four parts over as many files, also empty ones; any range,
    any target."""
    dtype = data.draw(st.sampled_from(TORCH_DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    whole = sample(dtype, shape, data.draw(st.integers(0, 99)))
    n = whole.numel()
    cuts = data.draw(st.lists(st.integers(0, n), max_size=3))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        write_pieces(Path(folder), {"w": whole, "other": torch.arange(3)}, {"w": cuts, "other": []}, files=4)
        found = scan_set(Path(folder), "w.safetensors")
        assert found is not None and found.keys() == {"w", "other"}
        stored = found["w"]
        assert (stored.dtype, stored.shape, stored.numel, stored.nbytes) == (
            dtype,
            shape,
            n,
            n * dtype.itemsize,
        )
        assert stored.read().shape == shape and raw(stored.read()) == raw(whole)
        flat = whole.reshape(-1)[start:stop]
        assert stored.read(start, stop).shape == (stop - start,) and raw(stored.read(start, stop)) == raw(
            flat
        )
        assert raw(stored.read(start)) == raw(whole.reshape(-1)[start:])
        out = torch.zeros(stop - start, dtype=dtype)
        stored.read_into(out, start)
        assert raw(out) == raw(flat)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_reading_into_another_dtype_or_layout_goes_by_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
):
    """Never more than a chunk in memory beside the target, and nothing around the target is touched."""
    monkeypatch.setattr(storage, "CHUNK", chunk)
    whole = torch.randn(6, 5)
    write_pieces(tmp_path, {"w": whole}, {"w": [4]})
    stored = (scan_set(tmp_path, "w.safetensors") or {})["w"]
    read, sizes = Stored.read, []
    monkeypatch.setattr(
        Stored, "read", lambda self, start=0, stop=None: sizes.append(stop - start) or read(self, start, stop)
    )
    around = torch.full((2 * 23 + 2,), -1.0, dtype=dtype)
    stored.read_into(around[1:-1:2], 3)
    assert torch.equal(around[1:-1:2], whole.view(-1)[3:26].to(dtype)) and around[::2].eq(-1).all()
    assert max(sizes) <= chunk and sum(sizes) == 23
    flat = torch.full((25,), -1.0, dtype=dtype)
    stored.read_into(flat[1:-1], 3)
    assert torch.equal(flat[1:-1], whole.view(-1)[3:26].to(dtype)) and flat[0] == flat[-1] == -1


def test_what_is_read_is_memory_of_its_own_and_a_parameter_can_be_the_target(tmp_path: Path):
    write(tmp_path / "a.safetensors", {"w": torch.arange(4.0)})
    stored = scan_safetensors(tmp_path / "a.safetensors")["w"]
    stored.read().fill_(9)
    assert stored.read().tolist() == [0, 1, 2, 3]
    p = torch.nn.Parameter(torch.zeros(2, 2))
    stored.read_into(p.detach().view(-1))
    assert p.tolist() == [[0, 1], [2, 3]]


def test_a_range_outside_of_the_tensor_is_a_programmers_error(tmp_path: Path):
    """Memory that nobody filled would look like numbers."""
    write(tmp_path / "a.safetensors", {"w": torch.arange(4.0)})
    stored = scan_safetensors(tmp_path / "a.safetensors")["w"]
    for use in (
        lambda: stored.read(0, 5),
        lambda: stored.read(-1, 2),
        lambda: stored.read_into(torch.zeros(3), 2),
    ):
        with pytest.raises(AssertionError):
            use()


def test_a_file_that_is_cut_short_after_it_was_scanned_is_noticed(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.arange(100.0)})
    stored = scan_safetensors(path)["w"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointFolderError, match=r"a\.safetensors ends too early.*Fix"):
        stored.read()


# ---- files that make no sense


@pytest.mark.slow
def test_every_cut_and_every_flipped_bit_of_a_header_is_refused_or_read_within_the_file(tmp_path: Path):
    """Never another error than the documented one, never a byte from outside of the data."""
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bool)})
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointFolderError, match=r"a\.safetensors"):
            scan_safetensors(path)
    for bit in range(8 * head):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = scan_safetensors(path)
        except CheckpointFolderError:
            continue
        for name, stored in found.items():
            (part,) = stored.parts
            assert (
                head - 64 <= part.offset <= part.offset + stored.nbytes <= len(whole) and stored.numel >= 0
            ), name
            stored.read()


def as_header(header: Any, data: bytes = bytes(64)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "header",
    [
        [],
        "w",
        {"w": None},
        {"w": {"dtype": "F32", "shape": [2]}},
        {"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"w": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [60, 68]}},
        {"w": {"dtype": "F32", "shape": [2.5], "data_offsets": [0, 10]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": "08"}},
        {"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
    ],
    ids=str,
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: Any):
    path = tmp_path / "a.safetensors"
    path.write_bytes(as_header(header))
    with pytest.raises(CheckpointFolderError, match=r"a\.safetensors"):
        scan_safetensors(path)


def test_a_folder_in_place_of_a_file_is_told(tmp_path: Path):
    (tmp_path / "ema.safetensors").mkdir()
    with pytest.raises(CheckpointFolderError, match=r"ema\.safetensors.*Fix"):
        scan_folder(tmp_path)


# ---- sets


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Ten elements in two pieces, and ``whole`` in the second file."""
    index = write_pieces(
        tmp_path, {"w": torch.arange(10.0).view(2, 5), "whole": torch.ones(3)}, {"w": [4], "whole": []}
    )
    described = json.loads(index.read_text())
    described["weight_map"]["whole"] = "w-0.safetensors"
    del described["pieces"]["whole"]
    index.write_text(json.dumps(described))
    return index


def test_pieces_and_whole_tensors_stand_side_by_side_and_a_single_file_comes_first(index: Path):
    found = scan_set(index.parent, "w.safetensors") or {}
    assert found["whole"].read().tolist() == [1, 1, 1] and torch.equal(
        found["w"].read(), torch.arange(10.0).view(2, 5)
    )
    assert scan_set(index.parent, "x.safetensors") is None
    write(index.parent / "w.safetensors", {"one": torch.ones(1)})
    assert (scan_set(index.parent, "w.safetensors") or {}).keys() == {"one"}


def test_any_set_with_an_index_is_a_model(index: Path):
    assert scan_folder(index.parent).keys() == {"w", "whole"}


def parts(described: dict[str, Any]) -> list[list[Any]]:
    return described["pieces"]["w"]["parts"]


DAMAGE: dict[str, Any] = {
    "a gap": lambda d: parts(d)[1].__setitem__(1, 5),
    "an overlap": lambda d: parts(d)[1].__setitem__(1, 3),
    "the end is missing": lambda d: parts(d).pop(),
    "the beginning is missing": lambda d: parts(d).pop(0),
    "no parts": lambda d: d["pieces"]["w"].update(parts=[]),
    "the same part twice": lambda d: parts(d).__setitem__(1, list(parts(d)[0])),
    "one file for both": lambda d: parts(d)[1].__setitem__(0, "w-0.safetensors"),
    "a longer shape": lambda d: d["pieces"]["w"].update(shape=[2, 6]),
    "a shorter shape": lambda d: d["pieces"]["w"].update(shape=[2, 4]),
    "another dtype": lambda d: d["pieces"]["w"].update(dtype="I32"),
    "an unknown dtype": lambda d: d["pieces"]["w"].update(dtype="F99"),
    "a part of two": lambda d: parts(d)[1].pop(),
    "a part that is no list": lambda d: parts(d).__setitem__(1, None),
    "an entry that is no object": lambda d: d["pieces"].update(w=[]),
    "a file that is not there": lambda d: parts(d)[1].__setitem__(0, "w-9.safetensors"),
    "a file that lacks the piece": lambda d: d["pieces"].update(other=dict(d["pieces"]["w"])),
    "a file that lacks the tensor": lambda d: d["weight_map"].update(other="w-0.safetensors"),
    "no weight_map": lambda d: d.pop("weight_map"),
    "pieces that are no object": lambda d: d.update(pieces=[]),
    "a number for a file": lambda d: d["weight_map"].update(whole=3),
    "no name for a file": lambda d: d["weight_map"].update(whole=""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_does_not_fit_its_files_is_refused(index: Path, damage: str):
    described = json.loads(index.read_text())
    DAMAGE[damage](described)
    index.write_text(json.dumps(described))
    with pytest.raises(CheckpointFolderError) as caught:
        scan_set(index.parent, "w.safetensors")
    assert str(index.parent) in str(caught.value)


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/w.safetensors", "..", "ABSOLUTE"])
@pytest.mark.parametrize("place", ["weight_map", "pieces"])
def test_an_index_that_names_files_outside_of_its_folder_is_refused(
    index: Path, tmp_path_factory: pytest.TempPathFactory, name: str, place: str
):
    """Though they are there and fit."""
    outside = tmp_path_factory.mktemp("outside") / "w.safetensors"
    (index.parent / "sub").mkdir()
    for copy in (
        outside,
        index.parent / "sub" / "w.safetensors",
        index.parent.parent / "outside.safetensors",
    ):
        shutil.copy(index.parent / "w-0.safetensors", copy)
    described = json.loads(index.read_text())
    name = str(outside) if name == "ABSOLUTE" else name
    if place == "weight_map":
        described["weight_map"]["whole"] = name
    else:
        parts(described)[0][0] = name
    index.write_text(json.dumps(described))
    with pytest.raises(CheckpointFolderError, match="outside of its folder"):
        scan_set(index.parent, "w.safetensors")


# ---- writing


def test_the_size_and_hash_of_what_was_written_and_every_dtype_for_every_reader(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    tensors = {str(dtype): sample(dtype, (3, 2)) for dtype in TORCH_DTYPES} | {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
    }
    size, digest = write(path, tensors)
    data = path.read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    theirs, ours = load_file(path), scan_safetensors(path)
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (
            raw(theirs[name]) == raw(ours[name].read()) == raw(tensor)
            and theirs[name].shape == ours[name].shape == tensor.shape
        )
    assert all(stored.parts[0].offset % stored.dtype.itemsize == 0 for stored in ours.values()), (
        "aligned for readers that map the file"
    )
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_of_the_librarys_own_writer_are_read(tmp_path: Path):
    tensors = {str(dtype): sample(dtype, (4, 3), seed=1) for dtype in TORCH_DTYPES}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"any": "thing"})
    assert {n: raw(s.read()) for n, s in scan_safetensors(tmp_path / "a.safetensors").items()} == {
        n: raw(t) for n, t in tensors.items()
    }


def test_tensors_are_made_one_at_a_time_and_written_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "CHUNK", 16)
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return torch.full((10,), float(len(made))).view(5, 2).t()  # not contiguous

    size, digest = write_safetensors(
        tmp_path / "a", {n: (torch.float32, (2, 5), lambda n=n: make(n)) for n in "abc"}
    )
    assert made == ["a", "b", "c"] and size == (tmp_path / "a").stat().st_size
    assert digest == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert [s.read().unique().tolist() for s in scan_safetensors(tmp_path / "a").values()] == [
        [1.0],
        [2.0],
        [3.0],
    ]


def test_a_file_can_be_replaced_from_itself_and_stays_when_writing_fails(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.arange(4.0), "v": torch.ones(2)})
    before, stored = path.read_bytes(), scan_safetensors(path)

    def fail() -> Tensor:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError):
        write_safetensors(
            path, {"v": (torch.float32, (2,), stored["v"].read), "w": (torch.float32, (4,), fail)}
        )
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(AssertionError):  # a tensor that is not what was announced
        write_safetensors(path, {"w": (torch.float32, (3,), stored["w"].read)})
    assert path.read_bytes() == before
    write_safetensors(path, {"w": (torch.float32, (4,), lambda: stored["w"].read() + 1)})
    assert scan_safetensors(path)["w"].read().tolist() == [1, 2, 3, 4] and scan_safetensors(path).keys() == {
        "w"
    }
