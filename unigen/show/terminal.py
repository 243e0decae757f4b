"""What commands print: safe for any terminal, any encoding, and a reader that leaves; laid out by rich."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from unigen.show.figures import cell, is_figure

if TYPE_CHECKING:
    from rich.columns import Columns
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

# The names of styles, in every command's output.
STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "soft": "dim"}
# Signs of ours, and what stands for one where the output's encoding lacks it.
PLAIN = dict(zip("●■○✓✕×↑━─▁▂▃▄▅▆▇█…–", "*#ovxx^=-_.:-=+*#.-", strict=True))
UNBOUND = 100_000  # columns of an output that is no terminal: nothing is broken into lines or cut


def has_colour() -> bool:
    """Colours where the output is a terminal and NO_COLOR (no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def harmless(text: object) -> str:
    """Text from data or files on one line, without characters that steer a terminal or turn the order of what
    stands beside them."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in str(text))


def showable(text: str) -> str:
    """The text with characters that the output's encoding lacks as plain signs, or else as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.translate(_plain(encoding)).encode(encoding, "backslashreplace").decode(encoding)


@cache
def _plain(encoding: str) -> dict[int, str]:
    """The part of ``PLAIN`` that an encoding needs."""
    return {ord(sign): plain for sign, plain in PLAIN.items() if not sign.encode(encoding, "ignore")}


def say(*parts: RenderableType) -> None:
    """Prints texts as they are and what rich draws, now; where nobody reads on (``unigen ... | head``) the
    command goes on to its own end and exit code."""
    text = "\n".join(part if isinstance(part, str) else drawn(part) for part in parts)
    with reader_may_leave():
        print(showable(text), flush=True)


def drawn(part: RenderableType, width: int | None = None, colour: bool | None = None) -> str:
    """What rich draws, as lines of text.

    Args:
        width: Columns; default: those of the terminal, without a limit where there is none.
        colour: Whether to colour; default: where the terminal wants it.
    """
    from rich.console import Group

    out = io.StringIO()
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNBOUND
    # in a group, since a text alone would lose that it is not to be broken
    _console(out, width, has_colour() if colour is None else colour).print(Group(part), crop=False)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))


def line(*parts: tuple[object, str] | str) -> Text:
    """A text of parts, each a ``(text, style)`` or a text without one; made harmless."""
    from rich.text import Text

    pairs = [part if isinstance(part, tuple) else (part, "") for part in parts]
    return Text.assemble(*((harmless(text), style) for text, style in pairs))


def one_line(*parts: Text | tuple[object, str] | str, most: int | None = None) -> Text:
    """As :func:`line`, but never broken: what goes beyond its place, or ``most`` columns, is cut with …."""
    made = line(*parts)
    made.no_wrap, made.overflow = True, "ellipsis"
    if most is not None:
        made.truncate(most, overflow="ellipsis")
    return made


class Stretched:
    """A text as wide as its place, at most ``most`` columns: ``draw`` makes it for a number of columns."""

    def __init__(self, draw: Callable[[int], Text], most: int = 100):
        self.draw, self.most = draw, most

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(1, min(self.most, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.draw(min(self.most, options.max_width))


def indented(part: RenderableType, by: int = 2) -> Padding:
    """The part, its lines moved to the right."""
    from rich.padding import Padding

    return Padding(part, (0, 0, 0, by), expand=False)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Columns that line up, Chinese ones too: figures to the right and never broken, texts to the left.

    A cell is a number, a text (whose line breaks stay), or a ``Text`` made by :func:`line`.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="soft")
    shown = [[v if isinstance(v, Text) else _lines(cell(v)) for v in row] for row in rows]
    for k, name in enumerate(header):
        values = [row[k] for row in rows if row[k] not in ("", "–")]
        right = bool(values) and all(map(is_figure, values))
        # at least a figure, or an ordinary word
        words = max(map(_longest, [line(name), *(row[k] for row in shown)]))
        least = max(words, *(row[k].cell_len for row in shown)) if right else min(20, words)
        made.add_column(line(name), justify="right" if right else "left", min_width=least, overflow="fold")
    for row in shown:
        made.add_row(*row)
    return made


def notices(entries: Sequence[tuple[str, str]]) -> Table:
    """Texts under each other, each behind a mark of its level: ``!``, and ``-`` for a note."""
    from rich.table import Table

    made = Table.grid(padding=(0, 1, 0, 0))
    made.add_column()
    made.add_column(overflow="fold")
    for level, text in entries:
        mark, style = ("-", "") if level == "note" else ("!", level)
        made.add_row(line((mark, style)), line(text))
    return made


def grid(rows: Sequence[Sequence[RenderableType]]) -> Table:
    """Cells that line up without a header, each on one line; what is :class:`Stretched` fills the width."""
    from rich.table import Table

    made = Table.grid(padding=(0, 1, 0, 0))
    for k in range(max(map(len, rows))):
        fills = any(k < len(row) and isinstance(row[k], Stretched) for row in rows)
        made.add_column(no_wrap=not fills, overflow="ellipsis")
    for row in rows:
        made.add_row(*row)
    return made


def beside(parts: Iterable[RenderableType]) -> Columns:
    """The parts beside each other, as many in a row as fit."""
    from rich.columns import Columns

    return Columns(parts, padding=(0, 3))


def _lines(text: str) -> Text:
    """The text as it is broken into lines, each harmless."""
    from rich.text import Text

    return Text("\n").join(line(part) for part in text.split("\n"))


def _longest(text: Text) -> int:
    """Columns of its longest word."""
    return max((columns(word) for word in text.plain.split()), default=0)


@contextmanager
def live() -> Iterator[Callable[[Iterable[RenderableType], str], None]]:
    """A view on the terminal's second screen, shown anew by the function this gives: parts, of which those
    that do not fit are cut, over a last line that stays. Ctrl-C, SIGTERM and errors leave with the screen put
    right; the first two end the block in silence."""
    from rich.console import Group
    from rich.layout import Layout
    from rich.live import Live

    # leaves as Ctrl-C does
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = _console(_Output(), None, has_colour())
    view = Live(
        console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    )
    screen = Layout()

    def show(parts: Iterable[RenderableType], footer: str) -> None:
        screen.split_column(Layout(Group(*parts)), Layout(line((footer, "soft")), size=1))
        view.update(screen, refresh=True)

    try:
        with view:
            yield show
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


class _Output(io.TextIOBase):
    """The standard output, for texts whose characters it may lack."""

    encoding = property(lambda self: sys.stdout.encoding)  # type: ignore[assignment]

    def write(self, text: str) -> int:
        sys.stdout.write(showable(text))
        return len(text)

    def flush(self) -> None:
        sys.stdout.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return sys.stdout.fileno()


def _console(file: Any, width: int | None, colour: bool) -> Console:
    """Draws plain texts as they are: no markup, no emoji, nothing coloured by its looks."""
    from rich.console import Console
    from rich.theme import Theme

    return Console(
        file=file,
        width=width,
        theme=Theme(STYLES),
        force_terminal=colour or isinstance(file, _Output),
        color_system="standard" if colour else None,
        no_color=not colour,
        markup=False,
        emoji=False,
        highlight=False,
    )


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
