"""The progress of long work: one line of the terminal, below all that is printed and logged.

Where standard error is no terminal, a plain line comes now and then instead, without control characters. Of
several processes the first one tells. Everything that shows progress makes a :class:`Bar`; training's own
has a few words more (``tracking/console.py``).
"""

from __future__ import annotations

import io
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, TextIO, TypeVar

from unigen.messages import in_language
from unigen.printing import Guarded, beneath, bottom, printable, width_of

Item = TypeVar("Item")

QUIET, EVERY = 3.0, 10.0  # seconds of work before its first plain line, and between two of them
_REDRAW = 0.1  # seconds between two drawings
_WIDEST, _LEAST = 40, 8  # columns of the bar itself
_PREFIXES = ("", "k", "M", "G", "T")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Bar:
    """Work that takes a while: shown from its making to :meth:`close`, or as a block.

    Args:
        label: What is done, such as ``reading data``.
        total: Units of work; None: unknown.
        unit: Of what; ``B`` are bytes.
        done: Units that were done before.
        stream: Where it is shown; default: standard error.
        plain: Lines of its own where there is no terminal (and a command runs: Python stays silent).
        shown: False: never, as where another process tells.
        passing: It ends as soon as anything else is shown or said.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: int = 0,
        stream: TextIO | None = None,
        plain: bool = True,
        shown: bool = True,
        passing: bool = False,
    ):
        self.label, self.total, self.done = printable(in_language(label), 40), total, done
        self.unit = unit if unit == "B" else in_language(unit)
        self.notes: Sequence[str] = ()  # what else there is to say, what matters most first
        self.stream, self.passing = stream or sys.stderr, passing
        self.main = threading.current_thread() is threading.main_thread()
        self._began, self._before, self._first = time.monotonic(), done, (0.0, -1)
        self._lock = threading.Lock()
        shown = shown and self.stream is not None and os.environ.get("RANK", "0") == "0" and not _forked
        self._screen = _screen_of(self.stream) if shown else None
        plain = plain and shown and self._screen is None and isinstance(self.stream, Guarded)
        self._plain = _Plain(self) if plain else None
        if self._screen is not None:
            self._screen.add(self)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def update(self, units: int = 1) -> None:
        """Units more are done; any thread may say so."""
        with self._lock:
            self.done += units
            if self._first[1] < 0:
                self._first = time.monotonic(), self.done
        if self._screen is not None and not _forked:
            self._screen.draw()
        elif self._plain is not None:
            self._plain.tell()

    def close(self) -> None:
        """Takes it from the terminal; a second call does nothing."""
        screen, self._screen = self._screen, None
        if screen is not None and not _forked:
            screen.remove(self)
        if self._plain is not None:
            self._plain.close()

    @property
    def drawn(self) -> bool:
        """Is it on a terminal?"""
        return self._screen is not None

    @property
    def speed(self) -> float:
        """Units a second. The first update is left out where there are more: it alone warms up."""
        now, (at, done) = time.monotonic(), self._first
        since, before = (self._began, self._before) if self.done <= max(done, 0) else (at, done)
        return (self.done - before) / max(now - since, 1e-9)

    @property
    def left(self) -> str:
        """The time left, as :func:`duration` writes it; ``?`` where nothing is known."""
        speed = self.speed
        return duration((self.total - self.done) / speed) if self.total is not None and speed > 0 else "?"

    @property
    def count(self) -> str:
        """``12/200``, ``1.2/3.4 GB``; what is done alone where that is all that is known."""
        if self.unit != "B":
            total = "" if self.total is None else f"/{self.total:,}"
            return f"{self.done:,}{total}" + (f" {self.unit}" if self.unit else "")
        most = max(self.done, self.total or 0)
        power = next(n for n in range(len(_PREFIXES)) if most < 1000 ** (n + 1) or n == len(_PREFIXES) - 1)
        size, digits = 1000**power, 1 if power else 0
        total = "" if self.total is None else f"/{self.total / size:.{digits}f}"
        return f"{self.done / size:.{digits}f}{total} {_PREFIXES[power]}B"

    @property
    def share(self) -> str:
        """`` 34%``, or nothing where the total is unknown."""
        return f" {min(1.0, self.done / self.total):.0%}" if self.total else ""

    @property
    def told(self) -> list[str]:
        """Its parts in words, what matters most first; the label stands before them."""
        counted = [self.count] if self.done or self.total else []
        timed = [in_language(f"ETA {self.left}")] if self.total else []
        fast = [f"{self.speed / 1e6:,.0f} MB/s"] if self.unit == "B" and self.done > self._before else []
        return [*counted, *timed, *fast, *self.notes]


def each(label: str, items: Sequence[Item], unit: str = "") -> Iterator[Item]:
    """The items, with a bar that counts them."""
    with Bar(label, len(items), unit) as shown:
        for item in items:
            yield item
            shown.update()


def clear() -> None:
    """Closes what an error left open, so that its message stands alone."""
    for screen in list(_screens.values()):
        for bar in list(screen.bars):
            bar.close()
    for plain in list(_Plain.open):
        plain.close()


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, second = divmod(round(min(seconds, 1e9)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Plain:
    """The plain lines of a bar; of work that cannot say how far it is, one. Of bars within each other the
    outer one tells."""

    open: ClassVar[list[_Plain]] = []
    last: ClassVar[float] = -math.inf  # when the last line of any of them came

    def __init__(self, bar: Bar):
        self._bar, self._begun = bar, time.monotonic()
        self._timer: threading.Timer | None = None
        for other in list(self.open):
            if other._bar.passing:
                other.close()
        self.open.append(self)
        if bar.passing:
            bottom.append(self)
        if bar.total is None and self.open == [self]:
            self._timer = threading.Timer(QUIET, self.tell)
            self._timer.daemon = True
            self._timer.start()

    def tell(self) -> None:
        bar, now = self._bar, time.monotonic()
        if self.open[:1] != [self] or now < self._begun + QUIET or now < _Plain.last + EVERY:
            return
        _Plain.last = now
        if self in bottom:  # what passes has told all
            bottom.remove(self)
        with suppress(OSError, ValueError):  # nobody reads it any more
            print(f"{bar.label}{bar.share}  {'  '.join(bar.told)}".rstrip(), file=bar.stream, flush=True)

    def gives_way_to(self, stream: TextIO) -> bool:
        return True

    @contextmanager
    def away(self, ended: bool) -> Iterator[None]:
        """For the text of another; only what passes is asked."""
        self.close()
        yield

    def close(self) -> None:
        for held in (self.open, bottom):
            if self in held:
                held.remove(self)
        if self._timer is not None:
            self._timer.cancel()


class _Screen:
    """The last line of a terminal, on which bars stand: the newest of the main thread in full, the others
    (what is saved beside a training) in short behind it."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.bars: list[Bar] = []
        self._width, self._drawn_at, self._open = 0, 0.0, False  # columns that are written on
        self._lock = threading.RLock()

    def add(self, bar: Bar) -> None:
        with self._lock:
            self.bars = [*(one for one in self.bars if not one.passing), bar]
            if self not in bottom:
                bottom.append(self)
            self.draw(now=True)

    def remove(self, bar: Bar) -> None:
        with self._lock:
            self.bars = [one for one in self.bars if one is not bar]
            self._draw_or_leave()

    def _draw_or_leave(self) -> None:
        if self.bars:
            self.draw(now=True)
            return
        self._erase()
        if self in bottom:
            bottom.remove(self)
        _screens.pop(self.stream, None)

    def draw(self, now: bool = False) -> None:
        """Draws the line, but not too often, nor behind a line that has not ended."""
        if not now and time.monotonic() - self._drawn_at < _REDRAW:
            return
        with self._lock, suppress(OSError, ValueError):  # a terminal that is gone
            if self._open or not self.bars:
                return
            self._drawn_at = time.monotonic()
            text, width = _drawn(self.bars, _width_of(self.stream) - 1, self.stream)
            self.stream.write(f"\r{text}{' ' * (self._width - width)}")
            self.stream.flush()
            self._width = width

    @contextmanager
    def away(self, ended: bool) -> Iterator[None]:
        """Inside, a text may be written to the terminal; ``ended``: with the end of its line."""
        with self._lock:
            self._erase()
            self.bars = [one for one in self.bars if not one.passing]
            yield
            self._open = not ended
            self._draw_or_leave()

    def gives_way_to(self, stream: TextIO) -> bool:
        return stream.isatty()

    def _erase(self) -> None:
        with suppress(OSError, ValueError):
            if self._width:
                self.stream.write(self.blank)
                self.stream.flush()
        self._width = 0

    @property
    def blank(self) -> str:
        """What clears the line."""
        return f"\r{' ' * self._width}\r"


class _Inherited:
    """The line in a process that was forked while it stood there: whoever writes first clears it."""

    def __init__(self, screen: _Screen):
        self._screen, self._open = screen, False

    def gives_way_to(self, stream: TextIO) -> bool:
        return stream.isatty()

    @contextmanager
    def away(self, ended: bool) -> Iterator[None]:
        if not self._open:
            with suppress(OSError, ValueError):
                self._screen.stream.write(self._screen.blank)
        yield
        self._open = not ended


_screens: dict[TextIO, _Screen] = {}
_forked = False


def _screen_of(stream: TextIO) -> _Screen | None:
    """The line of a stream's terminal; None where it is none."""
    stream = beneath(stream)
    try:
        return _screens.setdefault(stream, _Screen(stream)) if stream.isatty() else None
    except ValueError:  # it is closed
        return None


def _in_child() -> None:
    global _forked
    _forked = True
    bottom[:] = [_Inherited(screen) for screen in _screens.values()]
    _Plain.open.clear()
    _screens.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _width_of(stream: TextIO) -> int:
    """Columns of a terminal; 80 where it says that it has none, as those of some containers do."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _drawn(bars: Sequence[Bar], room: int, stream: TextIO) -> tuple[str, int]:
    """The line of some bars, of at most ``room`` columns, and how many it takes."""
    full = next((bar for bar in reversed(bars) if bar.main), bars[0])
    others = [f"{bar.label}{bar.share}" for bar in bars if bar is not full]
    told, label, words = full.told, _cut(full.label, room), []
    left = room - width_of(label) - 1
    first = len(told) - len(full.notes) + 2  # the notes that matter most come before the other bars
    for number, word in enumerate([*told[:first], *others, *told[first:]]):
        kept = 0 if number < first + len(others) else _LEAST + 2  # for the bar itself
        if width_of(word) + 2 + kept <= left:
            words.append(word)
            left -= width_of(word) + 2
    wide = min(_WIDEST, left)
    drawing = f" {_bar_of(full, wide, stream)}" if full.total and wide >= _LEAST else ""
    text = f"{label}{drawing} {'  '.join(words)}".rstrip()
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    return text, width_of(_COLOUR.sub("", text))


def _cut(text: str, most: int) -> str:
    while width_of(text) > max(0, most):
        text = text[:-1]
    return text


def _bar_of(bar: Bar, width: int, stream: TextIO) -> str:
    """The bar itself, drawn by rich in as many columns."""
    from rich.console import Console
    from rich.progress_bar import ProgressBar

    class Out(io.StringIO):
        encoding = stream.encoding or "utf-8"  # type: ignore[assignment]  (which signs there are)

    colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    out = Out()
    console = Console(
        file=out, width=width, force_terminal=colour, color_system="standard" if colour else None,
        no_color=not colour, legacy_windows=False,
    )  # fmt: skip
    drawing = ProgressBar(total=bar.total or 1, completed=min(bar.done, bar.total or 1), width=width)
    console.print(drawing, end="")
    text = out.getvalue().rstrip("\n")
    return text + " " * (width - width_of(_COLOUR.sub("", text)))  # without colours the rest is left out
