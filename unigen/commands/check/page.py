"""The page of ``unigen check``: one HTML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unigen.commands.check.advice import Advice
from unigen.commands.check.findings import Findings
from unigen.commands.check.terminal import Bars, Line, Shares, Table, advice_line, percent, sections
from unigen.show.charts import bar_chart
from unigen.show.language import TAGS, Words, of_code
from unigen.show.pages import escape, part, table, write_sections

FEW = 5  # problems that are all shown unfolded


def write(
    path: Path, found: Findings, summary: dict[str, Any], advice: Sequence[Advice], words: Words
) -> Path:
    """Writes the page."""
    parts = [("", _head(found, summary, words))]
    if found.problems.counts:
        parts.append((words("problems"), _problems(found, words)))
    if advice:
        parts.append((words("advice"), _advice(advice, words)))
    for heading, blocks in sections(summary, words):
        parts.append((heading, _body(blocks, words)))
    return write_sections(
        path,
        words("title"),
        parts,
        language=TAGS[words.language],
        styles=["charts", "check"],
        script="charts",
    )


def verdict(found: Findings, words: Words) -> str:
    n = len(found.problems)
    return words("one_bad") if n == 1 else words("bad", n=n) if n else words("clean")


def _head(found: Findings, s: dict[str, Any], words: Words) -> str:
    n = len(found.problems)
    mark = '<span class="mark bad">✕</span>' if n else '<span class="mark good">✓</span>'
    depth = words("deep" if found.deep else "headers")
    lines = [f'<p class="verdict">{mark}{escape(verdict(found, words))}</p>']
    covered = words("covered", records=s["records"], files=s["files"], seconds=found.seconds, depth=depth)
    lines.append(f'<p class="soft">{escape(covered)}</p>')
    lines.append(f'<p class="soft path">{escape(common_folder(found.files))}</p>')
    if found.interrupted:
        told = escape(words("interrupted", n=s["records"]))
        lines.append(f'<p class="verdict"><span class="mark warn">!</span>{told}</p>')
    median = s["lengths"]["quantiles"]["0.5"] if s["lengths"]["count"] else 0
    length = f"{words('tile_length')} ({words(s['lengths']['unit'])})"
    tiles = [
        (s["records"], words("tile_records")),
        (n, words("tile_problems")),
        (median, length),
        (s["pictures"]["pieces"], words("tile_pictures")),
        (s["targets"]["text_tokens"], words("tile_text")),
        (s["targets"]["image_tokens"], words("tile_image")),
    ]
    shown = "".join(
        f'<div class="tile"><b>{_short(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    return f'{"".join(lines)}<div class="tiles">{shown}</div>'


def _short(n: int) -> str:
    """A number that fits a tile: 1,234 or 12.3 M."""
    for size, name in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if n >= 10 * size or (size == 10**6 and n >= size):
            return f"{n / size:,.1f} {name}"
    return f"{n:,}"


def _problems(found: Findings, words: Words) -> str:
    """A fold for each code; the first is open where there are few."""
    header = [words(key) for key in ("place", "field", "found", "expected", "fix")]
    parts = []
    folder = common_folder(found.files)
    for code, n in found.problems.counts.most_common():
        first = found.problems.first[code]
        rows = [
            [place(problem, folder), *(problem[key] for key in ("field", "found", "expected", "cure"))]
            for problem in first
        ]
        body = table(rows, header)
        if n > len(first):
            path = found.problems.path
            more = (
                words("more_in", n=n - len(first), path=path) if path else words("more_how", n=n - len(first))
            )
            body += f'<p class="soft">{escape(more)}</p>'
        is_open = " open" if len(found.problems) <= FEW else ""
        told = f'{escape(code)}<span class="count">{n:,}</span><span class="count">{escape(of_code(code, words.language))}</span>'
        parts.append(f"<details{is_open}><summary>{told}</summary>{body}</details>")
    return "".join(parts)


def place(problem: dict[str, Any], folder: str = "") -> str:
    """``file:line``, ``file[index]`` where no line tells it, or the file; without the ``folder`` that all
    files are in."""
    file = problem["file"].removeprefix(folder)
    if problem["line"] is not None:
        return f"{file}:{problem['line']}"
    return file if problem["field"] == "(file)" else f"{file}[{problem['index']}]"


def common_folder(files: Sequence[Path]) -> str:
    """The folder that all files are in, with its last slash."""
    return os.path.join(os.path.commonpath([file.parent for file in files]), "")


def _advice(advice: Sequence[Advice], words: Words) -> str:
    marks = {"warn": '<span class="mark warn">!</span>', "note": '<span class="mark note">i</span>'}
    return f'<ul class="advice">{"".join(f"<li>{marks[a.level]}<span>{escape(advice_line(a, words))}</span></li>" for a in advice)}</ul>'


def _shares(block: Shares) -> str:
    """One bar, divided."""
    whole = sum(n for _, n in block.parts)
    parts = [(f"var(--c{i})", escape(name), n / whole) for i, (name, n) in enumerate(block.parts)]
    bar = "".join(
        f'<i style="background:{colour};width:{share:.3%}" title="{name}: {percent(share)}"></i>'
        for colour, name, share in parts
    )
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{name} {percent(share)}</span>'
        for colour, name, share in parts
    )
    return f'<div><p class="soft">{escape(block.title)}</p><div class="shares">{bar}</div><div class="legend">{legend}</div></div>'


def _body(blocks: Sequence[Any], words: Words) -> str:
    """Blocks one under another, charts side by side."""
    parts: list[str] = []
    charts: list[str] = []
    for block in blocks:
        if isinstance(block, Bars):
            charts.append(
                part(
                    "chart",
                    bar_chart(block.title, block.bars, words, x_label=block.x_label, y_label=block.y_label),
                )
            )
            continue
        if charts:
            parts.append(f'<div class="charts">{"".join(charts)}</div>')
            charts = []
        if isinstance(block, Table):
            parts.append(table(block.rows, block.header))
        elif isinstance(block, Shares):
            parts.append(_shares(block))
        elif isinstance(block, Line):
            parts.append(f'<p class="soft">{escape(block.text)}</p>')
    if charts:
        parts.append(f'<div class="charts">{"".join(charts)}</div>')
    return f'<div class="blocks">{"".join(parts)}</div>'
