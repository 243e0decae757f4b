"""TensorBoard's event files, read back with TensorBoard's own reader."""

import io
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from tiny import draw_picture
from trackers import small_disk, wait_for

from unigen.config import Config
from unigen.tracking import background
from unigen.tracking import tensorboard as module
from unigen.tracking.tracker import Tracker

pytest.importorskip("tensorboard")


@pytest.fixture(autouse=True)
def names_in_order(monkeypatch: pytest.MonkeyPatch):
    """Files are read in the order of their names: second, host, process, and a number that the process counts
    up. Runs of one process within a second must not pass from 9 to 10."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


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


def test_numbers_pictures_and_texts_are_shown(tmp_path: Path, caplog):
    picture = tmp_path / draw_picture(tmp_path / "a.png", 0, 48, 32)
    tracker = Tracker(tmp_path, Config(tensorboard=True))
    tracker.log({"loss": 0.5, "norm": float("nan"), "note": "x"}, 1)
    tracker.image("samples/0", picture, 1, "a # house\n猫")
    tracker.text("prompts/0", "# a house\n<b>and</b> a 猫", 1)
    (queue,) = tracker._trackers
    wait_for(lambda: queue._done == 3)
    shown = read(tmp_path / "tensorboard")  # while the run goes on: nothing waits in a buffer
    assert set(shown.Tags()["tensors"]) == {"train/loss", "train/norm", "samples/0", "prompts/0/text_summary"}
    assert [(event.step, list(event.tensor_proto.float_val)) for event in shown.Tensors("train/loss")] == [
        (1, [0.5])
    ]
    width, height, data = shown.Tensors("samples/0")[0].tensor_proto.string_val
    assert (int(width), int(height)) == (48, 32)
    assert Image.open(io.BytesIO(data)).tobytes() == Image.open(picture).convert("RGB").tobytes()
    (text,) = shown.Tensors("prompts/0/text_summary")[0].tensor_proto.string_val
    assert text.decode() == "    # a house\n    <b>and</b> a 猫"
    assert shown.PluginTagToContent("text").keys() == {"prompts/0/text_summary"}
    assert shown.PluginTagToContent("images").keys() == {"samples/0"}
    assert shown.SummaryMetadata("samples/0").summary_description == "    a # house\n    猫"
    tracker.finish()
    assert not [record for record in caplog.records if record.name.startswith("unigen")]


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
    found = curve(tmp_path, "train/loss")
    assert [step for step, _ in found] == [step for step, _ in wanted]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    run(tmp_path, range(10, 12), 9, scale=100.0)
    assert [step for step, _ in curve(tmp_path, "train/loss")] == list(range(1, 12))


# The writer's own thread dies of a full disk, and says so.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_a_full_or_read_only_disk_does_not_take_comes_later_and_nothing_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch
):
    """Pass: one warning an outage; the calls return, and all points are there when the disk takes them."""
    monkeypatch.setattr(module, "RETRY_S", 0.1)
    with small_disk(tmp_path / "disk", 256) as disk:
        (disk / "ballast").write_bytes(bytes(252 << 10))
        tracker = Tracker(disk, Config(tensorboard=True))
        for step in range(1, 201):
            tracker.log({"loss": 1 / step, "norm": 2 / step}, step)
        wait_for(lambda: any("tensorboard cannot write" in message for message in caplog.messages))
        (disk / "ballast").unlink()
        (queue,) = tracker._trackers
        wait_for(lambda: queue._done == 200)
        tracker.finish()
        found = dict(curve(disk, "train/norm"))
        assert list(found) == list(range(1, 201)) and found[200] == pytest.approx(0.01)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        tracker = Tracker(disk, Config(tensorboard=True), 150)
        tracker.log({"loss": 9.0}, 151)
        wait_for(lambda: sum("tensorboard cannot write" in message for message in caplog.messages) == 2)
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        tracker.finish()
        # the point at which the disk was full may have been written whole, and comes again
        assert list(dict(curve(disk, "train/loss"))) == list(range(1, 152))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_stays_full_holds_the_end_for_its_limit_only(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(background, "FINISH_S", 0.5)
    with small_disk(tmp_path / "disk", 16) as disk:
        (disk / "ballast").write_bytes(bytes(16 << 10))
        tracker = Tracker(disk, Config(tensorboard=True))
        tracker.log({"loss": 1.0}, 1)
        done = threading.Timer(60, lambda: None)
        done.start()
        tracker.finish()
        assert done.is_alive(), "it waited for the disk"
        done.cancel()
    assert any("1 of 1 calls were not sent" in message for message in caplog.messages)


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
        "Tracker tensorboard cannot show images",
        "Tracker tensorboard is incomplete",
    ]
    assert curve(tmp_path, "train/loss") == [(1, 1.0)]


def test_without_the_package_the_cure_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run(tmp_path, range(1, 3))
    assert len(caplog.messages) == 1 and "the extra tensorboard" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_tensorflow_is_not_imported_for_it(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from unigen.config import Config
from unigen.tracking.tracker import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), Config(tensorboard=True))
tracker.log({{"loss": 1.0}}, 1)
tracker.text("a", "b", 1)
tracker.finish()
print("tensorflow" in sys.modules, "torch.utils.tensorboard" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "False True\n" and not done.stderr
    assert curve(tmp_path, "train/loss") == [(1, 1.0)]
