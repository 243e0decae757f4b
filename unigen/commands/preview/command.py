"""``unigen preview``: samples as the model sees them, as a page to look at and as a few lines in the
terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from unigen.commands.preview.pick import Look, PreviewError, PreviewOptions, check, look_at, pick, time_shift
from unigen.show.terminal import harmless, has_colour, say

if TYPE_CHECKING:
    from unigen.commands.preview.view import Shown


def preview(options: PreviewOptions) -> int:
    """``unigen preview``: 0 where all records are good, 1 where one is bad.

    Raises:
        UserError: nothing can be shown: an option, the checkpoint or the data cannot be used, or the page not
            be written.
    """
    check(options)
    from unigen.model.weights import load_planner

    planner = load_planner(options.model_path, options.data_options())
    shift = time_shift(options)
    chosen = pick(options)
    ink = colours()
    bad = 0

    def looks() -> Iterator[Look]:
        nonlocal bad
        for found in chosen:
            shown = look_at(found, options, planner, shift)
            bad += shown.problem is not None
            say(in_terminal(shown, ink))
            yield shown

    if options.model_path is None:
        say("No --model_path: texts are cut into words (an estimate), pictures sized as for BAGEL-7B-MoT.")
    if options.output is None:
        for _ in looks():
            pass
    else:
        from unigen.commands.preview.page import write_preview

        try:
            page = write_preview(Path(options.output), looks(), options, planner)
        except OSError as error:
            raise PreviewError(
                f"{options.output}: the page cannot be written ({error.strerror or error}). Fix: another"
                " --output"
            ) from error
        say(f"Written to {page}")
    return 1 if bad else 0


class Colours(NamedTuple):
    """ANSI codes; empty where colours are not wanted."""

    text: str = ""
    image: str = ""
    loss: str = ""
    soft: str = ""
    bad: str = ""
    end: str = ""


def colours() -> Colours:
    """As the output wants them."""
    if not has_colour():
        return Colours()
    return Colours("\x1b[34m", "\x1b[32m", "\x1b[1;33m", "\x1b[2m", "\x1b[1;31m", "\x1b[0m")


def in_terminal(look: Look, ink: Colours) -> str:
    """A few lines on a record: where it is, its blocks in order, what carries loss."""
    if look.view is None:  # its message names the place
        return f"{ink.soft}record {look.number}{ink.end}\n  {ink.bad}bad:{ink.end} {harmless(look.problem)}"
    head = f"{ink.soft}record {look.number}  {harmless(look.origin)}{ink.end}"
    view = look.view
    pack = view.pack
    parts: list[str] = []
    for piece in sorted({shown.block.segment for shown in view.blocks}):
        group = [shown for shown in view.blocks if shown.block.segment == piece]
        parts.append(_piece(group, ink))
    answer = next((i for i, piece in enumerate(view.record.sample) if piece.target), 0)
    line = f"{' '.join(parts[:answer])}{' -> ' if answer else ''}{' '.join(parts[answer:])}"
    share = len(pack) / view.max_length
    total = (
        f"{len(pack):,} tokens, {share:.1%} of {view.max_length:,}; loss on {pack.n_text_labels:,} text"
        f" labels, {pack.n_image_targets:,} image tokens"
    )
    return f"{head}  {view.record.format}\n  {line}\n  {ink.soft}{total}{ink.end}"


def _piece(group: list[Shown], ink: Colours) -> str:
    """``[text 12]``, ``[image 640x480 -> clean 32x40=1280, vit 28x37=1036]``; what carries loss is marked
    ``*loss*``."""
    first = group[0]
    loss = f" {ink.loss}*loss*{ink.end}" if first.block.loss else ""
    if first.kind == 0:
        state = " dropped" if first.block.dropped else " cut" if first.block.cut else ""
        return f"[{ink.text}text{ink.end} {first.block.length:,}{state}{loss}]"
    seen = next((shown.picture for shown in group if shown.picture), None)
    original = f" {seen.original[0]}x{seen.original[1]}" if seen else ""
    forms = []
    for shown in group:
        rows, columns = shown.block.grid or (0, 0)
        time = f" t={shown.picture.time:.2f}" if shown.picture and shown.picture.time is not None else ""
        state = " dropped" if shown.block.dropped else time
        forms.append(
            f"{shown.kind.name.lower()}"
            f" {rows}x{columns}={shown.block.length:,}{state}{loss if shown.block.loss else ''}"
        )
    return f"[{ink.image}image{ink.end}{original} -> {', '.join(forms)}]"
