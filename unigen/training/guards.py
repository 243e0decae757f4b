"""What must not ruin a run: records whose pictures broke meanwhile, steps whose numbers make no sense, a
metric that stopped improving.

Every decision is the same on all processes, since it rests on sums over all of them.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unigen.config import Config, UserError
from unigen.data.dataset import list_bad_records
from unigen.data.loader import MicroBatch, PackStream
from unigen.data.verdict import Verdict, percents
from unigen.files import json_of
from unigen.printing import typed
from unigen.runs.layout import BAD_RECORDS, BAD_STEPS
from unigen.runs.log import drop_after
from unigen.training.engine import Engine

log = logging.getLogger("unigen")

# gradient norms that a spike is measured against: the last ones, and how many there must be
WINDOW, FEWEST = 100, 20
# steps of which a share may be skipped; and those that must be taken after a checkpoint to make it a good one
LAST, CONFIRM = 20, 5


class TrainingStopped(UserError):
    """Training cannot go on; the message says why and the fix."""


class Diverged(TrainingStopped):
    """Steps could not be taken: the weights of the last one may be broken as well."""


class BadStepGuard:
    """Counts what went wrong, lists it in the run's folder, and stops the run where it goes on going
    wrong."""

    def __init__(self, engine: Engine, config: Config, output_dir: Path):
        self.engine, self.config, self.output_dir = engine, config, output_dir
        self.in_a_row = 0  # skipped steps
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.stale = 0  # validations since the best one
        self.recent: deque[int] = deque(maxlen=LAST)  # 1 for a step that was skipped
        self.drifted = ""  # how far the probe's losses have risen, where that ends the run
        self.left_out = 0  # steps of this process's life that were skipped
        self.good = ""  # the newest checkpoint from which steps could be taken
        self._fresh: dict[str, int] = {}  # checkpoints after which fewer than CONFIRM steps were taken

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide alike."""
        return {
            "skipped_in_a_row": self.in_a_row,
            "grad_norms": list(self.norms),
            "stale_validations": self.stale,
            "recent": list(self.recent),
        }

    def load(self, state: dict[str, Any], step: int) -> None:
        """Goes on from ``step``: later ones will be taken, and listed, again."""
        path = self.output_dir / BAD_STEPS
        if self.engine.main and path.exists():
            try:
                drop_after(path, step)
            except OSError as error:
                log.warning("%s may list steps twice, as it cannot be rewritten: %s", path, error)
        self.in_a_row, self.stale = state.get("skipped_in_a_row", 0), state.get("stale_validations", 0)
        self.norms.extend(state.get("grad_norms", ()))
        self.recent.extend(state.get("recent", ()))

    # ---- steps

    def refuses(self, losses: Sequence[float], grad_norm: float) -> str:
        """Why a step must not be taken; "" where nothing speaks against it."""
        if not all(map(math.isfinite, losses)):
            return "its loss is not finite"
        # With loss scaling an overflowing gradient is the scaler's business: it skips the step and lowers the
        # scale.
        if not math.isfinite(grad_norm):
            return "" if self.engine.precision.name == "fp16" else "its gradient is not finite"
        k = self.config.spike_sigma
        if k is not None and len(self.norms) >= FEWEST:
            mean = math.fsum(self.norms) / len(self.norms)
            deviation = math.sqrt(math.fsum((n - mean) ** 2 for n in self.norms) / len(self.norms))
            if grad_norm > mean + k * deviation:
                return (
                    f"its gradient norm {grad_norm:.4g} is a spike (the last {len(self.norms)}: {mean:.4g} ±"
                    f" {deviation:.4g})"
                )
        return ""

    def took(self, grad_norm: float) -> None:
        self.in_a_row = 0
        self.recent.append(0)
        for name in list(self._fresh):
            self._fresh[name] += 1
            if self._fresh[name] >= CONFIRM:
                self.good = name
                del self._fresh[name]
        if math.isfinite(grad_norm):
            self.norms.append(grad_norm)

    def skipped(self, step: int, why: str, batches: Sequence[MicroBatch], numbers: dict[str, float]) -> None:
        """A step was left out: its records go to ``bad_steps.jsonl``.

        Raises:
            Diverged: as many in a row as ``max_skipped_steps`` allows were left out, or a larger share of the
                last ones than ``max_skipped_share``.
        """
        self.in_a_row += 1
        self.left_out += 1
        self.recent.append(1)
        self._fresh.clear()
        origins = json.dumps([origin for batch in batches for origin in batch.pack.origins])
        everyone = [origin for part in self.engine.gather(origins) for origin in json.loads(part)]
        if self.engine.main:
            shown = {name: str(value) for name, value in numbers.items()}
            line = {"step": step, "why": why, **shown, "records": everyone}
            with open(self.output_dir / BAD_STEPS, "a", encoding="utf-8") as f:
                f.write(json_of(line) + "\n")
            log.warning("Step %d skipped: %s; its records are listed in bad_steps.jsonl", step, why)
        if self.in_a_row >= self.config.max_skipped_steps:
            raise Diverged(
                f"step {step}: {why}, as in the {self.in_a_row - 1} steps before it (max_skipped_steps is"
                f" {self.config.max_skipped_steps}). {self._fix()}"
            )
        if len(self.recent) == LAST and self._too_many:
            raise Diverged(f"step {step}: {why}; {self._share()}. {self._fix()}")

    @property
    def _too_many(self) -> bool:
        return sum(self.recent) > self.config.max_skipped_share * len(self.recent)

    def _share(self) -> str:
        return (
            f"{sum(self.recent)} of the last {len(self.recent)} steps had to be skipped (max_skipped_share is"
            f" {self.config.max_skipped_share:g})"
        )

    def _fix(self) -> str:
        start = "start again, or resume from a checkpoint before it"
        if self.good:
            place = self.output_dir / self.good
            start = f"resume with --resume_from_checkpoint {typed(place)}, the last checkpoint before it"
        return f"Fix: lower --learning_rate, look at the records in bad_steps.jsonl, then {start}"

    # ---- checkpoints

    def mark(self) -> dict[str, Any]:
        """What the manifest of a checkpoint says of steps that were skipped before it; nothing where none
        was."""
        if not any(self.recent):
            return {}
        diverging = self.in_a_row > 0 or self._too_many
        skipped = [sum(self.recent), len(self.recent)]
        return {"skipped_steps": skipped, "diverging": diverging, "last_good": self.good}

    def saved(self, name: str) -> None:
        """A checkpoint was written. It counts as good when ``CONFIRM`` steps have been taken after it."""
        if not self.mark().get("diverging"):
            self._fresh[name] = 0

    def finish(self) -> None:
        """The end of the run. Raises Diverged where too many of its last steps were skipped."""
        if sum(self.recent) > 2 and self._too_many:
            raise Diverged(f"the run has ended, but {self._share()}. {self._fix()}")

    # ---- records

    def check_records(self, batches: Sequence[MicroBatch], stream: PackStream) -> None:
        """Records whose pictures turned out unreadable: an error, or a line in ``bad_records.jsonl`` while
        they are few.

        Raises:
            TrainingStopped: with ``on_bad_record`` error, or above ``max_bad_share`` of all records.
        """
        bad = [record.to_dict() for batch in batches for record in batch.bad]
        everyone = [record for part in self.engine.gather(json.dumps(bad)) for record in json.loads(part)]
        if not everyone:
            return
        first = everyone[0]
        message = f"{first['file']}:{first['line']}: {first['code']}: {first['found']}"
        if self.config.on_bad_record == "error":
            raise TrainingStopped(
                f"{message}. Fix: {first['cure']}, or set on_bad_record to skip; then resume with"
                " --resume_from_checkpoint auto"
            )
        if self.engine.main:
            list_bad_records(self.output_dir / BAD_RECORDS, everyone)
            log.warning("%d record(s) left out: %s", len(everyone), message)
        stream.unreadable |= {f"{record['file']}:{record['index']}" for record in everyone}
        mixture = stream.mixture
        broken = len(stream.unreadable)
        verdict = Verdict(mixture.total - broken, mixture.left_out + broken, 0, self.config.max_bad_share)
        if not verdict.can_train("skip"):
            raise TrainingStopped(
                f"{message}; now {verdict.bad:,} of {verdict.total:,} records cannot be used, more than"
                f" {percents(verdict.max_bad_share)} (max_bad_share). Fix: see bad_records.jsonl, bring the"
                " pictures back, then resume with --resume_from_checkpoint auto"
            )

    # ---- validation

    def validated(self, better: bool) -> None:
        """Notes a validation: was it better than all before?"""
        self.stale = 0 if better else self.stale + 1

    @property
    def exhausted(self) -> bool:
        """Were there ``early_stopping_patience`` validations in a row that were no better, or did the model
        forget too much?"""
        patience = self.config.early_stopping_patience
        return bool(self.drifted) or (patience is not None and self.stale >= patience)
