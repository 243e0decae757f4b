"""What the terminal shows of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from unigen.commands.watch import report
from unigen.commands.watch.health import diagnose
from unigen.commands.watch.panels import Panel, curves_of, panels_of
from unigen.figures import figure
from unigen.runs.reader import RunFolder, SampleAnswer
from unigen.show.curves import marks, span, sparkline
from unigen.show.language import Words
from unigen.show.terminal import Stretched, beside, filled, grid, line, notices, one_line, table

if TYPE_CHECKING:
    from unigen.show.terminal import RenderableType, Text

ROWS, SAMPLES = (4, 8, 2), 3  # of tables, and of the newest answers, at most
NAME = 24  # columns of a run's name or a prompt at most


def frame(runs: Sequence[RunFolder], words: Words, smoothing: float = 0.0) -> Iterator[RenderableType]:
    """One run in full, or several compared, part by part; ``smoothing`` is that of training curves."""
    if len(runs) == 1:
        yield from _one(runs[0], words, smoothing)
        return
    compared, states, wrong = report.overview(runs, words)
    for row, state in zip(compared.rows, states, strict=True):
        row[:2] = [one_line(row[0], most=NAME), line((row[1], report.MARKS[state][1]))]
    yield table(compared.header, compared.rows, compared.minor)
    if wrong:
        yield notices(wrong)
    yield ""
    yield _curves(runs, words, smoothing)


def _one(run: RunFolder, words: Words, smoothing: float) -> Iterator[RenderableType]:
    state = diagnose(run)
    sign, style = report.MARKS[state.name]
    share = report.share_done(run)
    done = "" if share is None else f"   {share:.1%}"
    named = (f"{sign} {words(state.name)}", style)
    yield line((run.name, "bold"), "  ", named, f"   {report.progress_of(run, words)}", (done, "bold"))
    if share is not None:
        yield Stretched(
            lambda n: line(("━" * round(share * n), style), ("─" * (n - round(share * n)), "soft"))
        )
    yield line((report.why(state, words), "bad" if state.name in ("hung", "dead") else "soft"))
    yield beside(
        line((f"{name} ", "soft"), words("aside", text=value, aside=note) if note else value)
        for name, value, note in report.facts(run, state, words)
    )
    if found := report.warning_rows(run, state, words):
        yield notices(found)
    yield ""
    yield _curves([run], words, smoothing)
    for made in report.tables(run, words, ROWS):
        yield ""
        yield line((made.title, "bold"))
        yield table(made.header, made.rows, made.minor)
        if made.more:
            yield line((made.more, "soft"))
    if run.sampled:
        yield ""
        yield line((words("latest_sample", step=run.sampled[-1]), "bold"))
        for answer in run.answers(run.sampled[-1])[:SAMPLES]:
            yield _answer(answer, words)


def _answer(answer: SampleAnswer, words: Words) -> Text:
    parts = [p["text"] if "text" in p else f"[{words('picture')} {p['image'].name}]" for p in answer.pieces]
    prompt = one_line(answer.prompt, most=NAME).plain
    return one_line((prompt, "soft"), "  ", "  ".join(parts) or answer.error)


def _curves(runs: Sequence[RunFolder], words: Words, smoothing: float) -> RenderableType:
    """The curves of all panels, those of several runs with a line between panels."""
    parts = [_panel(runs, panel, words, smoothing) for panel in panels_of(runs)]
    if not parts:
        return line((words("no_metrics"), "soft"))
    rows = [row for part in parts for row in (part if len(runs) == 1 else [*part, [line("")]])]
    return grid(rows, minor=(3,))


def _panel(
    runs: Sequence[RunFolder], panel: Panel, words: Words, smoothing: float
) -> list[list[Text | Stretched]]:
    """A line for each curve, all on one scale: its name, itself, its newest value, and a note."""
    curves, several = curves_of(runs, panel, smoothing), len(runs) > 1
    values = panel.values(curves)
    box = (*span([c.points for c in curves]), values)
    title, unit = panel.title(words), "%" if panel.unit == "unit_share" else ""
    signed = any(p.low < 0 for c in curves for p in c.points)
    low = values.low if signed else max(values.low, 0.0)  # room below the curves makes no loss negative
    extent = f"{figure(low)} … {'↑' * values.cut}{figure(values.high)}{unit}"
    rows: list[list[Text | Stretched]] = []
    if panel.members:  # a line for all of them, as there may be many
        newest = (f"{panel.line(curve, words)} {figure(curve.points[-1].mean)}" for curve in curves)
        return [[line(title), filled(list(newest))]]
    if several:
        rows.append([line((title, "bold")), one_line((extent, "soft"))])
    for curve in curves:
        name, note = (runs[curve.run].name, "") if several else (title, extent)
        if curve.is_validation:
            name = name if several else f"  {words('validation')}"
            best = runs[curve.run].metrics.log.best(panel.validation)
            notes = [f"{words('best')} {figure(best[1] * panel.scale)}"] if best else []
            note = words.listed([words("validation"), *notes] if several else notes)
        style = "yellow" if curve.is_validation else "cyan"
        spark = Stretched(lambda n, curve=curve, style=style: line((sparkline(curve, box, n), style)))
        newest = f"{figure(curve.points[-1].mean) + unit:>8}"
        rows.append([one_line(name, most=NAME), spark, line(newest), line((note, "soft"))])
    skipped = [step for step in runs[0].metrics.log.skipped if box[0] <= step <= box[1]]
    if panel.name == "grad_norm" and skipped and not several:
        spark = Stretched(lambda n: line((marks(skipped, box, n), "bad")))
        rows.append([line((f"  {words('skipped_steps')}", "soft")), spark])
    return rows
