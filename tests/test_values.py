"""The one reader of values: a value is taken, or refused by name, equally as a flag, in a recipe and from
Python."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import fractions
import json
import math
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from unigen.cli import load_name, parse_options
from unigen.commands.table import COMMANDS
from unigen.config import Config, SamplingOptions, TrainSource, UserError
from unigen.values import kinds, read_option, union_members

COMMAND_OPTIONS = {name: load_name(row.options) for name, row in COMMANDS.items()}
NEEDED = {"model_path": "m", "paths": ["p"], "data_path": "d"}  # of options that have no default
BESIDE = {"val_split": {"val_data_path": "v"}}  # an option that says nothing without another

# Spellings that some reader of numbers, truth values, YAML or paths would take for something else.
pytestmark = pytest.mark.usefixtures("no_plugins_after")  # some odd text is the name of a module

ODD = [
    "", " ", "0", "-0", "1", "-1", "+1", "1.5", "1.", ".5", "1e-5", "1E3", "1e20", "1e400", "-1e-400", "1_000", "1__0",
    "010", "-010", "00", "0x10", "0b1", "0o7", "1:30", "190:20:30", "1,5", "1 000", "٣", "１", "½", "nan", ".nan", "NaN",
    "inf", ".inf", "-.INF", "Infinity", "9" * 20, "9" * 5000, "1" + "0" * 400 + ".0", "true", "True", "TRUE", "tRUE",
    "false", "yes", "no", "on", "off", "y", "none", "None", "NONE", "null", "~", "auto", "cuda", "cuda:", "cuda:1", "gpu",
    "CPU", "cpu ", "2026-11-01", "[]", "[1, 2]", "[0, 1]", "[0.5]", "[a, b]", "[[1]]", "[", "{}", "{a: 1}", "[{path: x}]",
    "[{path: x, weight: -1}]", "a: b", "# x", "'", '"', "!!int 3", "&a", "*a", "<<", "%", "\t1", "1\n", "\0", "\ufeff1",
    "/" * 5000, "-", "=", "?", "é", "ab\x1b[2Jc",
]  # fmt: skip

# Objects of Python that no flag can give, besides the numbers and truth values themselves.
OBJECTS = [
    None, True, False, 0, -1, 1, 2**63, 2**70, 10**5000, -(10**400), 0.0, -0.0, 1.5, 1e20, 1e-320, math.nan, math.inf,
    -math.inf, np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(1), np.array([1, 2]),
    np.str_("auto"), decimal.Decimal(1), fractions.Fraction(1, 2), 1 + 2j, b"cpu", bytearray(b"x"), object(), int, ...,
    [], [1], [None], [True], [[]], (), (0.0, 1.0), (0.0, 1.0, 2.0), {}, {1: 2}, [{}], [{"path": 3}], {"a"}, range(3),
    datetime.date(2026, 11, 1), Path("x"), lambda: 1,
]  # fmt: skip


def given(options: type, **values: Any) -> dict[str, Any]:
    """The values, and those that the options need."""
    names = {f.name for f in dataclasses.fields(options)}
    beside = {key: value for name in values for key, value in BESIDE.get(name, {}).items() if key in names}
    return {**{name: value for name, value in NEEDED.items() if name in names}, **beside, **values}


def outcome(make: Any, name: str) -> Any:
    """What an option became, or "refused" where a UserError of one line names it and its fix."""
    try:
        return getattr(make(), name)
    except UserError as error:
        message = str(error)
        assert name in message and "Fix: " in message and "\n" not in message and len(message) < 1500, message
        return "refused"


def three_ways(options: type, name: str, text: str, folder: Path) -> list[Any]:
    """The outcome of a spelling as a flag, in a recipe (quoted, and as it is where YAML reads it as one
    scalar), and as a keyword of Python."""
    needed = given(options, **{name: text})
    argv = [
        f"--{key}={value if isinstance(value, str) else value[0]}"
        for key, value in needed.items()
        if key != name
    ]
    quoted = {"quoted.yaml": json.dumps(text)}
    try:
        node = yaml.compose(f"{name}: {text}", Loader=yaml.SafeLoader).value[0][1]
        if isinstance(node, yaml.ScalarNode) and node.value == text and not node.tag.endswith(":null"):
            quoted["plain.yaml"] = text
    except (yaml.YAMLError, AttributeError, TypeError):
        pass
    found = [
        outcome(lambda: parse_options(options, [*argv, f"--{name}={text}"]), name),
        outcome(lambda: options(**given(options, **{name: text})), name),
    ]
    for file, written in quoted.items():
        (folder / file).unlink(missing_ok=True)  # faster than to empty it
        (folder / file).write_text(f"{name}: {written}\n", encoding="utf-8")
        found.append(
            outcome(lambda file=file: parse_options(options, [*argv, "--config", str(folder / file)]), name)
        )
    return found


def odd_cases() -> list[tuple[str, str, str]]:
    """(command, option, spelling): every option, and every spelling with one option of each type at least."""
    seen: set[tuple[str, str]] = set()
    cases = []
    for command, options in COMMAND_OPTIONS.items():
        for number, (name, kind) in enumerate(kinds(options).items()):
            for text in ODD:
                if (str(kind), text) not in seen or text == ODD[number % len(ODD)]:
                    seen.add((str(kind), text))
                    cases.append((command, name, text))
    return cases


def check_alike(cases: list[tuple[str, str, str]], folder: Path) -> None:
    for command, name, text in cases:
        found = three_ways(COMMAND_OPTIONS[command], name, text, folder)
        assert all(one == found[0] and type(one) is type(found[0]) for one in found), (
            command,
            name,
            text,
            found,
        )


@pytest.mark.slow
def test_a_spelling_is_taken_or_refused_alike_as_flag_in_a_recipe_and_from_python(tmp_path):
    check_alike(random.Random(0).sample(odd_cases(), 150), tmp_path)


@pytest.mark.slow
def test_every_spelling_is_taken_or_refused_alike(tmp_path):
    cases = odd_cases()
    assert len(cases) > 2000 and {name for _, name, _ in cases} >= set(kinds(Config))
    check_alike(cases, tmp_path)


@pytest.mark.parametrize(
    "options", [*COMMAND_OPTIONS.values(), SamplingOptions, TrainSource], ids=lambda o: o.__name__
)
def test_any_object_of_python_is_taken_in_the_options_type_or_refused_by_name(options):
    for name, kind in kinds(options).items():
        for value in OBJECTS:
            found = outcome(lambda name=name, value=value: one_option(options, name, value), name)
            if found in ("refused", None):
                continue
            allowed = [getattr(member, "__origin__", member) for member in union_members(kind)]
            assert type(found) in allowed or isinstance(found, str), (name, value, found)
            assert not isinstance(found, float) or math.isfinite(found)


def one_option(options: type, name: str, value: Any) -> Any:
    """An instance with this value. Where the constructor reads 80 others, too, only this one is read."""
    if issubclass(options, Config):
        return types.SimpleNamespace(**{name: read_option(options, name, value)})
    needed = {"path": "p"} if options is TrainSource else {}
    return options(**{**given(options), **needed, name: value})
