"""What ``unigen evaluate`` says on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from unigen.evaluation.answered import Answered
from unigen.evaluation.results import Result, metric_key, not_given
from unigen.evaluation.statistics import Comparison
from unigen.messages import in_language
from unigen.show.language import Words
from unigen.show.terminal import say, table


def report(
    answered: Sequence[Answered], compared: Mapping[str, Mapping[str, Sequence[Comparison]]], page: Path
) -> None:
    """Numbers with intervals beside each other, verdicts, notes."""
    words, names = Words(None, "evaluate"), [Path(one.name).name for one in answered]
    both = next(iter(compared.values())) if len(compared) == 1 else {}
    for task, results in answered[0].scores.items():
        if not _beside(answered, task):
            continue  # nobody gave what its metrics need, which is said below
        say(f"\n{task}")
        verdicts = {one.name: in_language(one.sentence()) for one in both.get(task, [])}
        rows = [_row(found, verdicts, words) for found in _beside(answered, task)]
        heads = ["value and 95%"] if len(answered) == 1 else names
        say(table(["metric", *heads, "n", *(["verdict"] if verdicts else [])], rows))
        notes = [said_of(result, note, words) for result in results for note in result.notes]
        lacking = [
            lacks(result, words)
            for found in _beside(answered, task)
            for result in found
            if result.value is None and not result.was_not_given
        ]
        for line in dict.fromkeys([*notes, *lacking]):
            say(line)
    if not both:
        for name, tasks in compared.items():
            for task, ones in tasks.items():
                say(f"\n{name} against {answered[0].name}: {task}")
                rows = [[label(one.name, words), in_language(one.sentence())] for one in ones]
                say(table(["metric", "verdict"], rows))
    say("")
    everything = [r for one in answered for results in one.scores.values() for r in results]
    for line in not_measured(everything, words, words.metric):
        say(line)
    say(f"Written to {page}")


def _beside(answered: Sequence[Answered], task: str) -> list[list[Result]]:
    """Each metric that somebody gave what it needs, by checkpoint."""
    rows = zip(*(one.scores[task] for one in answered), strict=True)
    return [list(row) for row in rows if not all(result.was_not_given for result in row)]


def _row(found: Sequence[Result], verdicts: Mapping[str, str], words: Words) -> list[str]:
    n = next((str(result.n) for result in found if result.value is not None), "")
    named = next((result.name for result in found if result.value is not None), found[0].name)
    last = [verdicts.get(found[0].name, "")] if verdicts else []
    return [label(named, words), *map(_number, found), n, *last]


def _number(result: Result) -> str:
    if result.value is None:
        return in_language("none")
    ends = "" if result.interval is None else " [{:.4g}, {:.4g}]".format(*result.interval)
    return f"{result.value:.4g}{ends}"


def report_check(scores: Mapping[str, Sequence[Result]], promised: Collection[str]) -> None:
    """Which metrics will have a value, and why others will not; by the names that ``--metrics`` takes."""
    for task, results in scores.items():
        say(f"\n{task}")
        rows = []
        for result in results:
            if result.value is not None or result.lacks in promised:
                how = in_language("by the model") if result.value is None else ""
                rows.append([result.kind, in_language("can run"), how])
            elif not result.was_not_given:
                why = in_language(f"{result.reason}. Fix: {result.fix}")
                rows.append([result.kind, in_language("none"), why])
        say(table(["metric", "", ""], rows))
    say("")
    everything = [result for results in scores.values() for result in results]
    wanting = [result for result in everything if result.lacks not in promised]
    for line in not_measured(wanting, Words(None, "evaluate"), str):
        say(line)
    say("Nothing was generated. Without --check the records are answered and measured.")


def label(name: str, words: Words) -> str:
    """What a metric is called, by its identity."""
    return words.metric(metric_key(name))


def said_of(result: Result, note: str, words: Words) -> str:
    """A note to a metric."""
    return words("noted", metric=label(result.name, words), note=in_language(note, words.language))


def lacks(result: Result, words: Words) -> str:
    """Why a metric has no value, and what to do about it."""
    why, fix = (in_language(text, words.language) for text in (result.reason, result.fix))
    return words("lacking", kind=label(result.name, words), why=why, fix=fix)


def not_measured(results: Sequence[Result], words: Words, named: Callable[[str], str]) -> list[str]:
    """A line for each thing that nobody gave: which metrics lack it, ``named`` by their kinds."""
    return [
        words(
            "not_measured",
            kinds=words.listed(map(named, kinds)),
            why=in_language(reason, words.language),
            fix=in_language(fix, words.language),
        )
        for kinds, reason, fix in not_given(results)
    ]
