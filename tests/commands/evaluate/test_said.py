"""What metrics say, in Chinese: every sentence of the room has a translation with as many places."""

import ast
import json
from pathlib import Path

import pytest

from unigen.commands.evaluate.said import in_language

ROOT = Path(__file__).parents[3]
HELD = json.loads((ROOT / "unigen/assets/text/metrics.zh.json").read_text(encoding="utf-8"))
# Said before anything is measured, as the line of an error: networks that cannot be loaded, programmers' mistakes.
BEFORE = {"towers.py", "features.py", "inception.py", "given.py", "answers.py"}
NOT_OF_REPORTS = {
    "load it with texts=True", "{} was loaded without its texts", "take the features of both sets with one extractor",
    "use one extractor", "the features differ in kind", "the features differ in kind: {} ({}) and {} ({})",
    "{}/models names no model", "{} has no model {}",
}  # fmt: skip


def template(node: ast.expr) -> str | None:
    """A text, with ``{}`` for what varies; None where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def sentences() -> set[str]:
    """What the metrics may say: arguments of errors, notes, and what needs something that was not given."""
    found: set[str] = set()
    for path in (ROOT / "unigen/evaluation").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts: list[ast.AST] = []
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("CannotRun", "Unfit"):
                parts = list(node.args)
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in (
                "notes",
                "note",
                "NEEDS",
            ):
                parts = list(ast.walk(node.value))
                inside = {id(v) for part in parts if isinstance(part, ast.JoinedStr) for v in part.values}
                parts = [part for part in parts if id(part) not in inside]
            found |= {
                said for part in parts
                if path.name not in BEFORE and (said := template(part)) and " " in said
            }  # fmt: skip
    return found - NOT_OF_REPORTS


def test_every_sentence_is_translated():
    said = sentences()
    assert len(said) > 40
    lacking = sorted(
        sentence for sentence in said
        if in_language(sentence.replace("{}", "7"), "zh") == sentence.replace("{}", "7")
        and not sentence.startswith(("--", "pip "))
    )  # fmt: skip
    assert lacking == []
    assert all(key.count("{}") == text.count("{}") for key, text in HELD.items())


@pytest.mark.parametrize(
    ("said", "chinese"),
    [
        ("one has no value (no picture was drawn)", "其中一个没有值（没有画出图片）"),
        ("12 pictures are too few to extrapolate from", "12 张图太少，不能外推"),
        ("what nobody translated", "what nobody translated"),
    ],
)
def test_values_stay_and_sentences_within_sentences_are_translated(said, chinese):
    assert in_language(said, "zh") == chinese and in_language(said, "en") == said
