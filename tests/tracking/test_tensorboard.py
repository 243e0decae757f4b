"""TensorBoard's event files, read back with TensorBoard's own reader."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import draw_picture

from unigen.config import Config
from unigen.tracking.tracker import Tracker

pytest.importorskip("tensorboard")


def read(folder: Path):
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0}).Reload()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.util import tensor_util

    return [
        (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
        for event in read(folder / "tensorboard").Tensors(name)
    ]


def run(folder: Path, steps: range, resume_step: int = 0, scale: float = 1.0) -> None:
    tracker = Tracker(folder, Config(tensorboard=True), resume_step)
    for step in steps:
        tracker.log({"loss": scale / step, "note": "a text", "nothing": None, "count": step}, step)
    tracker.finish()


def test_numbers_pictures_and_texts_are_shown(tmp_path: Path):
    picture = tmp_path / draw_picture(tmp_path / "a.png", 0, 48, 32)
    tracker = Tracker(tmp_path, Config(tensorboard=True))
    tracker.log({"loss": 0.5, "norm": float("nan"), "note": "x"}, 1)
    tracker.image("samples/0", picture, 1)
    tracker.text("prompts/0", "# a house\n<b>and</b> a 猫", 1)
    shown = read(tmp_path / "tensorboard")  # while the run goes on: nothing waits in a buffer
    assert set(shown.Tags()["tensors"]) == {"loss", "norm", "samples/0", "prompts/0"}
    assert [(event.step, list(event.tensor_proto.float_val)) for event in shown.Tensors("loss")] == [
        (1, [0.5])
    ]
    width, height, data = shown.Tensors("samples/0")[0].tensor_proto.string_val
    assert (int(width), int(height)) == (48, 32) and data == picture.read_bytes()
    (text,) = shown.Tensors("prompts/0")[0].tensor_proto.string_val
    assert text.decode() == "    # a house\n    <b>and</b> a 猫"
    assert shown.PluginTagToContent("text").keys() == {"prompts/0"} and shown.PluginTagToContent(
        "images"
    ).keys() == {"samples/0"}
    tracker.finish()


@pytest.mark.parametrize("cut", [0, 5])
def test_a_resumed_run_shows_every_step_once(tmp_path: Path, cut: int):
    """Pass: after a stop at 7 and a resume at 4 each step has the one value that was logged last, also where
    a kill left half a record."""
    run(tmp_path, range(1, 8))
    (file,) = (tmp_path / "tensorboard").iterdir()
    if cut:
        os.truncate(file, file.stat().st_size - cut)
    run(tmp_path, range(5, 11), 4, scale=10.0)
    wanted = [(step, (1.0 if step <= 4 else 10.0) / step) for step in range(1, 11)]
    found = curve(tmp_path, "loss")
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    run(tmp_path, range(10, 12), 9, scale=100.0)
    assert [step for step, _ in curve(tmp_path, "loss")] == list(range(1, 12))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_loses_no_point(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tracker = Tracker(tmp_path, Config(tensorboard=True))
    tracker.log({"loss": 1.0}, 1)
    file = tracker._backends["tensorboard"]._file._file
    disk = os.dup(file)
    os.dup2(os.open("/dev/full", os.O_WRONLY), file)
    tracker.log({"loss": 2.0}, 2)
    os.dup2(disk, file)
    tracker.log({"loss": 3.0}, 3)
    tracker.finish()
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(caplog.messages) == 2


def test_a_picture_that_cannot_be_read_is_told_and_the_rest_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tracker = Tracker(tmp_path, Config(tensorboard=True))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13))
    tracker.image("a", tmp_path / "none.png", 1)
    tracker.image("a", tmp_path / "broken.png", 1)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "Tracker tensorboard cannot show images"
    ]
    assert curve(tmp_path, "loss") == [(1, 1.0)]


def test_without_the_package_the_cure_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run(tmp_path, range(1, 3))
    assert len(caplog.messages) == 1 and "pip install tensorboard" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_neither_tensorflow_nor_torch_is_imported_for_it(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from unigen.config import Config
from unigen.tracking.tracker import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), Config(tensorboard=True))
tracker.log({{"loss": 1.0}}, 1)
tracker.text("a", "b", 1)
print({{"tensorflow", "torch", "PIL"}} & sys.modules.keys())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "set()\n", done.stderr
