"""Samples while training: the model as it stands answers fixed prompts with fixed seeds, so that its answers
can be compared over the steps. The training goes on to the bit as without them.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unigen.config import Config, UserError
from unigen.files import json_of, remove, staged
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.pictures import run_transform
from unigen.inference.prompts import SAMPLES, Prompt, PromptError, read_prompts
from unigen.model.bagel import Bagel
from unigen.runs import layout
from unigen.sequence.images import ImageTransform, open_image
from unigen.sequence.tokens import Tokenizer
from unigen.tracking.tracker import Tracker
from unigen.training.engine import Engine
from unigen.training.synchronised import Elsewhere, SynchronisedGeneration, expected, stopped

log = logging.getLogger("unigen")

GIVEN_SIDE = 192  # longest side in pixels of the copy of a prompt's picture
SIDE = 256  # longest side in pixels of a drawn picture, where the model draws so small
MAX_PIECES = 4  # of an answer whose pieces the model chooses

# Kind of a prompt -> the pieces of its answer; None: as the model decides.
OUTPUTS: dict[str, list[str] | None] = {"draw": ["image"], "answer": ["text"], "auto": None}
# {"pieces": [{"text": str} | {"image": PNG in base64}], and "error": str where there is none}
Answer = dict[str, Any]


class SampleWriter:
    """Answers the prompts of ``sample_prompts`` into ``samples/step_N`` of the run's folder.

    Args:
        config: of the run; ``sample_prompts`` is given.
        engine: of the run. Where every process holds the whole model each answers its share of the prompts;
            where it is sharded all answer all of them together, and rank 0's choices count.
        model: of the engine, loaded.

    Raises:
        PromptError: a prompt cannot be used; says file and line.
    """

    def __init__(self, config: Config, engine: Engine, model: Bagel):
        assert config.sample_prompts is not None and model.source is not None
        self.config, self.engine, self.model = config, engine, model
        self.folder = Path(config.output_dir) / layout.SAMPLES
        # called before every prompt, token and Euler step; it may raise to end the samples
        self.idle: Callable[[], None] = lambda: None
        self.prompts = read_prompts(config.sample_prompts, config.seed)
        training, tokenizer = model.training, Tokenizer.load(model.source)
        self._inferencer = InterleaveInferencer(
            model, tokenizer=tokenizer, vae_transform=small_pictures(config, model)
        )
        self._inferencer.requests.usual = SAMPLES
        if not engine.main:
            self._inferencer.requests.warn = lambda message: None  # rank 0 says it
        model.train(training)
        self._lockstep = SynchronisedGeneration(engine, model, self._idle) if engine.sharded else None
        if self._lockstep is not None:
            self._inferencer.agree = self._lockstep.meet
        for prompt in self.prompts:
            self._check(prompt)

    def due(self, step: int, otherwise: bool) -> bool:
        """Are there samples after ``step``? ``otherwise`` decides where ``sample_steps`` does not: does it
        validate (or save)?"""
        every = self.config.sample_steps
        return step % every == 0 if every else otherwise

    def run(self, step: int, tracker: Tracker | None) -> None:
        """Answers every prompt with the model as it is (swap the average in first) and publishes
        ``samples/step_N`` in one rename.

        Every process calls it; ``tracker`` is rank 0's. What goes wrong with a prompt, or with the disk, is a
        warning. What is no ``Exception`` (``idle`` may raise ``Stopped``) on one process is raised on all of
        them, and leaves no folder.
        """
        began, device, training = time.perf_counter(), self.engine.device, self.model.training
        stop: BaseException | None = None
        answers: dict[int, Answer] = {}
        self.model.eval()
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.no_grad(),
                self.engine.autocast(),
            ):
                if self._lockstep is not None:
                    with self.engine.whole(), self._lockstep.watching():
                        answers = self._answer_in_step(self._lockstep)
                else:
                    with self.engine.whole(), _before(self.model.language_model.model, self._idle):
                        stop = self._answer_share(answers)
        finally:
            self.model.train(training)
        if self._lockstep is None:
            answers = self._collect(answers, stop)
        if self.engine.main:
            self._publish(step, [answers[number] for number in range(len(self.prompts))], tracker)
            log.info(
                "Samples of step %d: %s (%.1f s)",
                step,
                self.folder / layout.step_name(step),
                time.perf_counter() - began,
            )

    def _idle(self) -> None:
        self.idle()

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
            self._inferencer.requests.prepare([prompt.pieces], OUTPUTS[prompt.kind], prompt.sampling)
        except UserError as error:
            raise PromptError(f"{prompt.where}: {error}") from None

    def _ask(self, prompt: Prompt) -> list[Any]:
        """The answer: texts and pictures."""
        return self._inferencer.unified_generate(
            prompt.pieces, outputs=OUTPUTS[prompt.kind], max_pieces=MAX_PIECES, options=prompt.sampling
        )

    def _warn(self, prompt: Prompt, error: BaseException) -> str:
        """Says on this process why a prompt has no answer; the words."""
        words = (
            str(error)
            if isinstance(error, UserError)
            else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        )
        frames = error.__traceback__ is not None and not expected(error)
        log.warning(
            "No sample of %s on rank %d: %s",
            prompt.where,
            self.engine.rank,
            words,
            exc_info=error if frames else None,
        )
        return words

    def _answer_share(self, answers: dict[int, Answer]) -> BaseException | None:
        """This process's prompts, into ``answers``; what broke it off, which the others must hear of
        first."""
        for number in range(self.engine.rank, len(self.prompts), self.engine.world):
            prompt = self.prompts[number]
            try:
                self.idle()
                answers[number] = {"pieces": packed(self._ask(prompt))}
            except Exception as error:
                answers[number] = {"pieces": [], "error": self._warn(prompt, error)}
            except BaseException as stop:
                return stop
            if "error" in answers[number] and self.engine.device.type == "cuda":
                torch.cuda.empty_cache()
        return None

    def _collect(self, answers: dict[int, Answer], stop: BaseException | None) -> dict[int, Answer]:
        """All processes' answers; raises where one of them was broken off."""
        said = [
            json.loads(part) for part in self.engine.gather(json.dumps(None if stop is not None else answers))
        ]
        if stop is not None:
            raise stop
        if None in said:
            raise stopped()
        return {int(number): answer for part in said for number, answer in part.items()}

    def _answer_in_step(self, lockstep: SynchronisedGeneration) -> dict[int, Answer]:
        """Every prompt, on all processes at once; only rank 0's answers count."""
        answers = {}
        for number, prompt in enumerate(self.prompts):
            pieces: list[Any] = []
            error = lockstep.attempt(lambda prompt=prompt, into=pieces: into.extend(self._ask(prompt)))
            if error is None:
                answers[number] = {"pieces": packed(pieces) if self.engine.main else []}
                continue
            answers[number] = {
                "pieces": [],
                "error": str(error) if isinstance(error, Elsewhere) else self._warn(prompt, error),
            }
            if self.engine.device.type == "cuda":
                torch.cuda.empty_cache()
        return answers

    # ---- files

    def _publish(self, step: int, answers: Sequence[Answer], tracker: Tracker | None) -> None:
        """Writes a hidden folder and renames it; a disk that fails is a warning."""
        target = self.folder / layout.step_name(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in list(self.folder.iterdir()):
                if path.name.startswith(".") and layout.is_samples(path.name):  # by a kill
                    remove(path)
            with staged(target, replace=True, sync=False) as folder:  # a resumed run comes here again
                index = self._write(folder, answers)
        except (OSError, ValueError) as error:
            log.warning("The samples of step %d cannot be written to %s: %s", step, self.folder, error)
            return
        if tracker is not None:
            self._tell(tracker, target, index, step)

    def _write(self, folder: Path, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The pictures and ``index.json``; its content."""
        index = []
        for number, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
            pieces: list[dict[str, str]] = []
            for piece in answer["pieces"]:
                if "image" in piece:
                    name = f"{number:03}_{sum('image' in p for p in pieces)}.png"
                    (folder / name).write_bytes(base64.b64decode(piece["image"]))
                    piece = {"image": name}
                pieces.append(piece)
            asked: dict[str, Any] = {"prompt": prompt.text, "kind": prompt.kind, "seed": prompt.seed}
            if prompt.images:
                asked |= {"images": prompt.images, "given": self._given(folder, number, prompt)}
            asked |= {"options": prompt.options} if prompt.options else {}
            index.append({**asked, **answer, "pieces": pieces})
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
            texts = [piece["text"] for piece in line["pieces"] if "text" in piece]
            if texts:
                text = "\n\n".join([line["prompt"], *texts])
                tracker.text(f"{layout.SAMPLES}/{number:03}", text, step)
            for piece in line["pieces"]:
                if "image" in piece:
                    path = folder / piece["image"]
                    tracker.image(f"{layout.SAMPLES}/{path.stem}", path, step)


def small_pictures(config: Config, model: Bagel) -> ImageTransform:
    """How samples resize pictures for the VAE: as the run does, but to at most ``SIDE`` pixels or the run's
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
