"""Reading checkpoints: what is damaged is noticed, the right one is chosen, the right ones stay."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from saves import contents_of, damage, names, read_group, save, save_together, together, trainer_state

from unigen.runs import checkpoint, saver
from unigen.runs.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    manifest_hash,
    prune_checkpoints,
    read_manifest,
    read_states,
    remove_checkpoint,
    resolve_resume,
    scan_group,
    scan_weights,
    sweep_orphans,
    verify_checkpoint,
)


def forge(folder: Path, **changes: Any) -> None:
    """Changes the manifest, and its hash with it."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8")) | changes
    manifest["sha256"] = manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ---- what is damaged is noticed


@pytest.mark.slow
def test_every_flipped_bit_of_the_manifest_and_many_of_each_file_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also at a time whose last digits a float cannot tell apart: 1795432000.1234567 and ...68 are the same
    number."""
    monkeypatch.setattr(saver.time, "time", lambda: 1795432000.1234567)
    folder = save(tmp_path, 1)
    files = contents_of(folder)
    assert len(files) == 6
    for name, whole in files.items():
        bits = (
            range(8 * len(whole))
            if name == "manifest.json"
            else random.Random(0).sample(range(8 * len(whole)), 24)
        )
        for bit in bits:
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(data)
            with pytest.raises(CheckpointError, match=name):
                verify_checkpoint(folder)
        (folder / name).write_bytes(whole)
    verify_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["ema.safetensors", "tokenizer/merges.txt"]
)  # of two processes: test_damage.py
def test_a_missing_short_long_or_unreadable_file_is_named(tmp_path: Path, name: str):
    folder = save(tmp_path, 1)
    path = folder / name
    whole = path.read_bytes()
    for damaged in (None, whole[:-1], b"", whole + b"x", whole[::-1]):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name) as caught:
            verify_checkpoint(folder)
        assert "Fix:" in str(caught.value) and str(folder) in str(caught.value)
        path.write_bytes(whole)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["trainer.json", "manifest.json"])
def test_states_that_cannot_be_read_are_named(tmp_path: Path, name: str):
    folder = save(tmp_path, 1)
    assert read_states(folder) == {"trainer": trainer_state(1)}
    for damage_it in (
        lambda path: path.write_text("{"),
        lambda path: path.write_bytes(b"\xff"),
        Path.unlink,
        Path.mkdir,
    ):
        damage_it(folder / name)
        with pytest.raises(CheckpointError, match=f"{name}.*Fix:"):
            read_states(folder)


def test_every_damaged_file_is_listed_and_an_extra_file_is_fine(tmp_path: Path):
    folder = save(tmp_path, 1)
    (folder / "notes.txt").write_text("mine")
    verify_checkpoint(folder)
    (folder / "trainer.json").unlink()
    (folder / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"damaged checkpoint: .*; ") as caught:
        verify_checkpoint(folder)
    assert "optimizer.safetensors has 0 bytes instead of " in str(
        caught.value
    ) and "trainer.json is missing" in str(caught.value)
    assert "ema.safetensors" not in str(caught.value)


def test_several_processes_read_every_file_once_and_all_hear_of_the_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = save(tmp_path, 1)
    read: list[str] = []
    opened = checkpoint.open_file
    monkeypatch.setattr(
        checkpoint, "open_file", lambda path, *roots: read.append(path.name) or opened(path, *roots)
    )
    assert (
        together(3, lambda rank, channel: verify_checkpoint(folder, (rank, 3), channel.gather)) == [None] * 3
    )
    assert sorted(read) == sorted(name.rpartition("/")[2] for name in read_manifest(folder)["files"])
    damage(folder)
    damage(folder, "ema.safetensors")
    errors = together(3, lambda rank, channel: verify_checkpoint(folder, (rank, 3), channel.gather))
    for error in errors:
        assert isinstance(error, CheckpointError) and str(error) == str(errors[0])
        assert (
            str(error).count("has changed") == 2
            and "ema.safetensors" in str(error)
            and "optimizer.safetensors" in str(error)
        )
    damage(folder, "manifest.json")
    errors = together(3, lambda rank, channel: verify_checkpoint(folder, (rank, 3), channel.gather))
    assert all(str(error).count("manifest.json") == 1 for error in errors), (
        "the manifest is told once, not once a process"
    )


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path):
    (tmp_path / "secret.json").write_text('{"a": 1}')
    for n, change in enumerate(
        (
            {"states": ["../secret"]},
            {"groups": ["../ema"]},
            {"files": {"/etc/hostname": {"size": 0, "sha256": ""}}},
        )
    ):
        folder = save(tmp_path, n)
        forge(folder, **change)
        for use in (verify_checkpoint, read_states, read_manifest):
            with pytest.raises(CheckpointError, match="outside"):
                use(folder)


@pytest.mark.parametrize(("number", "fix"), [(1, "--model_path"), (99, "update unigen")])
def test_another_format_is_refused_by_name(tmp_path: Path, number: int, fix: str):
    folder = save(tmp_path, 1)
    forge(folder, format=number)
    with pytest.raises(CheckpointError, match=f"format {number}, this version reads 2. Fix: .*{fix}"):
        verify_checkpoint(folder)


def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path):
    folder = save(tmp_path, 1)
    for text in ("[]", "null", "3", "{}", "[" * 100_000, '{"sha256": null}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(folder)


def test_groups_are_found_whole_or_in_pieces_and_raw_weights_stand_before_the_average(tmp_path: Path):
    one, two = save(tmp_path, 1), save_together(tmp_path, 2)
    assert scan_group(one, "model") == {} and scan_group(two, "model") == {}
    assert read_group(one, "optimizer")["exp_avg.w"].tolist() == [1.0] * 3
    found = read_group(two, "optimizer")
    assert found.keys() == {"exp_avg.w", "step.w"} and found["step.w"].shape == () and found["step.w"] == 2
    assert torch.equal(found["exp_avg.w"], torch.full((6, 4), 2.0))
    assert torch.equal(scan_weights(two)["w"].read(), torch.arange(24.0).view(6, 4))
    for part in ("ema.safetensors", "ema-00001-of-00002.safetensors", "ema-00002-of-00002.safetensors"):
        if (two / part).exists():
            (two / part.replace("ema", "model")).write_bytes((two / part).read_bytes())
    index = (two / "ema.safetensors.index.json").read_text().replace("ema-", "model-")
    (two / "model.safetensors.index.json").write_text(index)
    averages, raw = scan_weights(two), scan_weights(two, raw=True)
    assert {p.file.name[:4] for p in averages["w"].parts} == {"ema-"} and {
        p.file.name[:6] for p in raw["w"].parts
    } == {"model-"}


# ---- which one to resume from


def test_the_newest_good_one_is_found_and_a_bad_newer_one_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10, 100):
        save(tmp_path, step)
    save(tmp_path, 1000, name="best")
    (tmp_path / "step_x").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_100"
    damage(tmp_path / "step_100")
    (tmp_path / "step_200").mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == tmp_path / "step_10"
    assert [r for r in caplog.messages if "step_100" in r and "optimizer.safetensors" in r]
    assert [r for r in caplog.messages if "step_200" in r and "manifest.json" in r]
    assert "step_9" not in caplog.text


def test_auto_starts_afresh_where_there_is_nothing(tmp_path: Path):
    assert resolve_resume(None, tmp_path) is None
    assert resolve_resume("auto", tmp_path) is None
    assert resolve_resume("auto", tmp_path / "nowhere") is None


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``auto`` would start from zero where a network file system refuses for a moment."""
    save(tmp_path, 3)

    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    for look in (
        lambda: resolve_resume("auto", tmp_path),
        lambda: sweep_orphans(tmp_path),
        lambda: prune_checkpoints(tmp_path, 1),
    ):
        with pytest.raises(
            CheckpointError, match=r"cannot be listed .*Permission denied.*Fix: allow reading it"
        ):
            look()


def test_a_named_folder_must_be_good_and_the_good_ones_are_listed(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert resolve_resume(str(tmp_path / "step_2"), tmp_path) == tmp_path / "step_2"
    damage(tmp_path / "step_2")
    for value in (tmp_path / "step_2", tmp_path / "step_4", tmp_path, "no/such/step_5"):
        with pytest.raises(CheckpointError, match="Fix") as caught:
            resolve_resume(value, tmp_path)
        text = str(caught.value)
        assert str(value) in text and f"{tmp_path / 'step_3'}, {tmp_path / 'step_1'}" in text
        assert "--resume_from_checkpoint" in text and f"nearby: {tmp_path / 'step_2'}" not in text
    shutil.rmtree(tmp_path / "step_1")
    shutil.rmtree(tmp_path / "step_3")
    with pytest.raises(CheckpointError, match="no good one nearby"):
        resolve_resume(tmp_path / "step_2", tmp_path)


def test_resuming_from_an_older_one_warns_about_the_newer(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save(tmp_path, 1)
    save(tmp_path, 2)
    resolve_resume(tmp_path / "step_2", tmp_path)
    assert not caplog.messages
    resolve_resume(tmp_path / "step_1", tmp_path)
    assert "step_2" in caplog.text


def test_processes_choose_together_and_alike(tmp_path: Path):
    """One sees the damage, because it alone read that file; both pass it over."""
    for step in (1, 2):
        save_together(tmp_path, step)
    damage(tmp_path / "step_2", "optimizer-00002-of-00002.safetensors")

    def choose(rank: int, channel: Any) -> Path | None:
        return resolve_resume(
            "auto", tmp_path, lambda folder: verify_checkpoint(folder, (rank, 2), channel.gather)
        )

    assert together(2, choose) == [tmp_path / "step_1"] * 2


# ---- which ones stay


def test_pruning_keeps_the_newest_the_best_and_what_is_not_ours(tmp_path: Path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    save(tmp_path, 8, name="best")
    (tmp_path / "step_1").mkdir()  # no manifest: somebody else's
    prune_checkpoints(tmp_path, None)
    assert len(names(tmp_path)) == 6
    prune_checkpoints(tmp_path, 2)
    assert names(tmp_path) == ["best", "step_1", "step_10", "step_11"]
    save(tmp_path, 5)
    prune_checkpoints(tmp_path, 1, protect=tmp_path / "step_5")
    assert names(tmp_path) == ["best", "step_1", "step_11", "step_5"]
    for name in ("best", "step_11", "step_5"):
        verify_checkpoint(tmp_path / name)


def test_one_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for step in (1, 2, 3):
        save(tmp_path, step)

    def refuse(folder: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "rename", refuse)
    prune_checkpoints(tmp_path, 1)
    assert (
        names(tmp_path) == ["step_1", "step_2", "step_3"]
        and caplog.text.count("Cannot remove the old checkpoint") == 2
    )


def test_what_is_half_removed_no_longer_looks_like_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = save(tmp_path, 1)
    monkeypatch.setattr(
        shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    with pytest.raises(OSError):
        remove_checkpoint(folder)
    monkeypatch.undo()
    assert names(tmp_path) == [f".step_1.partial-{os.getpid()}"]
    sweep_orphans(tmp_path)
    assert names(tmp_path) == []


def test_sweeping_removes_what_runs_left_half_done_and_nothing_else(tmp_path: Path):
    """Whoever's process id it bears: only the holder of the folder's lock sweeps, so nobody else is
    writing."""
    save(tmp_path, 1)
    kept = [
        ".cache",
        ".notes.txt.partial-3",
        ".step_3",
        ".step_2.partial-",
        ".step_2.partial-1x",
        "step_2.partial-1",
        ".step_2.other-1",
    ]
    for name in (
        ".step_2.partial-1",
        f".step_2.partial-{os.getpid()}",
        f".best.partial-{os.getppid()}",
        ".step_1.old-1",
        *kept,
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (".step_9.partial-7", ".metrics.jsonl.partial-7", ".bad_steps.jsonl.partial-7"):
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / ".step_8.partial-7").symlink_to(tmp_path / "elsewhere")
    sweep_orphans(tmp_path)
    assert names(tmp_path) == sorted(["step_1", "elsewhere", *kept])
    assert names(tmp_path / "elsewhere") == ["file"], "what a link points to is not ours"
    verify_checkpoint(tmp_path / "step_1")
    sweep_orphans(tmp_path / "nowhere")


def test_sweeping_gives_back_one_whose_replacement_never_came(tmp_path: Path):
    save(tmp_path, 1, name="best").rename(tmp_path / ".best.old-123")
    save(tmp_path, 2).rename(tmp_path / ".best.partial-123")
    sweep_orphans(tmp_path)
    assert names(tmp_path) == ["best"] and read_states(tmp_path / "best") == {"trainer": trainer_state(1)}
    verify_checkpoint(tmp_path / "best")
