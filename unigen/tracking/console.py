"""What a run says in a terminal: a bar, or plain lines."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from unigen.printing import bar, beneath, printable_lines

_SHOWN: dict[str, tuple[str, str]] = {
    "loss": ("loss", ".4f"),
    "text_loss": ("text", ".4f"),
    "image_loss": ("image", ".4f"),
    "preserve_loss": ("kept", ".4f"),
    "grad_norm": ("norm", ".3f"),
    "learning_rate": ("lr", ".2e"),
    "tokens_per_second": ("tok/s", ",.0f"),
    "data_wait": ("wait", ".0%"),
}
"""Metric -> its short name and format; ``data_wait`` is the share of the time spent waiting for data, in [0,
1]."""


class Progress:
    """A bar on a terminal; elsewhere a plain line every ``every`` steps, and at the last.

    A terminal or a pipe that is gone, or a file on a full disk, is no reason to end a run: what cannot be
    shown is left out.

    Args:
        total_steps: Optimiser steps of the whole run.
        initial: Steps done already, after a resume.
        every: Steps between two plain lines.
        enabled: False prints nothing: the other processes of a run.
        stream: Where to; standard error by default.
        note: Is told every line, also where a bar or nothing is shown.
    """

    def __init__(
        self,
        total_steps: int,
        initial: int,
        every: int,
        enabled: bool,
        stream: TextIO | None = None,
        note: Callable[[str], None] = lambda line: None,
    ):
        self._note = note
        self._total, self._initial, self._every, self._enabled = total_steps, initial, every, enabled
        self._stream = stream or sys.stderr
        # when the first step was done, and which: it alone compiles and warms up
        self._first: tuple[float, int] | None = None
        self._start = time.monotonic()
        self._bar = None
        if enabled and self._stream.isatty():
            # Some containers' terminals say that they have no columns; a bar of no width would be invisible.
            width = (
                {"dynamic_ncols": True}
                if os.get_terminal_size(self._stream.fileno()).columns
                else {"ncols": 160}
            )
            self._bar = bar("", self._stream, total=total_steps, initial=initial, unit="step", **width)

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Shows that ``step`` optimiser steps are done; of ``metrics`` what is known by name (see ``_SHOWN``)
        and not None."""
        now, line = time.monotonic(), ""
        if step % self._every == 0 or step == self._total:
            line = f"step {step}/{self._total}  {describe(metrics)}  ETA {self._eta(now, step)}"
            self._note(line)
        if not self._enabled:
            return
        if self._bar is not None:
            if metrics:
                self._bar.set_postfix_str(describe(metrics), refresh=False)
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)
        elif line:
            self._print(line)
        if self._first is None:
            self._first = (now, step)

    def write(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._note(text)
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.write(printable_lines(text), file=beneath(self._stream))
        elif self._enabled:
            self._print(text)

    def close(self) -> None:
        """Leaves the bar as it is; a second call does nothing."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, file=self._stream, flush=True)

    def _eta(self, now: float, step: int) -> str:
        since, done = self._first or (self._start, self._initial)
        if step <= done:
            return "?"
        return duration((now - since) / (step - done) * (self._total - step))


def describe(metrics: dict[str, Any]) -> str:
    """The known metrics in a fixed order, for people: ``loss 1.2340  text 0.9000  lr 1.00e-05``."""
    parts = []
    for name, (short, form) in _SHOWN.items():
        value = plain(metrics.get(name))
        if value is not None:
            parts.append(f"{short} {value:{form}}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def plain(value: Any) -> Any:
    """A tensor or array scalar as a Python number; everything else as it is."""
    return value.item() if hasattr(value, "item") else value
