"""One file or folder through ``unigen check``, read in one way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unigen.commands.check import findings
from unigen.commands.check.findings import Findings
from unigen.commands.check.part import CheckedData
from unigen.data.mapping import PLAIN, ReadOptions
from unigen.sequence.plan import Planner


def check(
    paths: str | Path | Sequence[str | Path], planner: Planner, read: ReadOptions = PLAIN, **how: Any
) -> Findings:
    """What a check finds in ``paths``."""
    given = [paths] if isinstance(paths, str | Path) else paths
    return findings.check([CheckedData("paths", given, planner, read)], **how)
