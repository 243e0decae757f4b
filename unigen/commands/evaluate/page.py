"""The report of ``unigen evaluate``: verdicts first, then numbers with intervals, then samples side by
side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unigen.commands.evaluate.terminal import label, names_apart, not_measured, notes_of, rows_of
from unigen.config import UserError
from unigen.evaluation.score import OF_THE_DATA
from unigen.messages import in_language
from unigen.runs.metrics import Point
from unigen.show.charts import Chart, Line, line_chart
from unigen.show.curves import AxisRange
from unigen.show.language import TAGS, Words
from unigen.show.pages import embed, write_page
from unigen.values import written

if TYPE_CHECKING:
    from unigen.evaluation.cases import Case
    from unigen.evaluation.score import Answered
    from unigen.evaluation.statistics import Comparison

BY = "unigen evaluate"
WIDE = 8  # prompts of a grid over the steps
EACH = 4  # samples of a kind: best, worst, most changed
# By which metric samples are called good: the first of a task that has a value of each sample.
ORDER = ("accuracy", "anls", "rougeL", "geneval", "clip_score", "similarity", "ssim", "psnr", "structure")
MARKS = {
    "better": "good",
    "worse": "bad",
    "differs": "warn",
    "no difference shown": "note",
    "not compared": "note",
}


def write(
    path: Path,
    cases: Sequence[Case],
    answered: Sequence[Answered],
    compared: Mapping[str, Mapping[str, Sequence[Comparison]]],
    words: Words,
) -> Path:
    """Writes the page. The first of ``answered`` is what the others are ``compared`` with, by checkpoint and
    task.

    Raises:
        UserError: something else is at ``path``.
        OSError: it cannot be written.
    """
    short = _short([one.name for one in answered])
    checkpoints = [
        [short[one.name], one.about.get("checkpoint") or one.about["predictions"], one.name]
        for one in answered
    ]
    for row, one in zip(checkpoints, answered, strict=True):
        row[1] += f" {one.about['quantize']}" if one.about.get("quantize") else ""
    answered = [replace(one, name=short[one.name]) for one in answered]
    base = answered[0]
    everything = [result for one in answered for results in one.scores.values() for result in results]
    values = {
        "words": words,
        "checkpoints": checkpoints,
        "verdicts": [
            (
                short.get(name, name),
                [(_named(task, words), _verdicts(ones, words)) for task, ones in tasks.items() if ones],
            )
            for name, tasks in compared.items()
        ],
        "records": len(cases),
        "curves": _curves(answered, words),
        "grid": _grid(cases, answered),
        "tasks": [_task(task, cases, answered, words) for task in base.scores],
        "absent": [("note", text) for text in not_measured(everything, words, words.metric)],
        "settings": sorted((name, written(value)) for name, value in base.about["sampling"].items()),
        "about": base.about,
    }
    return write_page(
        path, "evaluate.html", values, by=BY, title=words("title"), language=TAGS[words.language],
        styles=["evaluate", "charts"], script="charts" if values["curves"] else "",
    )  # fmt: skip


def _short(names: Sequence[str]) -> dict[str, str]:
    """The names with as much of their folders, which are runs, as tells those apart."""
    folders = names_apart([str(Path(name).parent) for name in names])
    return {name: str(Path(folder, Path(name).name)) for name, folder in zip(names, folders, strict=True)}


def _named(task: str, words: Words) -> str:
    return words.texts.get(f"task_{task}", task)


def _of_runs(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    """The checkpoints of each run of which there are several, in the order of their steps."""
    runs: dict[str, list[Answered]] = {}
    for one in sorted((one for one in answered if one.step is not None), key=lambda one: one.step or 0):
        runs.setdefault(one.run, []).append(one)
    return {run: ones for run, ones in runs.items() if len(ones) > 1}


def _curves(answered: Sequence[Answered], words: Words) -> list[tuple[str, list[Chart], str]]:
    """For each task a chart of each metric over the steps, a line a run with its interval as a band; and the
    names of those that are the same everywhere."""
    runs, found = _of_runs(answered), []
    for task, results in answered[0].scores.items() if runs else []:
        charts, flat = [], []
        for number, result in enumerate(results):
            lines = []
            for colour, (run, ones) in enumerate(runs.items()):
                values = [(one.step, one.scores[task][number]) for one in ones]
                points = [
                    Point(step or 0, one.value, *(one.interval or (one.value, one.value)))
                    for step, one in values
                    if one.value is not None
                ]
                if len(points) > 1:
                    lines.append(Line(Path(run).name, points, colour, band=True))
            if lines and result.kind not in OF_THE_DATA:
                named = [one.scores[task][number].name for ones in runs.values() for one in ones]
                name = label(max(named, key=len), words)
                everything = [point for line in lines for point in line.points]
                if len({point.mean for point in everything}) == 1:
                    flat.append(f"{name} {everything[0].mean:.4g}")
                    continue
                low, high = min(p.low for p in everything), max(p.high for p in everything)
                room = AxisRange(low, high) if high > low else None  # for the whole band
                charts.append(line_chart(name, lines, words, values=room))
        note = words.sentences(
            words("band") * bool(charts), words("flat", kinds=words.listed(flat)) * bool(flat)
        )
        found.append((_named(task, words), charts, note))
    return [one for one in found if one[2]]


def _grid(cases: Sequence[Case], answered: Sequence[Answered]) -> list[list[Any]]:
    """Rows of what the checkpoints of each run drew for the same prompts; first the prompts."""
    runs = _of_runs(answered)
    chosen: dict[tuple[str, str], int] = {}
    for place, case in enumerate(cases):
        if "image" in case.outputs:
            chosen.setdefault((case.task, case.said_last), place)
    places = list(chosen.values())[:WIDE]
    if not runs or not places:
        return []
    rows: list[list[Any]] = [["", *(cases[place].said_last for place in places)]]
    for run, one in ((run, one) for run, ones in runs.items() for one in ones):
        drawn = [
            next((piece for piece in one.predictions[place].pieces if not isinstance(piece, str)), "")
            for place in places
        ]
        whose = f"{Path(run).name}: " if len(runs) > 1 else ""
        rows.append([f"{whose}{one.step:,}", *map(_shown, drawn)])
    return rows


def _verdicts(ones: Sequence[Comparison], words: Words) -> list[tuple[str, str, str]]:
    """(mark, metrics, sentence): what differs first, each by itself, then all of which one thing is said."""
    groups: dict[tuple[Any, ...], list[Comparison]] = {}
    for one in ones:
        if one.verdict == "not compared":
            key: tuple[Any, ...] = (2, one.reason)
        elif one.verdict == "no difference shown":
            key = (1, one.reason, one.n)
        else:
            key = (0, one.name)
        groups.setdefault(key, []).append(one)
    found = [_verdict(groups[key], words) for key in sorted(groups, key=lambda key: key[0])]
    # no line ends within "n = 5"
    return [(mark, kinds, re.sub(r" ([=≥]) ", "\u00a0\\1\u00a0", said)) for mark, kinds, said in found]


def _verdict(alike: Sequence[Comparison], words: Words) -> tuple[str, str, str]:
    """(mark, metrics, sentence) of comparisons of which one thing is said."""
    one = alike[0]
    kinds = words.listed(dict.fromkeys(label(each.name, words) for each in alike))
    if one.verdict == "not compared":
        return MARKS[one.verdict], kinds, words("not_compared", why=in_language(one.reason, words.language))
    over = in_language(one.reason, words.language)

    def whole(said: str) -> str:
        return words("aside", text=said, aside=over) if over else said

    if one.verdict == "no difference shown":
        least = min(each.p for each in alike if each.p is not None)
        p = f"{'=' if len(alike) == 1 else '≥'} {least:.2g}"
        return MARKS[one.verdict], kinds, whole(words("no_difference", n=one.n, p=p))
    assert one.difference is not None and one.interval is not None
    low, high = one.interval if one.difference > 0 else (-one.interval[1], -one.interval[0])
    size = f"{abs(one.difference):.4g} [{low:.4g}, {high:.4g}]"
    return MARKS[one.verdict], kinds, whole(words(one.verdict, size=size, p=f"{one.p:.2g}", n=one.n))


def _task(task: str, cases: Sequence[Case], answered: Sequence[Answered], words: Words) -> dict[str, Any]:
    """Numbers and samples of one task."""

    places = [place for place, case in enumerate(cases) if case.task == task]
    return {
        "name": _named(task, words),
        "header": [words("metric"), *(one.name for one in answered), "n"],
        "rows": rows_of(answered, task, words, "–"),
        "notes": [("note", text) for text in notes_of(answered, task, words)],
        "names": [result.name for result in answered[0].scores[task] if result.value is not None],
        "samples": _samples(task, places, cases, answered, words),
    }


def _samples(
    task: str, places: list[int], cases: Sequence[Case], answered: Sequence[Answered], words: Words
) -> list[dict[str, Any]]:
    """The best, the worst and the most changed samples, without repetition."""
    measured = _measure(task, answered)
    if measured is None or len(measured[1][0]) != len(places):
        chosen = [("", place, "") for place in places[: 2 * EACH]]
        kind = ""
    else:
        kind, values = measured
        last = values[-1]
        order = [int(i) for i in np.argsort(last, kind="stable") if np.isfinite(last[i])]
        groups = _ends(last, order)
        if len(values) > 1:
            change = np.nan_to_num(np.abs(values[-1] - values[0]))
            groups = {
                "changed": [int(i) for i in np.argsort(-change, kind="stable")[:EACH] if change[i]],
                **groups,
            }
        chosen, seen = [], set()
        for label, ones in groups.items():
            for i in ones:
                if i not in seen:
                    seen.add(i)
                    scores = " → ".join(f"{value[i]:.3g}" for value in values)
                    chosen.append((label and words(label), places[i], f"{words.metric(kind)} {scores}"))
    return [
        {
            "label": label,
            "score": score,
            "where": cases[place].where,
            "prompt": [_shown(piece) for piece in cases[place].prompt],
            "reference": [
                _shown(piece[0] if isinstance(piece, tuple) else piece)
                for piece in cases[place].references
                if piece is not None
            ],
            "answers": [
                (one.name, [_shown(piece) for piece in one.predictions[place].pieces]) for one in answered
            ],
        }
        for label, place, score in chosen
    ]


def _ends(values: np.ndarray, order: list[int]) -> dict[str, list[int]]:
    """The best and the worst samples by their values [n], at most half of those in ``order``, from the lowest
    value; one in the middle is neither, and where all are equal the samples have no label."""
    if not order or values[order[0]] == values[order[-1]]:
        return {"": order[: 2 * EACH]}
    most, middle = min(EACH, len(order) // 2), np.median(values[order])
    low, high = values[order[0]], values[order[-1]]
    return {
        "best": [i for i in order[::-1][:most] if values[i] > middle or values[i] == high],
        "worst": [i for i in order[:most] if values[i] < middle or values[i] == low],
    }


def _measure(task: str, answered: Sequence[Answered]) -> tuple[str, list[np.ndarray]] | None:
    """The metric by which samples are told apart, and each checkpoint's value of each sample."""
    for kind in ORDER:
        found = [
            next((r.samples for r in one.scores[task] if r.kind == kind and r.samples is not None), None)
            for one in answered
        ]
        if all(values is not None for values in found):
            return kind, [np.asarray(values, float) for values in found]
    return None


def _shown(piece: Any) -> Any:
    """A text, or a picture inside the page."""
    if isinstance(piece, str):
        return piece
    try:
        return embed(piece, min_width=120)
    except (UserError, OSError) as error:
        return f"({error})"
