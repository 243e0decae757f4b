"""``unigen watch``: a run, or several, in the terminal or as a page, from the files of their folders
alone."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unigen.commands.watch.options import WatchOptions
from unigen.config import ConfigError
from unigen.show.terminal import harmless, has_colour, say, showable

if TYPE_CHECKING:
    from unigen.commands.watch.terminal import View
    from unigen.runs.reader import Run

NARROWEST, WIDEST = 40, 200


def watch(options: WatchOptions) -> int:
    """``unigen watch``; returns 0, or 1 where what was shown last is hung or dead.

    Raises:
        UserError: there is no run, an option cannot work, or the page cannot be written.
    """
    steps = _resolve(options)
    from unigen.runs.reader import Run, find_runs
    from unigen.show.language import Words

    words = Words(options.language, "watch")
    runs = [Run(folder, steps, exact=options.html is not None) for folder in find_runs(options.run)]
    if options.html is not None:
        _write_page(options, runs)
    elif options.once or not sys.stdout.isatty():
        for run in runs:
            run.update()
        _print(runs, _view(options))
    else:
        _live(options, runs)
    from unigen.commands.watch.health import judge

    ill = [(run, state) for run in runs if (state := judge(run)).name in ("hung", "dead")]
    if options.html is not None:
        for run, state in ill:
            print(
                f"{harmless(run.name)}: {words(state.name)};"
                f" {'; '.join(words(w.key, **w.values) for w in state.why)}",
                file=sys.stderr,
            )
    return 1 if ill else 0


def _resolve(options: WatchOptions) -> tuple[int, int]:
    """The steps to show. Raises ConfigError for an option that cannot work."""
    if not 0 <= options.smooth < 1:
        raise ConfigError(f"smooth is {options.smooth}; it is a weight in [0, 1), such as 0.9 (--smooth 0.9)")
    if not 0.1 <= options.interval <= 3600:
        raise ConfigError(
            f"interval is {options.interval}; it is a number of seconds from 0.1 to 3600 (--interval 2)"
        )
    if options.html is not None and Path(options.html).is_dir():
        raise ConfigError(f"html is {options.html}, which is a folder; name a file (--html run.html)")
    if options.steps is None:
        return 0, 1 << 53
    first, colon, last = options.steps.replace("_", "").partition(":")
    try:
        found = int(first or 0), int(last or 1 << 53)
    except ValueError:
        found = (1, 0)
    if not colon or not 0 <= found[0] <= found[1]:
        raise ConfigError(
            f"steps is {options.steps!r}; it is FIRST:LAST, such as 1000:2000, 1000: or :500 (--steps"
            " 1000:2000)"
        )
    return found


def _write_page(options: WatchOptions, runs: Sequence[Run]) -> None:
    from unigen.commands.watch.page import write

    for run in runs:
        run.update()
    assert options.html is not None
    try:
        page = write(Path(options.html), runs, options)
    except OSError as error:
        raise ConfigError(
            f"{options.html}: the page cannot be written ({error.strerror or error}); name another file"
            " (--html ...)"
        ) from error
    print(f"-> {page}")


def _view(options: WatchOptions, live: bool = False) -> View:
    from unigen.commands.watch.terminal import View
    from unigen.show.language import Words

    size = shutil.get_terminal_size((100, 40))
    width = min(WIDEST, max(NARROWEST, size.columns))
    height = max(8, size.lines) if sys.stdout.isatty() and live else None
    return View(Words(options.language, "watch"), width, height, _has_braille(), options.smooth, live)


def _has_braille() -> bool:
    try:
        "⣿█━│×●…".encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _print(runs: Sequence[Run], view: View) -> None:
    from unigen.commands.watch.terminal import frame, render

    say("\n".join(render(frame(runs, view), view.width, has_colour())))


def _live(options: WatchOptions, runs: Sequence[Run]) -> None:
    """Frames on the terminal's second screen until Ctrl-C; the last one stays on the first."""
    from unigen.commands.watch.terminal import frame, render

    out = sys.stdout
    # leaves as Ctrl-C does, with the screen put right
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    out.write("\x1b[?1049h\x1b[?25l")
    try:
        while True:
            began = time.monotonic()
            for run in runs:
                run.update()
            view = _view(options, live=True)
            # Each line is written over the old one and its rest erased: a cleared screen would flicker.
            text = "".join(
                f"{line}\x1b[K\r\n" for line in render(frame(runs, view), view.width, has_colour())
            )
            out.write(f"\x1b[H{showable(text).removesuffix(chr(13) + chr(10))}\x1b[J")
            out.flush()
            time.sleep(max(0.05, options.interval - (time.monotonic() - began)))
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        out.write("\x1b[?25h\x1b[?1049l")
        out.flush()
    _print(runs, _view(options))
