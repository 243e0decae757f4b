"""The page of ``unigen preview``: one self-contained HTML file, without scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from unigen.commands.preview.blocks import (
    BLOCKS,
    KINDS,
    TOKENS,
    Ink,
    block_name,
    mask_drawing,
    named,
    plain,
    strip,
    tile,
    tile_side,
    visible,
)
from unigen.commands.preview.pick import Look, PreviewOptions
from unigen.commands.preview.view import SampleView, Shown, source_name
from unigen.data.dataset import task
from unigen.sequence.plan import Planner
from unigen.sequence.types import BadRecord, Image, Kind, Text
from unigen.show.language import TAGS, Words
from unigen.show.pages import table, write_sections

Say = Callable[..., str]

RAW = 3000  # characters of a bad record that are shown as they stand


# The pattern of what is hidden in every mask of the page.
STRIPES = (
    '<svg class="defs" aria-hidden="true"><pattern id="stripes" width="5" height="5" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><path d="M0 0V5"/></pattern></svg>'
)


def write_preview(path: Path, looks: Iterable[Look], options: PreviewOptions, planner: Planner) -> Path:
    """Writes the page; ``looks`` is read one by one, so that one sample's pictures are in memory at a time."""
    say = Words(options.language, "preview")
    sections, bad, shown = [], 0, 0
    for look in looks:
        shown += 1
        bad += look.problem is not None
        sections.append(("", _broken(look, say) if look.view is None else _sample(look.view, planner, say)))
    title = say("title", source=named(", ".join(Path(given).name or given for given in options.paths)))
    head = STRIPES + _head(options, shown, bad, say)
    return write_sections(
        path,
        title,
        [("", head), *sections],
        language=TAGS[options.language],
        styles=["preview"],
    )


def _head(options: PreviewOptions, shown: int, bad: int, say: Say) -> str:
    """What is shown, and the legend."""
    count = say("record_1") if shown == 1 else say("records", n=f"{shown:,}")
    lines = [say("about", shown=count, epoch=options.epoch, seed=options.seed)]
    if bad:
        lines.append(f"<strong>{say('bad_count', bad=bad)}</strong>")
    note = (
        say("words_note")
        if options.model_path is None
        else say("model_note", model=plain(options.model_path))
    )
    kinds = "".join(
        f'<dt>{say(name)}</dt><dd><span class="k-{name}"><span class="box"></span></span> {say(f"k_{name}")}</dd>'
        for name in KINDS.values()
    )
    samples = [
        ('<p class="ids"><span>house</span></p>', "l_context"),
        ('<p class="ids"><span class="y">house</span></p>', "l_learnt"),
        ('<bdi class="s">&lt;|im_end|&gt;</bdi>', "l_special"),
        ('<bdi class="t">→ &lt;|vision_start|&gt;</bdi>', "l_transition"),
        ('<p class="ids"><del>house</del></p>', "l_cut"),
        ('<p class="ids"><span>a<i> </i><b class="hid">NBSP</b></span></p>', "l_invisible"),
    ]
    marks = "".join(f"<dt>{sample}</dt><dd>{say(key)}</dd>" for sample, key in samples)
    legend = f'<div class="legend"><dl class="key">{kinds}</dl><dl class="key">{marks}</dl></div>'
    return f'<p>{" ".join(lines)}</p><p class="note">{note}</p><h3>{say("legend")}</h3>{legend}<p class="note">{say("l_hover")}</p>'


def _broken(look: Look, say: Say) -> str:
    problem = look.problem
    if isinstance(problem, BadRecord):
        names = ("code", "field", "found", "expected", "fix")
        facts = "".join(f"<dt>{say(name)}</dt><dd>{plain(getattr(problem, name))}</dd>" for name in names)
        body = f"<p><strong>{say('bad')}</strong></p><dl>{facts}</dl>"
    else:
        body = f"<p><strong>{say('bad')}</strong> {plain(problem)}</p>"
    if look.raw is not None:
        text = look.raw.decode("utf-8", "replace") if isinstance(look.raw, bytes) else repr(look.raw)
        cut = text[:RAW] + ("…" if len(text) > RAW else "")
        body += f'<details><summary class="note">{say("raw")}</summary><p class="ids"><code>{plain(cut)}</code></p></details>'
    where = f'<p class="where"><span>{say("place")}: <code>{plain(look.origin)}</code></span></p>'
    return f'<h2>{say("record", number=look.number)}</h2>{where}<div class="card broken">{body}</div>'


# ---- one sample


def _sample(view: SampleView, planner: Planner, say: Say) -> str:
    ink, side = Ink(planner.tokenizer, say), tile_side(view.blocks)
    cards = "".join(_card(shown, view, ink, side, planner, say) for shown in view.blocks)
    most = len(view.kept) > BLOCKS
    scale = say("mask_tokens" if len(view.pack) <= TOKENS and not most else "mask_blocks")
    scale += " " + say("mask_first", n=BLOCKS, all=len(view.kept)) if most else ""
    return (
        f"<h2>{say('record', number=view.number)}</h2>{_where(view, say)}{_facts(view, say)}"
        f"<h3>{say('sequence')} <small>{say('sequence_note')}</small></h3>{strip(view, say)}"
        f'<h3>{say("blocks")}</h3><div class="cards">{cards}</div>'
        f'<h3>{say("mask")}</h3><div class="sees">{mask_drawing(view, say)}<div><p class="note">{say("mask_note")} {scale}</p></div></div>'
        f"<h3>{say('dropout')}</h3>{_dropout(view, say)}"
    )


def _where(view: SampleView, say: Say) -> str:
    record = view.record
    parts = [
        (say("place"), record.origin),
        (say("format"), record.format),
        (say("task"), task(record.sample)),
    ]
    if record.metadata:
        parts.append((say("metadata"), json.dumps(record.metadata, ensure_ascii=False, default=str)[:2000]))
    return f'<p class="where">{"".join(f"<span>{name}: <code>{plain(value)}</code></span>" for name, value in parts)}</p>'


def _facts(view: SampleView, say: Say) -> str:
    """Length and targets; every number is one of the pack's."""
    pack, total = view.pack, len(view.pack)
    targets = max(1, pack.n_text_labels + pack.n_image_targets)
    share = total / view.max_length
    bar = f'<div class="bar"><i style="width:{min(1.0, share):.2%}"></i></div>'
    length = say("of_max", share=f"{share:.1%}", limit=f"{view.max_length:,}")
    lost = sum(len(shown.lost) for shown in view.blocks)
    warning = f' <span class="tag warn">{say("cut_note", lost=f"{lost:,}")}</span>' if lost else ""
    cells = [f"<div><b>{total:,}</b><span>{say('length')}: {length}</span>{warning}{bar}</div>"]
    for count, name in ((pack.n_text_labels, "text_labels"), (pack.n_image_targets, "image_targets")):
        of = f"{say('share_row', share=f'{count / max(1, total):.1%}')}{say('comma')}{say('share_labels', share=f'{count / targets:.1%}')}"
        cells.append(f"<div><b>{count:,}</b><span>{say(name)}: {of}</span></div>")
    return f'<div class="facts">{"".join(cells)}</div>'


def _dropout(view: SampleView, say: Say) -> str:
    parts = []
    rows = [
        (
            block_name(s, say),
            s.option,
            f"{s.chance:.0%}",
            say("dropped") if s.block.dropped else say("d_kept"),
        )
        for s in view.blocks
        if s.option
    ]
    if rows:
        parts.append(table(rows, [say("d_block"), say("d_option"), say("d_chance"), say("d_now")]))
    else:
        draws = any(isinstance(piece, Image) and piece.target for piece in view.record.sample)
        parts.append(f'<p class="note">{say("d_none" if draws else "d_none_text")}</p>')
    if view.copies is not None:
        now = say("with_copies" if view.copied else "without_copies")
        parts.append(f'<p class="note">{say("copies", share=f"{view.copies:.0%}", now=now)}</p>')
    return "".join(parts)


# ---- one block


def _card(shown: Shown, view: SampleView, ink: Ink, side: int, planner: Planner, say: Say) -> str:
    head = [f"<strong>{block_name(shown, say)}</strong>", *_tags(shown, ink, say)]
    if shown.block.dropped:
        kind = "" if shown.kind == Kind.TEXT else " image"
        return f'<div class="card gone{kind} k-{KINDS[shown.kind]}"><header>{"".join(head)}</header>{_gone(shown, view, ink, say)}</div>'
    n = shown.stop - shown.start
    a, b = shown.positions
    rope = say("rope_1", a=f"{a:,}") if a == b else say("rope", a=f"{a:,}", b=f"{b:,}")
    places = [say("tokens_n", n=f"{n:,}"), say("places", a=f"{shown.start:,}", b=f"{shown.stop - 1:,}"), rope]
    head[1:1] = [f'<span class="num">{place}</span>' for place in places]
    if shown.kind == Kind.TEXT:
        return f'<div class="card k-text"><header>{"".join(head)}</header>{ink.text(shown)}</div>'
    body = tile(shown, side) + _picture_facts(shown, ink, planner, say)
    return f'<div class="card image k-{KINDS[shown.kind]}"><header>{"".join(head)}</header>{body}</div>'


def _gone(shown: Shown, view: SampleView, ink: Ink, say: Say) -> str:
    """What a dropped block would have been, and what is left of it."""
    piece = view.record.sample[shown.block.segment]
    if isinstance(piece, Text):
        text = piece.variants[shown.wording[0] - 1]
        was, note = visible(text[:RAW]), say("dropped_text")
    else:
        rows, columns = shown.block.grid or (0, 0)
        was = f"{plain(source_name(piece) or say('in_bytes'))}: {rows} × {columns} = {shown.block.length:,}"
        note = say("dropped_image", position=shown.positions[0])
    if shown.block.closing_label is not None:
        note += " " + say("dropped_label", label=plain(ink.name(shown.block.closing_label)))
    return f'<p class="ids" dir="auto">{was}</p><p class="note">{note}</p>'


def _tags(shown: Shown, ink: Ink, say: Say) -> list[str]:
    def tag(text: str, kind: str = "") -> str:
        return f'<span class="tag{f" {kind}" if kind else ""}">{text}</span>'

    tags = [tag(say("loss"), "loss") if shown.block.loss else tag(say("copy" if shown.target else "context"))]
    if shown.block.dropped:
        tags.append(tag(say("dropped"), "warn"))
    if shown.option:
        tags.append(tag(say("may_drop", chance=f"{shown.chance:.0%}")))
    if shown.wording[1] > 1:
        tags.append(tag(say("wording", k=shown.wording[0], n=shown.wording[1])))
    if shown.twins:
        tags.append(tag(say("shares", others=", ".join(map(str, shown.twins)))))
    if shown.lost:
        tags.append(tag(say("cut_note", lost=f"{len(shown.lost):,}"), "warn"))
    if shown.kind == Kind.TEXT and any(token.id in ink.special for token in shown.tokens[1:-1]):
        tags.append(tag(say("special_inside"), "warn"))
    if shown.picture and shown.picture.upscaled:
        tags.append(tag(say("upscaled", factor=f"{max(shown.picture.scale):.3g}"), "warn"))
    return tags


def _picture_facts(shown: Shown, ink: Ink, planner: Planner, say: Say) -> str:
    picture, grid = shown.picture, shown.block.grid
    assert picture is not None and grid is not None
    g = planner.geometry
    side = g.vit_patch if shown.kind == Kind.VIT else g.latent_stride
    (w0, h0), (w, h) = picture.original, picture.size
    rows = [
        (say("file"), plain(picture.name or say("in_bytes"))),
        (
            say("size"),
            f"{w0:,} × {h0:,} → {say('pixels', w=f'{w:,}', h=f'{h:,}')}{say('comma')}{_resize(shown, say)}",
        ),
        (say("tokens"), say("grid", rows=grid[0], columns=grid[1], n=f"{shown.block.length:,}", side=side)),
    ]
    note = ""
    if picture.time is not None:
        rows.append(
            (
                "t",
                say(
                    "time",
                    t=f"{picture.time:.3f}",
                    picture=f"{1 - picture.time:.0%}",
                    noise=f"{picture.time:.0%}",
                ),
            )
        )
        note = f'<p class="note">{say("illustration")}</p>'
    if shown.transition is not None:
        rows.append((say("opens"), ink.transition(shown)))
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in rows)}</dl>{note}"


def _resize(shown: Shown, say: Say) -> str:
    """What the resize did, in words."""
    assert shown.picture is not None
    across, down = shown.picture.scale
    if across == down == 1:
        return say("same_size")
    if min(across, down) > 1:
        told = say("scaled_up") + f" ×{max(across, down):.3g}"
    elif max(across, down) < 1:
        told = say("scaled_down", share=f"{min(across, down):.0%}")
    else:
        told = say("mixed_scale")
    change = across / down - 1
    return told + (f"{say('comma')}{say('aspect', share=f'{change:+.1%}')}" if abs(change) >= 0.005 else "")
