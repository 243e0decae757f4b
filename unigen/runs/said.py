"""``train.log``: all that a run said, with the time, whatever the terminal showed of it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from unigen.printing import is_ours, printable_lines
from unigen.runs.log import JsonlLog
from unigen.runs.secrets import hide

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class RunLog(logging.Handler):
    """A handler of the root logger that keeps what is said until the run's folder is the run's, and from then
    on writes it there at once.

    What is said by a run that ends before that is written nowhere: such a run leaves the folder as it was.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._waiting: list[bytes] = []
        self._file: JsonlLog | None = None
        self._busy = False  # the file itself may warn
        self._alone = threading.RLock()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
            return
        self.note(text if record.levelno < logging.WARNING else f"{record.levelname}: {text}")

    def note(self, text: str) -> None:
        """Adds a text, which may have several lines; its secrets are hidden."""
        first, *more = hide(printable_lines(text)).splitlines() or [""]
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        line = "\n    ".join([f"{stamp} {first}", *more]).encode("utf-8", "backslashreplace") + b"\n"
        with self._alone:
            self._waiting.append(line)
            self._write()

    def open(self, path: Path) -> None:
        """From now on what is said goes to the end of ``path``, and first what was said before."""
        with self._alone:
            self._busy = True
            self._file = JsonlLog(path)
            self._busy = False
            self._write()

    def close(self) -> None:
        with self._alone:
            file, self._file = self._file, None
        if file is not None:
            file.close()
        super().close()

    def _write(self) -> None:
        if self._file is None or self._busy:
            return
        self._busy = True
        while self._waiting:
            lines, self._waiting = self._waiting, []
            self._file.append(b"".join(lines))
        self._busy = False


def listen(level: str, main: bool) -> RunLog:
    """Sets what a process of a run says: the terminal shows ``level`` and above of the main process, warnings
    of the others. Returns the main process's log, a handler of the root logger, which :func:`leave` takes
    away again; that of the others is told nothing."""
    logging.basicConfig(level=logging.INFO if main else logging.WARNING, format="%(message)s")
    root, said = logging.getLogger(), RunLog()
    for handler in root.handlers:
        if type(handler) is logging.StreamHandler:  # of basicConfig
            handler.setLevel(LEVELS[level])
            handler.addFilter(is_ours)
    if main:
        root.addHandler(said)
    return said


def leave(said: RunLog) -> None:
    logging.getLogger().removeHandler(said)
    said.close()
