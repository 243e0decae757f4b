"""The command line: ``unigen COMMAND --option value ...``.

The commands are the rows of ``commands/table.py``.

Options are flat and snake_case; the same names are the keys of YAML recipes (``--config recipe.yaml``). A
flag wins over every recipe, a later recipe over an earlier one. ``recipe.py`` reads recipes, ``values.py``
every value, ``jsonargparse`` writes the help; this file adds switches without a value, several values, and
"did you mean".
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

from unigen.bars import Bar, clear
from unigen.commands.table import COMMANDS, Command
from unigen.config import TOPICS, Config, ConfigError, SamplingOptions, SourceOptions, UserError
from unigen.messages import LANGUAGES, in_language, keep, preferred, speaking, spoken
from unigen.others import nearest, unknown
from unigen.printing import guard, guarded, libraries_silent, printable_lines, width_of
from unigen.recipe import UsageError, read_recipe
from unigen.values import describe, kinds, read_option, read_value, shown, union_members
from unigen.version import __version__

T = TypeVar("T")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 where the user can put the cause right, 130 when
    interrupted.

    Args:
        argv: Arguments after the program's name; default: those of the process.
    """
    given, rest = taken_out(sys.argv[1:] if argv is None else argv, "--language")
    language = given[-1] if given and given[-1] in LANGUAGES else preferred()
    with guarded(), libraries_silent(), speaking(language):
        keep([re.sub("^--[^=]*=?", "", value) for value in [os.getcwd(), *rest]])
        return _main(rest, given)


def _main(argv: list[str], language: list[str]) -> int:
    """Runs a command; ``language`` is what was given by ``--language``."""
    if not argv or argv[0] in ("-h", "--help"):
        print(commands_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"unigen {__version__}")
        return 0
    try:
        for value in language:
            read_value(Literal[LANGUAGES], flag_value("--language", [value] * bool(value), str), "--language")
        return run_command(argv[0], argv[1:], language[-1:])
    except UserError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing == "unigen":
            raise
        return _refuse(
            f"{missing} is not installed, which unigen {argv[0]} needs. Fix: pip install . in the folder that"
            " holds its pyproject.toml; it brings all that is needed"
        )
    except KeyboardInterrupt:
        print(in_language("unigen: interrupted"), file=sys.stderr)
        return 130


def _refuse(why: str) -> int:
    # a line break in a name starts no line that could pass for one of ours
    said = printable_lines(in_language("unigen: error: ") + in_language(why))
    print(said.replace("\n", "\n  "), file=sys.stderr)
    return 2


def program(argv: list[str] | None = None) -> None:
    """:func:`main` as the whole program: what ``unigen`` and ``python -m unigen`` run. Does not return."""
    code = 0
    guard()  # for good: also for what the interpreter says of an error that nobody expected
    try:
        code = main(argv)
        if sys.stdout is not None:  # closed by whoever started the program
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on: unigen ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to be written has no place
        code = code or 128 + signal.SIGPIPE
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of many processes: a thread of gloo may still hold a tensor of the last collective, since data
        # parallel keeps its process group alive after its end. Letting go of it while the interpreter ends
        # aborts the process ("terminate called without an active exception"), a finished run would look
        # failed. Everything is written and closed by now.
        os._exit(code)
    sys.exit(code)


def run_command(name: str, argv: list[str], language: list[str]) -> int:
    """Parses the options of a command and calls its function; a function that returns None has succeeded."""
    if name not in COMMANDS:
        near = nearest(name, list(COMMANDS))
        raise UsageError(
            f"unknown command {name!r}{f'; did you mean {near}?' if near else ''}"
            f" (commands: {', '.join(COMMANDS)})"
        )
    command = COMMANDS[name]
    try:
        return _run(name, command, argv, language)
    finally:
        clear()


def _run(name: str, command: Command, argv: list[str], language: list[str]) -> int:
    Bar("starting", passing=True)  # importing PyTorch takes a while
    options = load_name(command.options)
    if any(token in ("-h", "--help") for token in argv):
        print(help_text(options, name, command))
        return 0
    if language and "language" in kinds(options):
        argv = [*argv, "--language", *language]  # wins over its recipe
    code = load_name(command.run)(parse_options(options, argv, command.positional, command.short))
    return int(code or 0)


def parse_config(argv: list[str]) -> Config:
    """The training options in flags and recipes, each checked by itself; :meth:`Config.resolve` checks them
    together.

    Raises:
        UsageError: an unknown option or key, a missing value, a wrong type, an unreadable recipe.
    """
    return parse_options(Config, argv)


def parse_options(
    options: type[T], argv: list[str], positional: str = "", short: Mapping[str, str] | None = None
) -> T:
    """Any dataclass of options from flags and recipes: defaults, then recipes in order, then flags.

    Args:
        options: The dataclass; its docstring's ``Args:`` are the help.
        argv: Flags, e.g. ``["--config", "recipe.yaml", "--learning_rate", "2e-5"]``.
        positional: The option that values without a flag belong to; empty for none.
        short: Options of one letter, ``{"n": "samples"}`` for ``-n 5``.

    Raises:
        UsageError: as for :func:`parse_config`; of unknown names it lists all, a line each.
    """
    types = kinds(options)
    # a command that takes something of a training's recipe knows all of its options
    takes = None if issubclass(options, Config) else getattr(options, "from_training", None)
    known = {**kinds(Config), **types} if takes else types
    unknown_names: list[str] = []
    flags = list(read_flags(argv, types, unknown_names, positional, short or {}))
    recipes = [path for flag, name, given in flags if name == "config" for path in paths_of(flag, given)]
    try:
        found, trained, own = list[Given](), list[Given](), list[str]()
        for recipe in recipes:
            lines = list(read_recipe(Path(recipe), known, unknown_names, _of_other_command))
            if not takes or all(name in types for name, *_ in lines):
                found += lines
            else:
                trained += lines
                own += [where for name, where, _ in lines if name not in kinds(Config)]
        if unknown_names:
            raise UsageError("\n".join(unknown_names))
        if own:
            raise UsageError(
                f"{own[0]} is no option of a training, as others in that recipe are. Fix: give it as a flag"
                f" ({', '.join('--' + where.rpartition(' ')[2] for where in own)})"
            )
        keep([value for *_, value in (*found, *trained)])
        for name, (flag, given) in collect(flags, types).items():
            found.append((name, f"--{name}", flag_value(flag, given, types[name])))
        said = _read(Config, trained)
        values = (takes(said) if takes else {}) | _read(options, found)
        if takes and issubclass(options, SourceOptions):
            # what a training refuses of its data is refused here
            only = kinds(SourceOptions).keys() - (() if trained else ("preserve_data_path",))
            shared = {name: value for name, value in values.items() if name in kinds(Config)}
            Config(**said | shared).resolve(data=False, only=only)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    values = getattr(options, "completed", dict)(values)
    for field in fields(options):  # type: ignore[arg-type]
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UsageError(f"--{field.name} is missing; it has no default. Fix: --{field.name} ...")
    return options(**values)


Given = tuple[str, str, Any]  # an option, what messages call it, its value


def _read(options: type, found: list[Given]) -> dict[str, Any]:
    """The values as the types of the options have them. Raises ConfigError."""
    ordered = sorted(found, key=lambda one: one[0] != "plugin")
    return {name: read_option(options, name, value, where) for name, where, value in ordered}


# Flags


def taken_out(argv: list[str], flag: str) -> tuple[list[str], list[str]]:
    """The values of a flag of the program itself ("" where one is missing), and the arguments without it."""
    given, rest, ahead = [], [], list(argv)
    while ahead:
        token = ahead.pop(0)
        if token.partition("=")[0] != flag:
            rest.append(token)
        elif "=" in token:
            given.append(token.partition("=")[2])
        else:
            given.append(ahead.pop(0) if ahead and not is_flag(ahead[0]) else "")
    return given, rest


def read_flags(
    argv: list[str],
    types: dict[str, Any],
    unknown_names: list[str],
    positional: str = "",
    short: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, str, list[str]]]:
    """(flag as written, option, its values) in order; ``--a=b`` gives one value, ``--no_switch`` gives
    ``false``. What is to be said of flags that no option has goes to ``unknown_names``."""
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if not is_flag(token):
            if not positional:
                raise UsageError(f"{token!r} belongs to no option; write --option {token}")
            yield positional, positional, [token]
            continue
        flag, equals, value = token.partition("=")
        name = (
            (short or {}).get(flag[1:], "")
            if re.fullmatch(r"-[A-Za-z]", flag)
            else flag.lstrip("-").replace("-", "_")
        )
        given = [value] if equals else []
        while not equals and position < len(argv) and not is_flag(argv[position]):
            if positional and name in types and not belongs(argv[position], types[name], len(given)):
                break
            given.append(argv[position])
            position += 1
        if name.startswith("no_") and name not in types and is_switch(types.get(name[3:])):
            if given and not positional:
                raise UsageError(
                    f"{flag} takes no value, found {given[0]!r}; write --{name[3:]} {given[0]} instead"
                )
            if positional:
                position -= len(given)
            name, given = name[3:], ["false"]
        if not (flag.startswith("--") or name) or name not in (*types, "config"):
            said = unknown(name, [*types, "config"], "--", _of_other_command)
            unknown_names.append(f"unknown option {flag}{said}")
            continue
        yield flag, name, given


def _of_other_command(name: str) -> str:
    """What to say after ``unknown option NAME`` where another command takes it; "" where none does."""
    takers = (other for other, command in COMMANDS.items() if name in kinds(load_name(command.options)))
    found = next(takers, None)
    return f"; it is an option of unigen {found}. Fix: leave it out" if found else ""


def belongs(token: str, kind: Any, taken: int) -> bool:
    """Whether a value after a flag is the flag's, where a command also takes values without one."""
    if is_switch(kind):
        return taken == 0 and token.lower() in ("true", "false")
    if dict in map(get_origin, union_members(kind)):
        return "=" in token
    return takes_several(kind) or taken == 0


def is_flag(token: str) -> bool:
    """``--name``, ``--name=...`` and ``-x`` are flags; negative numbers and a prompt with dashes are
    values."""
    return re.match(r"--[A-Za-z][\w-]*(=|$)|-[A-Za-z]$|--$", token) is not None


def collect(
    flags: list[tuple[str, str, list[str]]], types: dict[str, Any]
) -> dict[str, tuple[str, list[str]]]:
    """Option -> its last flag; an option of several values adds up what its flags gave."""
    found: dict[str, tuple[str, list[str]]] = {}
    for flag, name, given in flags:
        if name == "config":
            continue
        before = found[name][1] if name in found and takes_list(types[name]) else []
        found[name] = (flag, before + given)
    return found


def flag_value(flag: str, given: list[str], kind: Any) -> Any:
    """The value for :func:`read_option`: a switch without a value is on; several values are a list."""
    if is_switch(kind) and not given:
        return "true"
    if not given:
        raise UsageError(f"{flag} needs a value. Fix: give {describe(kind)}")
    if len(given) == 1:
        return given[0]
    if not takes_several(kind):
        several = shown(" ".join(given))
        raise UsageError(f"{flag} takes one value, found {len(given)}: {several}. Fix: keep one, or quote it")
    return given


def paths_of(flag: str, given: list[str]) -> list[str]:
    if not given:
        raise UsageError(f"{flag} needs a value. Fix: give the path of a YAML recipe")
    return given


# Types


def is_switch(kind: Any) -> bool:
    """Whether an option is on without a value: true or false, or not said."""
    return bool in union_members(kind) and set(union_members(kind)) <= {bool, type(None)}


def takes_several(kind: Any) -> bool:
    return any(get_origin(member) in (list, tuple, dict) for member in union_members(kind))


def takes_list(kind: Any) -> bool:
    return any(get_origin(member) in (list, dict) for member in union_members(kind))


# Help


def commands_overview() -> str:
    """What ``unigen --help`` prints."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {_summary(name)}" for name in COMMANDS)
    return in_language(
        "usage: unigen COMMAND [--option value ...]\n\n"
        "Train, evaluate and sample BAGEL-style unified models.\n\n"
        f"commands:\n{rows}\n\n"
        "  unigen COMMAND --help  its options\n  unigen --version       the version"
    )


def help_text(options: type, name: str, command: Command) -> str:
    """What ``unigen NAME --help`` prints: the options by topic, with the docstrings of their dataclass, and
    an example."""
    import jsonargparse

    values = f"{command.positional.upper()} ... " if command.positional else ""
    usage = f"unigen {name} {values}[--config RECIPE.yaml ...] [--option value ...]"
    parser = jsonargparse.ArgumentParser(
        prog=f"unigen {name}", usage=usage, description=_summary(name), default_env=False
    )
    topics = [topic for topic in (*TOPICS, SamplingOptions) if issubclass(options, topic)]
    shared = {field.name for topic in topics for field in fields(topic)}
    if {field.name for field in fields(options)} - shared:  # what the command has of its own comes first
        parser.add_class_arguments(options, None, skip=shared)
    for topic in topics:
        parser.add_class_arguments(topic, None)
    if spoken() == "zh":
        _in_chinese(parser, options, topics)
    text = re.sub(r", --\w+\+ \S+", "", parser.format_help()).rstrip()  # several values follow one flag here
    text = text.replace("[ITEM,...]", "VALUE ...").replace("usage: ", in_language("usage: "), 1)
    shorts = (f"-{letter} is short for --{option}.\n" for letter, option in command.short.items())
    letters = "".join(map(in_language, shorts))
    return f"{text}\n\n" + in_language(
        "recipes:\n  --config RECIPE.yaml ...\n                        YAML files with the same names as"
        " keys; later ones\n                        win, and flags win over all.\n\nA switch is turned on by"
        " --name or --name true, off by --no_name or\n--name false. --language zh says in Chinese what a"
        f" command prints.\n{letters}\nexample:\n  {_in_lines(command.example)}"
    )


def _in_lines(command: str) -> str:
    """A command that a terminal of 80 columns would break, in lines that still are one command."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and width_of(f"  {lines[-1]} {part} \\") > 80:
            lines.append(f"    {part}")
        else:
            lines[-1] = f"{lines[-1]} {part}".strip() if len(lines) == 1 else f"{lines[-1]} {part}"
    return " \\\n".join(lines)


@cache
def _chinese() -> dict[str, Any]:
    """The Chinese of commands and options, which docs/flags.zh-CN.md holds, too."""
    import yaml

    return yaml.safe_load((files("unigen") / "assets" / "text" / "flags.zh.yaml").read_text("utf-8"))


def _summary(name: str) -> str:
    return _chinese()["commands"][name] if spoken() == "zh" else COMMANDS[name].summary


def _in_chinese(parser: Any, options: type, topics: list[type]) -> None:
    """Puts the Chinese of the options, and of what argparse says itself, into a parser."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def _split_lines(self, text: str, width: int) -> list[str]:
            text = re.sub(r"(?<=显示本帮助)\.$", "。", text.replace("%%", "%"))
            text = re.sub(r"\s*\((required, )?type: (.*?)(?:, default: (.*))?\)$", _kind_in_chinese, text)
            return broken(text, width)

    texts, titles = _chinese()["options"], [_chinese()["topics"][topic.__name__][0] for topic in topics]
    for action in parser._actions:
        found = (texts.get(group.__name__, {}).get(action.dest) for group in (options, *topics, *TOPICS))
        meaning = "显示本帮助" if action.dest == "help" else next(filter(None, found), action.help)
        action.help = _without_links(meaning).replace("`", "").replace("%", "%%")
    groups = parser._action_groups[2:]  # after those of argparse itself
    for group, title in zip(groups, [*["本命令的参数"] * (len(groups) - len(titles)), *titles], strict=True):
        group.title = title
    parser._optionals.title = "参数"
    parser.formatter_class = Formatter


def _without_links(text: str) -> str:
    """``[title](page)`` of the documents as a path that a terminal's reader can open."""
    return re.sub(r"(?<=（) | (?=[，。；）])", "", re.sub(r"\[[^]]*\]\((.*?)\)", r" docs/\1 ", text))


def _kind_in_chinese(match: re.Match[str]) -> str:
    written = {"True": "true", "False": "false", "": "空"}  # as they are given, {true,false}
    default = f"，默认 {written.get(match[3], match[3])}" if match[3] is not None else ""
    return f"（{'必填，' if match[1] else ''}类型 {match[2]}{default}）"


def broken(text: str, width: int) -> list[str]:
    """The text in lines of at most so many columns; Chinese may be broken anywhere but before its signs."""
    lines = [""]
    for part in re.findall(r"[（“]?(?:[^\s\u2e80-\uffef]+|[\u2e80-\uffef])[，。；：、）]*|\s+", text):
        if width_of(lines[-1] + part) > width and lines[-1].strip():
            lines.append("")
        lines[-1] += part if lines[-1] or not part.isspace() else ""
    return [line.rstrip() for line in lines]


# Names and errors


def load_name(path: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
