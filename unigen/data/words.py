"""Words about fields and values, for messages: bounded in length, always printable."""

from __future__ import annotations

import json
from typing import Any

from unigen.printing import printable

Json = dict[str, Any]


def join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def show(value: Any) -> str:
    """``value`` as JSON, cut to a length that a message can carry; always encodable."""
    return cut(json.dumps(value, ensure_ascii=False, default=_brief))


def names(record: Json) -> str:
    """The fields a record has."""
    return cut(", ".join(name for name in record if record[name] is not None) or "(none)")


def cut(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 80 else text[:77] + "..."


def _brief(value: Any) -> str:
    """A value that tables have and JSON has not."""
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else str(value)[:80]
