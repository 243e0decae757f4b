"""Secrets of the environment are kept out of what a run writes: its options, its logs, its trackers.

A secret is the value of an environment variable whose name ends in KEY, TOKEN, SECRET or PASSWORD. No pattern
is searched for: it would also meet ordinary words, and what the model has written must stay as it is.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

HIDDEN = "<hidden>"
_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_MIN_LENGTH = 8  # shorter values are words and numbers that ordinary texts are full of


def hide(text: str) -> str:
    """``text`` with ``<hidden>`` in place of the environment's secrets, also of those quoted for URLs."""
    values = [value for name, value in os.environ.items() if name.upper().endswith(_NAMES)]
    forms = {f for v in values for f in (v.strip(), quote(v, safe=""), json.dumps(v)[1:-1], *v.splitlines())}
    for form in sorted(forms, key=len, reverse=True):  # one may stand inside another
        if len(form) >= _MIN_LENGTH:
            text = text.replace(form, HIDDEN)
    return text


def redacted(value: Any) -> Any:
    """A copy of options for others to see: secrets in texts and paths are hidden, also in dicts and lists."""
    if isinstance(value, dict):
        return {name: redacted(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted, value))
    return type(value)(hide(str(value))) if isinstance(value, str | PurePath) else value


class _Hiding(logging.Formatter):
    """Hides secrets in what another formatter makes of a record: message, traceback and stack."""

    def __init__(self, inner: logging.Formatter | None):
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return hide(self._inner.format(record))


def hide_in_logs() -> None:
    """Makes every handler of the root logger hide secrets; to be called when the handlers are there."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, _Hiding):
            handler.setFormatter(_Hiding(handler.formatter))
