"""Small declarative schemas of JSON values: which names, types and ranges. Names that a schema does not list
are fine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unigen.messages import listed


def short(value: Any) -> str:
    """A value in a message."""
    text = repr(value) if not isinstance(value, (dict, list)) else json.dumps(value, default=str)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


Wrong = tuple[str, str] | None
"""The key below the value, such as ``.a.b`` or ``[3]``, and what is wrong with it."""


@dataclass(frozen=True)
class Rule:
    """Any value."""

    def wrong(self, value: Any) -> Wrong:
        """What breaks the rule; None where nothing does."""
        return None


@dataclass(frozen=True)
class Number(Rule):
    """A finite number between two others, inclusive; ``whole`` ones are written without a point."""

    low: float
    high: float
    whole: bool = False

    def wrong(self, value: Any) -> Wrong:
        kinds = (int,) if self.whole else (int, float)
        if type(value) in kinds and self.low <= value <= self.high and math.isfinite(value):
            return None
        wanted = (
            f"a whole number from {self.low:,} to {self.high:,}"
            if self.whole
            else f"a number from {self.low:g} to {self.high:g}"
        )
        return "", f"is {short(value)}; it must be {wanted}"


def whole(low: int, high: int) -> Number:
    """A whole number between two others, inclusive."""
    return Number(low, high, True)


@dataclass(frozen=True)
class String(Rule):
    """A string; one of ``choices`` where there are any, and of ``least`` to ``length`` characters."""

    choices: tuple[str, ...] = ()
    length: int = 1 << 20
    least: int = 0

    def wrong(self, value: Any) -> Wrong:
        if not isinstance(value, str):
            return "", f"is {short(value)}; it must be a text"
        if self.choices and value not in self.choices:
            return "", f"is {short(value)}; it must be {listed(self.choices, 'or')}"
        if len(value) < self.least:
            return "", "is empty"
        return None if len(value) <= self.length else ("", f"has more than {self.length:,} characters")


@dataclass(frozen=True)
class Flag(Rule):
    """True or false; or the one of them that is ``only`` allowed."""

    only: bool | None = None

    def wrong(self, value: Any) -> Wrong:
        if isinstance(value, bool) and self.only in (None, value):
            return None
        wanted = "true or false" if self.only is None else str(self.only).lower()
        return "", f"is {short(value)}; it must be {wanted}"


@dataclass(frozen=True)
class Maybe(Rule):
    """Null, or what another rule says."""

    rule: Rule

    def wrong(self, value: Any) -> Wrong:
        return None if value is None else self.rule.wrong(value)


@dataclass(frozen=True)
class Either(Rule):
    """What any of several rules says; the last one's words are told."""

    rules: tuple[Rule, ...]

    def wrong(self, value: Any) -> Wrong:
        found = [rule.wrong(value) for rule in self.rules]
        return None if None in found else found[-1]


@dataclass(frozen=True)
class Items(Rule):
    """A list whose items all keep a rule."""

    rule: Rule
    low: int = 0
    high: int = 1 << 24

    def wrong(self, value: Any) -> Wrong:
        if not isinstance(value, list):
            return "", f"is {short(value)}; it must be a list"
        if not self.low <= len(value) <= self.high:
            return "", f"has {len(value):,} items; it must have {self.low:,} to {self.high:,}"
        found = ((i, wrong) for i, item in enumerate(value) if (wrong := self.rule.wrong(item)))
        return next(((f"[{i}]{key}", said) for i, (key, said) in found), None)


@dataclass(frozen=True)
class Table(Rule):
    """An object. Names that it does not list may have any value, or keep the rule ``rest``.

    Args:
        needs: name -> rule of what must be there.
        may: name -> rule of what may be there.
        rest: of all other names.
        name: of the names themselves; "" where one is fine, else what is wrong with it.
    """

    needs: Mapping[str, Rule] = field(default_factory=dict)
    may: Mapping[str, Rule] = field(default_factory=dict)
    rest: Rule | None = None
    name: Callable[[str], str] | None = None

    def wrong(self, value: Any) -> Wrong:
        if not isinstance(value, dict):
            return "", f"holds a {type(value).__name__}, not a JSON object"
        for name, rule in self.may.items():  # told first: other keys may only be wrong on account of it
            if isinstance(rule, NoCode) and name in value:
                return f".{name}", rule.wrong(None)[1]
        for name in self.needs:
            if name not in value:
                return f".{name}", "is missing"
        for name, item in value.items():
            rule = self.needs.get(name) or self.may.get(name) or self.rest
            if self.name is not None and (said := self.name(name)):
                return f".{name}", said
            if rule is not None and (found := rule.wrong(item)):
                return f".{name}{found[0]}", found[1]
        return None

    def known(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The names of a value that the table lists; numbers that need not be whole as floats."""
        rules = {**self.may, **self.needs}
        return {
            name: float(item) if isinstance(rules[name], Number) and not rules[name].whole else item
            for name, item in value.items()
            if name in rules
        }


class NoCode(Rule):
    """What must not be there: it names code of the folder, which never runs."""

    def wrong(self, value: Any) -> Wrong:
        return (
            "",
            "names code of this folder, which never runs; remove the key, this model needs no code",
        )
