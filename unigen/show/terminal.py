"""What commands print: safe for any terminal, any encoding, and a reader that leaves."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager


def has_colour() -> bool:
    """Colours where the output is a terminal and NO_COLOR (no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def harmless(text: object) -> str:
    """Text from data or files on one line, without characters that steer a terminal or turn the order of what
    stands beside them."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in str(text))


def showable(text: str) -> str:
    """The text with characters that the output's encoding lacks as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    """Prints the text, now; where nobody reads on (``unigen ... | head``) the command goes on to its own end
    and exit code."""
    with reader_may_leave():
        print(showable(text), flush=True)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """What is printed inside may find that nobody reads it any more; then nothing is said, here or when the
    interpreter ends."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def columns(text: str) -> int:
    """Columns that a terminal gives the text: Chinese characters take two, combining ones none."""
    return sum(
        2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text
    )
