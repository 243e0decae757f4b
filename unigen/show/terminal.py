"""What commands print: safe for any terminal, any encoding, and a reader that leaves; laid out by rich."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from unigen.figures import cell, figures_alone
from unigen.messages import in_language
from unigen.printing import above, beneath, printable, printable_lines, width_of

if TYPE_CHECKING:
    from rich.columns import Columns
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

# The names of styles, in every command's output.
STYLES = {"good": "green", "warn": "yellow", "bad": "bold red", "note": "dim", "soft": "dim"}
# Signs of ours, and what stands for one where the output's encoding lacks it.
PLAIN = dict(zip("●■○✓✕×↑━─▁▂▃▄▅▆▇█…–", "*#ovxx^=-_.:-=+*#.-", strict=True))
CUT = 12  # columns that a text keeps which may be cut
LONGEST_TEXT = 4000  # characters of a text in a table or a line; the middle of a longer one goes
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
UNBOUND = 100_000  # columns of an output that is no terminal: nothing is broken into lines or cut


def has_colour() -> bool:
    """Colours where the output is a terminal and NO_COLOR (no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def harmless(text: object) -> str:
    """Text from data or files on one line: line ends and tabs become spaces, for the rest see
    :func:`printable`."""
    return printable(re.sub(r"\r?\n|\t", " ", str(text)), LONGEST_TEXT)


def showable(text: str) -> str:
    """The text with characters that the output's encoding lacks as plain signs, or else as escapes; and with
    nothing that steers a terminal but colours of rich."""
    parts = _COLOUR.split(text)
    parts[::2] = map(printable_lines, parts[::2])
    return _encodable("".join(parts))


def _encodable(text: str) -> str:
    encoding = sys.stdout.encoding or "utf-8"
    return text.translate(_plain(encoding)).encode(encoding, "backslashreplace").decode(encoding)


@cache
def _plain(encoding: str) -> dict[int, str]:
    """The part of ``PLAIN`` that an encoding needs."""
    return {ord(sign): plain for sign, plain in PLAIN.items() if not sign.encode(encoding, "ignore")}


def say(*parts: RenderableType) -> None:
    """Prints texts in the language of the command and what rich draws, now; where nobody reads on (``unigen
    ... | head``) the command goes on to its own end and exit code."""
    text = "\n".join(
        printable_lines(in_language(part)) if isinstance(part, str) else drawn(part) for part in parts
    )
    out = beneath(sys.stdout)
    with reader_may_leave(), above(out, "\n"):
        print(showable(text), flush=True, file=out)


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


def indented(part: RenderableType, by: int = 2) -> Padding:
    """The part, its lines moved to the right."""
    from rich.padding import Padding

    return Padding(part, (0, 0, 0, by), expand=False)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], minor: Sequence[int] = ()) -> RenderableType:
    """Columns that line up, Chinese ones too: figures to the right and never broken, texts to the left.

    A cell is a number, a text (whose line breaks stay), or a ``Text`` made by :func:`line`. Where all are too
    wide, the ``minor`` columns go one after the other.
    """
    from rich.text import Text

    shown = [[v if isinstance(v, Text) else _lines(cell(v)) for v in row] for row in rows]
    made = []
    for k, name in enumerate(header):
        cells, right = [line(in_language(name)), *(row[k] for row in shown)], figures_alone(rows, k)
        # at least a figure, or an ordinary word
        words = max(map(_longest, cells))
        least = max(words, *(cell.cell_len for cell in cells[1:])) if right else min(20, words)
        most = max((part.cell_len for cell in cells for part in cell.split("\n")), default=0)
        made.append(_Column(cells, least, least, most, right))
    return _Table(made, minor, gap=2, headed=True)


def grid(rows: Sequence[Sequence[Text | Stretched]], minor: Sequence[int] = ()) -> RenderableType:
    """As :func:`table`, without a header, a line each; what is :class:`Stretched` fills the width."""
    made = []
    for k in range(max(map(len, rows))):
        cells = [row[k] if k < len(row) else line("") for row in rows]
        texts = [cell.cell_len for cell in cells if not isinstance(cell, Stretched)]
        if len(texts) < len(cells):
            made.append(_Column(cells, 1, Stretched.LEAST, Stretched.MOST))
        else:
            made.append(_Column(cells, max(texts) if k else min(CUT, max(texts)), max(texts), max(texts)))
    return _Table(made, minor, gap=1, headed=False)


class Stretched:
    """A text as wide as its place: ``draw`` makes it for a number of columns."""

    LEAST, MOST = 20, 100

    def __init__(self, draw: Callable[[int], Text]):
        self.draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield self.draw(min(self.MOST, options.max_width))


def filled(parts: Sequence[str]) -> Stretched:
    """The parts behind each other in as many lines as they need; a part is broken only where it alone is too
    long."""
    from rich.text import Text

    def draw(n: int) -> Text:
        rows = [""]
        for part in parts:
            if rows[-1] and width_of(f"{rows[-1]}  {part}") > n:
                rows.append("")
            rows[-1] += f"{'  ' if rows[-1] else ''}{part}"
        return Text("\n").join(map(line, rows))

    return Stretched(draw)


class _Column(NamedTuple):
    """A column: ``most`` wide where there is room, ``fair`` before minor ones go, ``least`` always."""

    cells: Sequence[Text | Stretched]
    least: int
    fair: int
    most: int
    right: bool = False


class _Table:
    """A table that is laid out when it is known how wide it may be."""

    def __init__(self, columns: Sequence[_Column], minor: Sequence[int], gap: int, headed: bool):
        self.columns, self.minor, self.gap, self.headed = columns, minor, gap, headed

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        from rich.table import Table

        left, room = list(self.columns), options.max_width + self.gap
        for k in self.minor:
            if sum(c.fair + self.gap for c in left) > room:
                left.remove(self.columns[k])
        gaps = self.gap * (len(left) - 1)
        widths = _narrowed(left, options.max_width - gaps)
        made = Table.grid(padding=(0, self.gap, 0, 0))
        made.width = sum(widths) + gaps  # or rich would break figures to make it fit
        for c, width in zip(left, widths, strict=True):
            made.add_column(justify="right" if c.right else "left", width=width, overflow="fold")
        for n, row in enumerate(zip(*(c.cells for c in left), strict=True)):
            made.add_row(*row, style="soft" if self.headed and n == 0 else "")
        yield made


def _narrowed(columns: Sequence[_Column], room: int) -> list[int]:
    """Their widths, of which the widest give way until all fit or are as narrow as they may be."""
    widths = [max(c.least, min(c.most, room)) for c in columns]
    while sum(widths) > room:
        wide = [k for k, c in enumerate(columns) if widths[k] > c.least]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


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


def beside(parts: Iterable[RenderableType]) -> Columns:
    """The parts beside each other, as many in a row as fit."""
    from rich.columns import Columns

    return Columns(parts, padding=(0, 3))


def _lines(text: str) -> Text:
    """The text as it is broken into lines, each harmless."""
    from rich.text import Text

    return Text("\n").join(line(part) for part in text.split("\n"))


def _longest(text: Text) -> int:
    """Columns of its longest word; a few of a text that may be cut."""
    words = max((width_of(word) for word in text.plain.split()), default=0)
    return min(CUT, words) if text.no_wrap else words


@contextmanager
def live() -> Iterator[Callable[[Iterable[RenderableType], str], None]]:
    """A view on the terminal's second screen, shown anew by the function this gives: parts, of which those
    that do not fit are cut, over a last line that stays. Ctrl-C, SIGTERM and errors leave with the screen put
    right; the first two end the block in silence."""
    from rich.console import Group
    from rich.layout import Layout
    from rich.live import Live

    from unigen.bars import clear

    clear()  # "starting" would stay on the first screen
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
        beneath(sys.stdout).write(_encodable(text))  # rich moves the cursor here; all parts are harmless
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
