"""The model of a run answers prompts between two steps: each process its share of them, or all together where
the model is sharded. The training goes on to the bit as without it."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from unigen.bars import each
from unigen.config import Config, UserError
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.pictures import run_transform
from unigen.inference.prompts import SAMPLES
from unigen.model.bagel import Bagel
from unigen.printing import first_line
from unigen.runs.signals import Stopped
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.transform import ImageTransform
from unigen.training.engine import Engine
from unigen.training.synchronised import Elsewhere, SynchronisedGeneration, expected

log = logging.getLogger("unigen")

SIDE = 256  # longest side in pixels of a drawn picture, where the model draws so small

# {"pieces": [{"text": str} | {"image": PNG in base64}], and "error": str where there is none}
AnswerRecord = dict[str, Any]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts that are answered at once."""

    where: str  # they stand
    count: int
    ask: Callable[[], list[list[Any]]]  # the pieces of each answer: texts and pictures


class Answerer:
    """Has the model of a run answer.

    Where every process holds the whole model each takes its share of the jobs; where it is sharded all do all
    of them together, and rank 0's choices count.
    """

    def __init__(self, config: Config, engine: Engine, model: Bagel):
        assert model.source is not None
        self.engine, self.model = engine, model
        # called before every job, token and Euler step; it may raise to end the answers
        self.idle: Callable[[], None] = lambda: None
        training, tokenizer = model.training, Tokenizer.load(model.source)
        self.inferencer = InterleaveInferencer(
            model, tokenizer=tokenizer, vae_transform=small_pictures(config, model)
        )
        self.inferencer.requests.usual = SAMPLES
        if not engine.main:
            self.inferencer.requests.warn = lambda message: None  # rank 0 says it
        model.train(training)
        self.at_once = 1 if engine.sharded else engine.world  # jobs that are worked on at the same time
        self._lockstep = SynchronisedGeneration(engine, model, self._idle) if engine.sharded else None
        if self._lockstep is not None:
            self.inferencer.pieces.agree = self._lockstep.meet

    def answer(self, jobs: Sequence[PromptBatch]) -> list[list[AnswerRecord]]:
        """The answers of each job, on all processes; every process calls it. What goes wrong with a job is a
        warning, and the ``error`` of its answers.

        What is no ``Exception`` (``idle`` may raise ``Stopped``) on one process is raised on all of them.
        """
        device, training = self.engine.device, self.model.training
        stop: BaseException | None = None
        answers: dict[int, list[AnswerRecord]] = {}
        self.model.eval()
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.no_grad(),
                self.engine.autocast(),
            ):
                if self._lockstep is not None:
                    with self.engine.whole(), self._lockstep.watching():
                        answers = self._answer_in_step(jobs, self._lockstep)
                else:
                    with self.engine.whole(), _before(self.model.language_model.model, self._idle):
                        stop = self._answer_share(jobs, answers)
        finally:
            self.model.train(training)
        if self._lockstep is None:
            answers = self._collect(answers, stop)
        return [answers[number] for number in range(len(jobs))]

    def _idle(self) -> None:
        self.idle()

    def _failed(self, job: PromptBatch, error: BaseException, said: str = "") -> list[AnswerRecord]:
        """Says on this process why a job has no answers, unless that was ``said``."""
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        named = f"{type(error).__name__}: {first_line(error)}"
        words = said or (str(error) if isinstance(error, UserError) else named)
        if not said:
            frames = None if error.__traceback__ is None or expected(error) else error
            log.warning("No sample of %s on rank %d: %s", job.where, self.engine.rank, words, exc_info=frames)
        return [{"pieces": [], "error": words} for _ in range(job.count)]

    def _answer_share(
        self, jobs: Sequence[PromptBatch], answers: dict[int, list[AnswerRecord]]
    ) -> BaseException | None:
        """This process's jobs, into ``answers``; what broke it off, which the others must hear of first."""
        for number in each("answering", range(self.engine.rank, len(jobs), self.engine.world)):
            try:
                self.idle()
                answers[number] = [{"pieces": packed(pieces)} for pieces in jobs[number].ask()]
            except Exception as error:
                answers[number] = self._failed(jobs[number], error)
            except BaseException as stop:
                return stop
        return None

    def _collect(
        self, answers: dict[int, list[AnswerRecord]], stop: BaseException | None
    ) -> dict[int, list[AnswerRecord]]:
        """All processes' answers; raises where one of them was broken off."""
        mine = json.dumps(None if stop is not None else answers)
        said = [json.loads(part) for part in self.engine.gather(mine)]
        if stop is not None:
            raise stop
        if None in said:
            raise Stopped
        return {int(number): answer for part in said for number, answer in part.items()}

    def _answer_in_step(
        self, jobs: Sequence[PromptBatch], lockstep: SynchronisedGeneration
    ) -> dict[int, list[AnswerRecord]]:
        """Every job, on all processes at once; only rank 0's answers count."""
        answers = {}
        for number, job in enumerate(each("answering", jobs)):
            found: list[list[Any]] = []
            error = lockstep.attempt(lambda job=job, into=found: into.extend(job.ask()))
            if error is None:
                answers[number] = [{"pieces": packed(pieces) if self.engine.main else []} for pieces in found]
            else:
                answers[number] = self._failed(job, error, str(error) if isinstance(error, Elsewhere) else "")
        return answers


def small_pictures(config: Config, model: Bagel) -> ImageTransform:
    """How answers resize pictures for the VAE: as the run does, but to at most ``SIDE`` pixels or the run's
    smallest side.

    So drawn and redrawn pictures are small; what the ViT sees is as in training.
    """
    run = run_transform(model.config, config.sources(), config.max_image_tokens)
    return replace(run, max_size=max(run.min_size, min(SIDE, run.max_size)))


def packed(pieces: Sequence[Any]) -> list[dict[str, str]]:
    """An answer as JSON can hold it."""
    found = []
    for piece in pieces:
        if isinstance(piece, str):
            found.append({"text": piece})
            continue
        buffer = io.BytesIO()
        piece.save(buffer, "PNG")
        found.append({"image": base64.b64encode(buffer.getvalue()).decode("ascii")})
    return found


@contextmanager
def _before(module: nn.Module, call: Callable[[], Any]) -> Iterator[None]:
    """``call`` runs before every forward of ``module``."""
    handle = module.register_forward_pre_hook(lambda *_: call(), prepend=True)
    try:
        yield
    finally:
        handle.remove()
