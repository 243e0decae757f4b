"""What every test shares: one thread per process, and the reference numbers."""

import os

# Before torch is imported: pytest-xdist runs a process per core, and threads of each would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest

# A shell that starts the tests in the background has these ignored, and so would every process that a test starts.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Some tests do less of what a benchmark does; the processes they start find it there, too.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

# Files that the data set unpacks stay out of the home folder. Workers of pytest-xdist inherit the first process's folder.
_UNPACKED = tempfile.TemporaryDirectory(prefix="unigen-tests-") if "UNIGEN_CACHE" not in os.environ else None
if _UNPACKED is not None:
    os.environ["UNIGEN_CACHE"] = _UNPACKED.name


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers (see its README)."""
    return Path(__file__).parent / "golden"
