"""The options of ``unigen watch``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from unigen.values import Options, PathText, Range


@dataclass
class WatchOptions(Options):
    """Which runs to watch, and how they are shown.

    Args:
        run: Folder of a run, or of several; of several, curves are compared.
        html: Write a page to this file, and end.
        plots: Write the curves into this folder, a PNG for each chart, and end.
        serve: Keep the page live on this machine, at http://127.0.0.1, until Ctrl-C.
        port: Port of the live page; 0 takes one that is free.
        interval: Seconds between two looks at the folder.
        once: Print what there is now, and end; so it is, too, where the output is no terminal.
        steps: The part of the curves to show, in finer detail, as FIRST:LAST; either may be missing.
        smooth: Weight in [0, 1) of what was before in the drawn training curves, an exponential moving
            average; validation and learning rate stay as they are.
        language: Language; default that of the locale.
    """

    run: list[PathText] = field(default_factory=list)
    html: PathText | None = None
    plots: PathText | None = None
    serve: bool = False
    port: Annotated[int, Range(0, 65535)] = 6007
    interval: Annotated[float, Range(0.1, 3600)] = 2.0
    once: bool = False
    steps: str | None = None
    smooth: Annotated[float, Range(0, 1, below=True)] = 0.0
    language: Literal["en", "zh"] | None = None
