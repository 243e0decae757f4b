"""Numbers as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def gb(n: float) -> str:
    """Bytes: ``29.4 GB`` (10^9), as disks and ``min_free_gb`` count."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:.3g} {name}" if n < 100 * unit else f"{n / unit:,.0f} {name}"
    return f"{n:.0f} B"


def figure(value: float | None) -> str:
    """Four significant digits: ``1.234``, ``12,340``, ``2e-05``; ``–`` where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.3g}"


def is_figure(value: Any) -> bool:
    """Whether a table sets the value to the right: a number, or a text of one alone, such as ``< 0.01%``."""
    if isinstance(value, str):
        return re.fullmatch(r"(< )?-?[\d.,]+ ?%?", value) is not None
    return isinstance(value, Real) and not isinstance(value, bool)


def figures_alone(rows: Sequence[Sequence[Any]], k: int) -> bool:
    """Does column ``k`` of a table hold figures and gaps alone? Then it stands to the right."""
    values = [row[k] for row in rows if row[k] not in ("", "–")]
    return bool(values) and all(map(is_figure, values))


def cell(value: Any) -> str:
    """A value in a table: thousands apart, floats with four significant digits."""
    if isinstance(value, str) or not is_figure(value):
        return str(value)
    return f"{value:,}" if isinstance(value, Integral) else f"{float(value):.4g}"
