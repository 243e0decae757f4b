"""The curves of runs as PNG files, one for each chart of the page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from unigen.commands.watch.options import WatchOptions
from unigen.commands.watch.page import charts_of
from unigen.commands.watch.panels import panels_of
from unigen.files import atomic
from unigen.outputs import claim
from unigen.runs.reader import RunFolder
from unigen.show.language import Words
from unigen.show.raster import has_fonts, png

log = logging.getLogger(__name__)


def write(folder: Path, runs: Sequence[RunFolder], options: WatchOptions) -> list[str]:
    """Writes a PNG for each chart into ``folder``, which it makes; their names.

    Raises:
        UserError: files of others with these names are there.
        OSError: it cannot be written.
    """
    names = [f"{panel.name.replace('/', '_')}.png" for panel in panels_of(runs)]
    words = Words(options.language, "watch")
    charts = charts_of(runs, options.smooth, words)
    if words.language != "en" and not has_fonts(charts):
        log.warning(
            "No font of this machine has Chinese letters, so plots are in English. Fix: install one, such"
            " as fonts-noto-cjk"
        )
        charts = charts_of(runs, options.smooth, Words("en", "watch"))
    if not names:
        return []
    claim("plots", folder, "unigen watch", names)
    for name, chart in zip(names, charts, strict=True):
        with atomic(folder / name, sync=False) as file:
            file.write(png(chart))
    return names
