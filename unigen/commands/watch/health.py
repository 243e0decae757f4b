"""How a run is: running, hung, dead, stopped or finished, why one thinks so, how fast it is, and what an
engineer would worry about."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, Literal, NamedTuple

from unigen.runs.metrics import numbers
from unigen.runs.reader import Checkpoint, Rank, Run, is_gone

# without a heartbeat (they come every few seconds; a network folder may show them a minute late)
STALE_S = 60.0
LONG_PHASE_S = 120.0  # without progress before it is worth a word, and at least this many times a step
LONG_PHASE_STEPS = 20
ENDED = ("ended", "finished", "stopped", "failed")  # phases of a process that said goodbye
HANG_TIMEOUT_S = 1800.0  # as the option's default

GROWN = 5.0  # a gradient norm this many times the one before
FEWEST = 40  # rows that such a comparison needs
WAIT = 0.10  # share of the time waiting for data
WORSE = 3  # validations in a row
LATE = 1.5  # times save_steps without a checkpoint
LATE_S = 3 * 3600.0
ROOM = 1.2  # times the last checkpoint's size


class Told(NamedTuple):
    """A sentence of the words' table with its values."""

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


class Worry(NamedTuple):
    """``level`` is bad (something is broken or will be) or warn."""

    level: Literal["bad", "warn"]
    key: str
    values: dict[str, Any]


# ---- state


def judge(run: Run) -> State:
    """Whether it runs, by heartbeats, lock, processes and the steps done."""
    total, fresh = run.total_steps, [rank for rank in run.ranks if rank.age <= STALE_S]
    complete = total is not None and run.step >= total
    if run.ranks and all(rank.phase in ENDED for rank in run.ranks) and not run.locked:
        why = Told("said_goodbye", {"phase": run.ranks[0].phase, "ago": run.ranks[0].age})
        reason = str(run.ranks[0].facts.get("why", ""))
        more = [Told("reason", {"why": reason})] if reason else []
        return (
            State("finished", [Told("all_steps", {"n": run.step})])
            if complete
            else State("stopped", [why, *more])
        )
    gone = [rank for rank in fresh if not run.locked and is_gone(rank)]
    if run.locked or len(fresh) > len(gone):
        return _living(run, fresh)
    if complete:
        return State("finished", [Told("all_steps", {"n": run.step})])
    if gone:
        return State("dead", [_gone(run, gone[0])])
    if run.ranks:
        last = min(run.ranks, key=lambda rank: rank.age)
        where = {"rank": last.rank, "step": last.step, "phase": last.phase, "ago": last.age}
        return State("dead", [_gone(run, last) if is_gone(last) else Told("no_heartbeat", where)])
    if run.metrics.log.last_step is None:
        return State("new", [Told("nothing_yet", {})])
    return State("stopped", [Told("no_process", {"ago": time.time() - run.metrics.modified})])


def _gone(run: Run, rank: Rank) -> Told:
    return Told(
        "process_gone",
        {"rank": rank.rank, "pid": rank.pid, "step": rank.step, "phase": rank.phase, "ago": rank.age},
    )


def _living(run: Run, fresh: list[Rank]) -> State:
    stale = [rank for rank in run.ranks if rank.age > STALE_S]
    if stale:
        silent = [
            Told("silent", {"rank": r.rank, "host": r.host, "step": r.step, "phase": r.phase, "ago": r.age})
            for r in stale[:3]
        ]
        return State("hung", [*silent, *([Told("lock_held", {})] if run.locked else [])])
    limit = run.option("hang_timeout", HANG_TIMEOUT_S) or math.inf
    stuck = [rank for rank in fresh if rank.quiet > limit]
    if stuck:
        return State(
            "hung",
            [
                Told("stuck", {"rank": r.rank, "step": r.step, "phase": r.phase, "for_": r.quiet})
                for r in stuck[:3]
            ],
        )
    if fresh:
        first = fresh[0]
        return State(
            "running",
            [
                Told(
                    "heartbeat",
                    {"ago": max(rank.age for rank in fresh), "phase": first.phase, "n": len(fresh)},
                )
            ],
        )
    return State("running", [Told("lock_held", {})])


# ---- speed


def speed(run: Run) -> Speed:
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


def _seconds_per_step(run: Run, rows: list[dict[str, Any]]) -> float | None:
    """From the log's times or durations, else from heartbeats, else from the last checkpoints."""
    # The time between the end of a run and its resuming is no time of steps.
    times = [(t, row["step"]) for row in rows for t in numbers([row], "time") if t >= run.started]
    rates = [_rate(times), _median(numbers(rows, "seconds")), _rate(run.rank_steps), _rate(_marks(run))]
    return next((rate for rate in rates if rate is not None), None)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _rate(places: list[tuple[float, int]]) -> float | None:
    """Seconds per step between the first and the last of (time, step)."""
    if len(places) < 2:
        return None
    (t0, s0), (t1, s1) = places[0], places[-1]
    return (t1 - t0) / (s1 - s0) if t1 > t0 and s1 > s0 else None


def _marks(run: Run) -> list[tuple[float, int]]:
    """(time, step) of the last two signs with a clock: checkpoints, and the first process's heartbeat."""
    marks = [(c.time, c.step) for c in run.checkpoints] + [(rank.time, rank.step) for rank in run.ranks[:1]]
    return sorted(marks)[-2:]


# ---- worries


def worries(run: Run, state: State) -> list[Worry]:
    """What should be looked at, the worst first."""
    found = [*_numbers(run), *_validation(run), *_space(run)]
    if state.name in ("running", "hung"):
        found += [*_saving(run), *_processes(run)]
    if run.stacks:
        found.append(Worry("bad", "stack_written", {"file": run.stacks[0], "n": len(run.stacks)}))
    if state.name in ("dead", "stopped") and run.writing:
        found.append(Worry("warn", "half_written", {"name": run.writing[0]}))
    if run.metrics.log.n_unreadable:
        found.append(Worry("warn", "unreadable", {"n": run.metrics.log.n_unreadable}))
    return sorted(found, key=lambda worry: worry.level != "bad")


def _numbers(run: Run) -> list[Worry]:
    log, found = run.metrics.log, []
    rows = list(log.recent)
    if log.n_not_finite:
        lately = any(row.get("nonfinite") for row in rows[-100:])
        found.append(
            Worry(
                "bad" if lately else "warn",
                "not_finite",
                {"n": log.n_not_finite, "step": log.not_finite_step},
            )
        )
    skipped = sum(bool(row.get("skipped")) for row in rows[-100:])
    if skipped:
        found.append(Worry("warn", "skipped", {"n": skipped, "of": len(rows[-100:]), "total": log.n_skipped}))
    norms = numbers(rows, "grad_norm")
    if len(norms) >= FEWEST:
        before, after = statistics.median(norms[: len(norms) // 2]), statistics.median(norms[-10:])
        if before > 0 and after > GROWN * before:
            found.append(Worry("bad", "norm_grows", {"after": after, "before": before}))
    waits = numbers(rows[-100:], "data_wait")
    if len(waits) >= 10 and statistics.fmean(waits) > WAIT:
        found.append(Worry("warn", "data_wait", {"share": statistics.fmean(waits)}))
    return found


def _validation(run: Run) -> list[Worry]:
    losses = [
        (row["step"], value) for row in run.metrics.log.validations for value in numbers([row], "val_loss")
    ]
    if not losses:
        return []
    best = min(range(len(losses)), key=lambda i: losses[i][1])
    since = len(losses) - 1 - best
    if since < WORSE:
        return []
    return [
        Worry(
            "warn",
            "no_better",
            {"n": since, "best": losses[best][1], "step": losses[best][0], "now": losses[-1][1]},
        )
    ]


def _saving(run: Run) -> list[Worry]:
    last: Checkpoint | None = run.last_checkpoint
    every = run.option("save_steps", 0)
    begin = run.metrics.log.points("loss")
    since = run.step - (last.step if last else int(begin[0].step) - 1 if begin else run.step)
    if every and since > LATE * every:
        return [Worry("bad", "no_checkpoint", {"n": since, "every": int(every)})]
    if last is not None and time.time() - last.time > LATE_S:
        return [Worry("warn", "old_checkpoint", {"ago": time.time() - last.time})]
    return []


def _processes(run: Run) -> list[Worry]:
    found = []
    pace = _seconds_per_step(run, list(run.metrics.log.recent)[-100:]) or 0.0
    limit = max(LONG_PHASE_S, LONG_PHASE_STEPS * pace)
    slow = [rank for rank in run.ranks if rank.quiet > limit and rank.phase not in ENDED]
    if slow:
        worst = max(slow, key=lambda rank: rank.quiet)
        found.append(
            Worry(
                "warn",
                "long_phase",
                {"rank": worst.rank, "phase": worst.phase, "for_": worst.quiet, "step": worst.step},
            )
        )
    steps = [rank.step for rank in run.ranks]
    if steps and max(steps) - min(steps) > 1:
        last = min(run.ranks, key=lambda rank: rank.step)
        found.append(Worry("warn", "behind", {"rank": last.rank, "step": last.step, "ahead": max(steps)}))
    offset = run.clock_offset()
    if abs(offset) > 30:
        found.append(Worry("warn", "clock_ahead" if offset > 0 else "clock_behind", {"for_": abs(offset)}))
    return found


def _space(run: Run) -> list[Worry]:
    last = run.last_checkpoint
    if run.disk_free is None:
        return []
    need = ROOM * (last.size if last else 0) + 1e9 * run.option("min_free_gb", 1.0)
    return (
        [Worry("bad", "disk_full", {"free": run.disk_free, "need": int(need)})]
        if run.disk_free < need
        else []
    )
