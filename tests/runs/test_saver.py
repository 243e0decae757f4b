"""Writing checkpoints: what goes in comes out, beside the training, by one process or by several."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from safetensors.torch import load_file, save_file
from saves import (
    ALONE,
    FILES,
    contents,
    contents_of,
    entry,
    names,
    pieces,
    read_group,
    save,
    save_together,
    shared_entries,
    together,
    trainer_state,
)
from tiny import train

from unigen.config import Config
from unigen.model.storage import scan_safetensors
from unigen.runs import saver as saving
from unigen.runs.channel import Channel
from unigen.runs.checkpoint import CheckpointError, read_manifest, read_states, verify_checkpoint
from unigen.runs.saver import Saver
from unigen.training.engine import Engine
from unigen.training.loop import TrainingLoop

# ---- what goes in comes out


@pytest.mark.parametrize("background", [False, True])
def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path, background: bool):
    base = torch.randn(6, 4)
    group = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(3).bfloat16(),
        "f16": torch.randn(3).half(),
        "f64": torch.randn(2).double(),
        "int64": torch.tensor([2**62, -1]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([[True, False, True]]),
        "specials": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "base": base,
        "shared": base,
        "view": base[1:3],
        "transposed": base.t(),
        "strided": base[::2, 1],
        "expanded": torch.ones(1).expand(4),
        "wants_grad": torch.randn(2, requires_grad=True),
        "名字": torch.ones(2),
    }
    save_file({"read": base}, tmp_path / "source.safetensors")
    stored = scan_safetensors(tmp_path / "source.safetensors")["read"]
    read = entry("a", "read", torch.empty(6, 4, device="meta"), read=stored.read)
    saver = Saver(tmp_path, 0, ALONE, background=background)
    saver.save(contents(1, read, *(entry("a", name, value) for name, value in group.items())))
    saver.wait()
    verify_checkpoint(tmp_path / "step_1")
    found = read_group(tmp_path / "step_1", "a")
    assert found.keys() == {*group, "read"}
    for name, value in (group | {"read": base}).items():
        got = found[name]
        assert (got.dtype, got.shape) == (value.dtype, value.shape), name
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got, value)]
        assert torch.equal(*raw), name
    assert load_file(tmp_path / "step_1" / "a.safetensors").keys() == found.keys(), (
        "the library's own reader agrees"
    )


def test_states_come_back_as_json_does(tmp_path: Path):
    state = {
        "数据": "猫",
        "best": float("inf"),
        "seed": 2**70,
        "rate": 0.1 + 0.2,
        "none": None,
        "nested": [{"a": [True]}],
        "bad": "\ud800",
    }
    folder = save(tmp_path, 1, states={"loader": state, "list": [1, 2], "tuple": (1, 2)})
    assert read_states(folder) == {"loader": state, "list": [1, 2], "tuple": [1, 2]}


def test_the_folder_holds_the_groups_the_states_the_files_and_nothing_else(tmp_path: Path):
    run = tmp_path / "new" / "run"
    folder = save(run, 7, about={"engine": "single"})
    assert folder == run / "step_7" and names(run) == ["step_7"] and names(folder) == FILES
    assert load_file(folder / "optimizer.safetensors")["exp_avg.w"].tolist() == [7.0] * 3
    manifest = read_manifest(folder)
    assert [manifest[key] for key in ("format", "step", "world", "engine")] == [2, 7, 1, "single"]
    assert (manifest["groups"], manifest["states"]) == (["ema", "optimizer"], ["trainer"])
    assert manifest["files"].keys() == set(FILES) - {"manifest.json", "tokenizer"} | {"tokenizer/merges.txt"}
    assert manifest["time"] == pytest.approx(time.time(), abs=60)


def test_a_name_or_key_that_cannot_be_right_is_a_programmers_error(tmp_path: Path):
    for more, name in [
        ({"states": {"x": {"a": [{1: 2}]}}}, None),
        ({}, "../elsewhere"),
        ({}, "a.b"),
        ({}, ".hidden"),
    ]:
        with pytest.raises(AssertionError):
            save(tmp_path, 1, name=name, **more)
        assert names(tmp_path) == [] and not (tmp_path.parent / "elsewhere").exists()
    twice = (entry("a", "w", torch.ones(1)), entry("a", "w", torch.ones(1)))
    for entries, states in [((), {"llm_config": {}}), ((), {"manifest": {}}), (twice, {})]:
        with pytest.raises(CheckpointError, match="AssertionError"):
            save(tmp_path, 1, *entries, states=states)
        assert names(tmp_path) == []


def test_saving_again_replaces_the_whole_folder(tmp_path: Path):
    save(tmp_path, 3, name="best")
    (tmp_path / "best" / "left_over").touch()
    save(tmp_path, 5, name="best")
    assert names(tmp_path) == ["best"] and names(tmp_path / "best") == FILES
    assert read_states(tmp_path / "best") == {"trainer": trainer_state(5)}


def test_saving_keeps_as_many_as_asked_and_the_one_just_written(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    save(tmp_path, 9, name="best", keep=2)
    assert names(tmp_path) == ["best", "step_3", "step_4"]
    save(tmp_path, 1, keep=2)  # resumed from an older step: the newest by number stay, and this one
    assert names(tmp_path) == ["best", "step_1", "step_3", "step_4"]


def test_what_an_earlier_process_of_the_same_number_left_is_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(saving.os, "getpid", lambda: 77)
    (tmp_path / ".step_1.partial-77").mkdir()
    (tmp_path / ".step_1.partial-77" / "left_over").touch()
    (tmp_path / ".step_1.old-77").mkdir()
    for _ in range(2):
        assert names(save(tmp_path, 1)) == FILES
    assert names(tmp_path) == ["step_1"]


@pytest.mark.gpu
@pytest.mark.parametrize("background", [False, True])
def test_tensors_on_a_gpu(tmp_path: Path, background: bool):
    value = torch.randn(1000, 300, device="cuda").bfloat16().t()
    expected = value.cpu()
    saver = Saver(tmp_path, 0, ALONE, background=background)
    saver.save(contents(1, entry("a", "v", value), entry("a", "s", torch.ones((), device="cuda"))))
    saver.settle()
    value.zero_()  # the next step
    saver.wait()
    assert torch.equal(read_group(tmp_path / "step_1", "a")["v"], expected)


# ---- beside the training


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every file of tensors waits for the event."""
    go, write = threading.Event(), saving.write_safetensors

    def waiting(*args: Any, **more: Any) -> Any:
        assert go.wait(30)
        return write(*args, **more)

    monkeypatch.setattr(saving, "write_safetensors", waiting)
    yield go
    go.set()


def test_a_slow_disk_does_not_hold_the_trainer_and_what_is_saved_is_of_the_moment_of_the_call(
    tmp_path: Path, slow_disk: threading.Event
):
    """``save`` returns while the write still blocks; weights, moments and states change afterwards, and what
    is written does not."""
    weights, moments, state = torch.ones(2, 3), torch.zeros(6).view(2, 3).t(), {"waiting": [1, 2]}
    wanted = [weights.clone(), moments.clone()]
    saver = Saver(tmp_path, 0, ALONE, background=True)
    saver.save(
        contents(1, entry("ema", "w", weights), entry("optimizer", "m", moments), states={"trainer": state})
    )
    assert saver.published() is None and not saver.failed and not (tmp_path / "step_1").exists()
    weights.fill_(9)
    moments.add_(1)
    state["waiting"].append(3)
    slow_disk.set()
    saver.wait()
    assert saver.published() == tmp_path / "step_1" and saver.published() is None, "told once"
    verify_checkpoint(tmp_path / "step_1")
    assert torch.equal(read_group(tmp_path / "step_1", "ema")["w"], wanted[0])
    assert torch.equal(read_group(tmp_path / "step_1", "optimizer")["m"], wanted[1])
    assert read_states(tmp_path / "step_1") == {"trainer": {"waiting": [1, 2]}}


def test_without_background_it_is_published_when_save_returns(tmp_path: Path):
    saver = Saver(tmp_path, 0, ALONE)
    saver.save(contents(1))
    assert saver.published() == tmp_path / "step_1"
    saver.wait()
    assert saver.published() is None


@pytest.mark.slow
def test_training_goes_on_within_2_s_of_a_save_on_a_disk_that_takes_longer(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """A real run whose every file takes 1.5 s: the step after a save begins before that is published, and at
    most 2 s after the last."""
    write, moments = saving.write_safetensors, []

    def slow(*args: Any, **more: Any) -> Any:
        time.sleep(1.5)
        return write(*args, **more)

    monkeypatch.setattr(saving, "write_safetensors", slow)
    folder = Path(options["output_dir"])
    step = TrainingLoop.take_step

    def noted(*given: Any) -> Any:
        began = time.monotonic()
        published = (folder / "step_2").exists()
        result = step(*given)
        moments.append((began, time.monotonic(), published))
        return result

    monkeypatch.setattr(TrainingLoop, "take_step", noted)
    train(options, max_steps=3, save_steps=2, ema=0.9)
    (_, saved_at, _), (went_on, _, published) = moments[1:]
    assert went_on - saved_at < 2.0 and not published
    verify_checkpoint(folder / "step_2")
    verify_checkpoint(folder / "step_3")


def test_where_memory_is_too_small_for_a_copy_all_processes_write_at_once_and_say_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Two machines, of which one has too little; a process that wrote beside the training alone would be
    waited for, for ever."""
    place = threading.local()
    monkeypatch.setattr(saving.platform, "node", lambda: place.machine)
    monkeypatch.setattr(
        saving, "free_memory", lambda: 100 << 30 if place.machine == "roomy" else saving._SPARE + 10
    )

    def work(rank: int, channel: Channel) -> list[Path | None]:
        place.machine = ["roomy", "tight"][rank]
        saver = Saver(tmp_path, rank, channel, background=True)
        told = []
        for step in (1, 2):
            saver.save(contents(step, *shared_entries(rank, 2, step)))
            told.append(saver.published())
        return told

    assert together(2, work) == [[tmp_path / "step_1", tmp_path / "step_2"]] * 2
    assert ["tight would need" in message for message in caplog.messages] == [True]
    verify_checkpoint(tmp_path / "step_2")


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, slow_disk: threading.Event):
    saver = Saver(tmp_path, 0, ALONE, background=True)
    saver.save(contents(1))
    second = threading.Thread(target=lambda: saver.save(contents(2)))
    second.start()
    second.join(0.2)
    assert second.is_alive() and not [name for name in names(tmp_path) if "step_2" in name], "one at a time"
    slow_disk.set()
    second.join(30)
    saver.wait()
    assert names(tmp_path) == ["step_1", "step_2"]
    assert [saver.published() for _ in range(3)] == [tmp_path / "step_1", tmp_path / "step_2", None], (
        "each is told, though nobody asked"
    )


@pytest.mark.slow
def test_what_was_published_before_is_not_told_again_while_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also before the writing thread has done anything."""

    class Late(threading.Thread):
        def run(self) -> None:
            time.sleep(0.2)
            super().run()

    monkeypatch.setattr(saving.threading, "Thread", Late)
    saver = Saver(tmp_path, 0, ALONE, background=True)
    saver.save(contents(1))
    saver.wait()
    assert saver.published() == tmp_path / "step_1"
    saver.save(contents(2))
    assert saver.published() is None
    saver.wait()
    assert saver.published() == tmp_path / "step_2"


@pytest.mark.parametrize("then", ["wait", "save"])
def test_a_failure_beside_the_training_shows_and_is_never_called_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
):
    """``failed`` tells it while the run goes on; ``wait`` or the next ``save`` raises it, once; the one after
    that succeeds."""
    save(tmp_path, 1)
    before = contents_of(tmp_path)
    saver = Saver(tmp_path, 0, ALONE, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "fsync", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        saver.save(contents(2))
        deadline = time.monotonic() + 30
        while not saver.failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert saver.published() is None
    with pytest.raises(CheckpointError, match=r"(?s)step 2.*Input/output error.*Fix"):
        saver.wait() if then == "wait" else saver.save(contents(3))
    assert saver.published() is None and contents_of(tmp_path) == before and names(tmp_path) == ["step_1"]
    saver.wait()
    saver.save(contents(4))
    saver.wait()
    assert saver.published() == tmp_path / "step_4" and names(tmp_path) == ["step_1", "step_4"]


def test_a_bug_beside_the_training_shows_like_a_failure(tmp_path: Path):
    saver = Saver(tmp_path, 0, ALONE, background=True)
    saver.save(contents(1, states={"trainer": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"TypeError.*Tensor"):
        saver.wait()
    assert names(tmp_path) == [] and saver.published() is None


# ---- several processes


def test_every_process_writes_its_part_and_the_parts_are_one_tensor(tmp_path: Path):
    folder = save_together(tmp_path, 3, world=3)
    verify_checkpoint(folder)
    parts = {f"{group}-0000{n}-of-00003.safetensors" for group in ("ema", "optimizer") for n in (1, 2, 3)}
    assert parts | {"ema.safetensors.index.json", "optimizer.safetensors.index.json"} < set(names(folder))
    assert read_manifest(folder)["world"] == 3 and read_manifest(folder)["files"].keys() >= parts
    assert torch.equal(read_group(folder, "ema")["w"], torch.arange(24.0).view(6, 4))
    assert read_group(folder, "optimizer").keys() == {"exp_avg.w", "step.w"}
    index = json.loads((folder / "optimizer.safetensors.index.json").read_text())
    assert index["weight_map"] == {"step.w": "optimizer-00001-of-00003.safetensors"}
    assert index["metadata"]["total_size"] == 25 * 4
    assert [part[1:] for part in index["pieces"]["exp_avg.w"]["parts"]] == [[0, 8], [8, 16], [16, 24]]


def test_whole_tensors_of_two_processes_make_an_ordinary_sharded_set(tmp_path: Path):
    """The index of the published kind, which every reader knows; a process without a tensor of a group writes
    no file of it."""

    def work(rank: int, channel: Channel) -> None:
        only = [entry("optimizer", "step.w", torch.tensor(1.0))] if rank else []
        Saver(tmp_path, rank, channel).save(
            contents(1, entry("ema", f"w{rank}", torch.full((2,), float(rank))), *only)
        )

    assert together(2, work) == [None, None]
    folder = tmp_path / "step_1"
    verify_checkpoint(folder)
    index = json.loads((folder / "ema.safetensors.index.json").read_text())
    assert index.keys() == {"metadata", "weight_map"}
    for name, file in index["weight_map"].items():
        assert load_file(folder / file)[name].tolist() == [float(name[1])] * 2
    assert [name for name in names(folder) if name.startswith("optimizer")] == [
        "optimizer-00002-of-00002.safetensors", "optimizer.safetensors.index.json",
    ]  # fmt: skip


@pytest.mark.parametrize("cuts", [[0, 5, 4, 24], [0, 5, 6, 20]], ids=["a gap", "an end too early"])
def test_pieces_that_do_not_cover_their_tensor_are_never_published(tmp_path: Path, cuts: list[int]):
    def work(rank: int, channel: Channel) -> None:
        Saver(tmp_path, rank, channel).save(contents(1, *pieces(rank, 3, "ema", "w", torch.ones(24), cuts)))

    errors = together(3, work, patience=5)
    assert all(isinstance(error, CheckpointError) and "w has gaps" in str(error) for error in errors), errors
    assert names(tmp_path) == []


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device"), "No space left"),
        (RuntimeError("bug"), "RuntimeError: bug"),
        (OSError(), "OSError"),
    ],
)
def test_the_error_of_one_process_fails_all_names_it_and_leaves_nothing(
    tmp_path: Path, error: Exception, says: str, background: bool
):
    """At once, whatever the error: nobody waits for a process that has given up."""
    save_together(tmp_path, 1)
    before = contents_of(tmp_path)

    def fail() -> torch.Tensor:
        raise error

    def work(rank: int, channel: Channel) -> None:
        saver = Saver(tmp_path, rank, channel, background=background)
        spoiled = [entry("ema", "spoiled", torch.empty(3, device="meta"), read=fail)] if rank == 1 else []
        try:
            saver.save(contents(2, *shared_entries(rank, 2, 2), *spoiled))
            saver.wait()
        finally:
            assert saver.published() is None

    began = time.monotonic()
    errors = together(2, work, patience=5)
    for found in errors:
        assert (
            isinstance(found, CheckpointError)
            and "process 1: " in str(found)
            and "process 0: " not in str(found)
        ), errors
        assert says in str(found) and "step 2" in str(found) and "Fix" in str(found)
    assert time.monotonic() - began < 4
    assert contents_of(tmp_path) == before and names(tmp_path) == ["step_1"]


def test_a_folder_that_the_machines_do_not_share_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Either the other machine does not see the first one's folder, or its files are not seen by the
    first."""
    monkeypatch.setattr(saving, "_PATIENCE_S", 0.2)
    for made in (False, True):
        run = tmp_path / str(made)

        def work(rank: int, channel: Channel, run: Path = run, made: bool = made) -> None:
            place = run / str(rank)
            place.mkdir(parents=True)
            if made and rank == 1:
                (place / f".step_1.partial-{saving.os.getpid()}").mkdir()
            Saver(place, rank, channel).save(contents(1, *shared_entries(rank, 2, 1)))

        for error in together(2, work):
            assert isinstance(error, CheckpointError) and "a folder that all machines share" in str(error)
            assert ("cannot be seen by process 0" if made else "process 1: ") in str(error)
        assert names(run / "0") == []


def test_a_process_that_is_gone_fails_the_save_of_the_others(tmp_path: Path):
    def work(rank: int, channel: Channel) -> None:
        if rank == 0:
            Saver(tmp_path, rank, channel).save(contents(1))

    errors = together(2, work, patience=0.3)
    assert isinstance(errors[0], CheckpointError) and "step 1 could not be finished" in str(errors[0])
    assert names(tmp_path) == []


def _save_as_rank(rank: int, world: int, port: int, folder: str) -> None:
    become_rank(rank, world, port)
    run = Path(folder) / "run"
    said: dict[str, Any] = {}
    with Engine(Config(device="cpu")) as engine:
        saver = Saver(run, rank, engine.background(), background=True, keep=2)
        for step in (1, 2, 3):
            saver.save(contents(step, *shared_entries(rank, world, step)))
            # training goes on over its own channel meanwhile
            said[f"sums {step}"] = engine.sum([rank + step, 1])
        saver.wait()
        said["published"] = [str(saver.published()) for _ in range(4)]
        spoiled = (
            [entry("ema", "spoiled", torch.empty(3, device="meta"), read=lambda: 1 / 0)] if rank == 1 else []
        )
        saver.save(contents(4, *shared_entries(rank, world, 4), *spoiled))
        try:
            saver.wait()
        except CheckpointError as error:
            said["error"] = str(error)
        verify_checkpoint(run / "step_3", (rank, world), engine.gather)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))


@pytest.mark.slow
def test_two_real_processes_write_beside_the_training(tmp_path: Path):
    """Over gloo: three saves in the background while the processes talk, the two newest stay, a failing
    fourth is told by both."""
    run_ranks(_save_as_rank, 2, str(tmp_path))
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [said[f"sums {step}"] for step in (1, 2, 3)] == [[2 * step + 1, 2] for step in (1, 2, 3)]
        assert said["published"] == [*(str(tmp_path / "run" / f"step_{step}") for step in (1, 2, 3)), "None"]
        assert "process 1: ZeroDivisionError" in said["error"] and "process 0: " not in said["error"]
    assert names(tmp_path / "run") == ["step_2", "step_3"]
    verify_checkpoint(tmp_path / "run" / "step_3")
    assert torch.equal(
        read_group(tmp_path / "run" / "step_3", "optimizer")["exp_avg.w"], torch.full((6, 4), 3.0)
    )
