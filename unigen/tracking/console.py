"""What a run says in a terminal: a bar, or plain lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from unigen.bars import Bar, duration
from unigen.messages import in_language
from unigen.printing import Guarded

__all__ = ["Progress", "as_number", "duration", "metrics_line"]

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
_FIRST = ("loss", "tokens_per_second")  # what a narrow terminal shows


class Progress:
    """A bar on a terminal; elsewhere a plain line every ``every`` steps, and at the last.

    A terminal or a pipe that is gone, or a file on a full disk, is no reason to end a run: what cannot be
    shown is left out.

    Args:
        initial: Steps done already, after a resume.
        enabled: False prints nothing: the other processes of a run.
        stream: Where to; standard error by default.
        note: Is told every line, also where a bar or nothing is shown.
    """

    def __init__(
        self, total_steps: int, initial: int, every: int, enabled: bool, stream: TextIO | None = None,
        note: Callable[[str], None] = lambda line: None,
    ):  # fmt: skip
        self._note = note
        self._total, self._every, self._enabled = total_steps, every, enabled
        stream = stream or sys.stderr
        self._stream = stream if isinstance(stream, Guarded) else Guarded(stream)
        self._bar = Bar("step", total_steps, done=initial, stream=self._stream, plain=False, shown=enabled)

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Shows that ``step`` optimiser steps are done; of ``metrics`` what is known by name (see ``_SHOWN``)
        and not None."""
        if metrics:
            self._bar.notes = _in_words(metrics, _FIRST)
        self._bar.update(step - self._bar.done)
        if step % self._every == 0 or step == self._total:
            line = in_language(f"step {step}/{self._total}  {metrics_line(metrics)}  ETA {self._bar.left}")
            self._note(line)
            if not self._bar.drawn:
                self._print(line)

    def write(self, *lines: str) -> None:
        """Lines above the bar; each is a sentence of its own, which another language knows as such."""
        for text in map(in_language, lines):
            self._note(text)
            self._print(text)

    def close(self) -> None:
        """Takes the bar away; a second call does nothing."""
        self._bar.close()

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            if self._enabled:
                print(text, file=self._stream, flush=True)


def metrics_line(metrics: dict[str, Any]) -> str:
    """The known metrics in a fixed order, for people: ``loss 1.2340  text 0.9000  lr 1.00e-05``."""
    return "  ".join(_in_words(metrics))


def _in_words(metrics: dict[str, Any], first: Sequence[str] = ()) -> list[str]:
    """The known metrics, each by its short name, those named ``first`` before the others."""
    names = [*first, *(name for name in _SHOWN if name not in first)]
    known = [(name, as_number(metrics.get(name))) for name in names]
    told = [(*_SHOWN[name], value) for name, value in known if value is not None]
    return [f"{in_language(short)} {value:{form}}" for short, form, value in told]


def as_number(value: Any) -> Any:
    """A tensor or array scalar as a Python number; everything else as it is."""
    return value.item() if hasattr(value, "item") else value
