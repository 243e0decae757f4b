import errno
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from unigen.training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    resolve_resume,
    save_checkpoint,
    sweep_orphans,
    verify_checkpoint,
)


def write_model(folder: Path) -> None:
    """Stands where the published layout goes: files, and a folder in the folder."""
    save_file({"w": torch.arange(5.0)}, folder / "ema.safetensors")
    (folder / "llm_config.json").write_text('{"hidden_size": 8}', "utf-8")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "merges.txt").write_text("a b\n", "utf-8")


def save(output_dir: Path, step: int, name: str | None = None) -> Path:
    tensors = {"optimizer": {"exp_avg.w": torch.full((3,), float(step))}}
    return save_checkpoint(output_dir, step, write_model=write_model, tensors=tensors, states={"trainer": {"step": step}}, name=name)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- what goes in comes out


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path):
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
    folder = save_checkpoint(tmp_path, 1, write_model=write_model, tensors={"a": group, "none": {}}, states={})
    tensors, states = load_checkpoint(folder)
    assert states == {} and tensors.keys() == {"a", "none"} and tensors["none"] == {}
    assert tensors["a"].keys() == group.keys()
    for name, value in group.items():
        got = tensors["a"][name]
        assert (got.dtype, got.shape) == (value.dtype, value.shape), name
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got, value)]
        assert torch.equal(*raw), name
    tensors["a"]["base"].add_(1)  # what was shared when it was saved is apart now
    assert torch.equal(tensors["a"]["shared"], base)


def test_states_come_back_as_json_does(tmp_path: Path):
    state = {"数据": "猫", "best": float("inf"), "seed": 2**70, "rate": 0.1 + 0.2, "none": None, "nested": [{"a": [True]}], "bad": "\ud800"}
    folder = save_checkpoint(tmp_path, 1, write_model=write_model, tensors={}, states={"loader": state, "list": [1, 2]})
    assert load_checkpoint(folder)[1] == {"loader": state, "list": [1, 2]}


def test_the_folder_holds_the_weights_the_groups_the_states_and_nothing_else(tmp_path: Path):
    folder = save(tmp_path / "new" / "run", 7)
    assert folder == tmp_path / "new" / "run" / "step_7"
    assert names(tmp_path / "new" / "run") == ["step_7"]
    assert names(folder) == ["ema.safetensors", "llm_config.json", "manifest.json", "optimizer.safetensors", "tokenizer", "trainer.json"]
    assert load_file(folder / "optimizer.safetensors")["exp_avg.w"].tolist() == [7.0] * 3
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert (manifest["format"], manifest["step"], manifest["groups"], manifest["states"]) == (1, 7, ["optimizer"], ["trainer"])
    assert manifest["files"].keys() == set(names(folder)) - {"manifest.json", "tokenizer"} | {"tokenizer/merges.txt"}


def test_a_name_that_is_taken_by_the_model_is_a_programmers_error(tmp_path: Path):
    for tensors, states in [({"ema": {}}, {}), ({}, {"llm_config": {}}), ({}, {"manifest": {}}), ({}, {"x": {"a": [{1: 2}]}})]:
        with pytest.raises(AssertionError):
            save_checkpoint(tmp_path, 1, write_model=write_model, tensors=tensors, states=states)
        assert names(tmp_path) == []


def test_saving_again_replaces_the_whole_folder(tmp_path: Path):
    save(tmp_path, 3, name="best")
    (tmp_path / "best" / "left_over").touch()
    save(tmp_path, 5, name="best")
    assert names(tmp_path) == ["best"] and "left_over" not in names(tmp_path / "best")
    assert load_checkpoint(tmp_path / "best")[1] == {"trainer": {"step": 5}}


@pytest.mark.gpu
def test_tensors_on_a_gpu(tmp_path: Path):
    value = torch.randn(1000, 300, device="cuda").bfloat16().t()
    folder = save_checkpoint(
        tmp_path, 1, write_model=write_model, tensors={"a": {"v": value, "s": torch.ones((), device="cuda")}}, states={}
    )
    assert torch.equal(load_checkpoint(folder)[0]["a"]["v"], value.cpu())
    assert torch.equal(load_checkpoint(folder, "cuda")[0]["a"]["v"], value)


# ---- what is damaged is noticed


def test_every_single_flipped_bit_is_noticed(tmp_path: Path):
    folder = save(tmp_path, 1)
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        bits = range(8 * len(whole)) if path.name == "manifest.json" else random.Random(0).sample(range(8 * len(whole)), 24)
        for bit in bits:
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=path.name):
                verify_checkpoint(folder)
        path.write_bytes(whole)
    verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["ema.safetensors", "optimizer.safetensors", "trainer.json", "tokenizer/merges.txt", "manifest.json"])
def test_a_missing_short_long_or_unreadable_file_is_named(tmp_path: Path, name: str):
    folder = save(tmp_path, 1)
    path = folder / name
    whole = path.read_bytes()
    for damage in (
        path.unlink,
        lambda: path.write_bytes(whole[:-1]),
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(whole + b"x"),
    ):
        damage()
        for use in (verify_checkpoint, load_checkpoint):
            with pytest.raises(CheckpointError, match=name) as caught:
                use(folder)
            assert "Cure:" in str(caught.value) and str(folder) in str(caught.value)
        path.write_bytes(whole)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(folder)


def test_every_damaged_file_is_listed_and_an_extra_file_is_fine(tmp_path: Path):
    folder = save(tmp_path, 1)
    (folder / "notes.txt").write_text("mine")
    verify_checkpoint(folder)
    (folder / "trainer.json").unlink()
    (folder / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors has 0 bytes instead of \d+; trainer.json is missing"):
        verify_checkpoint(folder)


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path):
    from unigen.training.checkpoint import _manifest_hash

    folder = save(tmp_path, 1)
    (tmp_path / "secret.json").write_text('{"a": 1}')
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    for change in ({"states": ["../secret"]}, {"files": {"/etc/hostname": {"size": 0, "sha256": ""}}}):
        forged = manifest | change
        forged["sha256"] = _manifest_hash(forged)
        (folder / "manifest.json").write_text(json.dumps(forged))
        with pytest.raises(CheckpointError, match="outside"):
            load_checkpoint(folder)


def test_a_later_format_is_refused_by_name(tmp_path: Path):
    from unigen.training.checkpoint import _manifest_hash

    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8")) | {"format": 99}
    manifest["sha256"] = _manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        verify_checkpoint(folder)


# ---- which one to resume from


def damage(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_newest_good_one_is_found_and_a_bad_newer_one_warned_about(tmp_path: Path, caplog):
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


def test_auto_takes_the_newest_or_starts_afresh_but_never_drops_a_run(tmp_path: Path):
    assert resolve_resume(None, tmp_path) is None
    assert resolve_resume("auto", tmp_path) is None
    assert resolve_resume("auto", tmp_path / "nowhere") is None
    save(tmp_path, 1)
    assert resolve_resume("auto", tmp_path) == tmp_path / "step_1"
    damage(tmp_path / "step_1")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(step_1\)"):
        resolve_resume("auto", tmp_path)


def test_a_named_folder_must_be_good_and_the_good_ones_are_listed(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert resolve_resume(str(tmp_path / "step_2"), tmp_path) == tmp_path / "step_2"
    damage(tmp_path / "step_2")
    for value in (tmp_path / "step_2", tmp_path / "step_4", tmp_path, "no/such/step_5"):
        with pytest.raises(CheckpointError, match="Cure") as caught:
            resolve_resume(value, tmp_path)
        text = str(caught.value)
        assert str(value) in text and f"{tmp_path / 'step_3'}, {tmp_path / 'step_1'}" in text
        assert "--resume_from_checkpoint" in text and f"nearby: {tmp_path / 'step_2'}" not in text
    shutil.rmtree(tmp_path / "step_1")
    shutil.rmtree(tmp_path / "step_3")
    with pytest.raises(CheckpointError, match="no good one nearby"):
        resolve_resume(tmp_path / "step_2", tmp_path)


def test_resuming_from_an_older_one_warns_about_the_newer(tmp_path: Path, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    resolve_resume(tmp_path / "step_2", tmp_path)
    assert not caplog.messages
    resolve_resume(tmp_path / "step_1", tmp_path)
    assert "step_2" in caplog.text


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


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_sweeping_removes_what_dead_runs_left_and_nothing_else(tmp_path: Path):
    save(tmp_path, 1)
    dead, alive, own = dead_pid(), os.getppid(), os.getpid()
    for name in (f".step_2.partial-{dead}", f".step_2.partial-{alive}", f".best.partial-{own}", f".step_1.old-{dead}", ".cache", ".step_3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / f".notes.txt.partial-{dead}").touch()
    sweep_orphans(tmp_path)
    assert names(tmp_path) == sorted([".cache", f".notes.txt.partial-{dead}", ".step_3", f".step_2.partial-{alive}", "step_1"])
    sweep_orphans(tmp_path / "nowhere")


def test_sweeping_gives_back_one_whose_replacement_never_came(tmp_path: Path):
    save(tmp_path, 1, name="best").rename(tmp_path / f".best.old-{dead_pid()}")
    sweep_orphans(tmp_path)
    assert names(tmp_path) == ["best"]
    verify_checkpoint(tmp_path / "best")


# ---- a failing disk


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and its permission")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_costs_only_the_new_checkpoint(small_disk: Path):
    old = save(small_disk, 1)
    before = {p.relative_to(old): p.read_bytes() for p in old.rglob("*") if p.is_file()}
    big = torch.zeros(300_000)

    def fill_in_model(folder: Path) -> None:
        save_file({"w": big}, folder / "ema.safetensors")

    for name in (None, "step_1"):
        for options in (
            {"write_model": write_model, "tensors": {"optimizer": {"big": big}}, "states": {}},
            {"write_model": fill_in_model, "tensors": {}, "states": {}},
            {"write_model": write_model, "tensors": {}, "states": {"loader": "x" * 1_200_000}},
        ):
            with pytest.raises(CheckpointError, match=r"(?i)no space left.*save_total_limit"):
                save_checkpoint(small_disk, 2, name=name, **options)
            assert names(small_disk) == ["step_1"]
    verify_checkpoint(old)
    assert before == {p.relative_to(old): p.read_bytes() for p in old.rglob("*") if p.is_file()}
    save(small_disk, 2)  # there is room for a small one, so nothing was left behind


def test_a_read_only_disk_is_a_clear_error(small_disk: Path):
    old = save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=f"{os.strerror(errno.EROFS)}.*Cure"):
        save(small_disk, 2)
    prune_checkpoints(small_disk, 1)
    sweep_orphans(small_disk)
    verify_checkpoint(old)


def test_a_limit_on_file_sizes_is_a_clear_error(tmp_path: Path):
    """The kernel's own refusal in the middle of a write, without needing root."""
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)):
            save_checkpoint(tmp_path, 2, write_model=write_model, tensors={"o": {"big": torch.zeros(50_000)}}, states={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_1"]


def test_a_place_that_is_no_folder_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Cure"):
        save(tmp_path / "file", 1)
    (tmp_path / "step_2").touch()
    with pytest.raises(CheckpointError, match="Cure"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["file", "step_2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), SafetensorError("x"), OSError(errno.EIO, "I/O error")])
def test_an_interrupted_or_failing_writer_leaves_nothing(tmp_path: Path, error: BaseException):
    def fail(folder: Path) -> None:
        write_model(folder)
        raise error

    save(tmp_path, 1)
    expected = CheckpointError if isinstance(error, (OSError, SafetensorError)) else type(error)
    with pytest.raises(expected):
        save_checkpoint(tmp_path, 1, write_model=fail, tensors={}, states={})
    assert names(tmp_path) == ["step_1"]
    assert load_checkpoint(tmp_path / "step_1")[1] == {"trainer": {"step": 1}}


# ---- kill -9


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from unigen.training.checkpoint import *

torch.set_num_threads(1)
root, mode = Path(sys.argv[1]), sys.argv[2]
OWN_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir"}

def write_model(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(bytes(300_000))

def save(step, name=None, size=1000):
    save_checkpoint(root, step, write_model=write_model, tensors={"o": {"w": torch.full((size,), float(step))}},
                    states={"s": {"step": step}}, name=name)

def check(folder, allowed):
    tensors, states = load_checkpoint(folder)
    step = states["s"]["step"]
    assert set(tensors["o"]["w"].tolist()) == {float(step)}, "mixed"
    assert step in allowed, (step, allowed)
    return step

def die_at(event_number):  # kill -9 just before the n-th operation on the file system
    count = 0
    def hook(event, args):
        nonlocal count
        if event in OWN_EVENTS:
            if count == event_number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
    sys.addaudithook(hook)

def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return pid

if mode == "every":
    save(1, "best"); save(1)
    seen, killed, n = set(), 0, 0
    while True:
        def work():
            die_at(n)
            save(2, "best"); save(2); prune_checkpoints(root, 1)
        _, status = os.waitpid(fork(work), 0)
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
        sweep_orphans(root)
        best = check(root / "best", {1, 2})
        latest = latest_checkpoint(root)
        found = (best, check(latest, {1, 2}))
        assert found in {(1, 1), (2, 1), (2, 2)}, found
        seen.add(found)
        left = {p.name for p in root.iterdir()}
        assert left <= {"best", "step_1", "step_2"}, left
        if os.WIFEXITED(status):
            break
        killed += 1; n += 1
        save(1, "best"); save(1)
        import shutil; shutil.rmtree(root / "step_2", ignore_errors=True)
    assert left == {"best", "step_2"}, left
    assert seen == {(1, 1), (2, 1), (2, 2)}, seen
    print("killed", killed)
else:
    rng, last, killed_inside = random.Random(0), 0, 0
    for round in range(12):
        def work(first=last):
            for step in range(first + 1, first + 100):
                save(step, size=300_000); save(step, "best", size=300_000); prune_checkpoints(root, 2)
        pid = fork(work)
        deadline = time.monotonic() + 60
        while max([0, *(int(p.name[5:]) for p in root.glob("step_*"))]) <= last:  # however slow the disk
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        killed_inside += any(p.name.startswith(".") for p in root.iterdir())
        sweep_orphans(root)
        steps = sorted(int(p.name[5:]) for p in root.glob("step_*"))
        for step in steps:
            check(root / f"step_{step}", {step})
        assert steps[-1] > last, (steps, last)
        if last:
            check(root / "best", range(last, 10000))
        last = steps[-1]
        assert not [p for p in root.iterdir() if p.name.startswith(".")]
    prune_checkpoints(root, 2)
    assert sorted(p.name for p in root.iterdir()) == ["best", *sorted(f"step_{step}" for step in steps[-2:])]
    assert killed_inside >= 3, killed_inside
    print("killed", killed_inside)
"""


@pytest.mark.parametrize("mode", ["every", "random"])
def test_kill_9_at_any_moment_leaves_whole_checkpoints_only(tmp_path: Path, mode: str):
    """``every``: before each single file operation of saving and pruning; ``random``: by the clock, in the middle of writes."""
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path / "run"), mode], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= (30 if mode == "every" else 3)
