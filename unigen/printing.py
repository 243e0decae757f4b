"""What is printed: nothing that a terminal obeys, but what the program itself draws.

Texts of data, names of files and of tensors, and messages of libraries are all written by others. So the two
standard streams are guarded while a command runs: whatever is printed, logged or raised passes
:class:`Guarded`, which shows control characters as ``\\x1b``. Who steers the terminal on purpose (rich in
``show/terminal.py``, the bars of ``bars.py``) writes to the stream :func:`beneath` it.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO, cast

bottom: list[Any] = []  # what stands on the last line of the terminal (bars.py), and goes for a line of text
LONGEST_NAME = 1000  # characters of a name or value that a message shows; the middle of a longer one goes
LONGEST_LINE = 8000  # characters of a line of a message, on standard error
# Whose warnings are no part of what a command says; "py" are those of the module warnings.
_LIBRARIES = ("py", "torch", "transformers", "bitsandbytes", "peft", "deepspeed", "accelerate", "urllib3")
_ERROR = 40  # of logging
_STAYS = "\u3000"  # the space of Chinese texts, which Python calls unprintable
_LINE_END = re.compile(r"(\r?\n)")


def printable(text: object, most: int | None = LONGEST_NAME) -> str:
    """A text of others on one line: what a terminal obeys, what turns the order of what stands beside it, and
    what cannot be encoded is shown as ``\\x1b``.

    Args:
        most: Characters that are shown; the middle of a longer text is left out. None: all.
    """
    shown = _shortened(str(text), most)  # before anything is done to millions of characters
    return shown if shown.isprintable() else "".join(map(_visible, shown))


def typed(word: object) -> str:
    """A word of a command line, such as a path, as it is to be typed: in quotes where a shell would part
    it."""
    return shlex.quote(str(word))


def first_line(error: BaseException) -> str:
    """The first line of an error's text that holds words, or its type where it has none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if any(map(str.isalnum, line))), type(error).__name__)


def _visible(c: str) -> str:
    if c.isprintable() or c in _STAYS:
        return c
    return c.encode("unicode_escape").decode()


def printable_lines(text: str, most: int | None = None) -> str:
    """As :func:`printable`, but line ends and tabs stay, and ``most`` counts the characters of a line."""
    if text.replace("\n", "").isprintable() and (most is None or len(text) <= most):
        return text
    parts = _LINE_END.split(text)
    lines = (_shortened(line, most).split("\t") for line in parts[::2])
    parts[::2] = ["\t".join(printable(cell, None) for cell in cells) for cells in lines]
    return "".join(parts)


def _shortened(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2) :]}"


class Guarded:
    """A text stream that shows what a terminal would obey, and what its encoding lacks, as escapes; lines
    keep their ends. All but writing is done by the stream ``beneath``.

    Args:
        beneath: Where it goes.
        most: Characters of a line; the middle of a longer one is left out. None: all.
    """

    def __init__(self, beneath: TextIO, most: int | None = None):
        self.beneath, self._most = beneath, most

    def write(self, text: str) -> int:
        encoding = self.beneath.encoding or "utf-8"
        shown = printable_lines(text, self._most)
        if not shown.isascii():
            shown = shown.encode(encoding, "backslashreplace").decode(encoding)
        with above(self.beneath, shown):
            self.beneath.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self.beneath)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)


def guard() -> None:
    """Guards the standard streams for the rest of the process, where they are not; messages are shortened,
    results are not."""
    if sys.stdout is not None and not isinstance(sys.stdout, Guarded):
        sys.stdout = cast(TextIO, Guarded(sys.stdout))
    if sys.stderr is not None and not isinstance(sys.stderr, Guarded):
        sys.stderr = cast(TextIO, Guarded(sys.stderr, LONGEST_LINE))


@contextmanager
def guarded() -> Iterator[None]:
    """:func:`guard` for a block of code."""
    before = sys.stdout, sys.stderr
    guard()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def is_ours(record: Any) -> bool:
    """Does a record of the log belong on the terminal? What libraries warn of is for ``train.log`` alone."""
    return record.levelno >= _ERROR or record.name.partition(".")[0] not in _LIBRARIES


@contextmanager
def libraries_silent() -> Iterator[None]:
    """Inside, what libraries warn of stays off the terminal, so that a command's own words come first; where
    Python is asked to warn (``-W``, PYTHONWARNINGS) nothing changes."""
    import logging

    if sys.warnoptions or logging.lastResort is None:
        yield
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):  # these have handlers of their own
        os.environ.setdefault(name, "error")
    logging.captureWarnings(True)
    logging.lastResort.addFilter(is_ours)
    try:
        yield
    finally:
        logging.lastResort.removeFilter(is_ours)
        logging.captureWarnings(False)


def beneath(stream: TextIO) -> TextIO:
    """The stream itself, for control sequences of our own."""
    return stream.beneath if isinstance(stream, Guarded) else stream


@contextmanager
def above(stream: TextIO, text: str) -> Iterator[None]:
    """Inside, the text may be written: bars that stand on the terminal are away, and come back below it."""
    with ExitStack() as stack:
        for line in list(bottom) if text else ():
            if line.gives_way_to(stream):
                stack.enter_context(line.away(text.endswith("\n")))
                stack.callback(stream.flush)
        yield


def width_of(text: str) -> int:
    """Columns that a terminal gives the text: Chinese characters take two, combining ones none."""
    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text
    )
