"""``unigen preview``: samples as the model sees them, as a page to look at and as a few lines in the
terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from unigen.commands.preview.pick import (
    Look,
    PreviewOptions,
    check_options,
    look_at,
    pick,
    shown_sources,
    time_shift,
)
from unigen.data.keys import Unlearnt
from unigen.data.words import cut
from unigen.messages import in_language
from unigen.outputs import output_file, unwritten
from unigen.show.language import Words
from unigen.show.terminal import indented, line, say

if TYPE_CHECKING:
    from unigen.commands.preview.view import BlockView

TEXT, IMAGE, LOSS = "blue", "green", "bold yellow"
StyledWords = list[str | tuple[str, str]]  # texts, some with a style


def preview(options: PreviewOptions) -> int:
    """``unigen preview``: 0 where all records are good, 1 where one is bad.

    Raises:
        UserError: nothing can be shown: an option, the checkpoint or the data cannot be used, or the page not
            be written.
    """
    check_options(options)
    sources = shown_sources(options)
    named = [path for source in sources for path in source.paths]
    output = options.output and output_file(
        "output", options.output, "unigen preview", [*named, options.model_path]
    )
    from unigen.model.weights import load_planner

    planners = [load_planner(options.model_path, options, source) for source in sources]
    shift = time_shift(options)
    chosen = pick(options)
    bad = 0

    def looks() -> Iterator[Look]:
        nonlocal bad
        for found in chosen:
            shown = look_at(found, options, planners[found.source], shift)
            bad += shown.problem is not None and not isinstance(shown.problem, Unlearnt)
            say(*in_terminal(shown))
            yield shown

    if options.model_path is None:
        say("No --model_path: texts are cut into words (an estimate), pictures sized as for BAGEL-7B-MoT.")
    if not output:
        for _ in looks():
            pass
    else:
        from unigen.commands.preview.page import write_preview

        with unwritten("output", output):
            write_preview(output, looks(), options, planners[0])
        say(f"Written to {options.output}")
    return 1 if bad else 0


def in_terminal(look: Look) -> list[Any]:
    """A few lines on a record: where it is, its blocks in order, what carries loss."""
    if look.view is None:  # its message names the place
        silent = isinstance(look.problem, Unlearnt)
        mark = (in_language("left out:"), "soft") if silent else (in_language("bad:"), "bad")
        gap = "" if mark[0].endswith("：") else " "  # a full-width sign has its own
        problem = line(mark, gap + in_language(str(look.problem)))
        return [line((in_language(f"record {look.number}"), "soft")), indented(problem)]
    view, pack = look.view, look.view.pack
    words = Words(None, "preview")
    numbers = sorted({shown.block.segment for shown in view.blocks})
    answer = next((i for i, segment in enumerate(view.record.sample) if segment.target), 0)
    parts: StyledWords = []
    for i in numbers:
        parts.append("" if i == numbers[0] else " -> " if i == answer else " ")
        parts += _segment([shown for shown in view.blocks if shown.block.segment == i], words)
    total = (
        f"{len(pack):,} tokens, {len(pack) / view.max_length:.1%} of {view.max_length:,}; loss on"
        f" {pack.n_text_labels:,} text labels, {pack.n_image_targets:,} image tokens"
    )
    head = line(
        (in_language(f"record {look.number}") + f"  {look.origin}", "soft"), f"  {view.record.format}"
    )
    said = {"unread": "nothing reads", "no_picture": "taken as no picture"}
    notes = [f"{in_language(said[what])}: {cut(field)}" for what, field in view.record.notes]
    shown = [indented(line((note, "soft"))) for note in notes[:5]]
    return [head, indented(line(*parts)), indented(line((in_language(total), "soft"))), *shown]


def _segment(blocks: list[BlockView], words: Words) -> StyledWords:
    """``[text 12]``, ``[image 640x480 -> clean 32x40=1280, vit 28x37=1036]``; what carries loss is marked
    ``*loss*``."""
    if blocks[0].variants:
        (shown,) = blocks
        state = "t_dropped" if shown.block.dropped else "t_cut" if shown.block.cut else ""
        told = f" {shown.block.length:,}{state and ' ' + words(state)}"
        return ["[", (words("t_text"), TEXT), told, *_loss(shown, words), "]"]
    seen = next((shown.picture for shown in blocks if shown.picture), None)
    parts: StyledWords = [
        "[",
        (words("t_image"), IMAGE),
        f" {seen.original[0]}x{seen.original[1]}" if seen else "",
        " ->",
    ]
    for shown in blocks:
        rows, columns = shown.block.grid or (0, 0)
        time = shown.picture.time if shown.picture else None
        state = words("t_dropped") if shown.block.dropped else f"t={time:.2f}" if time is not None else ""
        told = f"{words(f't_{shown.kind.name.lower()}')} {rows}x{columns}={shown.block.length:,}"
        parts.append(f"{'' if shown is blocks[0] else ','} {told}{state and ' ' + state}")
        parts += _loss(shown, words)
    return [*parts, "]"]


def _loss(shown: BlockView, words: Words) -> StyledWords:
    weight = "" if shown.block.weight == 1 else f" x {shown.block.weight:g}"
    return [" ", (f"*{words('t_loss')}{weight}*", LOSS)] if shown.block.loss else []
