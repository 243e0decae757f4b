"""What tests share: one thread a process, the reference numbers, a tiny model with data, a recorded run."""

import os

# The tests start hundreds of interpreters, and each would compile the package's files again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Before torch is imported: pytest-xdist runs a process per core, and threads of each would only fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import json
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from recorded import beat, record
from tiny import SMALL, draw_picture, text, write_jsonl

from unigen import bars

sys.dont_write_bytecode = False  # as above, of this process

# A shell that starts the tests in the background has these ignored, and so would every process that a test
# starts.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Some tests do less of what a benchmark does; the processes they start find it there, too.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import few_points  # noqa: E402, F401  (its folder of kills.py is on the path now)

os.environ["UNIGEN_LANGUAGE"] = "en"  # whatever the locale is

# Files that the data set unpacks stay out of the home folder. Workers of pytest-xdist inherit the first
# process's folder.
_UNPACKED = tempfile.TemporaryDirectory(prefix="unigen-tests-") if "UNIGEN_CACHE" not in os.environ else None
if _UNPACKED is not None:
    os.environ["UNIGEN_CACHE"] = _UNPACKED.name


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share what their file makes once go to one process of pytest-xdist, which else makes it again
    in each; and what takes long comes first, so that at the end no process waits for another."""
    if getattr(config.option, "loadgroup", False):  # in such a process
        for item in items:
            made = [one for each in item._fixtureinfo.name2fixturedefs.values() for one in each]
            if any(one.scope == "module" for one in made) and not item.get_closest_marker("xdist_group"):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))


@pytest.fixture(autouse=True)
def no_slow_machine_says_so(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long tells of it after some seconds, which is one more line where a test counts lines."""
    if request.node.path.name != "test_bars.py":
        monkeypatch.setattr(bars, "QUIET", 300.0)


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN takes the products of all linear layers, of any size, as on an AMD processor those of large
    ones."""
    import torch

    from unigen.model import products

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(products, "FEW_ROWS", 0)
    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "AVX512_IS_LEFT", True)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers (see its README)."""
    return Path(__file__).parent / "golden"


# Small things to train with: a checkpoint whose pictures are tiny, and records of every task; and a recorded
# run.


@pytest.fixture(scope="session")
def small_model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with smaller pictures."""
    folder = tmp_path_factory.mktemp("model") / "small"
    shutil.copytree(golden / "model", folder)
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


@pytest.fixture(scope="session")
def light_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a codec of pixels in place of the VAE, for tests that draw nothing: a start is
    shorter."""
    folder = tmp_path_factory.mktemp("light") / "light"
    shutil.copytree(small_model, folder)
    (folder / "ae.safetensors").unlink()
    (folder / "vae_config.json").write_text(json.dumps({"type": "pixel", "downsample": 4, "z_channels": 16}))
    (folder / "config.json").write_text(
        json.dumps(SMALL | {"vae_transform": {"max_size": 32, "min_size": 16}})
    )
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven records: two of text, two drawn, one described, one edited, one interleaved."""
    folder = tmp_path_factory.mktemp("data")
    a, b, c = (draw_picture(folder / f"{i}.png", i, 48 + 16 * i, 32) for i in range(3))
    return write_jsonl(
        folder / "train.jsonl",
        [
            text("What is two and two?", "Four."),
            {"text_prompt": "A red house", "image_path": a},
            {"image_path": b, "caption": "A small tree beside the house."},
            {
                "input_image": a,
                "editing_steps": [
                    {"instruction": "Make it night", "result_image": c},
                    {"instruction": "And snow", "result_image": b},
                ],
            },
            {
                "sequence": [
                    {"type": "text", "content": "First"},
                    {"type": "image", "image_path": a},
                    {"type": "text", "content": "and then the end."},
                ]
            },
            text("Say it twice.", "It. It."),
            {"text_prompt": "Nothing at all", "image_path": c},
        ],
    )


@pytest.fixture
def options(small_model: Path, records: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a short run; a test changes what it is about."""
    return {
        "model_path": str(small_model),
        "train_data_path": str(records),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "learning_rate": 1e-3,
        "device": "cpu",
        "num_workers": 0,
        "logging_steps": 1,
        "eval_samples": 0,  # answers take their time
    }


@pytest.fixture(scope="session")
def recorded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("runs") / "garden")


@pytest.fixture
def folder(recorded_folder: Path) -> Path:
    """1,240 of 2,000 steps on eight processes, alive."""
    beat(recorded_folder)
    return recorded_folder


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny encoders, by their kind."""
    import tiny_towers

    folder = tmp_path_factory.mktemp("towers")
    kinds = ("clip", "siglip", "dinov2", "bert")
    return {kind: str(getattr(tiny_towers, f"write_{kind}")(folder / kind)) for kind in kinds}


@pytest.fixture
def no_plugins_after(tmp_path: Path):
    """What a test's plugins add is gone after it."""
    from unigen import plugins, topics
    from unigen.data import containers, formats
    from unigen.evaluation import score
    from unigen.tracking import tracker

    tables: list[dict] = [
        plugins._loaded, topics.OPTIMIZERS, topics.SCHEDULES, containers.CONTAINERS, formats.FORMATS,
        score.METRICS, tracker.TRACKERS,
    ]  # fmt: skip
    before = [dict(table) for table in tables]
    yield
    for file in (file for plugin, file in plugins._loaded.items() if plugin not in before[0]):
        if file.is_relative_to(tmp_path):
            sys.modules.pop(file.stem, None)
    for table, rows in zip(tables, before):
        table.clear()
        table.update(rows)
