"""TensorBoard: event files in the folder of a run."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigen.config import Config, UserError
from unigen.runs.layout import TENSORBOARD
from unigen.tracking.background import Complain, TrackerClient
from unigen.tracking.services import EXTRAS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RETRY_S = 2.0


class TensorBoard(TrackerClient):
    """Metrics, pictures and texts in ``output_dir/tensorboard``, as a tracker's client.

    Every start of a run writes a file of its own. A resumed run tells TensorBoard to drop what was logged
    after ``resume_step``, that of the checkpoint it resumes from (0: none). While the disk takes nothing,
    calls wait for it, and ``complain`` is told.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, output_dir: Path, config: Config, resume_step: int, complain: Complain):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            fix = EXTRAS["tensorboard"]
            raise UserError(f"tensorboard is not installed ({error}). Fix: {fix}") from error
        self._new, self._complain = SummaryWriter, complain
        self._folder, self._purge_step = Path(output_dir) / TENSORBOARD, resume_step + 1
        self._writer: SummaryWriter | None = None

    def start(self) -> None:
        self._write(lambda writer: None)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Numbers alone: TensorBoard has no curve for anything else."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._write(lambda writer: [writer.add_scalar(name, value, step) for name, value in numbers.items()])

    def image(self, name: str, path: Path, step: int, caption: str) -> None:
        """The caption is the picture's description, which the page shows beside its name. Raises UserError
        where the picture cannot be read."""
        import numpy as np
        from torch.utils.tensorboard.summary import image

        from unigen.sequence.images import open_image

        summary = image(name, np.asarray(open_image(path)), dataformats="HWC")
        summary.value[0].metadata.summary_description = _as_code(caption)
        self._write(lambda writer: writer._get_file_writer().add_summary(summary, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Shown word for word, as a block of code: TensorBoard would take it for Markdown."""
        self._write(lambda writer: writer.add_text(name, _as_code(text), step))

    def finish(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, add: Callable[[SummaryWriter], Any]) -> None:
        """Calls ``add`` and brings what it adds to the disk, as soon as the disk takes it."""
        while True:
            try:
                if self._writer is None:
                    self._writer = self._new(str(self._folder), purge_step=self._purge_step)
                add(self._writer)
                self._writer.flush()
                self._purge_step = None
                return
            except OSError as error:
                self._complain("cannot write", f"What is logged waits until it can. {error}")
                self._drop_writer()
                self._await_disk()

    def _drop_writer(self) -> None:
        """TensorBoard reads a file up to half a record, so what follows an outage needs a file of its own."""
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        self._writer = None

    def _await_disk(self) -> None:
        """A writer that fails prints a traceback, so none is made while the disk takes nothing."""
        while True:
            time.sleep(RETRY_S)
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    file.write(bytes(1 << 16))
                return


def _as_code(text: str) -> str:
    """Markdown that shows ``text`` word for word."""
    return "\n".join("    " + line for line in text.splitlines())
