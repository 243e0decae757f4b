"""Keys, tokens and passwords are kept out of what a run writes: its saved config, its logs, its trackers.

A secret is known by the name it goes under (``api_key``, ``HF_TOKEN`` ...), by its look (``hf_...``, a URL
with a password ...), or because an environment variable holds it. Forty hexadecimal digits are a key of
Weights & Biases when they stand alone, and a hash when they are part of a path or a name, or when the word
before says so (``commit``, ``revision`` ...).
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

HIDDEN = "<hidden>"

# shorter values of environment variables are words and numbers that ordinary texts are full of
_MIN_LENGTH = 8
_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)$", re.IGNORECASE)
# "tokens", "max_num_tokens" and the like are numbers of tokens, so nothing here is plural.
_NAME = r"(?:(?:api|access|secret|private|account|encryption)[_-]?key|token|secret|passw(?:or)?d|passphrase|credentials?|authorization)"
_NAMED = re.compile(rf"{_NAME}$", re.IGNORECASE)
_PASSWORD = re.compile(r"(passw(?:or)?d|passphrase|secret)$", re.IGNORECASE)
_FLAG = re.compile(rf"--?[\w.-]*{_NAME}$", re.IGNORECASE)
_HASHES = r"(?:commit|revision|rev|sha|sha1|sha-1|hash|digest|checksum|tree|blob|head|fingerprint|etag|oid|id|version|ref)"
_HASH = re.compile(rf"(?:^|[_-]){_HASHES}$", re.IGNORECASE)
# What is no secret under any name: a number, a word of a language, a special token.
_HARMLESS = re.compile(r"[-+]?\d+(?:\.\d+)?|none|null|true|false|<[^<>]*>|\*+|", re.IGNORECASE)
_LONE_KEY = re.compile(r"(?<![\w/\\.@-])[0-9a-f]{40}(?![\w/\\@-]|\.\w)")
_HASH_BEFORE = re.compile(rf"\b{_HASHES}\b[\"'`]?\s*[:= ]?\s*[\"'`]?$", re.IGNORECASE)

_SHAPES = [
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL),
        HIDDEN,
    ),
    # https://user:password@host; with a user alone only where that is commonly a token (ssh://git@host is
    # not)
    (re.compile(r"(://)[^\s/?#@:\"']*:[^\s/?#\"']*@"), rf"\1{HIDDEN}@"),
    (re.compile(rf"(https?://)(?!{HIDDEN})[^\s/?#@:\"']+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    # signed links: https://bucket.host/file?X-Amz-Signature=...
    (
        re.compile(
            rf"([?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|key|[\w-]*{_NAME})=)[^&\s#\"']+",
            re.I,
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"(\bauthorization[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|token|digest)\s+)?[^\s\"',;]+", re.I
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\bbearer\s+)(?:(?=[^\s\d]*\d)[\w.~+/=-]{8,}|[\w.~+/=-]{20,})", re.I), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"(?<![A-Za-z0-9])(?:"
            r"hf_[A-Za-z0-9]{30,}|wandb_v\d+_\w{20,}|local-[0-9a-f]{40}"
            r"|sk-(?:proj|ant|or|svcacct|admin)-[\w-]{16,}|sk-[A-Za-z0-9]{20,}"
            r"|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"
            r")(?![A-Za-z0-9])"
        ),
        HIDDEN,
    ),
]
# Not after a slash: ".../token=a/part.parquet" is the path of a table.
_ASSIGNED = re.compile(
    rf"(?<![\w./\\-])([\w.-]*{_NAME})([\"']?\s*[:=]\s*[\"']?)([^\s\"',;&)}}\]]+)", re.IGNORECASE
)
_ARGUMENT = re.compile(rf"(?<![\w-])(--?[\w.-]*{_NAME})(\s+)([^\s-]\S*)", re.IGNORECASE)


def environment_secrets() -> list[str]:
    """Values of the environment variables whose names end in KEY, TOKEN, SECRET, PASSWORD ..., and their
    quoted forms; longest first."""
    found = set()
    for name, value in os.environ.items():
        if _VARIABLE.search(name) and len(value.strip()) >= _MIN_LENGTH:
            for form in (
                value,
                value.strip(),
                quote(value, safe=""),
                json.dumps(value)[1:-1],
                *value.split("\n"),
            ):
                if len(form) >= _MIN_LENGTH:
                    found.add(form)
    return sorted(found, key=len, reverse=True)


def hide(text: str, known: list[str] | None = None) -> str:
    """``text`` with ``<hidden>`` in place of what is, or looks like, a secret.

    Args:
        text: Any text.
        known: Values to hide besides; default: :func:`environment_secrets`.
    """
    return _hide(text, environment_secrets() if known is None else known)


def redacted(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``values`` for others to see: secrets, also in nested dicts and lists, are ``<hidden>``.

    Numbers stay (``max_num_tokens``), but for those that a password's name stands before; what is no
    container, text, path or number is taken over as it is.
    """
    return _clean(values, "", environment_secrets())


class HideSecrets(logging.Filter):
    """Hides secrets in the messages, tracebacks and stacks of every record that passes. The environment is
    read when it is made."""

    def __init__(self) -> None:
        super().__init__()
        self._known = environment_secrets()
        self._formatter = logging.Formatter()

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # the handler will tell of the bad format
            return True
        if (shown := _hide(message, self._known)) != message:
            record.msg, record.args = shown, None
        if record.exc_info and not record.exc_text:
            record.exc_text = self._formatter.formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = _hide(record.exc_text, self._known)
        if record.stack_info:
            record.stack_info = _hide(record.stack_info, self._known)
        return True


def hide_in_logs() -> None:
    """Puts a :class:`HideSecrets` on every handler of the root logger that has none; call it after the
    handlers are there."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(f, HideSecrets) for f in handler.filters):
            handler.addFilter(HideSecrets())


def _hide(text: str, known: list[str], hashes: bool = False) -> str:
    for value in known:
        text = text.replace(value, HIDDEN)
    for pattern, shown in _SHAPES:
        text = pattern.sub(shown, text)
    text = _ASSIGNED.sub(_without_value, text)
    text = _ARGUMENT.sub(_without_value, text)
    return text if hashes else _LONE_KEY.sub(_unless_hash, text)


def _without_value(match: re.Match[str]) -> str:
    name, between, value = match.groups()
    return match[0] if _HARMLESS.fullmatch(value) else f"{name}{between}{HIDDEN}"


def _unless_hash(match: re.Match[str]) -> str:
    return (
        match[0] if _HASH_BEFORE.search(match.string[max(0, match.start() - 40) : match.start()]) else HIDDEN
    )


def _clean(value: Any, name: str, known: list[str]) -> Any:
    """``value`` as it may be shown under ``name``."""
    if isinstance(value, dict):
        return {key: _clean(inner, str(key), known) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        flags = ["", *(str(item) if isinstance(item, str) else "" for item in value)]
        kept = [_clean(item, flag if _FLAG.match(flag) else name, known) for flag, item in zip(flags, value)]
        return kept if isinstance(value, list) else tuple(kept)
    if isinstance(value, str | PurePath):
        text = str(value)
        if _NAMED.search(name) and not _HARMLESS.fullmatch(text):
            return HIDDEN
        shown = _hide(text, known, hashes=bool(_HASH.search(name)))
        return shown if shown != text else value
    if isinstance(value, int | float) and not isinstance(value, bool) and _PASSWORD.search(name):
        return HIDDEN
    return value
