"""The report of ``unigen check`` in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from unigen.commands.check.advice import Advice
from unigen.commands.check.findings import Findings
from unigen.commands.check.report import (
    Note,
    ReportTable,
    advice_line,
    covered,
    more,
    place,
    said,
    sections,
    verdict,
)
from unigen.show.language import Words, of_code
from unigen.show.terminal import indented, line, notices, table

if TYPE_CHECKING:
    from unigen.show.terminal import RenderableType

FEW = 3  # problems of a code that are shown in full


def report(
    found: Findings, summary: dict[str, Any], advice: Sequence[Advice], words: Words, output: str | None
) -> Iterator[RenderableType]:
    """What the terminal shows of a check, part by part; ``output`` is the page that was written."""
    yield line(covered(found, summary, words))
    if found.interrupted:
        yield line((words("interrupted", n=summary["records"]), "warn"))
    yield ""
    yield line((f"== {verdict(found, words)} ==", "bad" if len(found.problems) else "good"))
    yield from _problems(found, words)
    for heading, blocks in sections(summary, words):
        yield ""
        yield line((f"== {heading} ==", "bold"))
        shown = [block for block in blocks if isinstance(block, ReportTable | Note)]
        for n, block in enumerate(shown):
            if n:
                yield ""
            yield line(block.text) if isinstance(block, Note) else table(block.header, block.rows)
    if advice:
        yield ""
        yield line((f"== {words('advice')} ==", "bold"))
        yield notices([(a.level, advice_line(a, words)) for a in advice])
    if output:
        yield ""
        yield line(f"-> {output}")


def _problems(findings: Findings, words: Words) -> Iterator[RenderableType]:
    for code, n in findings.problems.counts.most_common():
        yield line((code, "bad"), f"  ({n:,})  {of_code(code, words.language)}".rstrip())
        shown = findings.problems.first[code][:FEW]
        for p in shown:
            yield indented(line(place(p)))
            found, expected, fix = said(p, words)
            where = words.field(p["field"])
            yield indented(line(words("in_field", field=where, found=found, expected=expected)), 4)
            yield indented(line(words("so_fix", fix=fix)), 4)
        if rest := more(findings, n - len(shown), words):
            yield indented(line(rest))
