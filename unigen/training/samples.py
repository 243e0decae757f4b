"""Samples while training: the model as it stands answers fixed prompts with fixed seeds, so that its answers
can be compared over the steps. The training goes on to the bit as without them.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from unigen.config import Config, SamplingOptions, UserError
from unigen.files import atomic, json_of, remove, staged
from unigen.inference.prompts import Prompt, PromptError, read_prompts
from unigen.model.bagel import Bagel
from unigen.runs import layout
from unigen.sequence.images import open_image
from unigen.tracking.tracker import Tracker
from unigen.training.answering import Answerer, AnswerRecord, PromptBatch
from unigen.training.engine import Engine
from unigen.training.grid import grid_of
from unigen.training.sample_plan import Pace, with_kinds

log = logging.getLogger("unigen")

GIVEN_SIDE = 192  # longest side in pixels of the copy of a prompt's picture
MAX_PIECES = 4  # of an answer whose pieces the model chooses
RAW = "raw"  # of the weights as they are, where the average answers besides

# Kind of a prompt -> the pieces of its answer; None: as the model decides.
OUTPUTS: dict[str, list[str] | None] = {"draw": ["image"], "answer": ["text"], "decide": None}


class SampleWriter:
    """Answers the prompts of ``sample_prompts`` into ``samples/step_N`` of the run's folder; ``tasks`` of the
    training data tell what to do with a prompt that does not say it.

    Raises:
        PromptError: a prompt cannot be used; says file and line.
    """

    def __init__(self, config: Config, engine: Engine, model: Bagel, tasks: Collection[str] = ()):
        assert config.sample_prompts is not None
        self.config, self.engine, self.model = config, engine, model
        self.folder = Path(config.output_dir) / layout.SAMPLES
        self.prompts = with_kinds(read_prompts(config.sample_prompts, config.seed), config, tasks)
        self.pace = Pace(config, engine)  # says when there are samples
        self.answerer = Answerer(config, engine, model)
        self._inferencer = self.answerer.inferencer
        for prompt in self.prompts:
            self._check(prompt)

    def run(
        self,
        step: int,
        tracker: Tracker | None,
        averaged: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Answers every prompt with the model as it is and publishes ``samples/step_N`` in one rename.

        Every process calls it; ``tracker`` is rank 0's. Inside of ``averaged`` the model holds an average of
        its weights, which then answers first. What goes wrong with a prompt, or with the disk, is a warning.
        What is no ``Exception`` (``idle`` may raise ``Stopped``) on one process is raised on all of them, and
        leaves no folder.
        """
        began = time.perf_counter()
        jobs = [
            PromptBatch(prompt.where, 1, lambda prompt=prompt: [self._ask(prompt)]) for prompt in self.prompts
        ]
        with contextlib.nullcontext() if averaged is None else averaged():
            answers = self.answerer.answer(jobs)
        raw = self.answerer.answer(jobs) if averaged is not None else []
        self.pace.took(step, time.perf_counter() - began)
        if self.engine.main:
            self._publish(step, [one for (one,) in answers], [one for (one,) in raw], tracker)
            seconds, folder = time.perf_counter() - began, self.folder / layout.step_name(step)
            log.info("Samples of step %d: %s (%.1f s)", step, folder, seconds)

    # ---- answers

    def _check(self, prompt: Prompt) -> None:
        """Raises PromptError where this model cannot answer."""
        config = self.model.config
        if prompt.kind == "draw" and not config.visual_gen:
            raise PromptError(
                f"{prompt.where}: kind is draw, but with visual_gen=false the model cannot draw. Fix:"
                " --visual_gen true"
            )
        if prompt.images and prompt.kind != "draw" and not config.visual_und:
            raise PromptError(
                f"{prompt.where}: with visual_und=false the model sees pictures only to draw. Fix:"
                " --visual_und true"
            )
        try:
            self._inferencer.requests.prepare([prompt.pieces], OUTPUTS[prompt.kind], self._sampling(prompt))
        except UserError as error:
            raise PromptError(f"{prompt.where}: {error}") from None

    def _sampling(self, prompt: Prompt) -> SamplingOptions:
        """How a prompt is answered; tokens that the run learns may stand in it."""
        allowed = prompt.sampling.allow_control_tokens or self.config.allow_control_tokens
        return replace(prompt.sampling, allow_control_tokens=allowed)

    def _ask(self, prompt: Prompt) -> list[Any]:
        """The answer: texts and pictures."""
        return self._inferencer.unified_generate(
            prompt.pieces, outputs=OUTPUTS[prompt.kind], max_pieces=MAX_PIECES, options=self._sampling(prompt)
        )

    # ---- files

    def _publish(
        self, step: int, answers: Sequence[AnswerRecord], raw: Sequence[AnswerRecord], tracker: Tracker | None
    ) -> None:
        """Writes a hidden folder and renames it; a disk that fails is a warning."""
        target = self.folder / layout.step_name(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in list(self.folder.iterdir()):
                if path.name.startswith(".") and layout.is_samples(path.name):  # by a kill
                    remove(path)
            with staged(target, replace=True, sync=False) as folder:  # a resumed run comes here again
                index = self._write(folder, answers, raw)
        except (OSError, ValueError) as error:
            log.warning("The samples of step %d cannot be written to %s: %s", step, self.folder, error)
            return
        if tracker is not None:
            self._tell(tracker, target, index, step)

    def _write(
        self, folder: Path, answers: Sequence[AnswerRecord], raw: Sequence[AnswerRecord]
    ) -> list[dict[str, Any]]:
        """The pictures and ``index.json``; its content."""
        index = []
        for number, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
            asked: dict[str, Any] = {"prompt": prompt.text, "kind": prompt.kind, "seed": prompt.seed}
            if prompt.images:
                asked |= {"images": prompt.images, "given": self._given(folder, number, prompt)}
            asked |= {"options": prompt.options} if prompt.options else {}
            line = {**asked, **answer, "pieces": _store(folder, answer["pieces"], f"{number:03}")}
            if raw:
                own = raw[number]
                line[RAW] = {**own, "pieces": _store(folder, own["pieces"], f"{number:03}_{RAW}")}
            index.append(line)
        (folder / layout.SAMPLES_INDEX).write_text(json_of(index, indent=1) + "\n", encoding="utf-8")
        return index

    def _given(self, folder: Path, number: int, prompt: Prompt) -> list[str]:
        """Small copies of a prompt's pictures, so that the folder alone shows what was asked; none of one
        that is gone by now."""
        names = []
        for n, path in enumerate(prompt.images):
            try:
                picture = open_image(path)
            except (OSError, ValueError):  # its answer says so
                continue
            picture.thumbnail((GIVEN_SIDE, GIVEN_SIDE))
            names.append(f"{number:03}_given_{n}.png")
            picture.save(folder / names[-1])
        return names

    def _tell(self, tracker: Tracker, folder: Path, index: Sequence[dict[str, Any]], step: int) -> None:
        for number, line in enumerate(index):
            for name, answer in ((f"{number:03}", line), (f"{number:03}_{RAW}", line.get(RAW))):
                texts = [piece["text"] for piece in answer["pieces"] if "text" in piece] if answer else []
                if texts:
                    text = "\n\n".join([line["prompt"], *texts])
                    tracker.text(f"{layout.SAMPLES}/{name}", text, step)
                for piece in answer["pieces"] if answer else ():
                    if "image" in piece:
                        path = folder / piece["image"]
                        tracker.image(f"{layout.SAMPLES}/{path.stem}", path, step, line["prompt"])
        path = self.folder.parent / layout.SAMPLES_GRID
        try:
            if (grid := grid_of(self.folder, step)) is not None:
                with atomic(path) as file:
                    grid.save(file, format="PNG")
                rows = "; ".join(f"{number:03} {prompt.text}" for number, prompt in enumerate(self.prompts))
                tracker.image(f"{layout.SAMPLES}/grid", path, step, rows)
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)


def _store(folder: Path, pieces: Sequence[dict[str, str]], name: str) -> list[dict[str, str]]:
    """The pieces of an answer, their pictures as files ``NAME_0.png`` and so on."""
    found: list[dict[str, str]] = []
    for piece in pieces:
        if "image" in piece:
            file = f"{name}_{sum('image' in one for one in found)}.png"
            (folder / file).write_bytes(base64.b64decode(piece["image"]))
            piece = {"image": file}
        found.append(piece)
    return found
