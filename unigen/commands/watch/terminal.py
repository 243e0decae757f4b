"""The view in the terminal: lines of coloured spans that fit its width, and its height where it has one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from unigen.commands.watch.health import State, judge, speed, worries
from unigen.commands.watch.panels import Panel, curves_of, panels_of
from unigen.runs.reader import Run
from unigen.show.curves import Curve, span
from unigen.show.figures import figure, size
from unigen.show.language import Words
from unigen.show.plot import plot, sparkline
from unigen.show.terminal import columns, harmless

MARKS = {"running": "●", "hung": "■", "dead": "✕", "stopped": "■", "finished": "✓", "new": "○"}
STATE_STYLES = {
    "running": "good",
    "hung": "bad",
    "dead": "bad",
    "stopped": "warn",
    "finished": "good",
    "new": "soft",
}
LABEL = 9  # columns of the numbers beside a chart
PLAIN_HEIGHT = 6  # lines of a chart where the height is free
ANSI = {
    "bold": "1", "soft": "2", "good": "32", "warn": "33", "bad": "1;31", "train": "36", "val": "33",
}  # fmt: skip


class Span(NamedTuple):
    """Text of one line in one style, a name of :data:`ANSI` or ""."""

    text: str
    style: str = ""


Line = list[Span]


class View(NamedTuple):
    """How to show: ``height`` None for as many lines as there are; ``unicode`` says that the output has
    Braille and blocks."""

    words: Words
    width: int
    height: int | None = None
    unicode: bool = True
    smoothing: float = 0.0
    live: bool = False


def frame(runs: Sequence[Run], view: View) -> list[Line]:
    """What stands on the terminal now: one run in full, several beside each other."""
    lines = _one(runs[0], view) if len(runs) == 1 else _many(runs, view)
    footer = [Span(time.strftime("%H:%M:%S"), "soft")] + (
        [Span(f"  {view.words('quit')}", "soft")] if view.live else []
    )
    if view.height is not None:
        lines = lines[: view.height - 1]
    return [*lines, footer] if view.live else lines


def render(lines: Sequence[Line], width: int, colour: bool) -> list[str]:
    """The lines as text, each cut to ``width`` columns."""
    return [_rendered(line, width, colour) for line in lines]


def _rendered(line: Line, width: int, colour: bool) -> str:
    parts, left = [], width
    for text, style in line:
        shown = fit(text, left)
        left -= columns(shown)
        parts.append(f"\x1b[{ANSI[style]}m{shown}\x1b[0m" if colour and style and shown else shown)
        if left <= 0:
            break
    return "".join(parts).rstrip()


def fit(text: str, width: int) -> str:
    """The beginning of the text that takes at most ``width`` columns, with … where something was cut."""
    if columns(text) <= width:
        return text
    kept, used = "", 0
    for c in text:
        used += columns(c)
        if used > width - 1:
            break
        kept += c
    return kept + "…" if width > 0 else ""


def wrapped(text: str, width: int, style: str = "", mark: str = "") -> list[Line]:
    """The text in lines of at most ``width`` columns, broken at spaces and between Chinese characters;
    ``mark`` before the first."""
    lines, line = [], ""
    room = max(8, width - columns(mark))
    for word in _words(text):
        if line and columns(line + word.rstrip()) > room:
            lines.append(line.rstrip())
            line = ""
        line += word
    lines.append(line.rstrip())
    indent = " " * columns(mark)
    return [[Span(indent if n else mark, style), Span(part, style)] for n, part in enumerate(lines)]


def _words(text: str) -> list[str]:
    found = [""]
    for c in text:
        if found[-1].endswith(" ") or (found[-1] and columns(c) == 2 and c not in "，。；：、）"):
            found.append("")
        found[-1] += c
    return found


# ---- one run


def _one(run: Run, view: View) -> list[Line]:
    state = judge(run)
    head = [*_head(run, state, view), *_worries(run, state, view)]
    below = [
        part
        for part in (_checkpoints(run, view), _ranks(run, view), _bad(run, view), _samples(run, view))
        if part
    ]
    panels = panels_of([run])
    if not panels:
        return [
            *head,
            [],
            [Span(view.words("no_metrics"), "soft")],
            *(line for part in below for line in [[], *part]),
        ]
    across = max(1, min(3, view.width // 56))
    if view.height is not None and len(panels) % across == 1 and panels[-1].name == "data_wait":
        panels = panels[:-1]  # the head says it too, and it would take a row of its own
    rows = [panels[k : k + across] for k in range(0, len(panels), across)]
    if view.height is None:
        tall = PLAIN_HEIGHT
    else:
        # What stands below gives way before the curves get too low to read.
        while (
            below
            and (view.height - 1 - len(head) - sum(len(part) + 1 for part in below)) // len(rows) - 3 < 3
        ):
            below.pop()
        tall = (view.height - 1 - len(head) - sum(len(part) + 1 for part in below)) // len(rows) - 3
    if tall >= 2 or view.height is None:
        charts = [line for row in rows for line in _row(run, row, view, min(tall, 10), across)]
    else:
        room = view.height - 1 - len(head) - len(panels) - 2  # for one chart, and a line for each other curve
        charts = _row(run, panels[:1], view, min(room, 10), 1) if room >= 3 else []
        charts += _sparks(run, panels[1:] if charts else panels, view)
    return [*head, *charts, *(line for part in below for line in [[], *part])]


def _head(run: Run, state: State, view: View) -> list[Line]:
    words, pace, total = view.words, speed(run), run.total_steps
    mark = MARKS[state.name] if view.unicode else "*"
    first = [
        Span(f"{harmless(run.name)}  ", "bold"),
        Span(f"{mark} {words(state.name)}", STATE_STYLES[state.name]),
    ]
    place = words("of_steps", step=run.step, total=total) if total else words("step_alone", step=run.step)
    first.append(Span(f"   {place}"))
    if total:
        first.append(Span(f"   {min(1.0, run.step / total):.1%}", "bold"))
    lines = [first]
    if total:
        done = round(min(1.0, run.step / total) * view.width)
        full, rest = "━─" if view.unicode else "=-"
        lines.append([Span(full * done, STATE_STYLES[state.name]), Span(rest * (view.width - done), "soft")])
    for told in state.why:
        lines += wrapped(
            words(told.key, **told.values),
            view.width,
            "soft" if state.name in ("running", "finished", "new") else "bad",
        )
    minute = None if pace.seconds_per_step is None else 60 / pace.seconds_per_step
    facts = [("tokens_per_second", figure(pace.tokens_per_second)), ("steps_per_minute", figure(minute))]
    if state.name == "running":
        facts.insert(0, ("eta", "–" if pace.eta is None else words.duration(pace.eta)))
    facts.append(("data_wait_share", "–" if pace.data_wait is None else f"{pace.data_wait:.1%}"))
    if (last := run.last_checkpoint) is not None:
        facts.append(
            ("last_checkpoint", f"{last.name} ({words('ago', t=words.duration(time.time() - last.time))})")
        )
    facts.append(("disk_left", "–" if run.disk_free is None else size(run.disk_free)))
    lines += _facts([(words(key), value) for key, value in facts], view.width)
    if run.metrics.share < 1:
        lines += wrapped(words("reading", share=run.metrics.share), view.width, "soft")
    return lines


def _facts(facts: Sequence[tuple[str, str]], width: int) -> list[Line]:
    """Names and values, as many in a line as fit."""
    lines: list[Line] = [[]]
    used = 0
    for name, value in facts:
        taken = columns(name) + columns(value) + 4
        if used and used + taken > width:
            lines.append([])
            used = 0
        lines[-1] += [Span("   " if used else ""), Span(f"{name} ", "soft"), Span(value)]
        used += taken
    return lines


def _worries(run: Run, state: State, view: View) -> list[Line]:
    return [
        line
        for w in worries(run, state)
        for line in wrapped(view.words(w.key, **w.values), view.width, w.level, "! ")
    ]


def _row(run: Run, panels: Sequence[Panel], view: View, height: int, across: int) -> list[Line]:
    """Charts side by side."""
    width = (view.width - 3 * (across - 1)) // across
    made = [_panel(run, panel, view, width, height) for panel in panels]
    lines: list[Line] = [[]]
    for parts in zip(*made, strict=True):
        line: Line = []
        for n, part in enumerate(parts):
            line += [*([Span("   ")] if n else []), *_padded(part, width)]
        lines.append(line)
    return lines


def _padded(line: Line, width: int) -> Line:
    taken = sum(columns(part.text) for part in line)
    if taken > width:
        kept: Line = []
        left = width
        for text, style in line:
            kept.append(Span(fit(text, left), style))
            left -= columns(kept[-1].text)
        return kept
    return [*line, Span(" " * (width - taken))]


def _panel(run: Run, panel: Panel, view: View, width: int, height: int) -> list[Line]:
    """A chart of ``height + 2`` lines: its name with the newest values, the curves, the steps."""
    curves = curves_of([run], panel, view.smoothing)
    values, (first, last) = panel.values(curves), span([c.points for c in curves])
    plotted = plot(curves, (first, last, values), max(8, width - LABEL - 1), height, view.unicode)
    lines = [_title(panel, curves, view)]
    for n, spans in enumerate(plotted):
        label = figure(values.high) if n == 0 else figure(values.low) if n == height - 1 else ""
        label = ("↑" if view.unicode else "^") * (n == 0 and values.cut) + label
        edge = "│" if view.unicode else "|"
        drawn = [
            Span(text, "" if index < 0 else "val" if curves[index].is_validation else "train")
            for text, index in spans
        ]
        lines.append([Span(f"{label:>{LABEL}}{edge}", "soft"), *drawn])
    return [*lines, _axis(run, panel, (first, last), width, view)]


def _title(panel: Panel, curves: Sequence[Curve], view: View) -> Line:
    words = view.words
    unit = "%" if panel.unit == "unit_share" else ""
    line = [
        Span(f"{'':{LABEL + 1}}"),
        Span(words(panel.name if panel.name != "data_wait" else "data_wait_curve"), "bold"),
    ]
    for curve in curves:
        style, name = ("val", f"{words('validation')} ") if curve.is_validation else ("train", "")
        line.append(Span(f"  {name}{figure(curve.points[-1].mean)}{unit}", style))
        if curve.is_validation:
            line.append(Span(f" ({words('best')} {figure(min(p.mean for p in curve.points))})", "soft"))
    return line


def _axis(run: Run, panel: Panel, steps: tuple[float, float], width: int, view: View) -> Line:
    """First and last step; under the gradient norm, where steps were skipped."""
    room = max(8, width - LABEL - 1)
    first, last = steps
    left, right = f"{math.ceil(first):,}", f"{math.floor(last):,}"
    if math.ceil(first) >= math.floor(last):
        left = ""  # one step alone, in a range of its own
    axis = list(left + " " * max(1, room - len(left) - len(right)) + right)[:room]
    corner = "└" if view.unicode else "+"
    if panel.name == "grad_norm":
        for step in run.metrics.log.skipped:
            if first <= step <= last:
                axis[min(len(axis) - 1, round((step - first) / (last - first) * (room - 1)))] = (
                    "×" if view.unicode else "x"
                )
    line = [Span(f"{'':{LABEL}}{corner}", "soft")]
    for c in axis:
        style = "bad" if c in "×x" else "soft"
        line = (
            [*line[:-1], Span(line[-1].text + c, style)]
            if line[-1].style == style
            else [*line, Span(c, style)]
        )
    return line


def _sparks(run: Run, panels: Sequence[Panel], view: View) -> list[Line]:
    """The curves in a line each, where there is no room for charts."""
    lines: list[Line] = []
    for panel in panels:
        curves = curves_of([run], panel, view.smoothing)
        name = view.words(panel.name if panel.name != "data_wait" else "data_wait_curve")
        wide = max(8, view.width - 30)
        spark = sparkline(
            curves[0], (*span([c.points for c in curves]), panel.values(curves)), wide, view.unicode
        )
        lines.append(
            [
                *_padded([Span(name, "soft")], 18),
                Span(spark, "train"),
                Span(f" {figure(curves[0].points[-1].mean)}"),
            ]
        )
    return lines


# ---- what stands below


def _checkpoints(run: Run, view: View) -> list[Line]:
    words = view.words
    rows = [
        [c.name, words("ago", t=words.duration(time.time() - c.time)), size(c.size), str(c.world)]
        for c in run.checkpoints[-4:]
    ]
    rows += [[f"{name}", words("being_written"), "", ""] for name in run.writing]
    return _table([words("checkpoints"), words("age"), words("size"), words("world")], rows)


def _ranks(run: Run, view: View) -> list[Line]:
    words = view.words
    if len(run.ranks) < 2:
        return []
    shown = sorted(run.ranks, key=lambda rank: (-round(rank.age, -1), rank.step, rank.rank))[:8]
    rows = [
        [
            str(r.rank),
            harmless(r.host),
            f"{r.step:,}",
            harmless(r.phase) or "–",
            words.duration(r.busy),
            words("ago", t=words.duration(r.age)),
        ]
        for r in sorted(shown, key=lambda rank: rank.rank)
    ]
    lines = _table([words(key) for key in ("rank", "host", "step", "phase", "phase_for", "last_sign")], rows)
    more = len(run.ranks) - len(rows)
    return [*lines, [Span(words("more", n=more), "soft")]] if more else lines


def _bad(run: Run, view: View) -> list[Line]:
    words, lines = view.words, []
    for key, found in (("bad_steps", run.bad_steps), ("bad_records", run.bad_records)):
        if not found.count:
            continue
        lines.append([Span(f"{words(key)}  ", "bold"), Span(f"{found.count:,}", "warn")])
        for entry in list(found.last)[-2:]:
            lines.append([Span(f"  {describe(entry)}", "soft")])
    return lines


def describe(entry: object) -> str:
    """A line of ``bad_steps.jsonl`` or ``bad_records.jsonl`` in a few words."""
    assert isinstance(entry, dict)
    if "why" in entry:
        return harmless(f"{entry.get('step')}: {entry['why']}")
    return harmless(f"{entry.get('file')}:{entry.get('line')}: {entry.get('code')}: {entry.get('found')}")


def _samples(run: Run, view: View) -> list[Line]:
    if not run.sampled:
        return []
    step = run.sampled[-1]
    lines: list[Line] = [[Span(view.words("latest_sample", step=step), "bold")]]
    for answer in run.answers(step)[:3]:
        made = "  ".join(
            piece["text"] if "text" in piece else f"[{view.words('picture')} {piece['image'].name}]"
            for piece in answer.pieces
        )
        lines.append(
            [
                Span(f"  {fit(harmless(answer.prompt), max(12, view.width // 3))}  ", "soft"),
                Span(harmless(made or answer.error)),
            ]
        )
    return lines


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Line]:
    """Columns that line up; nothing where there are no rows."""
    if not rows:
        return []
    widths = [max(columns(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines: list[Line] = []
    for n, row in enumerate([header, *rows]):
        cells = [cell + " " * (width - columns(cell)) for cell, width in zip(row, widths, strict=True)]
        style = "bold" if n == 0 else ""
        lines.append(
            [
                Span(cells[0] + "  ", style),
                *(Span(cell + "  ", "soft" if n == 0 else "") for cell in cells[1:]),
            ]
        )
    return lines


# ---- several runs


def _many(runs: Sequence[Run], view: View) -> list[Line]:
    """A table of the runs, then each curve with a line for each run on one scale."""
    words = view.words
    states = [judge(run) for run in runs]
    rows = []
    for run, state in zip(runs, states, strict=True):
        latest, pace = run.metrics.log.latest, speed(run)
        steps = f"{run.step:,}" + (f" / {run.total_steps:,}" if run.total_steps else "")
        left = words.duration(pace.eta) if pace.eta is not None and state.name == "running" else "–"
        shown = [
            fit(harmless(run.name), 28),
            words(state.name),
            steps,
            figure(latest.get("loss")),
            figure(latest.get("val_loss")),
        ]
        rows.append([*shown, figure(pace.tokens_per_second), left])
    header = [
        words(key) for key in ("run", "state", "step", "loss", "validation", "tokens_per_second", "eta")
    ]
    lines = _table(header, rows)
    for line, state in zip(lines[1:], states, strict=True):
        line[1] = Span(line[1].text, STATE_STYLES[state.name])
    for panel in panels_of(runs):
        lines += [[], *_compared(runs, panel, view)]
    for run, state in zip(runs, states, strict=True):
        bad = [worry for worry in worries(run, state) if worry.level == "bad"]
        lines += [
            line
            for w in bad
            for line in wrapped(f"{harmless(run.name)}: {words(w.key, **w.values)}", view.width, "bad", "! ")
        ]
    return lines


def _compared(runs: Sequence[Run], panel: Panel, view: View) -> list[Line]:
    words, curves = view.words, curves_of(runs, panel, view.smoothing)
    name = words(panel.name if panel.name != "data_wait" else "data_wait_curve")
    values, steps = panel.values(curves), span([c.points for c in curves])
    unit = " %" if panel.unit == "unit_share" else ""
    lines: list[Line] = [
        [Span(name, "bold"), Span(f"  {figure(values.low)} … {figure(values.high)}{unit}", "soft")]
    ]
    names = min(24, max(columns(harmless(run.name)) for run in runs))
    wide = max(8, view.width - names - 26)
    for curve in curves:
        style = "val" if curve.is_validation else "train"
        kind = words("validation") if curve.is_validation else ""
        label = _padded([Span(fit(harmless(runs[curve.run].name), names))], names)
        spark = sparkline(curve, (*steps, values), wide, view.unicode)
        lines.append(
            [
                *label,
                Span(" "),
                Span(spark, style),
                Span(f" {figure(curve.points[-1].mean):>9} "),
                Span(kind, "soft"),
            ]
        )
    return lines
