"""The parts of the preview's page: texts as tokens, pictures as tiles, the sequence as a strip, the mask as a
drawing."""

from __future__ import annotations

import base64
import html
import io
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unigen.commands.preview.view import (
    CAUSAL,
    MIXED,
    NONE,
    Picture,
    SampleView,
    Shown,
    Token,
    block_mask,
    characters,
    mask,
    special_names,
)
from unigen.model import flow
from unigen.sequence.images import to_image
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Kind

NAMED = {
    "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "NBSP", "\u00ad": "SHY", "\u200b": "ZWSP", "\u200c": "ZWNJ",
    "\u200d": "ZWJ",
    "\u200e": "LRM", "\u200f": "RLM", "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO",
    "\u202e": "RLO",
    "\u2060": "WJ", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI", "\ufeff": "BOM",
}  # fmt: skip
JOINERS = "\u200c\u200d"  # inside a word or an emoji they shape it, and are no surprise
HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")  # Unicode categories that show nothing
HEAD, TAIL = 64, 10  # tokens of a long text that are not folded away
CHIPS = 2400  # tokens of a sample with a tooltip each; the others are shown as plain text
PLAIN = 4000  # characters of such a plain text
# up to so many image blocks in a sample: side of their tiles in pixels
TILES = ((6, 320), (12, 224), (40, 128))
SMALLEST = 72
TOKENS = 400  # up to this length the mask shows every token
BLOCKS = 96  # that the mask shows at most
LABELLED = 24  # up to so many blocks the mask names them and has a tooltip a cell
SIDE = 420  # of the mask, in SVG units
KINDS = {Kind.TEXT: "text", Kind.VIT: "vit", Kind.CLEAN: "clean", Kind.NOISED: "noised"}


# ---- texts


def sign(character: str) -> str | None:
    """What stands for a character that shows nothing, or None for one that can be seen (a plain space counts
    as seen)."""
    if character in NAMED:
        return NAMED[character]
    if character == " " or unicodedata.category(character) not in HIDDEN:
        return None
    return chr(0x2400 + ord(character)) if ord(character) < 32 else f"U+{ord(character):04X}"


def named(value: object) -> str:
    """Text in which what cannot be seen, or would turn the rest around, is named."""
    return "".join(c if c == "\n" or not (s := sign(c)) else f"⟨{s}⟩" for c in str(value))


def plain(value: object) -> str:
    """The same as HTML, for an element or an attribute."""
    return html.escape(named(value), quote=True)


def visible(text: str) -> str:
    """HTML of ``text`` with every space dotted and every invisible character named."""
    parts = []
    for i, c in enumerate(text):
        s = None if c in JOINERS and 0 < i < len(text) - 1 else sign(c)
        if c == " ":
            parts.append("<i> </i>")
        elif s:
            name = unicodedata.name(c, f"U+{ord(c):04X}").title()
            parts.append(f'<b class="hid" title="{html.escape(name)}">{s}</b>' + ("\n" if c == "\n" else ""))
        else:
            parts.append(html.escape(c))
    return "".join(parts)


Part = tuple[str, Sequence[Token]]  # what can be read, and the tokens that it is made of


class Ink:
    """Draws the tokens of one sample: knows the tokenizer, and how many tooltips are left."""

    def __init__(self, tokenizer: Tokenizer, say: Callable[..., str]):
        self.tokenizer, self.say, self.special, self.left = tokenizer, say, special_names(tokenizer), CHIPS

    def name(self, id: int) -> str:
        """A token in a tooltip or a label."""
        return self.special.get(id) or self.tokenizer.decode([id])

    def tip(self, token: Token) -> str:
        """The token's column of the pack; the field names are those of ``Pack``."""
        label = f" · label {token.label} “{self.name(token.label)}”" if token.label >= 0 else ""
        return f"index {token.index} · position {token.position} · id {token.id}{label}"

    def marker(self, token: Token) -> str:
        """A special token, isolated so that it does not decide the direction of the text it opens."""
        seen = "s y" if token.learnt else "s"
        return f'<bdi class="{seen}" title="{plain(self.tip(token))}">{plain(self.name(token.id))}</bdi>'

    def transition(self, shown: Shown) -> str:
        label = shown.transition
        if label is None:
            return ""
        tip = f"{self.say('l_transition')}: index {shown.stop - 1} · label {label}"
        return f'<bdi class="t" title="{plain(tip)}">→ {plain(self.name(label))}</bdi>'

    def run(self, parts: Sequence[Part]) -> str:
        """Parts of a text as chips; beyond the sample's tooltips as plain text."""
        chips, done = [], 0
        for text, tokens in parts:
            if self.left <= 0:
                break
            self.left, done = self.left - len(tokens), done + 1
            if len(tokens) == 1 and tokens[0].id in self.special:
                chips.append(self.marker(tokens[0]))
                continue
            tip = "\n".join(map(self.tip, tokens))
            many = f"<sub>×{len(tokens)}</sub>" if len(tokens) > 1 else ""
            chips.append(f'<span{_learnt(tokens)} title="{plain(tip)}">{visible(text)}{many}</span>')
        rest = parts[done:]
        if rest:
            text = "".join(text for text, _ in rest)
            chips.append(
                f"<span{_learnt(rest[0][1])}>{visible(text[:PLAIN])}</span>"
                + ("…" if len(text) > PLAIN else "")
            )
        return "".join(chips)

    def text(self, shown: Shown) -> str:
        """The tokens of a text block, a long one folded, and what was cut off it."""
        first, *inner, last = shown.tokens
        parts, at = [], 0
        for text, n in characters(self.tokenizer, [token.id for token in inner]):
            parts.append((text, inner[at : at + n]))
            at += n
        start = self.marker(first)
        end = self.cut(shown) + self.marker(last) + self.transition(shown)
        if len(parts) <= HEAD + 3 * TAIL:
            return f'<p class="ids" dir="auto">{start}{self.run(parts)}{end}</p>'
        # before the middle, which may use up the tooltips
        head, tail = self.run(parts[:HEAD]), self.run(parts[-TAIL:])
        middle = parts[HEAD:-TAIL]
        more = self.say("more_tokens", n=f"{sum(len(tokens) for _, tokens in middle):,}")
        return (
            f'<p class="ids" dir="auto">{start}{head}</p><details class="fold"><summary>{more}</summary><p'
            f' class="ids" dir="auto">{self.run(middle)}</p></details><p class="ids"'
            f' dir="auto">{tail}{end}</p>'
        )

    def cut(self, shown: Shown) -> str:
        if not shown.block.cut:
            return ""
        ids = shown.lost[:HEAD]
        label = shown.tokens[-2].label  # of the last token before the cut: what stood behind it
        assert label == shown.lost[0]
        tip = f"{self.say('l_cut_label')}: index {shown.stop - 2} · label {label}"
        more = (
            f" {self.say('more_tokens', n=f'{len(shown.lost) - HEAD:,}')}" if len(shown.lost) > HEAD else ""
        )
        return f'<del title="{plain(tip)}">{visible(self.tokenizer.decode(ids))}{more}</del>'


def _learnt(tokens: Sequence[Token]) -> str:
    return ' class="y"' if tokens[0].learnt else ""


# ---- pictures


def tile_side(blocks: Iterable[Shown]) -> int:
    """Side of a sample's tiles in pixels: smaller where there are many, so that pages stay small."""
    n = sum(shown.picture is not None for shown in blocks)
    return next((side for most, side in TILES if n <= most), SMALLEST)


def tile(shown: Shown, side: int) -> str:
    """The picture of a block under the grid of its tokens."""
    assert shown.picture is not None and shown.block.grid is not None
    rows, columns = shown.block.grid
    image = to_image(shown.picture.pixels)
    image.thumbnail((side, side))
    if shown.picture.time is not None:
        image = to_image(noised(image, shown.picture, (rows, columns)))
    wide = max(24, round(side * min(1.0, image.width / image.height)))
    faint = min(0.6, max(0.25, wide / columns / 16))  # a fine grid must not hide the picture
    lines = "".join(f"M0 {y}H{columns}" for y in range(1, rows)) + "".join(
        f"M{x} 0V{rows}" for x in range(1, columns)
    )
    path = f'<path d="{lines}" stroke-opacity="{faint:.2f}"/>'
    grid = f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" aria-hidden="true">{path}</svg>'
    return f'<div class="tile" style="max-width:{wide}px"><img alt="" src="{data_uri(image)}">{grid}</div>'


def noised(image: Any, picture: Picture, grid: tuple[int, int]) -> Tensor:
    """[3, H, W]: a small picture mixed with noise at the block's time, a noise value a latent cell, to show
    how much is left of it."""
    assert picture.time is not None
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    noise = torch.randn(1, 3, 2 * grid[0], 2 * grid[1], generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.interpolate(noise, x.shape[1:])[0]
    t = torch.full((x[0].numel(),), picture.time)
    return flow.mix(x.flatten(1).T, noise.flatten(1).T, t).T.reshape(x.shape).clamp(-1, 1)


def data_uri(image: Any) -> str:
    small = max(image.size) <= 64
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 82}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{'png' if small else 'jpeg'};base64,{data}"


# ---- the sequence and the mask


def block_name(shown: Shown, say: Callable[..., str]) -> str:
    return f"{shown.number} {say(KINDS[shown.kind])}"


def strip(view: SampleView, say: Callable[..., str]) -> str:
    """The sequence as a bar of its blocks."""
    parts = []
    for shown in view.blocks:
        grow = f"{math.sqrt(max(1, shown.block.length + 2)):.2f}"
        marks = (" loss" if shown.block.loss else "") + (" gone" if shown.block.dropped else "")
        state = (
            f"{say('dropped')}"
            if shown.block.dropped
            else f"{say('tokens_n', n=f'{shown.stop - shown.start:,}')}"
        )
        tip = f"{block_name(shown, say)} · {state}" + (f" · {say('loss')}" if shown.block.loss else "")
        parts.append(
            f'<div class="k-{KINDS[shown.kind]}{marks}" style="flex-grow:{grow}"'
            f' title="{plain(tip)}">{shown.number}</div>'
        )
    return f'<div class="strip">{"".join(parts)}</div>'


@dataclass(frozen=True)
class Axis:
    """Where blocks begin and end along a side of the mask, in SVG units."""

    edges: list[float]  # one more than blocks
    left: int  # room for the names

    def span(self, i: int) -> tuple[float, float]:
        return self.edges[i], self.edges[i + 1] - self.edges[i]


def mask_drawing(view: SampleView, say: Callable[..., str]) -> str:
    """The mask of the sample in the order of its sequence: token by token where it is short, else block by
    block."""
    blocks = view.kept[:BLOCKS]
    short, named = len(view.pack) <= TOKENS and len(blocks) == len(view.kept), len(blocks) <= LABELLED
    sizes = [float(s.stop - s.start) if short else 3 + math.sqrt(s.stop - s.start) for s in blocks]
    least = 0.0 if short else sum(sizes) * (0.03 if named else 0.0)
    sizes = [max(size, least) for size in sizes]
    left = 150 if named else 40
    ends = np.cumsum([0.0, *sizes]) / max(sum(sizes), 1e-9) * SIDE
    axis = Axis([left + float(end) for end in ends], left)
    top, height = 18 - left, SIDE + 22  # the same edges serve both sides: y = x + top
    cells = block_mask(view, BLOCKS)
    body = _token_cells(view, axis, top) if short else _block_cells(view, cells, axis, top)
    titles = _titles(view, cells, axis, top, say) if named else ""
    frame = "".join(f"M{x:.1f} 18V{18 + SIDE}M{left} {x + top:.1f}H{left + SIDE}" for x in axis.edges)
    parts = [
        f'<svg class="mask" viewBox="0 0 {left + SIDE + 4} {height}" role="img" aria-label="{say("mask")}">'
    ]
    parts += [
        _names(view, axis, top, named, say),
        body,
        f'<path class="frame" d="{frame}"/>',
        titles,
        "</svg>",
    ]
    return "".join(parts)


def _token_cells(view: SampleView, axis: Axis, top: float) -> str:
    """Rectangles of tokens that see tokens: runs along a row, rows alike drawn as one."""
    seen = mask(view.pack).numpy()
    kinds = np.concatenate([np.full(s.stop - s.start, s.kind + 1) for s in view.kept])
    codes = np.where(seen, kinds[None, :], 0)
    unit = SIDE / len(seen)
    paths: dict[int, list[str]] = {}
    for y, end in pairwise(_changes((codes[1:] != codes[:-1]).any(1))):
        for x, stop in pairwise(_changes(np.diff(codes[y]))):
            if codes[y, x]:
                left, up = axis.left + x * unit, axis.left + top + y * unit
                box = f"M{left:.4g} {up:.4g}h{(stop - x) * unit:.4g}v{(end - y) * unit:.4g}H{left:.4g}z"
                paths.setdefault(int(codes[y, x]) - 1, []).append(box)
    return "".join(
        f'<path class="f-{KINDS[Kind(kind)]}" d="{"".join(parts)}"/>' for kind, parts in sorted(paths.items())
    )


def _changes(differs: np.ndarray) -> list[int]:
    """Where runs begin, and the end of the last; ``differs[i]`` says that i + 1 is not as i."""
    return [0, *(np.flatnonzero(differs) + 1).tolist(), len(differs) + 1]


def _block_cells(view: SampleView, cells: Sequence[Sequence[int]], axis: Axis, top: float) -> str:
    paths: dict[str, list[str]] = {}
    for i, row in enumerate(cells):
        for j, verdict in enumerate(row):
            (y, h), (x, w) = axis.span(i), axis.span(j)
            if verdict == NONE and j > i:  # it stands after
                continue
            name = {NONE: "hidden", MIXED: "mixed"}.get(verdict, f"f-{KINDS[view.kept[j].kind]}")
            box = f"v{h:.1f}h{w:.1f}z" if verdict == CAUSAL else f"h{w:.1f}v{h:.1f}h{-w:.1f}z"
            paths.setdefault(name, []).append(f"M{x:.1f} {y + top:.1f}{box}")
    return "".join(f'<path class="{name}" d="{"".join(parts)}"/>' for name, parts in sorted(paths.items()))


def _titles(
    view: SampleView, cells: Sequence[Sequence[int]], axis: Axis, top: float, say: Callable[..., str]
) -> str:
    """Invisible cells that carry the tooltips, those above the diagonal left out: there nothing is seen."""
    parts = []
    for i, row in enumerate(cells):
        for j in range(i + 1):
            (y, h), (x, w) = axis.span(i), axis.span(j)
            tip = f"{block_name(view.kept[i], say)} {say(f'sees_{row[j]}')} {block_name(view.kept[j], say)}"
            parts.append(
                f'<rect x="{x:.1f}" y="{y + top:.1f}" width="{w:.1f}"'
                f' height="{h:.1f}"><title>{plain(tip)}</title></rect>'
            )
    return f'<g fill="transparent">{"".join(parts)}</g>'


def _names(view: SampleView, axis: Axis, top: float, named: bool, say: Callable[..., str]) -> str:
    parts = []
    for i, shown in enumerate(view.kept[:BLOCKS]):
        start, size = axis.span(i)
        middle = start + size / 2
        if size < (4 if named else 12):
            continue
        name = block_name(shown, say) if named else str(shown.number)
        parts.append(
            f'<text x="{axis.left - 6}" y="{middle + top + 4:.1f}" text-anchor="end">{plain(name)}</text>'
        )
        if size >= 10:
            parts.append(f'<text x="{middle:.1f}" y="12" text-anchor="middle">{shown.number}</text>')
    return "".join(parts)
