"""Writes ``docs/flags.md`` and ``docs/flags.zh-CN.md``: every option of every command.

    python tools/write_flags.py

Names, types, defaults and the English text come from the option dataclasses and their docstrings, the Chinese
text from ``unigen/assets/text/flags.zh.yaml``. A test compares both pages with what this file makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import yaml

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":  # run from anywhere, installed or not
    sys.path.insert(0, str(ROOT))

from unigen.cli import load_name, union_members  # noqa: E402
from unigen.commands.table import COMMANDS, Command  # noqa: E402
from unigen.config import TOPICS, Config, SamplingOptions, TrainSource  # noqa: E402
from unigen.values import RowOf  # noqa: E402

PAGES = {"en": ROOT / "docs" / "flags.md", "zh": ROOT / "docs" / "flags.zh-CN.md"}
CHINESE = ROOT / "unigen" / "assets" / "text" / "flags.zh.yaml"

# What the Chinese table calls "page" and "topics", in English; the first lines of docstrings do the rest.
PAGE = {
    "title": "Flags",
    "twin": "[中文](flags.zh-CN.md)",
    "intro": (
        "Every option of every command. This page is written by `python tools/write_flags.py` from the"
        " docstrings of\nthe option dataclasses; change it there. `unigen COMMAND --help` prints the"
        " same.\n\n"
        "- The same names are the keys of a YAML recipe: `--config recipe.yaml`. A later recipe wins over an"
        " earlier one,\n  a flag wins over all of them.\n"
        "- A switch is turned on by `--name` or `--name true`, off by `--no_name` or `--name false`.\n"
        "- An option of several values takes them one after the other: `--image a.png b.png`.\n"
        "- Every command takes `--language en` or `--language zh`: errors, log lines, reports and pages speak"
        " it. Default:\n  `UNIGEN_LANGUAGE`, else the locale (`LC_ALL`, `LC_MESSAGES`, `LANG`; `LANGUAGE`"
        " goes before them). JSON\n  and `metrics.jsonl` stay as they are.\n"
        "- A misspelt name is an error that suggests the right one. A default of none means that nothing is"
        " set; the\n  text says what happens then."
    ),
    "columns": "| flag | values | default | meaning |",
    "required": "required",
    "train_as_well": "Besides, every option of [unigen train](#unigen-train).",
    "topics_as_well": "Besides, the options of [unigen train](#unigen-train) under {}.",
    "source": "An entry of train_sources",
    "source_columns": "| key | values | default | meaning |",
}
TITLES = {
    "ModelOptions": "Model",
    "DataOptions": "Data",
    "SourceOptions": "Sources",
    "LoaderOptions": "Loading",
    "OptimOptions": "Optimisation",
    "RunOptions": "Run",
    "EvaluationOptions": "Evaluation",
    "TrackingOptions": "Trackers",
    "SamplingOptions": "Sampling",
}


class English:
    """The words of the English page: docstrings, with names and quoted words as code."""

    page = PAGE

    def summary(self, name: str) -> str:
        """The line under a command's heading."""
        return COMMANDS[name].summary

    def topic(self, options: type) -> tuple[str, str]:
        """(heading, line below) of a topic."""
        return TITLES[options.__name__], _code(_parsed(options).short_description or "")

    def meaning(self, options: type, name: str) -> str:
        """What an option means. Raises KeyError where its docstring does not say."""
        texts = {p.arg_name: " ".join((p.description or "").split()) for p in _parsed(options).params}
        return _code(texts[name])


class Chinese:
    """The words of the Chinese page, from ``unigen/assets/text/flags.zh.yaml``."""

    def __init__(self) -> None:
        self.table = yaml.safe_load(CHINESE.read_text(encoding="utf-8"))
        self.page = {name: str(text).rstrip("\n") for name, text in self.table["page"].items()}
        self._used: set[tuple[str, str]] = set()

    def summary(self, name: str) -> str:
        """As :meth:`English.summary`."""
        self._used.add(("commands", name))
        return self.table["commands"][name]

    def topic(self, options: type) -> tuple[str, str]:
        """As :meth:`English.topic`."""
        self._used.add(("topics", options.__name__))
        return tuple(self.table["topics"][options.__name__])

    def meaning(self, options: type, name: str) -> str:
        """As :meth:`English.meaning`; an option of a command that has no text of its own has that of
        training."""
        for group in (options.__name__, *(topic.__name__ for topic in TOPICS)):
            if name in self.table["options"].get(group, {}):
                self._used.add((group, name))
                return self.table["options"][group][name]
        raise KeyError(f"{CHINESE.name}: options.{options.__name__}.{name} is missing")

    def unused(self) -> list[str]:
        """Entries of the table that the page has no place for."""
        known = {(group, name) for group, texts in self.table["options"].items() for name in texts}
        known |= {(part, name) for part in ("commands", "topics") for name in self.table[part]}
        return sorted(".".join(entry) for entry in known - self._used)


def page(words: English | Chinese) -> str:
    """The whole page in one language."""
    parts = [f"# {words.page['title']}", words.page["twin"], words.page["intro"]]
    for name, command in COMMANDS.items():
        parts += section(name, command, words)
    return "\n\n".join(parts) + "\n"


def section(name: str, command: Command, words: English | Chinese) -> list[str]:
    """The heading, the usage and the tables of one command."""
    options = load_name(command.options)
    values = f"{command.positional.upper()} ... " if command.positional else ""
    parts = [f"## unigen {name}", f"`unigen {name} {values}[--option value ...]`", words.summary(name)]
    topics = [topic for topic in (*TOPICS, SamplingOptions) if issubclass(options, topic)]
    shared = {field.name for topic in topics for field in fields(topic)}
    own = [field for field in fields(options) if field.name not in shared]
    if own:
        parts.append(table(options, own, words))
    if options is not Config and issubclass(options, Config):
        return [*parts, words.page["train_as_well"]]
    trained = [words.topic(topic)[0] for topic in topics if topic in TOPICS and options is not Config]
    if trained:  # their tables stand once
        links = ", ".join(f"[{title}](#{title.lower()})" for title in trained)
        parts.append(words.page["topics_as_well"].format(links))
        topics = [topic for topic in topics if topic not in TOPICS]
    for topic in topics:
        title, line = words.topic(topic)
        parts += [f"### {title}", line, table(topic, fields(topic), words)]
    if options is Config:
        parts += [
            f"### {words.page['source']}",
            table(TrainSource, fields(TrainSource), words, words.page["source_columns"]),
        ]
    return parts


def table(options: type, rows: Iterable[Field], words: English | Chinese, head: str = "") -> str:
    """One line an option: name, values, default, meaning."""
    types = get_type_hints(options)
    lines = [head or words.page["columns"], "| --- | --- | --- | --- |"]
    for field in rows:
        cells = (
            f"`{field.name}`",
            values_of(types[field.name]),
            default_of(field, words.page["required"]),
            words.meaning(options, field.name).replace("|", r"\|"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def values_of(kind: Any) -> str:
    """What an option takes: its words, or a type; ``...`` after a type stands for several."""
    for rule in getattr(kind, "__metadata__", ()):
        if isinstance(rule, RowOf):
            return ", ".join(f"`{word}`" for word in rule.table)
    kinds = [member for member in union_members(kind) if member is not type(None)]
    for kind in [kind for kind in kinds if get_origin(kind) is list] or kinds:  # a text, or several: several
        if get_origin(kind) is Literal:
            return ", ".join(f"`{word}`" for word in get_args(kind))
        if get_origin(kind) is list:
            item = get_args(kind)[0]
            return f"{(get_origin(item) or item).__name__} ..."
        if get_origin(kind) is tuple:
            return " ".join(item.__name__ for item in get_args(kind))
        return kind.__name__
    raise TypeError(f"no type in {kind}")


def default_of(field: Field, required: str) -> str:
    """The default as one writes it after a flag."""
    if field.default is MISSING and field.default_factory is MISSING:
        return required
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None or value == [] or value == "":
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return re.sub(r"e-0(?=\d$)", "e-", str(value))


def write() -> None:
    """Writes both pages."""
    for language, words in (("en", English()), ("zh", Chinese())):
        PAGES[language].write_text(page(words), encoding="utf-8")
        print(f"Written {PAGES[language].relative_to(ROOT)}")


def _parsed(options: type) -> docstring_parser.Docstring:
    return docstring_parser.parse(options.__doc__ or "", style=docstring_parser.DocstringStyle.GOOGLE)


def _code(text: str) -> str:
    """Names of options and files, and words in double quotes, as code; pages of the documents as links."""
    text = re.sub(r'"([^"]+)"', r"`\1`", text)
    parts = re.split(r"(`[^`]+`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(
            r"(?<![\w/])(?:--)?(?:[a-z]+(?:_\w+)+|\w+\.(?:jsonl?|html|log))\b", r"`\g<0>`", parts[i]
        )
        parts[i] = re.sub(r"\bdocs/(\w+\.md)\b", r"[\1](\1)", parts[i])
    return "".join(parts)


if __name__ == "__main__":
    write()
