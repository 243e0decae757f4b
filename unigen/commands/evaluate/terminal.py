"""What ``unigen evaluate`` says on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from unigen.evaluation.answered import Answered
from unigen.evaluation.results import Result, not_given
from unigen.evaluation.statistics import Comparison
from unigen.show.terminal import say, table


def report(
    answered: Sequence[Answered], compared: Mapping[str, Mapping[str, Sequence[Comparison]]], page: Path
) -> None:
    """Numbers with intervals, notes, verdicts."""
    for one in answered:
        for task, results in one.scores.items():
            say(f"\n{task}" if len(answered) == 1 else f"\n{one.name}: {task}")
            shown = [result for result in results if not result.was_not_given]
            say(table(["metric", "value", "95 %", "n"], [_row(result) for result in shown]))
            for result in shown:
                for note in result.notes:
                    say(f"{result.kind}: {note}")
            _say_what_was_not_given(results)
    for name, tasks in compared.items():
        for task, ones in tasks.items():
            say(f"\n{name} against {answered[0].name}: {task}")
            say(table(["metric", "verdict"], [[one.name.partition("[")[0], one.sentence()] for one in ones]))
    say(f"\nWritten to {page}")


def report_check(scores: Mapping[str, Sequence[Result]], promised: Collection[str]) -> None:
    """Which metrics will have a value, and why others will not."""
    for task, results in scores.items():
        say(f"\n{task}")
        rows = []
        for result in results:
            if result.value is not None or result.lacks in promised:
                rows.append([label(result), "can run", *(["by the model"] if result.value is None else [""])])
            elif not result.was_not_given:
                rows.append([label(result), "none", f"{result.reason}. Fix: {result.fix}"])
        say(table(["metric", "", ""], rows))
        _say_what_was_not_given([result for result in results if result.lacks not in promised])
    say("\nNothing was generated. Without --check the records are answered and measured.")


def _say_what_was_not_given(results: Sequence[Result]) -> None:
    for kinds, reason, fix in not_given(results):
        say(f"not measured: {', '.join(kinds)} ({reason}; {fix})")


def label(result: Result) -> str:
    """The metric's kind, and what it is held against where that is the source."""
    return result.kind + (" to source" if "to=source" in result.name else "")


def _row(result: Result) -> list[str]:
    if result.value is None:
        return [result.kind, "none", f"{result.reason}. Fix: {result.fix}", ""]
    ends = "" if result.interval is None else "{:.4g} to {:.4g}".format(*result.interval)
    return [label(result), f"{result.value:.4g}", ends, str(result.n)]
