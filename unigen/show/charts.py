"""Line charts of a page: sharp at any width, since the lines are stretched and the texts are not; a few lines
of script show values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from unigen.show.curves import Curve, Panel, Range, span, thin, value_range
from unigen.show.language import Words, figure
from unigen.show.pages import COLOURS, escape, log_ticks, round_ticks

SIDE = 1000  # of the plane that is stretched over a chart

STYLE = (
    ":root { "
    + " ".join(f"--c{n}: {colour};" for n, colour in enumerate(COLOURS))
    + """ }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 26px 30px; }
.chart figcaption { margin: 0 0 8px; font-size: 13px; display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; }
.chart figcaption b { font-size: 15px; color: var(--ink); }
.chart .key::before { content: ""; display: inline-block; width: 16px; height: 0; border-top: 3px solid var(--k); vertical-align: 4px;
  margin-right: 6px; border-radius: 2px; } .chart .key.dots::before { border-top-style: dotted; }
.plot { display: grid; grid-template: 190px 22px / 54px 1fr; font-size: 12px; color: var(--soft); font-variant-numeric: tabular-nums; }
.ys, .xs, .area { position: relative; } .ys span { position: absolute; right: 8px; transform: translateY(-50%); white-space: nowrap; }
.xs { grid-column: 2; } .xs span { position: absolute; top: 5px; transform: translateX(-50%); white-space: nowrap; }
.xs span.begin { transform: none; } .xs span.end { transform: translateX(-100%); }
.area { border-left: 1px solid var(--line); border-bottom: 1px solid var(--line); touch-action: pan-y; cursor: crosshair; }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: hidden; }
.area path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-width: 1.8; }
.area .grid-line { stroke: var(--line); stroke-width: 1; } .area .band { stroke: none; opacity: .16; }
.area .dots { stroke-width: 6; stroke-linecap: round; } .area .faint { stroke-dasharray: 5 3; stroke-width: 1.5; }
.area .skips { stroke: #d1495b; stroke-width: 8; stroke-linecap: round; }
.area .cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.tip { position: absolute; z-index: 2; top: 6px; pointer-events: none; background: var(--card); color: var(--ink); padding: 6px 10px;
  border: 1px solid var(--line); border-radius: 8px; box-shadow: 0 2px 10px rgb(0 0 0 / .18); white-space: nowrap; line-height: 1.5; }
.tip i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--k); margin-right: 6px; }
.tip[hidden], .cursor[hidden] { display: none; }
"""
)

# Values come from the attribute data-curves; they are set as text, never as markup.
SCRIPT = """
for (const area of document.querySelectorAll('.area')) {
  const data = JSON.parse(area.dataset.curves), tip = area.querySelector('.tip'), line = area.querySelector('.cursor');
  const show = event => {
    const box = area.getBoundingClientRect(), share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = data.first + share * (data.last - data.first);
    let step = null; const rows = [];
    for (const curve of data.curves) {
      let low = 0, high = curve.x.length - 1;
      while (low < high) { const middle = (low + high) >> 1; if (curve.x[middle] < wanted) low = middle + 1; else high = middle; }
      if (low > 0 && wanted - curve.x[low - 1] < curve.x[low] - wanted) low--;
      if (step === null || Math.abs(curve.x[low] - wanted) < Math.abs(step - wanted)) step = curve.x[low];
      rows.push([curve, low]);
    }
    const head = document.createElement('div');
    head.textContent = data.step.replace('#', Math.round(step).toLocaleString('en')); tip.replaceChildren(head);
    for (const [curve, at] of rows) {
      if (Math.abs(curve.x[at] - step) > curve.gap) continue;
      const row = document.createElement('div'), dot = document.createElement('i');
      dot.style.setProperty('--k', 'var(--c' + curve.c + ')');
      row.append(dot, curve.n + '  ' + curve.t[at]); tip.append(row);
    }
    const x = (step - data.first) / (data.last - data.first) * 100;
    line.style.left = x + '%'; line.hidden = tip.hidden = false;
    tip.style.left = x < 50 ? 'calc(' + x + '% + 10px)' : 'auto'; tip.style.right = x < 50 ? 'auto' : 'calc(' + (100 - x) + '% + 10px)';
  };
  area.addEventListener('pointermove', show); area.addEventListener('pointerdown', show);
  area.addEventListener('pointerleave', () => { line.hidden = tip.hidden = true; });
}
"""


def chart(
    panel: Panel, curves: Sequence[Curve], names: Sequence[str], words: Words, skipped: Sequence[int] = ()
) -> str:
    """A chart as HTML.

    Args:
        curves: What to draw; each has a point at least.
        names: Of the runs; one run's curves are called training and validation.
        skipped: Steps to mark at the lower edge.
    """
    values, (first, last) = value_range(panel, curves), span(curves)
    ticks = _inside((log_ticks if values.log else round_ticks)(values.low, values.high), values)
    drawn = [curve._replace(points=thin(curve.points)) for curve in curves]

    def at(step: float) -> float:
        return (step - first) / (last - first) * SIDE

    def height(value: float) -> float:
        return (1 - values.place(value)) * SIDE

    parts = [f'<path class="grid-line" d="M0 {height(tick):.1f}H{SIDE}"/>' for tick in ticks]
    for curve in drawn:
        parts.append(_drawn(curve, _colour(curve, len(names)), at, height, len(names) == 1))
    marks = [step for step in skipped if first <= step <= last]
    if marks:
        parts.append(
            f'<path class="skips" d="{"".join(f"M{at(step):.1f} {SIDE - 20}h0" for step in marks)}"/>'
        )
    caption = [f"<b>{escape(title(panel, words))}</b>", *_notes(panel, values, words)]
    caption += _keys(drawn, names, words)
    if marks:
        caption.append(_key(words("skipped_steps"), "#d1495b", True))
    ys = "".join(
        f'<span style="top:{height(tick) / SIDE:.2%}">{escape(figure(tick))}</span>' for tick in ticks
    )
    data = escape(
        json.dumps(
            _data(panel, drawn, names, words, (first, last)), separators=(",", ":"), ensure_ascii=False
        )
    )
    svg = (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none"'
        f' aria-hidden="true">{"".join(parts)}</svg>'
    )
    area = (
        f'<div class="area" data-curves="{data}">{svg}<div class="cursor" hidden></div><div class="tip"'
        " hidden></div></div>"
    )
    return (
        f'<figure class="chart"><figcaption>{"".join(caption)}</figcaption><div class="plot"><div'
        f' class="ys">{ys}</div>{area}<div class="xs">{_steps(first, last, at, words)}</div></div></figure>'
    )


def title(panel: Panel, words: Words) -> str:
    return words("data_wait_curve" if panel.name == "data_wait" else panel.name)


def _notes(panel: Panel, values: Range, words: Words) -> list[str]:
    notes = [words(panel.unit)] if panel.unit else []
    if values.log:
        notes.append(words("log_scale"))
    if values.cut:
        notes.append(words("cut_off", high=values.high))
    return [f"<span>{escape(note)}</span>" for note in notes]


def _inside(ticks: Sequence[float], values: Range) -> list[float]:
    """The ticks that lie in the range, thinned to seven."""
    room = 1e-9 * (values.high - values.low)
    found = [tick for tick in ticks if values.low - room <= tick <= values.high + room]
    return found[:: -(-len(found) // 7)] if found else [values.low, values.high]


def _colour(curve: Curve, runs: int) -> int:
    return (curve.run if runs > 1 else int(curve.is_validation)) % len(COLOURS)


def _name(curve: Curve, names: Sequence[str], words: Words) -> str:
    kind = words("validation" if curve.is_validation else "training")
    return (
        kind
        if len(names) == 1
        else f"{names[curve.run]} · {kind}"
        if curve.is_validation
        else names[curve.run]
    )


def _keys(curves: Sequence[Curve], names: Sequence[str], words: Words) -> list[str]:
    """The legend: of one run its two curves, of several the runs, and once that dots are validations."""
    if len(names) == 1:
        return (
            [_key(_name(c, names, words), f"var(--c{_colour(c, 1)})", c.is_validation) for c in curves]
            if len(curves) > 1
            else []
        )
    runs = {c.run: c for c in reversed(curves)}
    keys = [_key(names[run], f"var(--c{_colour(c, len(names))})", False) for run, c in sorted(runs.items())]
    return (
        [*keys, _key(words("validation"), "var(--soft)", True)]
        if any(c.is_validation for c in curves)
        else keys
    )


def _key(name: str, colour: str, dots: bool) -> str:
    return f'<span class="key{" dots" if dots else ""}" style="--k:{colour}">{escape(name)}</span>'


def _drawn(curve: Curve, colour: int, at, height, alone: bool) -> str:
    """A curve: the band from least to greatest value, the means; validations as dots."""
    places = [(at(p.step), height(p.mean)) for p in curve.points]
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) + ("h0" if len(places) == 1 else "")
    paint = f'style="stroke:var(--c{colour})"'
    parts = []
    if not curve.is_validation and alone and any(p.high > p.low for p in curve.points):
        above = "L".join(f"{at(p.step):.1f} {height(p.high):.1f}" for p in curve.points)
        below = "L".join(f"{at(p.step):.1f} {height(p.low):.1f}" for p in reversed(curve.points))
        parts.append(f'<path class="band" style="fill:var(--c{colour})" d="M{above}L{below}Z"/>')
    lonely = ' class="dots"' if len(places) == 1 else ' class="faint"' if curve.is_validation else ""
    parts.append(f'<path{lonely} {paint} d="{line}"/>')
    if curve.is_validation and len(places) <= 100:
        parts.append(f'<path class="dots" {paint} d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>')
    return "".join(parts)


def _steps(first: float, last: float, at, words: Words) -> str:
    """The numbers under the chart; the last one says what they are."""
    # of half the range, since the last quarter belongs to the last step
    fine = round_ticks(first, (first + last) / 2)
    ticks = [
        k * (fine[1] - fine[0])
        for k in range(int(first // (fine[1] - fine[0])), int(last // (fine[1] - fine[0])) + 1)
    ]
    ticks = [tick for tick in ticks if tick >= first and tick == int(tick)]
    ticks = ticks[:: -(-len(ticks) // 6)] if ticks else [first]
    shown = [(at(tick) / SIDE, f"{tick:,.0f}") for tick in ticks if at(tick) < 0.74 * SIDE]
    parts = [
        f'<span{" class=begin" if x < 0.03 else ""} style="left:{x:.2%}">{text}</span>' for x, text in shown
    ]
    return "".join(
        [
            *parts,
            (
                '<span class="end"'
                f' style="left:100%">{escape(words("step_alone", step=math.floor(last)))}</span>'
            ),
        ]
    )


def _data(
    panel: Panel, curves: Sequence[Curve], names: Sequence[str], words: Words, steps: tuple[float, float]
) -> dict[str, object]:
    """What the script shows under the pointer; ``gap`` is how far from the pointed step a point still counts."""
    unit = " %" if panel.unit == "unit_share" else ""
    shown = []
    for curve in curves:
        xs = [round(p.step, 2) for p in curve.points]
        gap = max(1.0, (steps[1] - steps[0]) / (40 if curve.is_validation else 150))
        texts = [figure(p.mean) + unit for p in curve.points]
        shown.append(
            {
                "n": _name(curve, names, words),
                "c": _colour(curve, len(names)),
                "x": xs,
                "t": texts,
                "gap": gap,
            }
        )
    return {
        "first": steps[0],
        "last": steps[1],
        "step": words("step_alone", step=0).replace("0", "#"),
        "curves": shown,
    }
