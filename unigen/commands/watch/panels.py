"""Which curves of a run stand in which chart, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from unigen.runs.metrics import Point
from unigen.runs.reader import RunFolder
from unigen.show.charts import COLOURS, Chart, Key, Line, line_chart
from unigen.show.curves import AxisRange, Curve, smooth, value_range
from unigen.show.language import Words


class Panel(NamedTuple):
    """A chart: names of the run's curves, ``unit`` a key of the texts or "". With ``members``, curves that
    share it, ``name`` is that of their group."""

    name: str
    validation: str = ""
    unit: str = ""
    scale: float = 1.0  # of the values shown
    log: bool | None = False  # None: where the values ask for it
    from_zero: bool = False
    members: tuple[str, ...] = ()

    def title(self, words: Words) -> str:
        if not self.members:
            return words("data_wait_share" if self.name == "data_wait" else self.name)
        room, _, what = self.name.partition("/")
        if room == "eval":
            return words("of_eval", what=words.metric(what))
        return words.texts.get(f"of_{self.name.replace('/', '_')}", self.name)

    def line(self, curve: Curve, words: Words) -> str:
        """What a curve of a group is called."""
        if self.name.startswith("probe/"):
            return words.texts.get(f"part_{curve.name}", curve.name)
        return words.texts.get(f"task_{curve.name}", curve.name)

    def values(self, curves: Sequence[Curve]) -> AxisRange:
        """The values that the chart of these curves shows."""
        return value_range([c.points for c in curves], log=self.log, from_zero=self.from_zero)


PANELS = (
    Panel("loss", "val_loss"),
    Panel("text_loss", "val_text_loss", "unit_text_loss"),
    Panel("image_loss", "val_image_loss", "unit_image_loss"),
    Panel("preserve_loss", unit="unit_preserve_loss", log=None),
    Panel("grad_norm", log=None),
    Panel("learning_rate", from_zero=True),
    Panel("tokens_per_second", from_zero=True),
    Panel("data_wait", unit="unit_share", scale=100.0, from_zero=True),
)
UNITS = {"val/image_loss_by_time": "unit_time", "probe/drift": "unit_drift"}
"""Of groups of numbers."""


def panels_of(runs: Sequence[RunFolder]) -> list[Panel]:
    """The charts that have data, of one run those of its grouped numbers, too. A run with one kind of target
    alone has a total loss that says nothing new."""
    there = [
        panel
        for panel in PANELS
        if any(
            run.metrics.log.points(name) for run in runs for name in (panel.name, panel.validation) if name
        )
    ]
    names = {panel.name for panel in there}
    single = len(names & {"text_loss", "image_loss"}) == 1
    there = [panel for panel in there if not (single and panel.name == "loss")]
    for group, names in runs[0].metrics.log.groups.items() if len(runs) == 1 else ():
        if drawn := tuple(filter(runs[0].metrics.log.points, names)):
            there.append(Panel(group, "", UNITS.get(group, ""), members=drawn))
    return there


def curves_of(runs: Sequence[RunFolder], panel: Panel, smoothing: float = 0.0) -> list[Curve]:
    """The lines of a chart: of each run its training, smoothed, and its validation; or all of a group."""
    if panel.members:
        log = runs[0].metrics.log
        return [Curve(0, True, log.points(name), name.rpartition("/")[2]) for name in panel.members]
    curves = []
    for i, run in enumerate(runs):
        for is_validation, name in ((False, panel.name), (True, panel.validation)):
            points = run.metrics.log.points(name) if name else []
            if points:
                points = [
                    Point(p.step, p.mean * panel.scale, p.low * panel.scale, p.high * panel.scale)
                    for p in points
                ]
                exact = is_validation or panel.name == "learning_rate"
                curves.append(Curve(i, is_validation, points if exact else smooth(points, smoothing)))
    return curves


def chart(
    panel: Panel, curves: Sequence[Curve], names: Sequence[str], words: Words, skipped: Sequence[int] = ()
) -> Chart:
    """The chart of a panel for the page.

    Args:
        curves: What to draw; each has a point at least.
        names: Of the runs; one run's curves are called training and validation.
        skipped: Steps to mark at the lower edge.
    """
    several = len(names) > 1
    lines = []
    for number, curve in enumerate(curves):
        run, is_validation, points, own = curve
        if own:
            lines.append(Line(panel.line(curve, words), points, number, True))
            continue
        name = words("validation" if is_validation else "training")
        if several:
            name = f"{names[run]} · {name}" if is_validation else names[run]
        colour = run if several else int(is_validation)
        lines.append(Line(name, points, colour, is_validation, not is_validation and not several))
    keys = None  # a key for each line
    if panel.members and len(lines) == 1:
        keys = [Key(lines[0].name, "var(--c0)", True)]  # which task it is
    if several:
        keys = [Key(names[run], f"var(--c{run % COLOURS})") for run in sorted({c.run for c in curves})]
        if any(c.is_validation for c in curves):
            keys.append(Key(words("validation"), "var(--soft)", True))
    return line_chart(
        panel.title(words),
        lines,
        words,
        values=panel.values(curves),
        notes=[words(panel.unit)] if panel.unit else [],
        keys=keys,
        marks=skipped,
        marks_name=words("skipped_steps"),
        unit="%" if panel.unit == "unit_share" else "",
    )
