"""What a metric answers: a number with its identity and its uncertainty, or why there is none."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ParamSpec

import numpy as np

from unigen.config import UserError
from unigen.printing import first_line

P = ParamSpec("P")
NO_SAMPLES = ("there are no samples", "give at least one prediction")
INSTALL = "pip install 'sacrebleu>=2.5,<3' 'rouge-score>=0.1.2' 'nltk>=3.9' (the extra metrics)"


class CannotRun(UserError):
    """A metric has no value, for a reason that its user can remove."""

    def __init__(self, reason: str, fix: str):
        super().__init__(f"{reason}. Fix: {fix}")
        self.reason, self.fix = reason, fix


class Unfit(CannotRun):
    """The samples do not allow a metric: they are too few, too small, or hold no such thing."""


@dataclass(frozen=True)
class Result:
    """One metric over n samples.

    Args:
        name: its identity, such as ``fd[dinov2-vitl14@3fe1|pil-bicubic-224|n=2000|lib=...]``: everything that
            the number depends on besides the samples. Numbers of different names are not compared.
        value: the number; None where it could not be had, never 0.
        n: samples it is over.
        interval: 95 % interval of ``value``; None where there is none.
        method: how the interval was made.
        samples: value of each sample [n]; None where the metric has one value for all. NaN: not this sample.
        higher_is_better: None where neither end is good (a ratio of lengths).
        notes: what the reader must know, such as a bias.
        reason, fix: why there is no value, and what to do about it.
        lacks: where that is nobody's fault: ``samples``, or what was not given.
        source: the paper or program the number is defined by.
        data: digest of what the samples were held against.
        pairs: what each sample is [n]; samples of two results that are the same are pairs, also where each
            result has others besides. None: only results over all the same samples have pairs.
        parts: sums over samples make the value: [n, k] numbers, and the ``rule`` that turns sums into it
            (``statistics.RULES``).
        rows: where sums do not suffice: the samples themselves, n rows, and the ``function`` from any rows to
            the value.
    """

    name: str
    value: float | None
    n: int = 0
    interval: tuple[float, float] | None = None
    method: str = ""
    samples: np.ndarray | None = field(default=None, repr=False, compare=False)
    higher_is_better: bool | None = True
    notes: tuple[str, ...] = ()
    reason: str = ""
    fix: str = ""
    lacks: str = ""
    source: str = ""
    data: str = ""
    pairs: tuple[Any, ...] | None = field(default=None, repr=False, compare=False)
    parts: np.ndarray | None = field(default=None, repr=False, compare=False)
    rule: str = "mean"
    rows: np.ndarray | None = field(default=None, repr=False, compare=False)
    function: Callable[[np.ndarray], float] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def without(cls, kind: str, error: CannotRun, source: str = "") -> Result:
        """The result of a metric that cannot run."""
        lacks = "samples" if isinstance(error, Unfit) else ""
        return cls(kind, None, reason=error.reason, fix=error.fix, lacks=lacks, source=source)

    @property
    def kind(self) -> str:
        """The metric's short name: what stands before the bracket."""
        return self.name.partition("[")[0]

    @property
    def was_not_given(self) -> bool:
        """Has it no value because nobody gave what it needs?"""
        return self.value is None and self.lacks not in ("", "samples")

    def as_json(self) -> dict[str, Any]:
        """What ``metrics.json`` holds of it; a missing value is ``null``, and none is NaN."""
        shown: dict[str, Any] = {
            "name": self.name, "value": self.value, "n": self.n,
            "interval": None if self.interval is None else list(self.interval),
            "higher_is_better": self.higher_is_better, "source": self.source,
        }  # fmt: skip
        for key in ("method", "data", "reason", "fix"):
            if getattr(self, key):
                shown[key] = getattr(self, key)
        if self.notes:
            shown["notes"] = list(self.notes)
        return shown


def not_given(results: Sequence[Result]) -> list[tuple[list[str], str, str]]:
    """The metrics that lack what nobody gave, for each such thing: their kinds, why, and the fix."""
    found: dict[str, tuple[list[str], str, str]] = {}
    for result in results:
        if result.was_not_given:
            kinds = found.setdefault(result.lacks, ([], result.reason, result.fix))[0]
            if result.kind not in kinds:
                kinds.append(result.kind)
    return list(found.values())


def metric_key(name: str) -> str:
    """What a metric is called in files: its kind, and whether it is held against an edit's source."""
    return name.partition("[")[0] + ("_to_source" if "to=source" in name else "")


def identity(kind: str, *parts: str, **named: Any) -> str:
    """``kind[part|part|name=value]``; values that are None are left out."""
    inner = [*parts, *(f"{name}={value}" for name, value in named.items() if value is not None)]
    return f"{kind}[{'|'.join(inner)}]"


def libraries(*names: str) -> str:
    """``torch-2.13.0+cpu,pillow-12.3.0``: installed versions, in the order given.

    Raises:
        CannotRun: one is not installed.
    """
    found = []
    for name in names:
        try:
            found.append(f"{name}-{version(name)}")
        except PackageNotFoundError:
            raise CannotRun(f"{name} is not installed", INSTALL) from None
    return ",".join(found)


def digest_of(*texts: Any) -> str:
    """Twelve hexadecimal digits of anything JSON can hold."""
    text = json.dumps(texts, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def digest_of_numbers(numbers: np.ndarray) -> str:
    """Twelve hexadecimal digits of an array's shape and values."""
    digest = hashlib.sha256(f"{numbers.shape} {numbers.dtype}".encode())
    digest.update(np.ascontiguousarray(numbers).data)
    return digest.hexdigest()[:12]


def metric(kind: str, source: str) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """A decorator: the function's result carries ``source``, and what keeps it from running becomes a result
    without a value.

    Programmers' errors, and pictures that cannot be read, are raised as ever.
    """

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Result:
            try:
                result = function(*args, **kwargs)
            except CannotRun as error:
                return Result.without(kind, error, source)
            except ImportError as error:
                reason = f"{error.name or 'a library'} cannot be imported ({first_line(error)})"
                return Result(kind, None, reason=reason, fix=INSTALL, source=source)
            assert result.value is None or math.isfinite(result.value), f"{kind} is {result.value}"
            return replace(result, source=source)

        return run

    return decorate


def same_length(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """How many samples there are.

    Raises:
        CannotRun: there are none.
    """
    n = len(first)
    assert all(len(other) == n for other in others), f"{[n, *map(len, others)]} samples: one for each"
    if not n:
        raise Unfit(*NO_SAMPLES)
    return n
