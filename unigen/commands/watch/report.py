"""What is said of runs, as texts and tables, for the terminal and the page alike."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from unigen.commands.watch import health
from unigen.commands.watch.health import State, diagnose, speed
from unigen.figures import figure, gb
from unigen.runs.reader import RunFolder
from unigen.show.language import Words

MARKS = {
    "running": ("●", "good"), "hung": ("■", "bad"), "dead": ("✕", "bad"), "stopped": ("■", "warn"),
    "finished": ("✓", "good"), "new": ("○", "note"),
}  # fmt: skip
VALUE_LENGTH = 400  # of a value in a table


class WatchTable(NamedTuple):
    """A table; ``more`` says that some rows are not shown, ``minor`` are the columns that a window too narrow
    for all goes without, in the order in which they go."""

    title: str
    header: list[str]
    rows: list[list[Any]]
    more: str = ""
    minor: tuple[int, ...] = ()


def why(state: State, words: Words) -> str:
    """The evidence for the state of a run."""
    return words("semicolon").join(words(told.key, **told.values) for told in state.why)


def progress_of(run: RunFolder, words: Words) -> str:
    """How far the run is."""
    if (total := run.total_steps) is not None:
        return words("of_steps", step=run.step, total=total)
    return words("step_alone", step=run.step)


def share_done(run: RunFolder) -> float | None:
    """The share of the steps that are done, where it is known how many there are."""
    return None if run.total_steps is None else min(1.0, run.step / run.total_steps)


def facts(run: RunFolder, state: State, words: Words) -> list[tuple[str, str, str]]:
    """``(name, value, note)`` of the run's speed, last checkpoint and disk."""
    pace, last = speed(run), run.last_checkpoint
    minute = None if pace.seconds_per_step is None else 60 / pace.seconds_per_step
    told = [
        *([("eta", _left(run, state, words), "")] if state.name == "running" else []),
        ("tokens_per_second", figure(pace.tokens_per_second), ""),
        ("steps_per_minute", figure(minute), ""),
        ("data_wait_share", "–" if pace.data_wait is None else f"{pace.data_wait:.1%}", ""),
        *([("last_checkpoint", words("ago", ago=time.time() - last.time), last.name)] if last else []),
        ("disk_left", "–" if run.disk_free is None else gb(run.disk_free), ""),
    ]
    return [(words(key), value, note) for key, value, note in told]


def warning_rows(run: RunFolder, state: State, words: Words) -> list[tuple[str, str]]:
    """``(level, text)`` of what should be looked at, the worst first."""
    return [(w.level, words(w.key, **w.values)) for w in health.warnings(run, state)]


def tables(run: RunFolder, words: Words, most: tuple[int, int, int]) -> list[WatchTable]:
    """What there is of checkpoints, processes, skipped steps and records left out; ``most`` rows of the
    first, of the second, and of each of the others."""
    made = [_checkpoints(run, words, most[0]), _processes(run, words, most[1])]
    return [one for one in (*made, *_problems(run, words, most[2])) if one.rows]


def _checkpoints(run: RunFolder, words: Words, most: int) -> WatchTable:
    """The checkpoints, those being written and the newest first."""
    rows: list[list[Any]] = [[name, "", words("being_written"), "", ""] for name in run.writing]
    rows += [
        [c.name, c.step, words("ago", ago=time.time() - c.time), gb(c.size), c.world]
        for c in reversed(run.checkpoints[-most:])
    ]
    header = ("name", "step", "age", "size", "world")
    return _grid(words, "checkpoints", header, rows, len(run.checkpoints) - most)


def _processes(run: RunFolder, words: Words, most: int) -> WatchTable:
    """The processes of a run of several; where some are left out, those that are silent or behind stay."""
    ranks = run.ranks if len(run.ranks) > 1 else []
    shown = sorted(ranks, key=lambda rank: (-round(rank.age, -1), rank.step, rank.rank))[:most]
    rows: list[list[Any]] = []
    for r in sorted(shown, key=lambda rank: rank.rank):
        times = (words.duration(r.busy), words("ago", ago=r.age))
        rows.append([r.rank, r.host, str(r.pid), r.step, words.phase(r.phase), *times])
    header = ("rank", "host", "pid", "step", "phase", "phase_for", "last_sign")
    return _grid(words, "processes", header, rows, len(ranks) - most, minor=(2, 5, 1))


def _problems(run: RunFolder, words: Words, most: int) -> Iterator[WatchTable]:
    """The last steps that were skipped, and the last records that were left out."""
    bad, left = run.bad_steps, run.bad_records
    steps = [(e.get("step", ""), e.get("why", ""), _records(e.get("records"))) for e in bad.last]
    records = [(f"{e.get('file')}:{e.get('line')}", e.get("code"), e.get("found")) for e in left.last]
    for title, header, found, count, minor in (
        ("bad_steps", ("step", "why", "records"), steps, bad.count, ()),
        ("bad_records", ("file", "code", "found"), records, left.count, (1,)),
    ):
        rows = [list(map(begin_of, row)) for row in found[::-1][:most]]
        yield _grid(words, title, header, rows, count - len(rows), minor)


def overview(runs: Sequence[RunFolder], words: Words) -> tuple[WatchTable, list[str], list[tuple[str, str]]]:
    """A row for each of several runs, the names of their states, and ``(level, text)`` of what is wrong."""
    states = [diagnose(run) for run in runs]
    rows, wrong = [], []
    for run, state in zip(runs, states, strict=True):
        latest = run.metrics.log.latest
        steps = f"{run.step:,}" + (f"/{run.total_steps:,}" if run.total_steps else "")
        _, best = run.metrics.log.best() or (0, None)
        numbers = (latest.get("loss"), latest.get("val_loss"), best, speed(run).tokens_per_second)
        named = f"{MARKS[state.name][0]} {words(state.name)}"
        rows.append([run.name, named, steps, *map(figure, numbers), _left(run, state, words)])
        wrong += [
            (level, f"{run.name}: {text}")
            for level, text in warning_rows(run, state, words)
            if level == "bad"
        ]
    header = ("run", "state", "step", "loss", "validation", "best", "tokens_per_second", "eta")
    made = _grid(words, "", header, rows, minor=(6, 5, 7, 4))
    return made, [state.name for state in states], wrong


def differing(runs: Sequence[RunFolder], words: Words) -> list[WatchTable]:
    """A table of the options that are not the same in all of several runs; none where all are."""
    from unigen.config import Config

    usual = Config().to_dict()
    names = dict.fromkeys(name for run in runs for name in run.config)
    names.pop("output_dir", None)
    rows: list[list[Any]] = []
    for name in names:
        values = [run.config.get(name, usual.get(name)) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([begin_of(name), *map(option_value, values)])
    title, option = words("options_differ"), words("option")
    return [WatchTable(title, [option, *(run.name for run in runs)], rows)] if rows else []


def option_value(value: Any) -> str:
    """An option as it is written in a recipe, or its begin."""
    return begin_of(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def more(n: int, words: Words) -> str:
    """That ``n`` are not shown; empty for none."""
    return words("more", n=n) if n > 0 else ""


def begin_of(value: Any) -> str:
    """The begin of a value that may be long."""
    text = str(value)
    return text if len(text) <= VALUE_LENGTH else text[:VALUE_LENGTH] + " …"


def _grid(
    words: Words,
    title: str,
    header: Iterable[str],
    rows: list[list[Any]],
    rest: int = 0,
    minor: tuple[int, ...] = (),
) -> WatchTable:
    """A table of ``rows``, of which ``rest`` more are not shown; title and header are keys of the texts."""
    return WatchTable(
        words(title) if title else "", [words(key) for key in header], rows, more(rest, words), minor
    )


def _left(run: RunFolder, state: State, words: Words) -> str:
    eta = speed(run).eta
    return words.duration(eta) if eta is not None and state.name == "running" else "–"


def _records(value: Any) -> str:
    if not isinstance(value, list):
        return ""
    shown = [":".join(map(str, entry)) if isinstance(entry, list) else str(entry) for entry in value[:3]]
    return ", ".join(shown) + (f" … ({len(value):,})" if len(value) > 3 else "")
