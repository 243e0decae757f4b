"""What an option may be, and the one reader of its value: flags, recipes and Python go through
:func:`read_option`.

An option's type stands at its field: ``batch_size: Count = 1``. A type is one of bool, int, float, str,
``Literal[...]``, a list or a pair of them, ``None``, or ``Annotated[type, rule]`` with a :class:`Range`,
:class:`Spelling`, :class:`AsPath`, :class:`AsPlugin`, :class:`RowOf`, :class:`KeysOf` or :class:`Pairs`. A
text is read the same wherever it comes from, so ``"1e-5"`` is a number in Python too; where YAML 1.1 would
surprise (``010`` is 8, ``1:30`` is 90, ``yes`` is true) it is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from unigen import plugins
from unigen.others import nearest, unknown

MOST = 10**12  # of any number that says no other limit
_NONE = ("none", "None", "null")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_MAX_TEXT = 100  # characters of a number
_MAX_NODES, _MAX_DEPTH = 100_000, 8  # of YAML, its aliases written out


class UserError(ValueError):
    """Something the user can put right; the command line shows the message alone, without a traceback."""


class ConfigError(UserError):
    """An option has a value that cannot work; the message says which, why, and the fix."""


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; ``above`` leaves out ``low``, ``below`` leaves out ``high``."""

    low: float = 0
    high: float = MOST
    above: bool = False
    below: bool = False

    def refuses(self, value: float) -> bool:
        return not (self.low < value if self.above else self.low <= value) or not (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low = f"above {_figure(self.low)}" if self.above else f"of at least {_figure(self.low)}"
        high = f" and {'below' if self.below else 'at most'} {_figure(self.high)}"
        return low if math.isinf(self.high) else low + high


@dataclass(frozen=True)
class Spelling:
    """A text of the form ``pattern``, a regular expression, which ``words`` explain."""

    pattern: str
    words: str


@dataclass(frozen=True)
class AsPath:
    """A text that file systems take as a path: at most 4,095 bytes, 255 between two slashes."""

    def refuses(self, value: str) -> bool:
        try:
            data = os.fsencode(value)
        except UnicodeEncodeError:
            return True
        return len(data) > 4095 or max(map(len, data.split(b"/"))) > 255


@dataclass(frozen=True)
class KeysOf:
    """A mapping whose keys are the fields of a dataclass of options."""

    options: type


@dataclass(frozen=True)
class AsPlugin:
    """A module of the user's, which reading the value imports (``unigen/plugins.py``)."""


@dataclass(frozen=True, eq=False)
class RowOf:
    """The name of a row of a table, to which plugins may add."""

    table: Mapping[str, Any]


@dataclass(frozen=True)
class Pairs:
    """A mapping of texts to texts; a flag writes it as ``a=b c=d``."""


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
PathText = Annotated[str, AsPath()]
Plugin = Annotated[str, AsPlugin()]
Renames = Annotated[dict[str, str], Pairs()]
Device = Annotated[
    str, Spelling(r"auto|cpu|cuda(:[0-9]{1,3})?", "auto, cpu, cuda, or one GPU such as cuda:0")
]


class Options:
    """A dataclass of options; whoever makes one gets its values read by :func:`read_option`.

    Raises:
        ConfigError: there is no such option, or a value has another type than its option or is out of range.
    """

    def __new__(cls, *given: Any, **named: Any) -> Options:
        known = kinds(cls)
        if others := [name for name in named if name not in known]:
            raise ConfigError(
                "\n".join(f"unknown option {shown(one)}{unknown(one, known)}" for one in others)
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.reread()

    def reread(self) -> None:
        """Reads every value again, for attributes that were set later. Raises ConfigError."""
        for name in plugins_first(kinds(type(self))):
            setattr(self, name, read_option(type(self), name, getattr(self, name)))


@cache
def kinds(options: type) -> dict[str, Any]:
    """Option -> its type, with its rules."""
    hints = get_type_hints(options, include_extras=True)
    return {field.name: hints[field.name] for field in fields(options)}


def plugins_first(names: Iterable[str]) -> list[str]:
    """Names of options in the order in which they are read: what plugins add is there for the others."""
    return sorted(names, key=lambda name: name != "plugin")


@cache
def _empties(options: type) -> dict[str, Any]:
    """The options of which an empty text or list is the default, and is so allowed."""
    made = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(options)
    }
    return {name: value for name, value in made.items() if value in ("", [], {})}


def read_option(options: type, name: str, value: Any, label: str = "") -> Any:
    """The value of an option in the option's own type: numbers out of texts, Python's out of NumPy's, texts
    out of paths.

    Args:
        options: The dataclass; ``name`` is one of its fields.
        value: Of a flag, a text or several; of a recipe, what :func:`spelled` gives; or any object of Python.
        label: What the message calls the option; default its name.

    Raises:
        ConfigError: the value has another type, is out of range, or is empty.
    """
    found = read_value(kinds(options)[name], value, label or name, "" if label else f" (--{name} ...)")
    if isinstance(found, str | list | dict) and not found and name not in _empties(options):
        words = describe(kinds(options)[name])
        raise ConfigError(f"{label or name} is {shown(found)}; it is empty. Fix: give {words}")
    return found


def read_value(kind: Any, value: Any, label: str, hint: str = "") -> Any:
    """The value of one type, as :func:`read_option`; ``hint`` ends the message."""
    try:
        return _fit(kind, value, label)
    except _Unfit as unfit:
        why, *read = unfit.args or ("",)
        said = f"{label} is {shown(*read or (value,))}{'; ' * bool(why)}{why}"
        raise ConfigError(f"{said}. Fix: give {describe(kind)}{hint}") from None


def read_keys(options: type, values: Any, label: str) -> dict[str, Any]:
    """A mapping with the fields of ``options`` as keys, its values read.

    Raises:
        ConfigError: it is no mapping, a key is unknown or missing, or a value cannot be.
    """
    known, lines = kinds(options), getattr(values, "lines", {})

    def at(key: Any) -> str:
        """The label at the line of a key, where it names a line of a recipe."""
        recipe = re.fullmatch(r"(.+):\d+(: [^:]+)", label)
        return f"{recipe[1]}:{lines[key]}{recipe[2]}" if recipe and key in lines else label

    if not isinstance(values, dict):
        raise ConfigError(
            f"{label} is {shown(values)}. Fix: write a mapping such as {{path: data.jsonl, weight: 2}}"
        )
    wrong = []
    for key in values:
        if not isinstance(key, str) or key not in known:
            near = nearest(str(key)[:_MAX_TEXT], list(known))
            words = f"did you mean {near}?" if near else f"keys: {', '.join(known)}"
            wrong.append(f"{at(key)}: unknown key {shown(key)}; {words} Fix: correct the key")
    if wrong:
        raise ConfigError("\n".join(wrong))
    for field in fields(options):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            raise ConfigError(f"{label}: {field.name} is missing. Fix: {field.name}: ...")
    found = {key: read_option(options, key, value, f"{at(key)}: {key}") for key, value in values.items()}
    try:
        options(**found)  # its values together
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None
    return found


# Types


class _Unfit(Exception):
    """A value does not fit a type: why, where that is not plain, and the value as it was read, if it was."""


def _fit(kind: Any, value: Any, label: str) -> Any:
    """The value as ``kind``. Raises _Unfit."""
    kind, rule = get_args(kind) if get_origin(kind) is Annotated else (kind, None)
    if get_origin(kind) in (Union, UnionType):
        return _fit_one(get_args(kind), value, label)
    if value is None:
        raise _Unfit("it has no value")
    if isinstance(rule, KeysOf):
        return read_keys(rule.options, value, label)
    if isinstance(rule, Pairs):
        return _pairs(value)
    if get_origin(kind) is Literal:
        return _word(value, get_args(kind))
    if get_origin(kind) in (list, tuple):
        return _several(kind, value, label)
    found = _READ[kind](value)
    if isinstance(rule, Range) and rule.refuses(found):
        raise _Unfit("it is out of range", found)
    if isinstance(rule, AsPath) and rule.refuses(found):
        raise _Unfit("no file system takes it as a path")
    if isinstance(rule, RowOf) and found not in rule.table:
        raise _Unfit
    if isinstance(rule, AsPlugin):
        try:
            plugins.load([found])
        except plugins.PluginError as error:
            raise ConfigError(f"{label} is {shown(found)}; {error}") from None
    if isinstance(rule, Spelling) and not re.fullmatch(rule.pattern, found):
        raise _Unfit("it is none of these")
    return found


def _fit_one(alternatives: tuple[Any, ...], value: Any, label: str) -> Any:
    """The value as the first of the alternatives that it fits. A list in brackets is no text."""
    if type(None) in alternatives and (value is None or (isinstance(value, str) and value in _NONE)):
        return None
    several = [kind for kind in alternatives if get_origin(kind) in (list, tuple)]
    if several and isinstance(value, str) and bracketed(value):
        return _fit(several[0], value, label)
    problem = _Unfit()
    for kind in alternatives:
        if kind is not type(None):
            try:
                return _fit(kind, value, label)
            except _Unfit as unfit:
                problem = unfit
    raise problem


def _word(value: Any, words: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in words:
        return words[words.index(value)]
    raise _Unfit


def _pairs(value: Any) -> dict[str, str]:
    """A mapping, or texts with an equals sign each."""
    if isinstance(value, str) and value.startswith("{") and value.endswith("}"):
        value = spelled(value, "it")
    if not isinstance(value, dict):
        parts = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(part, str) and "=" in part for part in parts):
            raise _Unfit("each is written as NAME=PLACE")
        pairs = [part.partition("=")[::2] for part in parts]
        value = dict(pairs)
        if len(value) < len(pairs):
            raise _Unfit("one name is given twice")
    if not all(isinstance(text, str) and text for pair in value.items() for text in pair):
        raise _Unfit("names and places are texts, none of them empty")
    return dict(value)


def _several(kind: Any, value: Any, label: str) -> Any:
    """A list or a tuple; a value alone is a list of one."""
    items = get_args(kind)
    if isinstance(value, str) and bracketed(value):
        try:
            value = spelled(value, label)
        except ConfigError as error:
            raise _Unfit(str(error)) from None
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise _Unfit
        return tuple(_fit(item, part, label) for item, part in zip(items, value, strict=True))
    parts = value if isinstance(value, list | tuple) else [value]
    found = [_fit(items[0], part, f"{label}[{i}]") for i, part in enumerate(parts)]
    if "" in found:
        raise _Unfit("one of them is empty")
    return found


def _flag(value: Any) -> bool:
    if isinstance(value, bool) or (
        type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    ):
        return bool(value)
    if isinstance(value, str) and value in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return value.lower() == "true"
    raise _Unfit


def _whole(value: Any) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and len(value) <= _MAX_TEXT and _INT.fullmatch(value):
        return int(value)
    raise _Unfit(_surprise(value))


def _number(value: Any) -> float:
    written = isinstance(value, str) and len(value) <= _MAX_TEXT and _FLOAT.fullmatch(value)
    if not written and (not isinstance(value, Real) or isinstance(value, bool)):
        raise _Unfit(_surprise(value))
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise _Unfit("it is not finite")
    return found


def _surprise(value: Any) -> str:
    """Why a text that looks like a number is none."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?0[0-9_]+", value):
        return "a number with a leading zero is octal in YAML and decimal elsewhere"
    return ""


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise _Unfit
    if "\0" in value:
        raise _Unfit("it holds a NUL character")
    return str(value)


_READ: dict[Any, Callable[[Any], Any]] = {bool: _flag, int: _whole, float: _number, str: _text}


# YAML


def bracketed(text: str) -> bool:
    """``[a, b]``: one text that is a list written as in a recipe."""
    return text.startswith("[") and text.endswith("]")


def spelled(text: str, label: str) -> Any:
    """YAML as lists, mappings and texts: a scalar keeps its spelling (``2026-11-01`` is no date), an absent
    value is None.

    Raises:
        ConfigError: it is no valid YAML, has a tag, a merge key or a key twice, or is too deep or too large.
    """
    root = compose(text, label)
    return None if root is None else node_value(root, label)


class Placed(dict[str, Any]):
    """A mapping of YAML, with the ``lines`` that its keys stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


def compose(text: str, label: str) -> Any:
    """The YAML node of a text. Raises ConfigError."""
    import yaml

    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise ConfigError(f"{label}: it is nested too deeply. Fix: write plain lists") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        where = f"{label}:{mark.line + 1}" if mark else label
        raise ConfigError(
            f"{where}: not valid YAML: {problem}. Fix: write 'option: value' lines, indented by blanks"
        ) from None


def node_value(node: Any, label: str, depth: int = 0, budget: list[int] | None = None) -> Any:
    """What a YAML node says, as :func:`spelled`. Raises ConfigError."""
    import yaml

    budget = [_MAX_NODES] if budget is None else budget
    budget[0] -= 1
    if depth > _MAX_DEPTH or budget[0] < 0:
        raise ConfigError(
            f"{label}: too deep or, with its aliases written out, too large. Fix: at most {_MAX_DEPTH}"
            f" levels and {_MAX_NODES:,} values"
        )
    core = ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "value", "merge")
    if node.tag.removeprefix("tag:yaml.org,2002:") not in core:
        raise ConfigError(
            f"{label}: cannot be read: the tag {node.tag}. Fix: write a plain number, text, true, false,"
            " or a list"
        )
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.SequenceNode):
        return [node_value(item, label, depth + 1, budget) for item in node.value]
    found = Placed()
    for key, value in node.value:
        name = key_text(key, label)
        found.lines[name] = key.start_mark.line + 1
        if name in found:
            raise ConfigError(f"{label}: the key {name!r} is there twice. Fix: keep one of the two")
        found[name] = node_value(value, label, depth + 1, budget)
    return found


def key_text(node: Any, label: str) -> str:
    """The text of a key. Raises ConfigError for another one, and for a merge key."""
    if not isinstance(node.value, str):
        raise ConfigError(f"{label}: a key is no text. Fix: write the name of an option")
    if node.tag.endswith(":merge"):
        raise ConfigError(f"{label}: merge keys (<<) are not read. Fix: write the keys out")
    return node.value


# Words


def describe(kind: Any) -> str:
    """A type in words: ``Count | None`` is "a whole number of at least 1 and at most 10^12, or none"."""
    if get_origin(kind) is Annotated:
        base, rule = get_args(kind)
        if isinstance(rule, KeysOf):
            return f"mappings with the keys {', '.join(kinds(rule.options))}"
        if isinstance(rule, AsPath):
            return "a path"
        if isinstance(rule, RowOf):
            return "one of " + ", ".join(rule.table)
        if isinstance(rule, AsPlugin):
            return "the name of a module, or the path of a .py file"
        if isinstance(rule, Pairs):
            return "NAME=PLACE pairs, such as text_prompt=caption, or in a recipe a mapping"
        return rule.words if isinstance(rule, Spelling) else f"{describe(base)} {rule}"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(kind))
    if get_origin(kind) in (list, tuple):
        items = [describe(item) for item in get_args(kind)]
        if get_origin(kind) is list:
            return f"several of: {items[0]}"
        plural = items[0].replace("a number", "numbers")
        return f"a list of {'two' if len(items) == 2 else len(items)} {plural}"
    if get_args(kind):
        return ", or ".join(describe(item) for item in get_args(kind))
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        type(None): "none",
    }
    return names.get(kind, str(kind))


def union_members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone; without rules."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(get_args(k)[0] if get_origin(k) is Annotated else k for k in kinds)


def shown(value: Any) -> str:
    """A value as messages show it: on one line, and short."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4,300 digits
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text):,} characters)"


def written(value: Any) -> str:
    """A value as it is written on the command line and in a recipe: true, none, several with blanks."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return " ".join(map(written, value)) if isinstance(value, list | tuple) else str(value)


def _figure(value: float) -> str:
    words = {MOST: "10^12", 2**63 - 1: "2^63 - 1"}
    return words.get(value, f"{value:,}")
