"""Answers to held-out records while training, measured as ``unigen evaluate`` measures them."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest
from typing import Any

from unigen.config import Config, ConfigError, UserError, nearest
from unigen.data.dataset import TASKS
from unigen.data.loader import PackStream
from unigen.evaluation.answers import Prediction
from unigen.evaluation.cases import Case, batches, cases_of
from unigen.evaluation.features import load_extractor
from unigen.evaluation.material import Material, Tools
from unigen.evaluation.results import metric_key
from unigen.evaluation.score import METRICS, NEEDS, score
from unigen.evaluation.towers import PictureTower
from unigen.inference.prompts import SAMPLES
from unigen.training.answering import Answerer, AnswerRecord, PromptBatch
from unigen.training.engine import Engine

log = logging.getLogger("unigen")

FAST = ("accuracy", "anls", "psnr", "ssim")
"""What is measured by default: nothing that needs a library, a network or much time."""
ELSEWHERE = {"structure", "stopped"}  # the pieces of an answer are prescribed here
SAMPLES_ASKED = 16  # by default, where the time allows
READ = 2000  # records that questions are taken from
AT_ONCE = 4  # records answered together; the answers depend on it
SHARE = 0.1  # of the time that the default may take

Scores = dict[str, float | None]


class Questions:
    """At most ``count`` records that ask something, and what answers them; ``seed``: of the first answer."""

    def __init__(self, answerer: Answerer, seed: int, data: PackStream, count: int):
        self.answerer, self.seed = answerer, seed
        self.cases = self._spread(self._fitting(data), count)
        of_kinds: dict[tuple[str, ...], list[list[Case]]] = {}
        for batch in batches(self.cases, AT_ONCE):
            of_kinds.setdefault(batch[0].outputs, []).append(batch)
        self.batches: list[list[Case]] = _in_turn(list(of_kinds.values()))

    def ask(self, some: Sequence[Sequence[Case]]) -> list[list[AnswerRecord]]:
        """The answers to some batches; all processes call it together."""
        return self.answerer.answer([self._job(batch) for batch in some])

    def _fitting(self, data: PackStream) -> list[Case]:
        """The records that ask something, and fit into the model's context with their answer."""
        dataset, prepare = data.mixture.parts[0].dataset, self.answerer.inferencer.requests.prepare
        found, _ = cases_of(islice(dataset, READ), numbers=dataset.numbers.tolist())
        fitting = []
        for case in found:
            try:
                prepare([list(case.prompt)], list(case.outputs), self.settings([case]))
            except UserError as error:
                log.info("Not among the records that are answered: %s (%s)", case.where, error)
            else:
                fitting.append(case)
        return fitting

    def _spread(self, cases: Sequence[Case], count: int) -> list[Case]:
        """``count`` of them, of every task as many as there are, in the order of the data."""
        groups = [[case for case in cases if case.task == task] for task in TASKS]
        return sorted(_in_turn(groups)[:count], key=lambda case: case.number)

    def settings(self, batch: Sequence[Case]) -> Any:
        """How a batch is answered: texts may become twice as long as the longest that is right."""
        encode = self.answerer.inferencer.tokenizer.encode
        lengths = [len(encode(text)) for case in batch for given in case.texts for text in given]
        # which tokens may stand in a text was asked where the records were read
        plain = replace(SAMPLES, seed=self.seed + batch[0].number, allow_control_tokens=True)
        return replace(plain, max_new_tokens=min(1000, 2 * max(lengths) + 8)) if lengths else plain

    def _job(self, batch: Sequence[Case]) -> PromptBatch:
        prompts, outputs = [list(case.prompt) for case in batch], list(batch[0].outputs)
        generate, options = self.answerer.inferencer.unified_generate_batch, self.settings(batch)
        ask = partial(generate, prompts, outputs=outputs, options=options)
        return PromptBatch(batch[0].where, len(batch), ask)


class HeldOutAnswers:
    """Some held-out records, what the model answers to them, and how good that is.

    Raises:
        ConfigError: a metric is unknown, or needs what is not given.
        CannotRun: what a metric needs cannot be loaded.
    """

    def __init__(self, config: Config, engine: Engine, answerer: Answerer, val: PackStream):
        self.config, self.engine = config, engine
        self.metrics = tuple(config.eval_metrics or FAST)
        self._check_metrics()
        asked = SAMPLES_ASKED if config.eval_samples is None else config.eval_samples
        self.questions = Questions(answerer, config.seed, val, asked)
        self.batches = self.questions.batches
        # how many of the batches are answered; None: all that the time allows, found at the first time
        free = config.eval_samples is None and not config.metric_for_best_model.startswith("eval/")
        self.kept: int | None = None if free else len(self.batches)
        self.seconds = 0.0  # that the last answers took
        self._complained: set[str] = set()
        self.tools = self._tools() if engine.main else Tools()

    def names(self, kinds: Sequence[str]) -> Iterator[str]:
        """What metrics of these kinds measure of these records."""
        for task in TASKS:
            cases = [case for case in self.questions.cases if case.task == task]
            material = Material(task, cases, [], Tools())
            for kind in kinds if cases else ():
                for end, one in zip(("", "_to_source"), METRICS.get(kind, [])):
                    if one.fits(material):
                        yield f"eval/{kind}{end}/{task}"

    @property
    def records(self) -> int:
        return sum(map(len, self.batches[: self.kept]))

    def measure(self, budget: float) -> Scores:
        """Every metric by task, the same on all processes; None for one that has no value. All processes call
        it.

        Args:
            budget: seconds that answers may take where nobody said how many are wanted; the first time
                decides.
        """
        began, longest, at_once = time.perf_counter(), 0.0, self.questions.answerer.at_once
        answers: list[list[AnswerRecord]] = []
        wanted = self.batches[: self.kept]
        for start in range(0, len(wanted), at_once):
            spent = self._agreed(time.perf_counter() - began)
            if self.kept is None and start and spent + longest > budget:
                break
            answers += self.questions.ask(wanted[start : start + at_once])
            longest = max(longest, self._agreed(time.perf_counter() - began) - spent)
        self.seconds = self._agreed(time.perf_counter() - began)
        if self.kept is None:
            self.kept = len(answers) if self.seconds <= budget else 0
            self._tell_kept(budget)
        answers = answers[: self.kept]
        scores = json.dumps(self._scores(answers) if self.engine.main else {})
        return json.loads(self.engine.gather(scores)[0])

    # ---- before the first step

    def _check_metrics(self) -> None:
        given = {"extractor": self.config.eval_features, "clip": self.config.eval_clip}
        options = {"extractor": "eval_features", "clip": "eval_clip"}
        for kind in self.metrics:
            if kind not in METRICS:
                near = nearest(kind, list(METRICS))
                raise ConfigError(
                    f"eval_metrics: there is no {kind!r}{f' (did you mean {near}?)' if near else ''}. Fix:"
                    f" use some of {', '.join(k for k in METRICS if METRICS[k][0].needs in ('', *given))}"
                )
            need = METRICS[kind][0].needs
            if kind in ELSEWHERE or (need and need not in given):
                raise ConfigError(
                    f"eval_metrics: {kind} is not measured while training. Fix: leave it out, and measure it"
                    " by unigen evaluate"
                )
            if need and given[need] is None:
                raise ConfigError(
                    f"eval_metrics: {kind} cannot be: {NEEDS[need][0]}. Fix: --{options[need]} FOLDER"
                )

    def _tools(self) -> Tools:
        device = str(self.engine.device)
        features, clip = self.config.eval_features, self.config.eval_clip
        extractor = load_extractor(features, device) if features else None
        tower = PictureTower.load(clip, device, texts=True) if clip else None
        return Tools(extractor=extractor, clip=tower, device=device)

    # ---- answers

    def _scores(self, answers: Sequence[Sequence[AnswerRecord]]) -> Scores:
        """On rank 0: the metrics of the records that were answered."""
        asked = [pair for batch, some in zip(self.batches, answers) for pair in zip(batch, some, strict=True)]
        cases, predictions = [], []
        for case, answer in asked:
            if "error" not in answer:
                cases.append(case)
                pieces = tuple(map(_piece, answer["pieces"]))
                predictions.append(Prediction(case.number, case.where, case.task, None, pieces))
        try:
            found = score(cases, predictions, self.tools, kinds=self.metrics)
        except Exception as error:  # a picture that is gone; the other processes wait
            self._complain("answers", f"they could not be measured ({type(error).__name__}: {error})")
            return {}
        scores: Scores = {}
        for task, result in ((task, result) for task, results in found.items() for result in results):
            scores[f"eval/{metric_key(result.name)}/{task}"] = result.value
            if result.value is None:
                self._complain(result.kind, f"{result.reason}. Fix: {result.fix}")
        return scores

    def _complain(self, what: str, why: str) -> None:
        if what not in self._complained:
            self._complained.add(what)
            log.warning("No value of %s: %s", what, why)

    def _agreed(self, seconds: float) -> float:
        """The longest time of all processes."""
        return max(map(float, self.engine.gather(repr(seconds))))

    def _tell_kept(self, budget: float) -> None:
        if self.kept == len(self.batches):
            return
        why = f"more would add over {SHARE:.0%} of the time ({budget:.1f} s for each evaluation, predicted)"
        there = len(self.questions.cases)
        if not self.records:
            log.info("No answers are measured: %s. --eval_samples %d measures all", why, there)
            return
        log.info(
            "Answers to %d of %d held-out records are measured: %s. --eval_samples %d measures all of them",
            self.records, there, why, there,
        )  # fmt: skip


def _piece(piece: dict[str, str]) -> str | bytes:
    return piece["text"] if "text" in piece else base64.b64decode(piece["image"])


def _in_turn(groups: Sequence[Sequence[Any]]) -> list[Any]:
    """The first of each group, the second of each, and so on."""
    return [one for turn in zip_longest(*groups) for one in turn if one is not None]
