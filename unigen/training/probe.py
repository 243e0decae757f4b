"""Does a model forget? Losses and answers on a set that it is not trained for, beside those of the model that
the run began with."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from unigen.config import Config
from unigen.data.loader import PackStream
from unigen.evaluation.text import levenshtein
from unigen.files import atomic
from unigen.foreign import ForeignFileError, read_json
from unigen.model.bagel import Bagel
from unigen.model.lora import adapters_off
from unigen.runs import layout
from unigen.schema import Items, Number, String, Table
from unigen.sequence.images import open_image
from unigen.training.answering import Answerer, AnswerRecord
from unigen.training.answers import Questions
from unigen.training.engine import Engine
from unigen.training.validation import Agree, Batches, Tasks, held_out_losses

log = logging.getLogger("unigen")

ASKED = 8  # records that are answered
KINDS = ("text", "image")
LOSS, DRIFT, ANSWERS = "probe/loss", "probe/drift", "probe/answers"
_ANSWER = Table({"pieces": Items(Table({}, {"text": String(), "image": String()}))}, {"error": String()})
_BASE = Table({"data": String(), "losses": Table(rest=Number(0, 1e300)), "answers": Items(Items(_ANSWER))})


class Probe:
    """The probe of a run: its ``data``, what is asked of them, and what the model said of them at first."""

    def __init__(self, config: Config, engine: Engine, model: Bagel, answerer: Answerer, data: PackStream):
        self.config, self.engine, self.model, self.data = config, engine, model, data
        self._tasks = Tasks(data.mixture)
        self._questions = Questions(answerer, config.seed, data, ASKED)
        # {"data": fingerprint, "losses": by kind, "answers": by batch}: of the model that the run began with
        self.base: dict[str, Any] | None = None

    def measure(self, step: int, batches: Batches, agree: Agree) -> tuple[dict[str, float], float] | None:
        """The numbers by their names in ``metrics.jsonl``, and what a token's forward takes; None where
        ``agree`` broke it off. The first time it measures the base, too."""
        if self.base is None and step:
            with self._as_it_was():
                base = self._look(batches, agree)
            if base is None:
                return None
            self.base = base[0]
        found = self._look(batches, agree)
        if found is None:
            return None
        now, pace = found
        self.base = self.base or now
        self.engine.on_main(self._keep)
        values = {f"{LOSS}/{kind}": loss for kind, loss in now["losses"].items()}
        for kind, was in self.base["losses"].items():
            if was and kind in now["losses"]:
                values[f"{DRIFT}/{kind}"] = now["losses"][kind] / was - 1
        return values | _compared(self.base["answers"], now["answers"]), pace

    def drifted(self, values: Mapping[str, float | None]) -> str:
        """Why the run must end by ``stop_on_drift``; "" where it goes on."""
        limit = self.config.stop_on_drift
        drifts = {kind: values.get(f"{DRIFT}/{kind}") for kind in KINDS}
        kind, most = max(((k, d) for k, d in drifts.items() if d is not None), key=lambda one: one[1])
        if limit is None or most <= limit:
            return ""
        return (
            f"the {kind} loss on the probe lies {most:.1%} above that of the model that the run began with"
            f" (stop_on_drift is {limit:g})"
        )

    def load(self, run: Path) -> None:
        """Takes the base from the folder of the run that is gone on with, where it has one of this data. All
        processes call it together."""
        said = ""
        if self.engine.main:
            try:
                held = read_json(run / layout.PROBE, [run], _BASE)
                said = json.dumps(held) if held["data"] == self._fingerprint else ""
            except (OSError, ForeignFileError) as error:
                log.info("The probe has no base to go on with: %s", error)
        said = self.engine.gather(said)[0]
        self.base = json.loads(said) if said else None

    @property
    def _fingerprint(self) -> str:
        return self.data.mixture.fingerprint

    def _as_it_was(self) -> AbstractContextManager[Any]:
        """Inside, the model is the one that the run began with, where that is still to be had."""
        if self.engine.teacher is not None:
            return self.engine.teacher.in_place()
        if self.model.adapters and not any(adapter.whole for adapter in self.model.adapters.values()):
            return adapters_off(self.model)
        log.warning("The probe was not measured at step 0, so its drift counts from this step on")
        return nullcontext()

    def _look(self, batches: Batches, agree: Agree) -> tuple[dict[str, Any], float] | None:
        """What there is to remember of the model as it is."""
        found = held_out_losses(self.engine, self.data, self._tasks, batches(self.data), agree)
        if found is None:
            return None
        losses = {kind: found.values[f"{kind}_loss"] for kind in KINDS if f"{kind}_loss" in found.values}
        answers = self._questions.ask(self._questions.batches)
        return {"data": self._fingerprint, "losses": losses, "answers": answers}, found.seconds_per_token

    def _keep(self) -> None:
        path = Path(self.config.output_dir) / layout.PROBE
        if path.exists():
            return
        try:
            with atomic(path) as file:
                file.write(json.dumps(self.base).encode())
        except OSError as error:
            log.warning("%s cannot be written; a resume would count the drift anew. %s", path, error)


def _compared(
    base: Sequence[Sequence[AnswerRecord]], now: Sequence[Sequence[AnswerRecord]]
) -> dict[str, float]:
    """How near answers are to those of the base: the share that is the same, and the mean likeness."""
    both = [pair for one, other in zip(base, now) for pair in zip(one, other)]
    pairs = [(a["pieces"], b["pieces"]) for a, b in both if "error" not in a and "error" not in b]
    if not pairs:
        return {}
    found = {"same": [float(a == b) for a, b in pairs], "likeness": [likeness(a, b) for a, b in pairs]}
    return {f"{ANSWERS}/{name}": sum(values) / len(pairs) for name, values in found.items()}


def likeness(pieces: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]]) -> float:
    """Of two answers, 0 to 1, the mean over their pieces: of texts 1 - edits / longer length, of pictures 1 -
    mean difference of levels / 255; 0 of pieces of two kinds, or where one answer has none."""
    found = [0.0] * abs(len(pieces) - len(others))
    for a, b in zip(pieces, others):
        if "text" in a and "text" in b:
            longest = max(len(a["text"]), len(b["text"]))
            found.append(1 - levenshtein(a["text"], b["text"]) / longest if longest else 1.0)
            continue
        one, two = (open_image(base64.b64decode(p["image"])) if "image" in p else None for p in (a, b))
        if one is None or two is None or one.size != two.size:
            found.append(0.0)
            continue
        levels = np.abs(np.asarray(one, np.float64) - np.asarray(two, np.float64))
        found.append(1 - float(levels.mean()) / 255)
    return sum(found) / len(found) if found else 1.0
