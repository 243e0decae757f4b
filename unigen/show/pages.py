"""Pages to look at: one self-contained HTML file each, with charts as SVG and pictures as data URIs.

They need no network, no script and no plotting library, follow the reader's light or dark mode, and escape
every text. A picture is a ``PIL.Image.Image``, a path, or encoded bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

Series = Mapping[str, Sequence[tuple[float, float]]]

# Middle tones, readable on white and on near black; line styles change after the last one.
COLOURS = ("#3f83c8", "#d9822b", "#2f9e6e", "#d1495b", "#8a63d2", "#1798a8", "#a87642", "#7a869a")
DASHES = ("", "7 3", "2 3")
# of a drawn line; longer ones are averaged, since a point is an element with its own tooltip
MAX_POINTS = 400
MAX_SIDE = 1024  # of a picture in a page; the files beside the page keep their size
SMALL = 192  # pictures up to this side are magnified with hard pixels

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d687a; --line: #d9dee6; --page: #f6f7f9; --card: #ffffff; --mine: #e6effa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b5; --line: #333b47; --page: #14171c; --card: #1d2128; --mine: #1f3147; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 20px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 20px; } h2 { font-size: 17px; margin: 0 0 14px; }
h1, h2, p, td, figcaption { overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px; margin: 0 0 18px; }
.wide { overflow-x: auto; } .soft { color: var(--soft); } svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; } .number { text-align: right; }
.grid { display: grid; gap: 12px; } figure { margin: 0; min-width: 0; } figcaption { font-size: 13px; color: var(--soft); margin-top: 4px; }
img { max-width: 100%; height: auto; border-radius: 6px; vertical-align: top;
  box-shadow: 0 0 0 1px var(--line); } img.small { image-rendering: pixelated; }
.grid img { width: 100%; } .grid img.small { border-radius: 3px; }
.piece { margin: 0 0 12px; } .piece:last-child { margin: 0; } p.piece { white-space: pre-wrap; max-width: 76ch; }
.mine { background: var(--mine); border-color: transparent; }
"""
# the browser itself refuses anything from outside
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escape(value: Any) -> str:
    """Text for an element or an attribute; control characters and lone surrogates, which HTML cannot hold,
    become visible signs."""
    shown = "".join(
        c if c in "\n\t" or ord(c) > 31 else chr(0x2400 + ord(c)) for c in str(value).replace("\r\n", "\n")
    )
    return html.escape(shown.encode("utf-8", "replace").decode("utf-8"), quote=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_figure(value: Any) -> bool:
    return _is_number(value) or (
        isinstance(value, str) and re.fullmatch(r"(< )?-?[\d.,]+ ?%?", value) is not None
    )


# ---------------------------------------------------------------- charts

WIDTH, HEIGHT = 720, 320  # of the plotted part with its left and upper margins; labels and legend come below
LEFT, RIGHT, TOP = 74, 18, 40


def line_chart(series: Series, *, title: str, x_label: str, y_label: str, log_y: bool = False) -> str:
    """An SVG chart of named lines of (x, y) points, with axes, grid, legend and a tooltip on every point.

    Points that cannot be drawn (not finite; not positive with ``log_y``) are left out and counted under the
    chart; lines of more than ``MAX_POINTS`` points are drawn as the means of equal runs of points.
    """
    drawn, left_out = {}, 0
    for name, points in series.items():
        good = [
            (float(x), float(y))
            for x, y in points
            if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)
        ]
        left_out += len(points) - len(good)
        drawn[name] = _thin(good)
    note = (
        f'<p class="soft">Points left out: {left_out} (not finite{" or not positive" if log_y else ""}).</p>'
        if left_out
        else ""
    )
    every = [point for points in drawn.values() for point in points]
    if not every:
        return f'<p class="soft">{escape(title)}: no data.</p>{note}'

    x_ticks = round_ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = (log_ticks if log_y else round_ticks)(min(y for _, y in every), max(y for _, y in every))
    place_x = _scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT, False)
    place_y = _scale(y_ticks[0], y_ticks[-1], HEIGHT, TOP, log_y)
    rows = _legend_rows(list(drawn), WIDTH - LEFT - RIGHT)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT + 52 + 20 * len(rows)}"'
    parts = [f'<svg {size} role="img" aria-label="{escape(title)}" fill="currentColor" font-size="12">']
    parts.append(f'<text x="{LEFT}" y="22" font-size="14" font-weight="600">{escape(title)}</text>')
    parts += [_axes([(place_x(v), v) for v in x_ticks], [(place_y(v), v) for v in y_ticks], x_label, y_label)]
    parts += [_line(n, name, points, place_x, place_y) for n, (name, points) in enumerate(drawn.items())]
    return "".join([*parts, _legend(rows, list(drawn), LEFT, HEIGHT + 58), "</svg>", note])


def bar_chart(bars: Sequence[tuple[str, str, float]], *, title: str, x_label: str, y_label: str) -> str:
    """An SVG chart of bars side by side, with axes, grid and tooltips. A bar is its label, what its tooltip
    calls it, and its value of at least 0. Labels that would run into each other are left out.
    """
    assert all(math.isfinite(value) and value >= 0 for _, _, value in bars), "a bar has a length"
    if not bars or not any(value for *_, value in bars):
        return f'<p class="soft">{escape(title)}: no data.</p>'
    ticks = round_ticks(0.0, max(value for *_, value in bars))
    place = _scale(ticks[0], ticks[-1], HEIGHT, TOP, False)
    step = (WIDTH - LEFT - RIGHT) / len(bars)
    every = math.ceil((max(_name_width(label) for label, *_ in bars) - 38) / step)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 48}" role="img" aria-label="{escape(title)}"'
        ' fill="currentColor" font-size="12">'
    ]
    parts.append(f'<text x="{LEFT}" y="22" font-size="14" font-weight="600">{escape(title)}</text>')
    parts.append(_axes([], [(place(value), value) for value in ticks], x_label, y_label))
    for n, (label, name, value) in enumerate(bars):
        x = LEFT + n * step
        # the whole height catches the pointer, so that the smallest bar can be asked too
        parts.append(
            f'<g><title>{escape(name)}: {value:,.6g}</title><rect x="{x:.1f}" y="{TOP}" width="{step:.1f}"'
        )
        parts.append(
            f' height="{HEIGHT - TOP}" fill-opacity="0"/><rect x="{x + step * 0.08:.1f}"'
            f' y="{place(value):.1f}"'
        )
        parts.append(
            f' width="{step * 0.84:.1f}" height="{HEIGHT - place(value):.1f}" rx="2"'
            f' fill="{COLOURS[0]}"/></g>'
        )
        if n % every == 0:
            parts.append(
                f'<text x="{x + step / 2:.1f}" y="{HEIGHT + 17}" text-anchor="middle"'
                f' fill-opacity=".7">{escape(label)}</text>'
            )
    return "".join([*parts, "</svg>"])


def _axes(
    xs: Sequence[tuple[float, float]], ys: Sequence[tuple[float, float]], x_label: str, y_label: str
) -> str:
    """Axes, grid, tick numbers and labels; ``xs`` and ``ys`` are the ticks as (place, value)."""
    parts = []
    for y, value in ys:
        parts.append(
            f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity=".14"/>'
        )
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill-opacity=".7">{value:.6g}</text>'
        )
    for x, value in xs:
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT}" stroke="currentColor" stroke-opacity=".07"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT + 17}" text-anchor="middle" fill-opacity=".7">{value:.6g}</text>'
        )
    parts.append(
        f'<path d="M{LEFT} {TOP}V{HEIGHT}H{WIDTH - RIGHT}" fill="none" stroke="currentColor"'
        ' stroke-opacity=".5"/>'
    )
    middle, turn = (LEFT + WIDTH - RIGHT) / 2, f"translate(15 {(TOP + HEIGHT) / 2}) rotate(-90)"
    parts.append(
        f'<text x="{middle}" y="{HEIGHT + 36}" text-anchor="middle"'
        f' fill-opacity=".8">{escape(x_label)}</text>'
    )
    parts.append(f'<text transform="{turn}" text-anchor="middle" fill-opacity=".8">{escape(y_label)}</text>')
    return "".join(parts)


def _line(
    n: int, name: str, points: Sequence[tuple[float, float]], place_x: Callable, place_y: Callable
) -> str:
    places = [(place_x(x), place_y(y)) for x, y in points]
    colour = COLOURS[n % len(COLOURS)]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    line = (
        f'<polyline points="{joined}" fill="none" {_stroke(n)} stroke-linejoin="round"/>'
        if len(places) > 1
        else ""
    )
    # where points stand apart each is shown; in a dense line they only catch the pointer
    seen = 1 if len(places) <= 24 else 0
    dots = [
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{3 if seen else 6}" fill="{colour}" fill-opacity="{seen}">'
        f"<title>{escape(name)}: {y:.6g} ({x:.6g})</title></circle>"
        for (px, py), (x, y) in zip(places, points, strict=True)
    ]
    return line + "".join(dots)


def _stroke(n: int) -> str:
    dash = DASHES[n // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[n % len(COLOURS)]}" stroke-width="2"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _name_width(name: str) -> int:
    """About the width of a legend's entry at 12 px; characters beyond Latin count double, as Chinese ones
    are."""
    return 48 + sum(14 if ord(c) > 0x2E7F else 7 for c in name)


def _legend_rows(names: Sequence[str], width: int) -> list[list[int]]:
    rows: list[list[int]] = [[]]
    used = 0
    for n, name in enumerate(names):
        if rows[-1] and used + _name_width(name) > width:
            rows.append([])
            used = 0
        rows[-1].append(n)
        used += _name_width(name)
    return rows


def _legend(rows: Sequence[Sequence[int]], names: Sequence[str], left: int, top: int) -> str:
    parts = []
    for k, row in enumerate(rows):
        x, y = left, top + 20 * k
        for n in row:
            parts.append(
                f'<path d="M{x} {y - 4}h22" {_stroke(n)}/><text x="{x + 28}"'
                f' y="{y}">{escape(names[n])}</text>'
            )
            x += _name_width(names[n])
    return "".join(parts)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    run = math.ceil(len(points) / MAX_POINTS)
    if run <= 1:
        return list(points)
    runs = [points[k : k + run] for k in range(0, len(points), run)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    """The map of [low, high] onto [start, end]."""
    bend = math.log10 if log else float
    a, b = bend(low), bend(high)
    return lambda value: start + (bend(value) - a) / (b - a) * (end - start)


def round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high]."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: give it room
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2, 5 times powers of ten that enclose [low, high]; powers of ten alone, or every few of
    them, when there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks, stride = (1, 2, 5) if last - first <= 4 else (1,), math.ceil((last - first + 1) / 12)
    ticks = [float(f"{m}e{k}") for k in range(first, last + stride, stride) for m in marks]
    below = max(t for t in ticks if t <= low)
    above = min((t for t in ticks if t >= high and t > below), default=10.0 * below)
    return [t for t in ticks if below <= t <= above] if above in ticks else [below, above]


# ---------------------------------------------------------------- pictures, tables, pages


def _open(picture: Any) -> Any:
    """A PIL picture of ``picture``: itself, or what ``open_image`` makes of a path or of encoded bytes."""
    if hasattr(picture, "convert"):
        return picture
    from unigen.sequence.images import open_image

    return open_image(picture)


def _png(image: Any) -> bytes:
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):  # PNG has no CMYK, and browsers no floats
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _img(picture: Any, caption: str = "", min_width: int = 0) -> str:
    """An ``<img>`` that holds its picture, scaled down to ``MAX_SIDE``; small ones are magnified, to
    ``min_width`` at least."""
    image = _open(picture).copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    small = max(image.size) <= SMALL
    size = (
        f' width="{image.width * max(1, math.ceil(min_width / image.width))}"' if small and min_width else ""
    )
    data = base64.b64encode(_png(image)).decode("ascii")
    return (
        f'<img{" class=small" if small else ""}{size} alt="{escape(caption)}"'
        f' src="data:image/png;base64,{data}">'
    )


def image_grid(items: Sequence[tuple[str, Any]], columns: int) -> str:
    """Pictures with captions, ``columns`` in a row; small pictures are magnified with hard pixels."""
    assert columns >= 1
    figures = [
        f"<figure>{_img(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, picture in items
    ]
    return (
        f'<div class="grid" style="grid-template-columns: repeat({columns}, minmax(0,'
        f' 1fr))">{"".join(figures)}</div>'
    )


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A table; numbers and texts of figures alone (``12.3 %``) stand to the right, thousands apart, floats
    with four significant digits."""

    def cell(value: Any) -> str:
        if not _is_number(value):
            kind = ' class="number"' if _is_figure(value) else ""
            return f"<td{kind}>{escape(value)}</td>"
        return f'<td class="number">{format(value, ",") if isinstance(value, Integral) else format(float(value), ".4g")}</td>'

    assert all(len(row) == len(header) for row in rows), "every row has a cell for each heading"
    numbers = [bool(rows) and all(_is_figure(row[k]) for row in rows) for k in range(len(header))]
    heads = "".join(
        f"<th{' class=number' if right else ''}>{escape(name)}</th>"
        for name, right in zip(header, numbers, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def write_page(
    path: Path,
    title: str,
    sections: Sequence[tuple[str, str]],
    *,
    language: str = "en",
    style: str = "",
    script: str = "",
) -> Path:
    """Writes a page of ``sections`` (heading, HTML from this module's functions) to ``path``, whose folder it
    makes.

    Headings and title are text and are escaped; the bodies are used as they are. ``style`` and ``script`` are
    CSS and JavaScript of the page's own; the browser runs that script and no other, by its SHA-256.
    """
    return _write(
        path,
        title,
        [f"<section>{_heading(heading)}{body}</section>" for heading, body in sections],
        language,
        style,
        script,
    )


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>" if text else ""


def _write(
    path: Path, title: str, sections: Sequence[str], language: str = "en", style: str = "", script: str = ""
) -> Path:
    assert "</" not in script, "it would end the element"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = POLICY + (f"; script-src 'sha256-{digest}'" if script else "")
    head = (
        f'<!doctype html>\n<html lang="{language}"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join([*sections, f"<script>{script}</script>"] if script else sections)
    path.write_text(
        f"{head}<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n", encoding="utf-8", newline="\n"
    )
    return path


def _pieces(pieces: Sequence[Any]) -> list[tuple[str | None, Any]]:
    """(text, None) or (None, PIL picture) for pieces given as text, picture, ``Text`` or ``Image``."""
    # late, since it needs PyTorch, and pages without such pieces do not
    from unigen.sequence.types import Image, Text

    plain = [p.text if isinstance(p, Text) else p for p in pieces]
    return [
        (p, None) if isinstance(p, str) else (None, _open(p.source if isinstance(p, Image) else p))
        for p in plain
    ]


def _piece(text: str | None, picture: Any) -> str:
    return (
        f'<p class="piece">{escape(text)}</p>'
        if text is not None
        else f'<div class="piece">{_img(picture, min_width=160)}</div>'
    )


def write_pieces(folder: Path, prompt: Sequence[Any], pieces: Sequence[Any], title: str = "Unigen") -> Path:
    """Writes an answer for people and programs: ``01_text.txt``, ``02_image.png``, ..., and ``index.html``
    that shows it under its prompt.

    Args:
        folder: Made where it is missing; files of the same names are replaced, others stay.
        prompt: Texts (``str``, ``Text``) and pictures (PIL, path, bytes, ``Image``) in order. A ``str`` is
            always a text.
        pieces: The answer, of the same kinds, in order.
        title: Heading of the page.

    Returns:
        The path of ``index.html``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # opened before anything is written: the prompt may show a file of this folder
    asked, answered = _pieces(prompt), _pieces(pieces)
    digits = max(2, len(str(len(answered))))
    for n, (text, picture) in enumerate(answered, start=1):
        if text is not None:
            (folder / f"{n:0{digits}d}_text.txt").write_text(
                text, encoding="utf-8", errors="replace", newline="\n"
            )
        else:
            (folder / f"{n:0{digits}d}_image.png").write_bytes(_png(picture))
    nothing = '<p class="soft">(nothing)</p>'
    question = (
        f'<section class="mine"><h2>Prompt</h2>{"".join(_piece(*p) for p in asked) or nothing}</section>'
    )
    answer = f"<section><h2>Answer</h2>{''.join(_piece(*p) for p in answered) or nothing}</section>"
    return _write(folder / "index.html", title, [question, answer])


def contact_sheet(pictures: Sequence[Any], columns: int, cell: int, gap: int = 4) -> Any:
    """A PIL picture that shows many: ``columns`` in a row, each ``cell`` pixels square (nearest neighbour),
    ``gap`` white pixels apart."""
    import numpy as np
    import torch

    from unigen.sequence.images import to_image

    assert pictures and columns >= 1 and cell >= 1
    rows, step = math.ceil(len(pictures) / columns), cell + gap
    sheet = np.full((rows * step + gap, columns * step + gap, 3), 255, np.uint8)
    for n, picture in enumerate(pictures):
        pixels = np.asarray(_open(picture).convert("RGB"))
        take_y, take_x = (np.arange(cell) * side // cell for side in pixels.shape[:2])
        top, left = gap + n // columns * step, gap + n % columns * step
        sheet[top : top + cell, left : left + cell] = pixels[take_y][:, take_x]
    # half a level, since it rounds down
    return to_image((torch.from_numpy(sheet).permute(2, 0, 1).float() + 0.5) / 127.5 - 1)


# ---------------------------------------------------------------- metrics


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a ``metrics.jsonl``: for each number its (step, value) points, by step.

    Nested objects become ``outer/inner``. A resumed run logs some steps twice: the later line counts. A last
    line without its end is one still being written, and is left out.

    Raises:
        ValueError: another line is not a JSON object with a ``step``; the message names file and line.
    """
    lines = Path(path).read_bytes().split(b"\n")
    curves: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            fix = "Fix: remove the line, or point to the metrics.jsonl of a training run."
            raise ValueError(
                f"{path}:{number}: found {line[:80]!r}; expected a JSON object with a 'step'. {fix}"
            ) from error
        for name, value in _numbers(record):
            if name != "step":
                curves.setdefault(name, {})[step] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def _numbers(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name}/")
        elif _is_number(value):
            found.append((prefix + name, value))
    return found
