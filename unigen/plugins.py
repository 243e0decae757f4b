"""Plugins: a module of the user's that adds rows to the tables of the program, and nothing more.

``--plugin my_module`` imports it by its name, from the current folder too, or by the path of its file. A row
is added as ``FORMATS["mine"] = ...``; while a plugin is imported, no row that is there can be replaced or
removed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_loaded: dict[str, Path] = {}  # as they were named -> the file
_loading = ""


class PluginError(ValueError):
    """A plugin cannot be imported: what is wrong with it, as the end of a sentence, and the fix."""


def _removing(method: Callable[..., Any]) -> Callable[..., Any]:
    def refused_to_plugins(self: dict[str, Any], *given: Any) -> Any:
        if _loading:
            raise PluginError(
                f"a plugin adds rows and removes none ({method.__name__}). Fix: leave that out, and add a row"
                " under another name"
            )
        return method(self, *given)

    return refused_to_plugins


class Registry(dict[str, T]):
    """Rows by their names, which plugins may add to; ``own`` are the names of the program's."""

    def __init__(self, *rows, **more):
        super().__init__(*rows, **more)
        self.own = frozenset(self)

    def __setitem__(self, name: str, row: T) -> None:
        if _loading and name in self:
            raise PluginError(f"the name {name!r} is taken. Fix: give the row another name")
        super().__setitem__(name, row)

    def update(self, *rows, **more) -> None:  # type: ignore[override] # dict's own calls no __setitem__
        for name, row in dict(*rows, **more).items():
            self[name] = row

    def __ior__(self, rows):  # type: ignore[override, misc]
        self.update(rows)
        return self

    def setdefault(self, name: str, row: T) -> T:  # type: ignore[override]
        if _loading or name not in self:
            self[name] = row
        return self[name]

    __delitem__ = _removing(dict.__delitem__)
    pop, popitem, clear = map(_removing, (dict.pop, dict.popitem, dict.clear))  # type: ignore[assignment]


def plugin_names() -> list[str]:
    """The plugins that were imported, as they were named."""
    return list(_loaded)


def load(plugins: Iterable[str]) -> None:
    """Imports each plugin, once, by whatever name.

    Raises:
        PluginError: there is no such module, it raises an error, or it adds a row under a name that is taken.
    """
    global _loading
    for plugin in plugins:
        file = _file(plugin)
        if plugin in _loaded or (file and file in map(_file, map(str, _loaded.values()))):
            continue
        _loading = plugin
        try:
            _loaded[plugin] = _import(plugin)
        finally:
            _loading = ""


def lacking(before: Iterable[str], now: Iterable[str]) -> list[str]:
    """Which of the plugins ``before`` are not among those ``now``, by whatever name: of two that make one
    module (``p``, ``p.py``, ``../p.py``) no process imports both."""
    there = {_module(plugin) for plugin in now}
    return [plugin for plugin in before if _module(plugin) not in there]


def _module(plugin: str) -> str:
    return Path(plugin).stem if plugin.endswith(".py") else plugin


def _file(plugin: str) -> Path | None:
    """The file that a plugin's name leads to; None where there is none."""
    path = plugin if plugin.endswith(".py") else getattr(sys.modules.get(plugin), "__file__", None)
    with suppress(ValueError):  # a zero byte
        return Path(os.path.realpath(path)) if path else None
    return None


def _import(plugin: str) -> Path:
    """Imports a plugin; its file."""
    path = Path(plugin) if plugin.endswith(".py") else None
    name = _module(plugin)
    before, folder = set(sys.modules), os.getcwd()
    sys.path.append(folder)
    try:
        if path is None:
            if not all(map(str.isidentifier, name.split("."))):
                raise ModuleNotFoundError(name=name.partition(".")[0])
            module = importlib.import_module(name)
            if not getattr(module, "__file__", None):  # a folder of that name
                raise ModuleNotFoundError(name=name.partition(".")[0])
        else:
            if name in sys.modules:
                raise PluginError(f"a module is called {name!r} already. Fix: give the file another name")
            spec = importlib.util.spec_from_file_location(name, path.absolute())
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except Exception as error:
        for made in set(sys.modules) - before:
            if made == name or made.startswith(name + "."):
                del sys.modules[made]
        raise _explained(error, plugin, path) from None
    finally:
        sys.path.remove(folder)
    return Path(module.__file__ or plugin)


def _explained(error: Exception, plugin: str, path: Path | None) -> PluginError:
    """What went wrong, with the file and the line of the plugin."""
    said = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and path is not None and not path.exists():
        return PluginError("there is no such file. Fix: give the path of a .py file, or a module's name")
    if isinstance(error, ModuleNotFoundError) and error.name == plugin.partition(".")[0]:
        return PluginError(
            "there is no such module, neither installed nor in this folder. Fix: check the name, or give the"
            " path of its .py file"
        )
    if isinstance(error, SyntaxError):
        return PluginError(f"{error.filename}:{error.lineno}: {error.msg}. Fix: correct that line")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    own = os.path.dirname(__file__)
    frames = [frame for frame in frames if not frame.filename.startswith(own + os.sep)] or frames
    where = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    if isinstance(error, PluginError):
        return PluginError(where + said)
    return PluginError(f"{where}{type(error).__name__}: {said}. Fix: correct that line")
