"""The results of ``gpu.py`` as Markdown, for ``RESULTS.md``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HOLDS = {True: "yes", False: "**no**", None: ""}


def report(path: Path) -> str:
    """Every run of a file of results, the newest last."""
    runs: list[list[dict[str, Any]]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        if result["part"] == "run" and result["name"] == "began":
            runs.append([])
        runs[-1].append(result)
    return "\n".join(page(run) for run in runs)


def page(results: list[dict[str, Any]]) -> str:
    """One run."""
    began, figures = (
        results[0],
        [r for r in results if r["part"] != "run" and r["name"] not in ("part", "card", "versions")],
    )
    found = {r["name"]: r["measured"] for r in results if r["part"] == "env" and r.get("measured")}
    judged = [r["pass"] for r in figures if r.get("pass") is not None]
    lines = [
        f"## {found.get('card', {}).get('name', 'unknown card')}, {began['measured']}",
        "",
        (
            f"Sources: {began['commit']}. Card: {words(found.get('card'))}. Versions:"
            f" {words(found.get('versions'))}."
        ),
        f"Predictions that hold: {sum(judged)} of {len(judged)}.",
        "",
        "| part | figure | measured | predicted | holds |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [row(r) for r in figures]
    return "\n".join([*lines, *endings(results), ""])


def row(r: dict[str, Any]) -> str:
    """A result as a line of the table."""
    measured = (
        f"FAILED: {r['failed']}" if "failed" in r else f"{words(r['measured'])} {r.get('unit', '')}".strip()
    )
    cells = (r["part"], r["name"], measured, r.get("predicted", ""), HOLDS[r.get("pass")])
    return "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"


def words(value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return "not measured"
    if isinstance(value, dict):
        return ", ".join(f"{key} {words(v)}" for key, v in value.items())
    if isinstance(value, list):
        return "; ".join(words(v) for v in value)
    return str(value)


def endings(results: Iterable[dict[str, Any]]) -> list[str]:
    """What was skipped, killed, or interrupted."""
    told = [
        f"- {r['part']}: {r.get('skipped') or r['failed']}"
        for r in results
        if r["name"] in ("part", "interrupted") and len({"skipped", "failed"} & set(r))
    ]
    if not any(r["part"] == "run" and r["name"] in ("ended", "interrupted") for r in results):
        told.append("- run: it did not come to its end")
    return ["", *told] if told else []
