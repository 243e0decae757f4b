"""A recipe: a YAML file of flat options, read as it is spelled and named by file and line."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from unigen.others import unknown
from unigen.values import UserError, compose, key_text, node_value, shown

MAX_BYTES = 1 << 20


class UsageError(UserError):
    """The command line or a recipe says something no command understands; names the flag or file:line."""


def read_recipe(
    path: Path, known: Collection[str], unknown_names: list[str], elsewhere: Callable[[str], str]
) -> Iterator[tuple[str, str, Any]]:
    """(option, ``file:line: key``, value) of a recipe; values as :func:`unigen.values.spelled` gives them.

    Args:
        path: A regular file of at most 1 MiB.
        known: The names of options that it may hold.
        unknown_names: Gets what is to be said of other names, a line each.
        elsewhere: What to say of such a name that no slip of the hand explains; "" where nothing is known.

    Raises:
        UserError: it cannot be read, is no valid YAML, has a key twice, or a value that no option can be.
    """
    import yaml

    root = compose(_text(path), str(path))
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(
            f"{path}:{root.start_mark.line + 1}: a recipe is a list of 'option: value' lines, found something"
            " else. Fix: write such lines"
        )
    seen: dict[str, int] = {}
    for key, node in root.value:
        line = key.start_mark.line + 1
        where = f"{path}:{line}"
        written = key_text(key, where)
        name = written.replace("-", "_")
        if name not in known:
            said = unknown(name, known, "", elsewhere)
            unknown_names.append(f"{where}: unknown option {shown(written)}{said}")
            continue
        if name in seen:
            raise UsageError(
                f"{where}: {name} was already given in line {seen[name]}. Fix: keep one of the two"
            )
        seen[name] = line
        yield name, f"{where}: {name}", node_value(node, f"{where}: {name}")


def _text(path: Path) -> str:
    """The text of a recipe. Raises UsageError; waits for no pipe."""
    fix = "give the path of a YAML recipe"
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UsageError(f"--config: {path} is no regular file. Fix: {fix}")
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        problem = getattr(error, "strerror", None) or error
        raise UsageError(f"--config: cannot read {path}: {problem}. Fix: {fix}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"--config: {path} has more than {MAX_BYTES:,} bytes. Fix: {fix}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--config: {path} is no UTF-8 text (byte {error.start}). Fix: {fix}") from None
