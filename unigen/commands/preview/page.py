"""The page of ``unigen preview``: one self-contained HTML file, without scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unigen.commands.preview.chips import Chip, Chips, FoldedText, signs_named
from unigen.commands.preview.pick import Look, PreviewOptions, shown_sources
from unigen.commands.preview.pictures import (
    COLOURS,
    LABELLED,
    encoded,
    mask_picture,
    tile,
    tile_side,
)
from unigen.commands.preview.view import BlockView, SampleView, source_name
from unigen.data.dataset import task
from unigen.data.keys import NOTES
from unigen.messages import in_language
from unigen.sequence.plan import Planner
from unigen.sequence.types import BadRecord, Image, Kind
from unigen.show.language import TAGS, Words
from unigen.show.pages import Embedded, write_page

RAW = 3000  # characters of a bad record, or of a text that was left out
METADATA = 2000
KINDS = {Kind.TEXT: "text", Kind.VIT: "vit", Kind.CLEAN: "clean", Kind.NOISED: "noised"}
LEGEND = [
    (Chip("house"), "l_context"),
    (Chip("house", learnt=True), "l_learnt"),
    (Chip("<|im_end|>", "special"), "l_special"),
    (Chip("<|vision_start|>", "next"), "l_next"),
    (Chip("house", "cut"), "l_cut"),
    (Chip("a \u00a0"), "l_invisible"),
]


def write_preview(path: Path, looks: Iterable[Look], options: PreviewOptions, planner: Planner) -> Path:
    """Writes the page; ``looks`` is read one by one, so that one sample's tensors are in memory at a time.

    Raises:
        OSError: The page cannot be written.
    """
    words = Words(options.language, "preview")
    samples = [
        _broken(look, words) if look.view is None else _sample(look.view, planner, words) for look in looks
    ]
    shown = words("record_1") if len(samples) == 1 else words("records", n=len(samples))
    model = options.model_path
    paths = [path for source in shown_sources(options) for path in source.paths]
    values = {
        "words": words,
        "about": words("about", shown=shown, epoch=options.epoch, seed=options.seed),
        "bad": sum("problem" in sample for sample in samples),
        "model": words("words_note") if model is None else words("model_note", model=signs_named(model)),
        "kinds": [(kind, words(kind), words(f"k_{kind}")) for kind in KINDS.values()],
        "colours": " ".join(f"--{KINDS[kind]}: rgb{rgb};" for kind, rgb in COLOURS.items()),
        "legend": LEGEND,
        "samples": samples,
    }
    title = words("title", source=signs_named(", ".join(Path(given).name or given for given in paths)))
    return write_page(
        path,
        "preview.html",
        values,
        by="unigen preview",
        title=title,
        language=TAGS[words.language],
        styles=["preview"],
    )


def _broken(look: Look, words: Words) -> dict[str, Any]:
    problem, raw = look.problem, look.raw
    if isinstance(problem, BadRecord):
        rows = [
            (words("code"), signs_named(problem.code)),
            (words("field"), signs_named(words.field(problem.field))),
        ]
        for name in ("found", "expected", "fix"):
            rows.append((words(name), signs_named(in_language(getattr(problem, name), words.language))))
    else:
        rows = [(words("found"), signs_named(in_language(str(problem), words.language)))]
    text = "" if raw is None else raw.decode("utf-8", "replace") if isinstance(raw, bytes) else repr(raw)
    return {
        "number": look.number,
        "where": [(words("place"), signs_named(look.origin))],
        "problem": rows,
        "raw": signs_named(_shortened(text, RAW)),
    }


def _shortened(text: str, most: int) -> str:
    return text[:most] + "…" * (len(text) > most)


# ---- one sample


def _sample(view: SampleView, planner: Planner, words: Words) -> dict[str, Any]:
    record, chips, side = view.record, Chips(planner.tokenizer, words), tile_side(view.blocks)
    where = {"place": record.origin, "format": record.format, "task": words(f"task_{task(record.sample)}")}
    if record.metadata:
        metadata = json.dumps(record.metadata, ensure_ascii=False, default=str)
        where["metadata"] = _shortened(metadata, METADATA)
    for what in NOTES:
        if fields := [field for kind, field in record.notes if kind == what]:
            where[what] = _shortened(", ".join(fields), METADATA)
    return {
        "number": view.number,
        "where": [(words(name), signs_named(value)) for name, value in where.items()],
        "share": len(view.pack) / view.max_length,
        "tiles": _tiles(view, words),
        "lost": sum(len(shown.lost) for shown in view.blocks),
        "cards": [_card(shown, chips, side, planner, words) for shown in view.blocks],
        **_mask(view, words),
        "dropout": [
            (_name(s, words), f"{s.chance:.0%}", words("dropped" if s.block.dropped else "d_kept"), s.option)
            for s in view.blocks
            if s.option
        ],
        "draws": any(isinstance(segment, Image) and segment.target for segment in record.sample),
        "copies": view.clean_copies,
        "copied": words("with_copies" if view.copied else "without_copies"),
    }


def _tiles(view: SampleView, words: Words) -> list[tuple[str, int, str]]:
    """Length and targets; every number is one of the pack's."""
    total, limit = len(view.pack), view.max_length
    counts = {"text_labels": view.pack.n_text_labels, "image_targets": view.pack.n_image_targets}
    targets = max(1, sum(counts.values()))
    return [(words("length"), total, words("of_max", share=total / limit, limit=limit))] + [
        (words(name), n, words("shares", of_tokens=n / total, of_targets=n / targets))
        for name, n in counts.items()
    ]


def _mask(view: SampleView, words: Words) -> dict[str, Any]:
    mask = mask_picture(view)
    drawn, every = len(mask.blocks), len(view.kept)
    kinds = [words(KINDS[shown.kind]) if drawn <= LABELLED else "" for shown in mask.blocks]
    scale = words("mask_tokens" if mask.by_token else "mask_blocks")
    return {
        "mask": Embedded(encoded(mask.image, "png"), small=True, width=mask.width),
        "side": mask.side,
        "axis": [(*place, shown.number, kind) for place, shown, kind in zip(mask.axis, mask.blocks, kinds)],
        "scale": scale if drawn == every else words.sentences(scale, words("mask_first", n=drawn, all=every)),
    }


# ---- one block


def _name(shown: BlockView, words: Words) -> str:
    return f"{shown.number} {words(KINDS[shown.kind])}"


def _card(shown: BlockView, chips: Chips, side: int, planner: Planner, words: Words) -> dict[str, Any]:
    dropped, (a, b) = shown.block.dropped, shown.positions
    text, note = None, words("illustration") if shown.kind == Kind.NOISED else ""
    if shown.kind == Kind.TEXT:
        text = FoldedText([Chip(shown.variants[shown.variant][:RAW])]) if dropped else chips.text(shown)
    if dropped:
        note = words("dropped_text") if text else words("dropped_image", position=a)
        if shown.block.closing_label is not None:
            note = words.sentences(note, words("dropped_label", label=chips.name(shown.block.closing_label)))
    return {
        "number": shown.number,
        "kind": KINDS[shown.kind],
        "name": _name(shown, words),
        "tokens": words("dropped") if dropped else words("tokens_n", n=shown.stop - shown.start),
        "places": []
        if dropped
        else [
            words("places", a=shown.start, b=shown.stop - 1),
            words("rope_1", a=a) if a == b else words("rope", a=a, b=b),
        ],
        "tags": list(_tags(shown, chips, words)),
        "grow": math.sqrt(shown.block.length + 2),  # its share of the bar that shows the sequence
        "loss": shown.block.loss,
        "dropped": dropped,
        "text": text,
        "tile": tile(shown, side) if shown.picture else None,
        "rows": [] if text else list(_picture_rows(shown, planner, words)),
        "opens": [] if text else chips.next_modality(shown),
        "note": note,
    }


def _tags(shown: BlockView, chips: Chips, words: Words) -> Iterable[tuple[str, str]]:
    """What stands out of a block, as (text, level)."""
    if shown.block.loss:
        weight = "" if shown.block.weight == 1 else f" × {shown.block.weight:g}"
        yield words("loss") + weight, "loss"
    else:
        yield words("copy" if shown.segment.target else "context"), ""
    if shown.option:
        yield words("may_drop", chance=shown.chance), ""
    if len(shown.variants) > 1:
        yield words("variant", k=shown.variant + 1, n=len(shown.variants)), ""
    if shown.same_position:
        yield words("same_position", others=", ".join(map(str, shown.same_position))), ""
    if shown.lost:
        yield words("cut_note", lost=len(shown.lost)), "warn"
    if shown.kind == Kind.TEXT and any(token.id in chips.special for token in shown.tokens[1:-1]):
        yield words("special_inside"), "warn"
    if shown.picture and shown.picture.enlarged:
        yield words("enlarged", factor=max(shown.picture.scale)), "warn"


def _picture_rows(shown: BlockView, planner: Planner, words: Words) -> Iterable[tuple[str, str]]:
    """What is known of a picture, as (name, value)."""
    assert isinstance(shown.segment, Image) and shown.block.grid is not None
    picture, (rows, columns) = shown.picture, shown.block.grid
    yield words("file"), signs_named(source_name(shown.segment)) or words("in_bytes")
    if picture:
        (w0, h0), (w, h), (across, down) = picture.original, picture.size, picture.scale
        resize = (
            words("same_size") if across == down == 1 else words("scaled", factor=math.sqrt(across * down))
        )
        if abs(across / down - 1) >= 0.005:
            resize += words("aspect", share=across / down - 1)
        yield words("size"), words("pixels", w0=w0, h0=h0, w=w, h=h)
        yield words("resize"), resize
    side = planner.geometry.vit_patch if shown.kind == Kind.VIT else planner.geometry.latent_stride
    yield words("tokens"), words("grid", rows=rows, columns=columns, n=shown.block.length, side=side)
    if picture and picture.time is not None:
        yield "t", words("time", t=picture.time, picture=1 - picture.time)
