"""Keeps ``unigen/assets/text/messages.zh.json``: a row for each sentence that the program may say.

    python tools/write_messages.py

Reads the source, adds an empty row for each new sentence, takes away those that are said no more, and lists
what lacks its Chinese. A row is ``"{} holds no checkpoints": "{} 中没有检查点"``; where the values stand in
another order they are numbered from 0, ``{1} ... {0}``. ``null`` marks a text that no user reads, or one that
stays English (a prompt, a citation). The part ``others`` holds
sentences of Python and of the system, and some that are put together.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from itertools import product
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "unigen" / "assets" / "text" / "messages.zh.json"
OTHERS = ROOT / "unigen" / "assets" / "options" / "others.yaml"
# Two words beside each other, or a word beside a value: what a person says, where it is no name or code.
PROSE = re.compile(
    r"[A-Za-z]{2,}[,;:.]? \(?[a-z]|[a-z]{2} \{\}|\{\} [a-z]{2}|^an? [a-z]|[a-z]{3}: \{\}|^[a-z]{3,} {2,}\{\}"
    r"|^[a-z]{2,} [A-Z]{2}|[a-z]{3,} --[a-z]|^[A-Z]+-[0-9]+ [a-z]"
)
# Functions that show any text, single words, too.
LABELS = ("Bar", "_bar", "each", "say", "table", "in_language")
NOT_SAID = ("compile", "fullmatch", "match", "sub", "search", "Command")  # patterns; the help is another page
PERCENT = re.compile(r"%(%)|%[-#0 +]*[\d.]*[a-z]")
LOGS = ("info", "warning", "error")  # of a logger: values are written %s
MOST = 16  # kinds of one sentence that are written out


def sentences(root: Path = ROOT / "unigen") -> dict[str, str]:
    """Sentence, ``{}`` for what varies -> file:line where it stands first."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        for line, text in Reader().read(ast.parse(path.read_text(encoding="utf-8"))):
            found.setdefault(text, f"{path.relative_to(root.parent)}:{line}")
    for path in sorted((root / "assets" / "templates").glob("*.html")):
        for text in re.findall(r'"([^"]+)"\|said', path.read_text(encoding="utf-8")):
            found.setdefault(text, path.name)
    for part in ("instead", "absent"):
        for text in yaml.safe_load(OTHERS.read_text(encoding="utf-8"))[part].values():
            found.setdefault(_escaped(text), OTHERS.name)
    return {text: place for text, place in found.items() if place != OTHERS.name or PROSE.search(text)}


class Reader:
    """Collects the texts of a file: those that are prose, and any that a function of ``LABELS`` shows."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def read(self, tree: ast.AST) -> list[tuple[int, str]]:
        self.visit(tree)
        return self.found

    def visit(self, node: ast.AST, label: bool = False) -> None:
        if isinstance(node, ast.Assert | ast.arg) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            return
        if isinstance(node, ast.AnnAssign):
            return self.visit(node.value) if node.value else None
        if isinstance(node, ast.FunctionDef):
            parts = [*node.body, *node.decorator_list, *node.args.defaults, *node.args.kw_defaults]
            for part in filter(None, parts):
                self.visit(part)
            return
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in NOT_SAID:
                return
            if name in LOGS and node.args and _is_text(node.args[0]):
                self._keep(node.lineno, [_percent(node.args[0].value)])
                node = ast.Call(node.func, node.args[1:], node.keywords, lineno=node.lineno)
            if name != "format" or not isinstance(node.func, ast.Attribute):
                self.visit(node.func)
            for part in [*node.args, *(keyword.value for keyword in node.keywords)]:
                listed = part.elts if name == "table" and isinstance(part, ast.List) else [part]
                for one in listed:
                    self.visit(one, name in LABELS)
            if name != "format":
                return
        kinds = self.kinds(node)
        if kinds is None:
            for part in ast.iter_child_nodes(node):
                self.visit(part)
            return
        self._keep(node.lineno, kinds, label)

    def _keep(self, line: int, kinds: list[str], label: bool = False) -> None:
        for text in kinds:
            if PROSE.search(text) or (label and re.search("[a-z]{2}", text.replace("{}", ""))):
                self.found.append((line, text))

    def kinds(self, node: ast.AST) -> list[str] | None:
        """What a text may be, a sentence for each of its conditions; None where it is no text."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [_escaped(node.value)]
        if isinstance(node, ast.JoinedStr):
            return _joined([self._part(part) for part in node.values])
        if isinstance(node, ast.IfExp):
            kinds = self.kinds(node.body), self.kinds(node.orelse)
            if kinds == (None, None):
                return None
            self.visit(node.test)
            both = [k if k is not None else self._value(n) for k, n in zip(kinds, (node.body, node.orelse))]
            return list(dict.fromkeys(both[0] + both[1]))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.kinds(node.left), self.kinds(node.right)
            if left is None and right is None:
                return None
            return _joined([left or self._value(node.left), right or self._value(node.right)])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            return [_percent(node.left.value)] if _is_text(node.left) else None
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "format":
            held = node.func.value
            return [re.sub(r"\{[^{}]*\}", "{}", held.value)] if _is_text(held) else None
        return None

    def _part(self, part: ast.expr) -> list[str]:
        if not isinstance(part, ast.FormattedValue):
            return self.kinds(part) or [""]
        if isinstance(part.value, ast.IfExp | ast.JoinedStr) and (kinds := self.kinds(part.value)):
            return kinds
        return self._value(part.value)

    def _value(self, node: ast.AST) -> list[str]:
        self.visit(node)
        return ["{}"]


def _joined(parts: list[list[str]]) -> list[str]:
    count = 1
    for part in parts:
        count *= len(part)
    assert count <= MOST, f"{count} kinds of one sentence are too many: {parts}"
    return list(dict.fromkeys("".join(chosen) for chosen in product(*parts)))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _percent(text: str) -> str:
    return PERCENT.sub(lambda match: match[1] or "{}", _escaped(text))


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def write() -> list[str]:
    """Writes the table anew; returns the sentences that lack their Chinese."""
    held = json.loads(TABLE.read_text(encoding="utf-8"))
    said = sentences()
    held["program"] = {text: held["program"].get(text, "") for text in sorted(said)}
    text = json.dumps(held, ensure_ascii=False, indent=1) + "\n"
    TABLE.write_text(text, encoding="utf-8")
    return [f"{said[text]}: {text!r}" for text, chinese in held["program"].items() if chinese == ""]


if __name__ == "__main__":
    lacking = write()
    print(*lacking, f"{len(lacking)} sentences lack their Chinese in {TABLE.relative_to(ROOT)}", sep="\n")
    sys.exit(bool(lacking))
