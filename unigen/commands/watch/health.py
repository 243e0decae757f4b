"""The diagnosis of a run: running, hung, dead, stopped or finished, the evidence, its speed, and warnings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from unigen.runs.metrics import numbers
from unigen.runs.ranks import ENDED, Rank, find_hang, is_gone
from unigen.runs.reader import Checkpoint, RunFolder

# without a heartbeat (they come every few seconds; a network folder may show them a minute late)
STALE_S = 60.0
LONG_PHASE_S = 120.0  # without progress before it is worth a word, and at least this many times a step
LONG_PHASE_STEPS = 20
HANG_TIMEOUT_S = 1800.0  # as the option's default

GROWN = 5.0  # a gradient norm this many times the one before
FEWEST = 40  # lines that such a comparison needs
WAIT = 0.10  # share of the time waiting for data
WORSE = 3  # validations in a row
DRIFT = 0.1  # share by which a loss on the probe may lie above the first one
LATE = 1.5  # times save_steps without a checkpoint
LATE_S = 3 * 3600.0
SPARE = 1.2  # times the last checkpoint's size


class Told(NamedTuple):
    """A sentence of the texts with its values."""

    key: str
    values: dict[str, Any]


class State(NamedTuple):
    """``name`` is running, hung, dead, stopped, finished or new; ``why`` the evidence."""

    name: Literal["running", "hung", "dead", "stopped", "finished", "new"]
    why: list[Told]


class Speed(NamedTuple):
    """None: not known."""

    seconds_per_step: float | None
    tokens_per_second: float | None
    data_wait: float | None
    eta: float | None  # seconds


class RunWarning(NamedTuple):
    """``level`` is bad (something is broken or will be) or warn."""

    level: Literal["bad", "warn"]
    key: str
    values: dict[str, Any]


# ---- state


def diagnose(run: RunFolder) -> State:
    """Whether it runs, by heartbeats, lock, processes and the steps done."""
    total, fresh = run.total_steps, [rank for rank in run.ranks if rank.age <= STALE_S]
    complete = total is not None and run.step >= total
    done = State("finished", [Told("all_steps", {"n": run.step})])
    if run.ranks and all(rank.phase in ENDED for rank in run.ranks) and not run.locked:
        phase, ago = run.ranks[0].phase, run.ranks[0].age
        said = Told("said_goodbye", {"phase": phase, "ago": ago})
        goodbye = [Told("ended_ago", {"ago": ago}) if phase == "ended" else said]
        if run.ranks[0].facts.get("signal"):
            goodbye.append(Told("resumes", {}))
        if reason := str(run.ranks[0].facts.get("why", "")):
            goodbye.append(Told("reason", {"why": reason}))
        return done if complete else State("stopped", goodbye)
    gone = [rank for rank in fresh if not run.locked and is_gone(rank)]
    if run.locked or len(fresh) > len(gone):
        return _living(run, fresh)
    if complete:
        return done
    if gone:
        return State("dead", [Told("process_gone", _where(gone[0]))])
    if run.ranks:
        last = min(run.ranks, key=lambda rank: rank.age)
        where = _where(last)
        why = Told("process_gone", where) if is_gone(last) else Told("no_heartbeat", where)
        return State("dead", [why])
    if run.metrics.log.last_step is None:
        return State("new", [Told("nothing_yet", {})])
    return State("stopped", [Told("no_process", {"ago": time.time() - run.metrics.modified})])


def _living(run: RunFolder, fresh: list[Rank]) -> State:
    lock = [Told("lock_held", {})]
    hang = find_hang(run.ranks, run.option("hang_timeout", HANG_TIMEOUT_S) or math.inf, STALE_S)
    if hang is not None and hang.silent:
        silent = [Told("silent", _where(rank)) for rank in hang.silent[:3]]
        return State("hung", silent + (lock if run.locked else []))
    if hang is not None:
        return State("hung", [Told("stuck", _where(rank)) for rank in hang.hung[:3]])
    if fresh:
        values = {"ago": max(rank.age for rank in fresh), "phase": fresh[0].phase, "n": len(fresh)}
        return State("running", [Told("heartbeat", values)])
    return State("running", lock)


def _where(rank: Rank) -> dict[str, Any]:
    """What is known of a process, by the names that the texts give it."""
    return vars(rank) | {"ago": rank.age, "for_": rank.quiet}


# ---- speed


def speed(run: RunFolder) -> Speed:
    """Over the last steps. ``eta`` counts what lies between steps too (validation, saving) where the log has
    times."""
    rows = list(run.metrics.log.recent)[-100:]
    seconds = _seconds_per_step(run, rows)
    tokens, waits = numbers(rows, "tokens_per_second"), numbers(rows, "data_wait")
    left = None if run.total_steps is None else max(0, run.total_steps - run.step)
    return Speed(
        seconds,
        statistics.fmean(tokens) if tokens else None,
        statistics.fmean(waits) if waits else None,
        left * seconds if left is not None and seconds is not None else None,
    )


def _seconds_per_step(run: RunFolder, rows: list[dict[str, Any]]) -> float | None:
    """From the log's times or durations, else from heartbeats, else from the last checkpoints."""
    # The time between the end of a run and its resuming is no time of steps.
    times = [(t, row["step"]) for row in rows for t in numbers([row], "time") if t >= run.started]
    took = numbers(rows, "seconds")
    median = statistics.median(took) if took else None
    rates = [_rate(times), median, _rate(run.rank_steps), _rate(_marks(run))]
    return next((rate for rate in rates if rate is not None), None)


def _rate(places: list[tuple[float, int]]) -> float | None:
    """Seconds per step between the first and the last of (time, step)."""
    if len(places) < 2:
        return None
    (t0, s0), (t1, s1) = places[0], places[-1]
    return (t1 - t0) / (s1 - s0) if t1 > t0 and s1 > s0 else None


def _marks(run: RunFolder) -> list[tuple[float, int]]:
    """(time, step) of the last two signs with a clock: checkpoints, and the first process's heartbeat."""
    marks = [(c.time, c.step) for c in run.checkpoints] + [(rank.time, rank.step) for rank in run.ranks[:1]]
    return sorted(marks)[-2:]


# ---- warnings


def warnings(run: RunFolder, state: State) -> list[RunWarning]:
    """What should be looked at, the worst first."""
    found = [*_numbers(run), *_validation(run), *_drift(run)]
    if state.name != "finished":  # a checkpoint is to come, in one that stopped when it is resumed
        found += _space(run)
    if state.name in ("running", "hung"):
        found += [*_saving(run), *_processes(run)]
    if run.stacks:
        found.append(_bad("stack_written", file=run.stacks[0], n=len(run.stacks)))
    if state.name in ("dead", "stopped") and run.writing:
        found.append(_warn("half_written", name=run.writing[0]))
    if run.metrics.log.n_unreadable:
        found.append(_warn("unreadable", n=run.metrics.log.n_unreadable))
    return sorted(found, key=lambda warning: warning.level != "bad")


def _bad(key: str, **values: Any) -> RunWarning:
    return RunWarning("bad", key, values)


def _warn(key: str, **values: Any) -> RunWarning:
    return RunWarning("warn", key, values)


def _numbers(run: RunFolder) -> Iterator[RunWarning]:
    log, lines = run.metrics.log, list(run.metrics.log.recent)
    if log.n_not_finite:
        level = _bad if any(line.get("nonfinite") for line in lines[-100:]) else _warn
        yield level("not_finite", n=log.n_not_finite, step=log.not_finite_step)
    if skipped := sum(bool(line.get("skipped")) for line in lines[-100:]):
        yield _warn("skipped", n=skipped, of=len(lines[-100:]), total=log.n_skipped)
    norms = numbers(lines, "grad_norm")
    if len(norms) >= FEWEST:
        before, after = statistics.median(norms[: len(norms) // 2]), statistics.median(norms[-10:])
        if before > 0 and after > GROWN * before:
            yield _bad("norm_grows", after=after, before=before)
    waits = numbers(lines[-100:], "data_wait")
    if len(waits) >= 10 and statistics.fmean(waits) > WAIT:
        yield _warn("data_wait", share=statistics.fmean(waits))


def _validation(run: RunFolder) -> list[RunWarning]:
    if (found := run.metrics.log.best()) is None:
        return []
    step, best = found
    since = numbers([line for line in run.metrics.log.validations if line["step"] > step], "val_loss")
    if len(since) < WORSE:
        return []
    return [_warn("no_better", n=len(since), best=best, step=step, now=since[-1])]


def _drift(run: RunFolder) -> list[RunWarning]:
    drifts = {kind: run.metrics.log.latest.get(f"probe/drift/{kind}", 0.0) for kind in ("text", "image")}
    return [_warn("drift", kind=kind, share=drift) for kind, drift in drifts.items() if drift > DRIFT]


def _saving(run: RunFolder) -> list[RunWarning]:
    last: Checkpoint | None = run.last_checkpoint
    every = run.option("save_steps", 0)
    begin = run.metrics.log.points("loss")
    since = run.step - (last.step if last else int(begin[0].step) - 1 if begin else run.step)
    if every and since > LATE * every:
        return [_bad("no_checkpoint", n=since, every=int(every))]
    if last is not None and time.time() - last.time > LATE_S:
        return [_warn("old_checkpoint", ago=time.time() - last.time)]
    return []


def _processes(run: RunFolder) -> Iterator[RunWarning]:
    pace = _seconds_per_step(run, list(run.metrics.log.recent)[-100:]) or 0.0
    limit = max(LONG_PHASE_S, LONG_PHASE_STEPS * pace)
    if slow := [rank for rank in run.ranks if rank.quiet > limit and rank.phase not in ENDED]:
        yield _warn("long_phase", **_where(max(slow, key=lambda rank: rank.quiet)))
    steps = [rank.step for rank in run.ranks]
    if steps and max(steps) - min(steps) > 1:
        last = min(run.ranks, key=lambda rank: rank.step)
        yield _warn("behind", rank=last.rank, step=last.step, ahead=max(steps))
    offset = run.clock_offset()
    if offset > 30:
        yield _warn("clock_ahead", for_=offset)
    if offset < -30:
        yield _warn("clock_behind", for_=-offset)


def _space(run: RunFolder) -> list[RunWarning]:
    last = run.last_checkpoint
    need, stay = int(SPARE * last.size) if last else 0, int(1e9 * run.option("min_free_gb", 1.0))
    if run.disk_free is None or run.disk_free >= need + stay:
        return []
    key = "disk_full" if last else "disk_reserve"
    return [_bad(key, free=run.disk_free, need=need, stay=stay)]
