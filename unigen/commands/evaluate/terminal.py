"""What ``unigen evaluate`` says on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from unigen.evaluation.results import Result, metric_key, not_given
from unigen.evaluation.score import Answered
from unigen.evaluation.statistics import Comparison
from unigen.messages import in_language
from unigen.show.language import Words
from unigen.show.terminal import say, table


def report(
    answered: Sequence[Answered], compared: Mapping[str, Mapping[str, Sequence[Comparison]]], page: Path
) -> None:
    """Numbers with intervals beside each other, verdicts, notes."""
    words, names = Words(None, "evaluate"), names_apart([one.name for one in answered])
    both = next(iter(compared.values())) if len(compared) == 1 else {}
    for task in answered[0].scores:
        verdicts = {one.name: in_language(one.sentence()) for one in both.get(task, [])}
        rows = rows_of(answered, task, words, in_language("none"), verdicts)
        if not rows:
            continue  # nobody gave what its metrics need, which is said below
        say(f"\n{task}")
        heads = ["value and 95%"] if len(answered) == 1 else names
        say(table(["metric", *heads, "n", *(["verdict"] if verdicts else [])], rows))
        for line in notes_of(answered, task, words):
            say(line)
    if not both:
        for name, tasks in compared.items():
            for task, ones in tasks.items():
                say(f"\n{name} against {answered[0].name}: {in_language(task)}")
                rows = [[label(one.name, words), in_language(one.sentence())] for one in ones]
                say(table(["metric", "verdict"], rows))
    say("")
    everything = [r for one in answered for results in one.scores.values() for r in results]
    for line in not_measured(everything, words, words.metric):
        say(line)
    say(f"Written to {page}")


def names_apart(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart, with equally many parts."""
    parts = [Path(path).parts for path in paths]
    longest = max(map(len, parts))
    enough = (n for n in range(1, longest) if len({one[-n:] for one in parts}) == len(set(parts)))
    count = next(enough, longest)
    return [str(Path(*one[-count:])) for one in parts]


def rows_of(
    answered: Sequence[Answered],
    task: str,
    words: Words,
    nothing: str,
    verdicts: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """A row for each metric that somebody gave what it needs: what it is called, each checkpoint's value with
    its interval, ``nothing`` in place of none, the number of samples, and the verdict of its name."""

    def number(one: Result) -> str:
        ends = "" if one.interval is None else " [{:.4g}, {:.4g}]".format(*one.interval)
        return nothing if one.value is None else f"{one.value:.4g}{ends}"

    rows = []
    for found in zip(*(one.scores[task] for one in answered), strict=True):
        if not all(one.was_not_given for one in found):
            known = next((one for one in found if one.value is not None), found[0])
            n = "" if known.value is None else str(known.n)
            row = [label(known.name, words), *map(number, found), n]
            rows.append([*row, verdicts.get(found[0].name, "")] if verdicts else row)
    return rows


def notes_of(answered: Sequence[Answered], task: str, words: Words) -> list[str]:
    """The notes to the metrics of a task, and why others have no value and what to do about it, each once."""
    notes, lacking = [], []
    for one in (result for each in answered for result in each.scores[task]):
        named = label(one.name, words)
        said = (in_language(note, words.language) for note in one.notes)
        notes += [words("named", name=named, value=note) for note in said]
        if one.value is None and not one.was_not_given:
            why, fix = (in_language(text, words.language) for text in (one.reason, one.fix))
            lacking.append(words("lacking", kind=named, why=why, fix=fix))
    return list(dict.fromkeys([*notes, *lacking]))


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
