"""Damage to a checkpoint that two processes wrote: always noticed, never loaded, and a run goes on from the
newest one that is whole."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import small_tensors, write_checkpoint
from tiny import built, train

from unigen.runs.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    read_states,
    resolve_resume,
    scan_group,
    scan_weights,
    verify_checkpoint,
)

PARTS = [f"{group}-0000{n}-of-00002.safetensors" for group in ("ema", "model", "optimizer") for n in (1, 2)]
INDEXES = [f"{group}.safetensors.index.json" for group in ("ema", "model", "optimizer")]
FILES = sorted([*PARTS, *INDEXES, "llm_config.json", "manifest.json", "trainer.json", "training_config.json"])


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two processes, not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("run"), 3)


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run" / "step_3")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_the_checkpoint_is_what_it_is_taken_for(whole: Path):
    """Passes when it has two parts and an index a group, verifies, and every tensor comes back to the bit
    from its pieces."""
    assert sorted(p.name for p in whole.iterdir()) == FILES
    verify_checkpoint(whole)
    pieces = json.loads((whole / "ema.safetensors.index.json").read_text("utf-8"))["pieces"]
    assert pieces["embed"]["parts"] == [[PARTS[0], 0, 320], [PARTS[1], 320, 640]]
    tensors = small_tensors()
    for raw, add in ((False, 0), (True, 1)):
        found = scan_weights(whole, raw)
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert (
                torch.equal(found[name].read(), value + add * (name != "frozen"))
                and found[name].dtype == value.dtype
            )
    assert torch.equal(scan_group(whole, "optimizer")["exp_avg.weight"].read(), tensors["weight"] * 2)


@pytest.mark.slow
def test_two_hundred_flipped_bits_over_all_files_are_all_noticed(checkpoint: Path):
    """Passes when each of 200 flips of one bit, 10 or more in every file, is an error that names the file."""
    rng = random.Random(0)
    sizes = {name: 8 * (checkpoint / name).stat().st_size for name in FILES}
    flips = [(name, rng.randrange(bits)) for name, bits in sizes.items() for _ in range(10)]
    flips += [
        (name, rng.randrange(sizes[name]))
        for name in rng.choices(FILES, weights=list(sizes.values()), k=200 - len(flips))
    ]
    assert len(flips) == 200
    noticed = 0
    for name, bit in flips:
        flip(checkpoint / name, bit)
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(checkpoint)
        noticed += 1
        flip(checkpoint / name, bit)
    assert noticed == 200
    verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_extended_emptied_or_missing_file_is_named(checkpoint: Path, name: str):
    """Passes when every file, too short, one byte too long, gone, or a folder instead, is an error that names
    it and the fix."""
    path = checkpoint / name
    data = path.read_bytes()
    lengths = [len(data) - 1, len(data) // 2, 8, 0]
    changes: list[Callable[[], object]] = [lambda n=n: path.write_bytes(data[:n]) for n in lengths]
    for change in [
        *changes,
        lambda: path.write_bytes(data + b"\0"),
        path.unlink,
        lambda: (path.unlink(), path.mkdir()),
    ]:
        change()
        with pytest.raises(CheckpointError, match=name) as caught:
            verify_checkpoint(checkpoint)
        assert "Fix:" in str(caught.value) and str(checkpoint) in str(caught.value)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(data)
    verify_checkpoint(checkpoint)


@pytest.mark.slow
def test_swapped_files_are_noticed(checkpoint: Path):
    """Passes when any two files of the checkpoint that change places are both named."""
    pairs = [(a, b) for i, a in enumerate(FILES) for b in FILES[i + 1 :] if "manifest.json" not in (a, b)]
    assert len(pairs) == 66
    for a, b in pairs:
        exchange(checkpoint / a, checkpoint / b)
        with pytest.raises(CheckpointError) as caught:
            verify_checkpoint(checkpoint)
        assert a in str(caught.value) and b in str(caught.value)
        exchange(checkpoint / a, checkpoint / b)
    verify_checkpoint(checkpoint)


def exchange(a: Path, b: Path) -> None:
    between = a.with_name("between")
    for path, new in ((a, between), (b, a), (between, b)):
        path.rename(new)


def test_files_of_another_step_are_noticed(checkpoint: Path):
    """Passes when no file of step 4 can stand in step 3, though all have the same sizes; those that are equal
    may."""
    other = write_checkpoint(
        checkpoint.parent, 4, {name: value + 1 for name, value in small_tensors().items()}
    )
    for name in FILES:
        mine, theirs = (checkpoint / name).read_bytes(), (other / name).read_bytes()
        (checkpoint / name).write_bytes(theirs)
        if mine == theirs:
            assert name in (*INDEXES, "llm_config.json", "training_config.json")
            verify_checkpoint(checkpoint)
        else:
            with pytest.raises(CheckpointError):
                verify_checkpoint(checkpoint)
        (checkpoint / name).write_bytes(mine)


@pytest.mark.parametrize("extra", ["ema.safetensors", "model.safetensors", "optimizer.safetensors"])
def test_an_extra_file_never_takes_the_place_of_verified_ones(whole: Path, checkpoint: Path, extra: str):
    """Passes when a whole group beside the two-part one, as an unclean copy of folders leaves it, is refused
    or not read."""
    alone = write_checkpoint(
        checkpoint.parent / "other", 3, {name: value * 0 for name, value in small_tensors().items()}, world=1
    )
    shutil.copyfile(alone / extra, checkpoint / extra)
    group = extra.removesuffix(".safetensors")
    wanted = {name: entry.read() for name, entry in scan_group(whole, group).items()}
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError as error:
        assert extra in str(error)
    else:
        found = scan_group(checkpoint, group)
        assert all(torch.equal(found[name].read(), value) for name, value in wanted.items())


def test_extra_parts_and_notes_are_not_read(checkpoint: Path):
    shutil.copyfile(checkpoint / PARTS[0], checkpoint / "ema-00003-of-00003.safetensors.copy")
    (checkpoint / "notes.txt").write_text("mine")
    verify_checkpoint(checkpoint)
    assert torch.equal(scan_weights(checkpoint)["embed"].read(), small_tensors()["embed"])


# ---- falling back


def wound(folder: Path, kind: int) -> str:
    """Damages a checkpoint in one of several ways; the file concerned."""
    name = [PARTS[kind % len(PARTS)], INDEXES[kind % 3], "trainer.json", "manifest.json"][kind % 4]
    path = folder / name
    if kind % 3 == 0:
        flip(path, 8 * (path.stat().st_size // 2))
    elif kind % 3 == 1:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    return name


@pytest.mark.parametrize("bad", [1, 2, 3])
@pytest.mark.parametrize("kind", range(4))
def test_the_newest_whole_one_is_taken_and_each_bad_newer_one_is_named(
    tmp_path: Path, caplog, bad: int, kind: int
):
    """Passes when of steps 1, 2, 3 with the newest 1 or 2 bad, 2 or 1 is resumed from; with all bad nothing
    is, and nothing starts afresh."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    damaged = {step: wound(tmp_path / f"step_{step}", kind + i) for i, step in enumerate([3, 2, 1][:bad])}
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING):
        if bad == 3:
            assert latest_checkpoint(tmp_path) is None
            with pytest.raises(
                CheckpointError, match=r"every checkpoint is damaged \(step_3, step_2, step_1\).*Fix"
            ):
                resolve_resume("auto", tmp_path)
        else:
            assert resolve_resume("auto", tmp_path) == tmp_path / f"step_{3 - bad}"
    for step, name in damaged.items():
        assert any(
            f"step_{step}" in line and name in line and "Passing over" in line for line in caplog.messages
        )
    # damaged ones are left for people to look at
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_run_goes_on_from_the_newest_whole_one(options, caplog):
    """Passes when a run of 3 steps whose step_3 is damaged resumes at step 2, and its end is that of a run
    that was never damaged."""

    options |= {"max_steps": 3, "save_steps": 1}
    train(options)
    run = Path(options["output_dir"])
    expected = {name: entry.read() for name, entry in scan_weights(run / "step_3").items()}
    flip(run / "step_3" / "ema.safetensors", 8 * 500_000)
    with caplog.at_level(logging.INFO):
        train(options, resume_from_checkpoint="auto")
    assert "Passing over" in caplog.text and f"Resumed from {run / 'step_2'} at step 2" in caplog.text
    verify_checkpoint(run / "step_3")
    found = scan_weights(run / "step_3")
    assert all(torch.equal(found[name].read(), value) for name, value in expected.items())


# ---- nothing in a checkpoint is ever run


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


BOMBS = [
    ".metadata",
    "__0_0.distcp",
    "optimizer.pt",
    "trainer.pt",
    "trainer.pkl",
    "pytorch_model.bin",
    "ema.pt",
    "random.pth",
]


def plant(folder: Path, fuse: Path) -> None:
    for name in BOMBS:
        with open(folder / name, "wb") as file:  # given a name, torch.save refuses hidden files
            torch.save(Bomb(fuse), file)


def test_the_bomb_works(tmp_path: Path):
    plant(tmp_path, tmp_path / "fuse")
    torch.load(tmp_path / ".metadata", weights_only=False)
    assert (tmp_path / "fuse").exists()


@pytest.mark.slow
def test_resuming_runs_nothing_that_was_planted_in_a_checkpoint(options, tmp_path: Path):
    """Passes when a run resumes from a folder full of pickles that write a file, trains on, and there is no
    such file."""

    train(options, max_steps=1)
    plant(Path(options["output_dir"]) / "step_1", tmp_path / "fuse")
    trainer = built(options, resume_from_checkpoint="auto")
    assert trainer.position.step == 1
    trainer.run.close()
    assert not (tmp_path / "fuse").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_the_place_of_a_file_is_refused_and_not_run(checkpoint: Path, tmp_path: Path, name: str):
    """Passes when the file is an error even where nobody looked at the checksums first, or is none of the
    files that are read."""
    torch.save(Bomb(tmp_path / "fuse"), checkpoint / name)
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(checkpoint)
    refused = 0
    for use in (
        read_states,
        scan_weights,
        lambda folder: scan_weights(folder, raw=True),
        lambda folder: scan_group(folder, "optimizer"),
    ):
        try:
            use(checkpoint)
        except ValueError as error:
            assert name in str(error)
            refused += 1
    assert refused >= (name != "llm_config.json") and not (tmp_path / "fuse").exists()
