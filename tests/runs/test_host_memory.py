"""The memory left: of the machine, and of the container or job around it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from unigen.runs import host_memory
from unigen.runs.host_memory import free_memory


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
            monkeypatch.setattr(host_memory, name, tmp_path / path)
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
        monkeypatch.setattr(host_memory, name, tmp_path / "nothing")
    assert free_memory() == math.inf
