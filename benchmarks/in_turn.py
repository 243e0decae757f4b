"""Timing of variants in turn, and what the benchmarks print.

A machine's speed drifts; so variants run one after another, round by round, and each is compared with its
neighbour.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unigen.model.products import linear

TOLERANCE = 1e-4
PLAIN = "plain"


class Disagreement(Exception):
    """Two variants gave different numbers, so their times are not compared."""


def agree(name: str, got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value wanted.

    Raises:
        Disagreement: it is above :data:`TOLERANCE`, or not a number.
    """
    if got.shape != wanted.shape:
        raise Disagreement(f"{name}: shapes are {tuple(got.shape)} and {tuple(wanted.shape)}")
    error = float((got - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise Disagreement(f"{name}: differs by {error:.1e} of its largest value; {TOLERANCE:.0e} is allowed")
    return error


# ---- time


@dataclass(frozen=True)
class Times:
    """Seconds of each variant, round by round, the plain one first; each round's product rate (FLOP/s)."""

    seconds: dict[str, list[float]]
    rates: list[float]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: str) -> list[float]:
        """How many times faster than the plain variant, round by round."""
        return [plain / own for plain, own in zip(self.seconds[PLAIN], self.seconds[name], strict=True)]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        result = {}
        for name, s in self.seconds.items():
            result[name] = {"rounds": len(s), "seconds": spread(s), "faster": spread(self.ratios(name))}
        return result


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def product_side(small: bool) -> int:
    """Rows of the matrices whose product tells the machine's rate."""
    return 64 if small else 2048


def product_rate(side: int, repeats: int = 3) -> float:
    """FLOP/s of a float32 matrix product of ``side``-cubed on this machine, by what the model's linear layers
    take there, the median of some."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / statistics.median(_seconds(lambda: linear(a, b)) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_in_turn(variants: Mapping[str, Callable[[], object]], options: argparse.Namespace) -> Times:
    """Times the variants one after another, round by round; a first round, which warms up, is not counted.

    ``options.repeats`` rounds, fewer where ``options.seconds`` are over.
    """
    assert next(iter(variants)) == PLAIN
    side = product_side(options.small)
    for work in variants.values():
        work()
    product_rate(side, 1)
    times = Times({name: [] for name in variants}, [])
    began = time.perf_counter()
    while len(times.rates) < options.repeats:
        if times.rates and time.perf_counter() - began > options.seconds:
            break
        for name, work in variants.items():
            times.seconds[name].append(_seconds(work))
        times.rates.append(product_rate(side))
    return times


# ---- kernels


class KernelCount(TorchDispatchMode):
    """Counts the operators that run a kernel: all but views and those that only make room."""

    FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in self.FREE:
            self.count += 1
        return func(*args, **(kwargs or {}))


def kernels(work: Callable[[], object]) -> int:
    """Kernels that ``work`` runs."""
    with KernelCount() as counted:
        work()
    return counted.count


# ---- options and output


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=9, help="most rounds of a measurement (default 9)")
    ends = "time of a measurement after which no round begins (default 180)"
    made.add_argument("--seconds", type=float, default=180.0, help=ends)
    made.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch's own choice)")
    made.add_argument("--small", action="store_true", help="a tiny model, whose times mean nothing")
    made.add_argument("--json", action="store_true", help="one JSON line in place of the table")
    return made


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(
    measure: Callable[[argparse.Namespace], tuple[dict[str, Any], list[str]]],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
) -> None:
    """Measures and prints the results as lines, or as one of JSON. Exit status 1: the variants disagree."""
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        results, lines = measure(options)
    except Disagreement as error:
        sys.exit(f"Nothing is timed: {error}")
    print(json.dumps(results) if options.json else "\n".join(lines))


def headline(results: dict[str, Any]) -> str:
    """What the times were measured on."""
    m = results["machine"]
    small = "; --small: times mean nothing" if results["small"] else ""
    return f"{m['processor']}, {m['threads']} thread(s), torch {m['torch']}, Python {m['python']}{small}"


HEAD = f"{'':34} {'seconds':>9} {'min':>9} {'max':>9}   {'faster':>7} {'min':>6} {'max':>6}"


def table(title: str, times: Times) -> list[str]:
    """A line for every variant: median and range of its seconds, and of how many times faster it is."""
    lines = []
    for name, seconds in times.seconds.items():
        line = f"{title + ': ' + name:34} {times.median(name):9.4f} {min(seconds):9.4f} {max(seconds):9.4f}"
        if name != PLAIN:
            ratio = spread(times.ratios(name))
            line += f"   {ratio['median']:6.2f}x {ratio['min']:5.2f}x {ratio['max']:5.2f}x"
        lines.append(line)
    return lines
