"""Host memory of loading and sharding (``benchmarks/memory.py`` measures more engines and numbers of
processes)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import memory
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("memory"),
    pytest.mark.skipif(
        not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says what memory processes share"
    ),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("memory")
    yield folder / "model", memory.make_checkpoint(folder / "model", 1.0)
    shutil.rmtree(folder)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_processes_load_and_shard_a_checkpoint_of_1_gb_in_at_most_1_2_times_its_size_and_1_gb(
    checkpoint: tuple[Path, int], engine: str
):
    """Together, interpreters and libraries included; and what they hold afterwards is the checkpoint once.
    (With ``ddp``, twice: the benchmark shows 3.9 GB for 1.2 GB, where 2.4 GB are allowed.)"""
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    folder, size = checkpoint
    assert 1.0e9 <= size < 1.1e9
    peak = memory.measure(folder, engine, 2)
    assert peak.held == size
    assert size < peak.together - peak.start  # the samples saw it
    assert peak.together <= memory.limit(size), peak
    assert peak.separate <= memory.limit(size), peak
