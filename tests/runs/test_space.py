"""Disk space: on real small file systems where the machine lets us mount one, with pretended numbers
elsewhere. And the memory left: of the machine, and of the container or job around it."""

import errno
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saves import damage, mount_disk, names, together

from unigen.files import free_bytes
from unigen.runs import space as module
from unigen.runs.channel import Channel
from unigen.runs.checkpoint import verify_checkpoint
from unigen.runs.saver import Contents, Saver, StateEntry
from unigen.runs.space import DiskSpace, SpaceError, free_memory, mount_of

MB = 1_000_000


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifests say one and the same time, so that all checkpoints have one size."""
    monkeypatch.setattr(
        "unigen.runs.saver.time",
        SimpleNamespace(time=lambda: 1.8e9, monotonic=time.monotonic, sleep=time.sleep),
    )


def save(run: Path, step: int, nbytes: int = 400_000, name: str | None = None) -> Path:
    entries = [StateEntry("ema", "w", (nbytes // 4,), torch.full((nbytes // 4,), float(step)))]
    Saver(run, 0, Channel(1, torch.device("cpu"))).save(
        Contents(step, entries, {"trainer": {"step": step}}, lambda _: None, {}), name
    )
    return run / (name or f"step_{step}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    yield from mount_disk(tmp_path, "4m")


@pytest.fixture(autouse=True)
def no_endless_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that never ends is a failure, not a hanging test."""
    looks = iter(range(1000))
    real = DiskSpace._lack

    def lack(self: DiskSpace, nbytes: int) -> str:
        assert next(looks, None) is not None, "it looks again and again"
        return real(self, nbytes)

    monkeypatch.setattr(DiskSpace, "_lack", lack)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch):
    """Free space as a test says; a removed folder gives back its bytes."""
    free = {"bytes": 0}
    monkeypatch.setattr(module, "free_bytes", lambda folder: free["bytes"])
    real = module.remove_checkpoint

    def remove(folder: Path) -> None:
        size = module.folder_bytes(folder)
        real(folder)
        free["bytes"] += size

    monkeypatch.setattr(module, "remove_checkpoint", remove)
    return free


def space(run: Path, policy: str = "stop", min_free_gb: float = 0.0, **more) -> tuple[DiskSpace, list[str]]:
    said: list[str] = []
    return DiskSpace(run, policy, min_free_gb, said.append, **more), said


# ---- stop


def test_stop_raises_with_what_is_needed_free_where_and_the_fix_only_when_it_does_not_fit(disk: Path):
    """Passes when 3 MB fit on 4.19 MB, and 5 MB, or 3 MB with 2 MB to stay free, do not."""
    run = disk / "run"  # it need not exist
    assert space(run)[0].need(3 * MB) is None
    with pytest.raises(SpaceError) as caught:
        space(run)[0].need(5 * MB)
    text = str(caught.value)
    assert str(run) in text and "takes 5 MB" in text and "4.19 MB are free" in text and f"on {disk}" in text
    for word in (
        "Fix:",
        "--output_dir",
        "--save_total_limit",
        "--low_space prune or wait",
        "--resume_from_checkpoint auto",
    ):
        assert word in text
    with pytest.raises(SpaceError, match=r"2 MB are to stay free \(min_free_gb\)"):
        space(run, min_free_gb=0.002)[0].need(3 * MB)


def test_a_disk_that_cannot_be_asked_is_a_space_error(tmp_path: Path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(module.os, "statvfs", fail)
    with pytest.raises(SpaceError, match=r"I/O error.*Fix"):
        space(tmp_path)[0].need(1)


# ---- prune


def test_prune_removes_the_oldest_until_it_fits_and_says_each(disk: Path):
    """Passes when of 1, 2, 3, 4 and best, 1 and 2 go for 1.9 MB on a disk with 2.2 - 0.5 MB left, and no
    more."""
    for step in (1, 2, 3, 4):
        save(disk, step)
    save(disk, 1, name="best")
    free = free_bytes(disk)
    asking, said = space(disk, "prune")
    asking.need(free - 200_000)
    assert len(names(disk)) == 5 and said == []
    asking.need(free + 500_000)
    assert names(disk) == ["best", "step_3", "step_4"]
    assert [
        str(disk / f"step_{n}") in line and "Removed" in line and "low_space is prune" in line
        for n, line in enumerate(said, 1)
    ] == [True, True]
    for folder in disk.iterdir():
        verify_checkpoint(folder)


def test_prune_never_removes_the_newest_good_one_the_best_or_one_protected_or_being_written(
    tmp_path: Path, pretended
):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    save(tmp_path, 4, name="best")
    (tmp_path / ".step_5.partial-1").mkdir()
    (tmp_path / "step_6").mkdir()  # no manifest
    damage(tmp_path / "step_4", "ema.safetensors")
    size = module.folder_bytes(tmp_path / "step_1")
    asking, said = space(tmp_path, "prune")
    # 2, and then the damaged 4: 3 is the newest good one
    asking.need(2 * size, protect=[tmp_path / "step_1"])
    assert names(tmp_path) == [".step_5.partial-1", "best", "step_1", "step_3", "step_6"]
    assert "step_4" in said[0] and "does not count" in said[0] and len(said) == 3
    pretended["bytes"] = 0
    with pytest.raises(SpaceError, match=r"removing the checkpoints that may go .* would not do"):
        asking.need(size, protect=[tmp_path / "step_1"])
    assert "step_1" in names(tmp_path)


def test_prune_removes_nothing_where_all_would_not_be_enough(tmp_path: Path, pretended):
    for step in (1, 2, 3):
        save(tmp_path, step)
    with pytest.raises(SpaceError, match="would not do"):
        space(tmp_path, "prune")[0].need(3 * 400_000)
    assert names(tmp_path) == ["step_1", "step_2", "step_3"]


def test_prune_removes_nothing_while_no_checkpoint_is_good(tmp_path: Path, pretended):
    for step in (1, 2, 3):
        damage(save(tmp_path, step), "ema.safetensors")
    with pytest.raises(SpaceError):
        space(tmp_path, "prune")[0].need(400_000)
    assert names(tmp_path) == ["step_1", "step_2", "step_3"]


def test_prune_waits_for_a_file_system_that_frees_late_instead_of_removing_more(
    tmp_path: Path, pretended, monkeypatch
):
    for step in (1, 2, 3):
        save(tmp_path, step)
    remove = module.remove_checkpoint

    def late(folder: Path) -> None:
        before = pretended["bytes"]
        remove(folder)
        after, pretended["bytes"] = pretended["bytes"], before
        threading.Timer(0.2, lambda: pretended.update(bytes=after)).start()

    monkeypatch.setattr(module, "remove_checkpoint", late)
    space(tmp_path, "prune")[0].need(400_000)
    assert names(tmp_path) == ["step_2", "step_3"]


# ---- wait


def test_wait_goes_on_when_it_fits_and_calls_idle_meanwhile(disk: Path, monkeypatch):
    """Passes when it returns only after the file that filled the disk is gone, having said twice, once each,
    what it does."""
    monkeypatch.setattr(module, "POLL_S", 0.01)
    (disk / "full").write_bytes(bytes(3 * MB))
    rounds = []

    def idle() -> None:
        rounds.append((disk / "full").exists())
        if len(rounds) == 3:
            (disk / "full").unlink()

    asking, said = space(disk, "wait")
    asking.need(2 * MB, idle=idle)
    assert rounds == [True] * 3
    assert (
        len(said) == 2
        and said[0].startswith("Waiting for disk space")
        and "takes 2 MB" in said[0]
        and "going on" in said[1]
    )
    asking.need(2 * MB)
    assert len(said) == 2


def test_what_idle_raises_ends_the_waiting(disk: Path):
    def idle() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        space(disk, "wait")[0].need(5 * MB, idle=idle)


# ---- several processes


@pytest.mark.parametrize("policy", ["stop", "prune", "wait"])
def test_all_processes_come_to_the_same_end_and_only_the_main_one_speaks(
    tmp_path: Path, pretended, monkeypatch, policy: str
):
    monkeypatch.setattr(module, "POLL_S", 0.01)
    for step in (1, 2):
        save(tmp_path, step)
    rounds, said = [0, 0, 0], [[], [], []]

    def one(rank: int, channel: Any) -> str:
        channel.main = rank == 0

        def idle() -> None:
            rounds[rank] += 1
            if rounds[0] == 2:
                pretended["bytes"] = MB

        try:
            DiskSpace(tmp_path, policy, 0.0, said[rank].append, channel).need(400_000, idle=idle)
            return "room"
        except SpaceError as error:
            return str(error)

    ends = together(3, one)
    assert len(set(ends)) == 1
    assert (ends[0] == "room") == (policy != "stop") and len(said[0]) == {"stop": 0, "prune": 1, "wait": 2}[
        policy
    ]
    assert said[1:] == [[], []] and rounds[1] == rounds[0] == rounds[2]
    assert names(tmp_path) == (["step_2"] if policy == "prune" else ["step_1", "step_2"])


# ---- the forecast


def test_the_forecast_says_how_many_how_large_and_how_much_is_free(tmp_path: Path, pretended):
    pretended["bytes"] = 812 * 10**9
    asking, _ = space(tmp_path, min_free_gb=1.0)
    one = int(233.1e9)
    place = mount_of(tmp_path)
    assert (
        asking.forecast(0, 1200, 500, None, one)
        == f"Checkpoints: 3 of 233 GB each, 699 GB in all; 812 GB free on {place}"
    )
    text = asking.forecast(0, 10_000, 500, 2, one)
    assert (
        text.startswith("Checkpoints: 2 of 233 GB each, one more while it is written, 699 GB in all")
        and "Warning" not in text
    )
    text = asking.forecast(0, 1200, 500, None, one, best=int(58e9))
    assert "and 58 GB for the best one, 757 GB in all" in text and "Warning" not in text


@pytest.mark.parametrize(
    ("step", "total", "save_steps", "keep", "full"),
    [
        (0, 3000, 500, None, 2000),  # 812 GB hold three of 233.1 and leave 1 free
        (0, 1501, 500, None, 1501),  # the last step is saved as well
        (0, 1500, 500, None, None),
        (499, 3000, 500, None, 2000),
        (500, 3000, 500, None, 2500),
        (0, 10**6, 1, 2, None),
        (0, 10**6, 1, 3, 4),
        (3000, 3000, 500, None, None),
    ],
)
def test_the_warning_names_the_step_whose_checkpoint_will_not_fit(
    tmp_path: Path, pretended, step, total, save_steps, keep, full
):
    pretended["bytes"] = 812 * 10**9
    text = space(tmp_path, min_free_gb=1.0)[0].forecast(step, total, save_steps, keep, int(233.1e9))
    assert ("Warning" in text) == (full is not None)
    if full is not None:
        assert (
            f"step {full} will not fit" in text
            and "low_space is stop" in text
            and text.endswith("Fix: --save_total_limit 2")
        )


def test_what_is_there_already_counts_and_is_pruned_by_the_limit(tmp_path: Path, pretended):
    for step in (1, 2, 3):
        save(tmp_path, step)
    size = module.folder_bytes(tmp_path / "step_1")
    pretended["bytes"] = size
    assert "Warning" not in space(tmp_path)[0].forecast(3, 50, 1, 3, size)
    assert "step 5 will not fit" in space(tmp_path)[0].forecast(3, 50, 1, 4, size)
    pretended["bytes"] = size - 1
    text = space(tmp_path, "prune")[0].forecast(3, 50, 1, 3, size)
    assert "step 4 will not fit; the oldest will be removed then" in text and text.endswith(
        "Fix: --save_total_limit 2"
    )


def test_the_forecast_is_what_happens_on_a_real_disk(disk: Path):
    """Passes when the step that the forecast names is the first whose checkpoint does not fit."""
    size = module.folder_bytes(save(disk, 1))
    asking, _ = space(disk)
    text = asking.forecast(1, 50, 1, None, size)
    for step in range(2, 50):
        try:
            asking.need(size)
        except SpaceError:
            break
        save(disk, step)
    assert 5 < step < 12 and f"step {step} will not fit" in text


# ---- memory


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine of 64 GB, half of it available; ``pretend(own group's lines, {folder: {file: text}})``."""

    def make(own: str, groups: dict[str, dict[str, str]]) -> float:
        (tmp_path / "meminfo").write_text("MemTotal:       64000000 kB\nMemAvailable:   32000000 kB\n")
        (tmp_path / "own").write_text(own)
        for folder, files in groups.items():
            (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / "cgroup" / folder / name).write_text(text)
        for name, path in (("MEMINFO", "meminfo"), ("OWN_GROUP", "own"), ("GROUPS", "cgroup")):
            monkeypatch.setattr(module, name, tmp_path / path)
        return free_memory()

    return make


def two(limit: str, used: int, cache: int) -> dict[str, str]:
    return {
        "memory.max": limit + "\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def one(limit: int, used: int, cache: int) -> dict[str, str]:
    stat = f"cache 9\ntotal_inactive_file {cache}\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


def test_here_it_is_a_number_of_bytes():
    assert 1e8 < free_memory() < 1e14


def test_without_a_limit_it_is_what_the_machine_has(pretend):
    assert pretend("0::/job\n", {"job": two("max", 10**9, 0)}) == 32_000_000 * 1024


def test_the_tightest_limit_above_counts_and_file_caches_are_free(pretend):
    groups = {"job/step": two("9000000000", 3 * 10**9, 10**9), "job": two("6000000000", 3 * 10**9, 5 * 10**8)}
    assert pretend("0::/job/step\n", groups) == 3.5e9


def test_in_a_container_the_root_is_the_limit(pretend):
    assert pretend("0::/kubepods/pod7\n", {".": two("4000000000", 10**9, 0)}) == 3e9


def test_the_older_version_too(pretend):
    own = "12:cpu,cpuacct:/job\n5:memory:/job\n0::/\n"
    assert (
        pretend(own, {"memory/job": one(8 * 10**9, 2 * 10**9, 10**9), "memory": one(2**63 - 4096, 0, 0)})
        == 7e9
    )


def test_where_nobody_says_there_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("MEMINFO", "OWN_GROUP", "GROUPS"):
        monkeypatch.setattr(module, name, tmp_path / "nothing")
    assert free_memory() == math.inf


def test_a_first_checkpoint_that_cannot_fit_is_refused_before_the_first_step(tmp_path: Path):
    free = free_bytes(tmp_path)
    for policy in ("stop", "prune", "wait"):
        disk = DiskSpace(tmp_path, policy, 0, print)
        disk.need_first(1000)
        if policy == "wait":
            disk.need_first(free + 10**12)
        else:
            with pytest.raises(SpaceError, match=r"Nothing was trained.*Fix: "):
                disk.need_first(free + 10**12)
