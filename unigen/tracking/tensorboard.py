"""TensorBoard: event files of a run, written with TensorBoard's own messages and nothing of its machinery."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

from unigen.config import UserError
from unigen.runs.layout import TENSORBOARD
from unigen.runs.log import JsonlLog


class EventFiles:
    """Metrics, pictures and texts as TensorBoard shows them, in ``output_dir/tensorboard``.

    Every start of a run writes a file of its own. A resumed run tells TensorBoard to drop what was logged
    after the step it resumes from.

    Args:
        output_dir: Folder of the run.
        resume_step: Optimiser steps done by the checkpoint the run resumes from, or 0.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, output_dir: Path, resume_step: int):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise UserError(
                f"tensorboard is not installed ({error}). Fix: pip install tensorboard"
            ) from error
        self._messages, self._summaries, self._record_writer = event_pb2, summary_pb2, RecordWriter
        folder = Path(output_dir) / TENSORBOARD
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{os.getpid()}"
        self._file = JsonlLog(folder / name)
        self._append(event_pb2.Event(file_version="brain.Event:2"))
        # TensorBoard drops what it has read of this step and later ones; the first start of a run it passes
        # over, so that needs one too.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(event_pb2.Event(step=resume_step + 1, session_log=start))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Numbers alone: TensorBoard has no curve for anything else."""
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
            if isinstance(value, int | float)
        ]
        if values:
            self._append(self._messages.Event(step=step, summary=self._summaries.Summary(value=values)))

    def image(self, name: str, path: Path, step: int) -> None:
        """The picture's own bytes. Raises OSError or UserError where it cannot be read."""
        from unigen.sequence.images import image_size

        data = path.read_bytes()
        width, height = image_size(data)
        image = self._summaries.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=data
        )
        self._add(name, step, image=image)

    def text(self, name: str, text: str, step: int) -> None:
        """Shown word for word, as a block of code: TensorBoard would take it for Markdown."""
        from tensorboard.compat.proto import tensor_pb2, tensor_shape_pb2

        shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
        block = "\n".join("    " + line for line in text.splitlines())
        tensor = tensor_pb2.TensorProto(dtype="DT_STRING", string_val=[block.encode()], tensor_shape=shape)
        plugin = self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        self._add(name, step, tensor=tensor, metadata=self._summaries.SummaryMetadata(plugin_data=plugin))

    def finish(self, failed: bool) -> None:
        self._file.close()

    def wait(self, deadline: float) -> None:
        """Nothing is under way."""

    def _add(self, name: str, step: int, **content: Any) -> None:
        value = self._summaries.Summary.Value(tag=name, **content)
        self._append(self._messages.Event(step=step, summary=self._summaries.Summary(value=[value])))

    def _append(self, event: Any) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        self._record_writer(record).write(event.SerializeToString())
        self._file.append(record.getvalue())
