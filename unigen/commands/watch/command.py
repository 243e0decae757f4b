"""``unigen watch``: a run, or several, in the terminal or as a page, from the files of their folders
alone."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unigen.commands.watch.options import WatchOptions
from unigen.config import ConfigError, UserError
from unigen.outputs import output_file, output_folder, unwritten
from unigen.show.terminal import harmless, live, say

if TYPE_CHECKING:
    from unigen.runs.reader import RunFolder
    from unigen.show.language import Words
    from unigen.show.terminal import RenderableType


def watch(options: WatchOptions) -> int:
    """``unigen watch``; returns 0, or 1 where what was shown last is hung or dead.

    Raises:
        UserError: there is no run, an option cannot work, or the page cannot be written.
    """
    steps = _resolve(options)
    for other in ("html", "plots", "once"):
        if options.serve and getattr(options, other):
            raise ConfigError(f"serve and {other} exclude each other. Fix: keep one of --serve and --{other}")
    html = options.html and output_file("html", options.html, "unigen watch", options.run)
    plots = options.plots and output_folder("plots", options.plots, options.run)
    from unigen.commands.watch.health import diagnose
    from unigen.commands.watch.report import why
    from unigen.runs.reader import RunFolder, find_runs
    from unigen.show.language import Words

    words = Words(options.language, "watch")
    runs = [RunFolder(folder, steps) for folder in find_runs(options.run)]
    _update(runs)
    if options.serve:
        _serve(options, runs)
    elif html or plots:
        try:
            _write(options, runs, html and Path(html), plots and Path(plots))
        except UserError:
            say(*_frame(options, runs, words))
            raise
    else:
        if not options.once and sys.stdout.isatty():
            _follow(options, runs, words)
        say(*_frame(options, runs, words))
    failed = [(run, state) for run in runs if (state := diagnose(run)).name in ("hung", "dead")]
    if html or plots:
        for run, state in failed:
            print(f"{harmless(run.name)}: {words(state.name)}; {why(state, words)}", file=sys.stderr)
    return 1 if failed else 0


def _resolve(options: WatchOptions) -> tuple[int, int]:
    """The steps to show. Raises ConfigError for an option that cannot work."""
    options.reread()
    if options.steps is None:
        return 0, 1 << 53
    first, colon, last = options.steps.replace("_", "").partition(":")
    try:
        found = int(first or 0), int(last or 1 << 53)
    except ValueError:
        found = (1, 0)
    if not colon or not 0 <= found[0] <= found[1]:
        raise ConfigError(
            f"steps is {options.steps!r}; expected FIRST:LAST, where one may be missing."
            " Fix: write such as --steps 1000:2000, --steps 1000: or --steps :500"
        )
    return found


def _write(options: WatchOptions, runs: Sequence[RunFolder], html: Path | None, plots: Path | None) -> None:
    """Writes what is asked for, and says where. Raises UserError where it cannot be written."""
    from unigen.commands.watch.page import page, write_plots
    from unigen.show.pages import write_page

    if html:
        with unwritten("html", html):
            write_page(html, **page(runs, options))
        say(f"-> {options.html}")
    if plots:
        with unwritten("plots", plots):
            names = write_plots(plots, runs, options)
        say(f"-> {options.plots}: {', '.join(names) or '–'}")


def _serve(options: WatchOptions, runs: Sequence[RunFolder]) -> None:
    """Keeps the page of the runs live until Ctrl-C. Raises UserError where the port cannot be had."""
    from unigen.commands.watch.page import page
    from unigen.commands.watch.serve import PageServer
    from unigen.show.pages import render

    def now() -> bytes:
        _update(runs)
        return render(**page(runs, options))

    with PageServer(options.port, options.interval, now) as server:
        port = server.server_address[1]
        say(f"{server.address}  (Ctrl-C ends it; from elsewhere: ssh -L {port}:127.0.0.1:{port} HOST)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever(poll_interval=0.1)
    _update(runs)


def _update(runs: Sequence[RunFolder]) -> None:
    for run in runs:
        run.update()


def _frame(options: WatchOptions, runs: Sequence[RunFolder], words: Words) -> Iterator[RenderableType]:
    from unigen.commands.watch.terminal import frame

    return frame(runs, words, options.smooth)


def _follow(options: WatchOptions, runs: Sequence[RunFolder], words: Words) -> None:
    """Shows the runs as they are now, again and again until Ctrl-C."""
    with live() as show:
        while True:
            began = time.monotonic()
            _update(runs)
            show(_frame(options, runs, words), f"{time.strftime('%H:%M:%S')}  {words('quit')}")
            time.sleep(max(0.05, options.interval - (time.monotonic() - began)))
