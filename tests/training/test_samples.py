"""Samples while training: repeatable, as the inferencer answers, without a trace in the training, and never
the end of a run."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling import files, pixels, sampler_of, write_prompts
from tiny import batch_of, built, draw_picture, step_of, train

from unigen.inference.context import ContextBuilder
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.prompts import PromptError
from unigen.model.weights import load_bagel
from unigen.runs.signals import Stopped
from unigen.sequence.draw import RandomKey
from unigen.sequence.images import open_image
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Image, Origin, Record, Text
from unigen.training.answering import small_pictures
from unigen.training.samples import GIVEN_SIDE, SampleWriter


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path)


@pytest.fixture
def ready(options: dict[str, Any], prompts: Path) -> Callable[..., SampleWriter]:
    """Makes a sampler of one process; keywords are options of the run."""

    def make(**changed: Any) -> SampleWriter:
        return sampler_of(options | {"sample_prompts": str(prompts)} | changed)

    return make


class Listener:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, int]] = []
        self.captions: dict[str, str] = {}

    def image(self, name: str, path: Path, step: int, caption: str) -> None:
        assert open_image(path).width
        self.captions[name] = caption
        self.heard.append(("image", name, step))

    def text(self, name: str, text: str, step: int) -> None:
        self.heard.append(("text", name, step))


@pytest.mark.slow
def test_every_prompt_is_answered_and_the_same_weights_answer_the_same(ready: Callable[..., SampleWriter]):
    """Passes when the folder holds what index.json says, two runs agree byte for byte, and the tracker hears
    of every piece."""
    sampler, tracker = ready(), Listener()
    sampler.run(3, tracker)
    first, second = sampler.folder / "step_3", sampler.folder / "step_12"
    index = json.loads((first / "index.json").read_text("utf-8"))
    assert [(line["prompt"], line["seed"]) for line in index] == [
        ("A red house", 42),
        ("What is this?", 43),
        ("Make it night", 7),
        ("and so", 45),
    ]
    shapes = [["image" if "image" in piece else "text" for piece in line["pieces"]] for line in index]
    assert shapes[:3] == [["image"], ["text"], ["image"]] and 1 <= len(shapes[3]) <= 4
    assert index[0]["pieces"] == [{"image": "000_0.png"}] and index[2]["pieces"] == [{"image": "002_0.png"}]
    assert open_image(first / "000_0.png").size == (48, 32)
    named = {piece["image"] for line in index for piece in line["pieces"] if "image" in piece}
    given = {name for line in index for name in line.get("given", [])}
    assert len(given) == sum(len(line.get("images", [])) for line in index) >= 2
    assert all(max(open_image(first / name).size) <= GIVEN_SIDE for name in given)
    assert {path.name for path in first.iterdir()} == named | given | {"index.json"}
    assert {name for kind, name, _ in tracker.heard if kind == "image"} == {
        f"samples/{Path(name).stem}" for name in named
    } | {"samples/grid"}
    assert ("text", "samples/001", 3) in tracker.heard
    assert tracker.captions["samples/000_0"] == "A red house"
    assert "000 A red house; 001 What is this?" in tracker.captions["samples/grid"]
    sampler.run(12, None)
    assert files(first) == files(second)
    sampler.run(3, None)  # as a resumed run does
    assert files(first) == files(second) and {path.name for path in sampler.folder.iterdir()} == {
        "step_3",
        "step_12",
    }


@pytest.mark.slow
def test_the_answers_are_those_of_the_inferencer(
    ready: Callable[..., SampleWriter], options: dict[str, Any], prompts: Path
):
    """Passes when a drawn picture, an edit and a text equal, to the bit, what InterleaveInferencer gives for
    the same seed."""
    sampler = ready()
    sampler.run(1, None)
    folder, image = sampler.folder / "step_1", prompts.parent / "a.png"
    model = load_bagel(options["model_path"], dtype=torch.float32)
    inferencer = InterleaveInferencer(model, vae_transform=small_pictures(sampler.config, model))
    fast = {"num_timesteps": 3, "cfg_text_scale": 3.0, "cfg_img_scale": 1.5}
    drawn = inferencer.unified_generate(
        "A red house", outputs=["image"], height=32, width=48, seed=42, **fast
    )
    assert np.array_equal(pixels(folder / "000_0.png"), np.asarray(drawn[0], dtype=np.float64))
    edited = inferencer.unified_generate([image, "Make it night"], outputs=["image"], seed=7, **fast)
    assert np.array_equal(pixels(folder / "002_0.png"), np.asarray(edited[0], dtype=np.float64))
    (text,) = InterleaveInferencer(model).unified_generate(
        [image, "What is this?"], outputs=["text"], max_new_tokens=4
    )
    assert json.loads((folder / "index.json").read_text("utf-8"))[1]["pieces"] == [{"text": text}]


def test_pictures_are_shown_as_the_run_trains_on_them(
    options: dict[str, Any], prompts: Path, monkeypatch: pytest.MonkeyPatch
):
    """Passes when a picture to look at and one to redraw become the blocks that the run's own planner makes,
    by its own limits."""
    line = [{"path": options.pop("train_data_path"), "max_image_size": 48, "min_image_size": 16}]
    sampler = sampler_of(
        options | {"sample_prompts": str(prompts), "train_sources": line, "max_image_tokens": 4}
    )
    config, seen, add_image = sampler.config, [], ContextBuilder.add_image

    def noted(self: ContextBuilder, contexts: Any, shown: Any) -> None:
        seen.extend([(b.kind, b.grid) for b in blocks] for blocks in shown)
        return add_image(self, contexts, shown)

    monkeypatch.setattr(ContextBuilder, "add_image", noted)
    sampler.run(1, None)
    planner = sampler.model.config.planner(Tokenizer.load(options["model_path"]), config, config.sources()[0])
    image = Image(prompts.parent / "a.png")
    for target, shown in ((Text("x", True), seen[0]), (Image(image.source, True), seen[1])):
        sample = [image, Text("?"), target]
        blocks = planner.outline(
            sample,
            planner.token_lengths(Record(sample, Origin(Path("x")), "direct")),
            RandomKey(0, 0, 0, training=False),
        )
        assert shown == [(b.kind, b.grid) for b in blocks if b.segment == 0]


def test_pictures_are_small_unless_the_model_draws_larger_ones_only(ready: Callable[..., SampleWriter]):
    """Passes when the side is 256, the model's smallest where that is larger, and its largest where that is
    smaller."""
    sampler = ready()
    model, config = sampler.model, sampler.config
    found = []
    for least, most in ((16, 1024), (512, 1024), (16, 64)):
        model.config.vae_transform.update(min_size=least, max_size=most)
        found.append(small_pictures(config, model).max_size)
    assert found == [256, 512, 64]
    model.config.vae_transform.update(min_size=512, max_size=1024)
    config.train_sources = [{"path": "a.jsonl", "min_image_size": 128}, {"path": "b.jsonl"}]
    config.train_data_path = None
    assert small_pictures(config, model).max_size == 256
    config.train_sources = [{"path": "a.jsonl", "min_image_size": 128, "max_image_size": 192}]
    assert small_pictures(config, model).max_size == 192


@pytest.mark.slow
def test_the_training_goes_on_to_the_bit_as_without_samples(
    options: dict[str, Any], prompts: Path, tmp_path: Path
):
    """Passes when weights, losses and the default generator are equal to the bit after three steps with and
    without samples, also where something draws from the default generator while sampling."""
    found = []
    for sampling in (False, True):
        trainer = built(options, sample_prompts=str(prompts), output_dir=str(tmp_path / f"run-{sampling}"))
        sampler = SampleWriter(trainer.config, trainer.engine, trainer.run.model)
        sampler.answerer.idle = lambda: torch.rand(3)
        said: list[Any] = []
        for step in range(3):
            assert all(module.training for module in trainer.run.model.modules())
            result = step_of(trainer, [batch_of(trainer, [step, step + 3])], 1e-3)
            said.append((result.text_loss, result.image_loss, result.grad_norm, torch.rand(1).item()))
            if sampling:
                sampler.run(step, None)
                assert all(p.grad is None for p in trainer.run.model.parameters())
        found.append((said, {name: p.detach().clone() for name, p in trainer.run.model.named_parameters()}))
    (said, weights), (said_sampling, weights_sampling) = found
    assert said == said_sampling
    assert all(torch.equal(p, weights_sampling[name]) for name, p in weights.items())
    pictures = [
        (tmp_path / "run-True" / "samples" / f"step_{step}" / "000_0.png").read_bytes() for step in range(3)
    ]
    assert len(set(pictures)) == 3, "the samples do not show that the weights move"


@pytest.mark.slow
def test_average_and_weights_answer_side_by_side(options: dict[str, Any], prompts: Path):
    """Passes when index.json holds the average's answers, and under raw those of the weights, which a run
    without an average gives to the byte; at step 0 both are one."""
    found = {}
    for ema in (None, 0.9):
        run = Path(f"{options['output_dir']}-{ema}")
        given = {"sample_prompts": str(prompts), "sample_steps": 2, "ema": ema, "output_dir": str(run)}
        train(options, given)
        found[ema] = run / "samples"
    plain, average = found[None] / "step_2", found[0.9] / "step_2"
    index, both = (json.loads((folder / "index.json").read_text("utf-8")) for folder in (plain, average))
    assert all("raw" not in line for line in index)
    for line, pair in zip(index, both, strict=True):
        for piece, raw in zip(line["pieces"], pair["raw"]["pieces"], strict=True):
            if "image" in piece:
                assert (plain / piece["image"]).read_bytes() == (average / raw["image"]).read_bytes()
            else:
                assert piece == raw
    name = both[0]["pieces"][0]["image"]
    assert (average / name).read_bytes() != (plain / name).read_bytes()
    assert "raw" not in json.loads((found[0.9] / "step_0" / "index.json").read_text("utf-8"))[0]
    grids = [open_image(folder.parent / "samples.png") for folder in (found[None], found[0.9])]
    drawn = sum(any("image" in piece for piece in line["pieces"]) for line in index)
    assert [grid.width for grid in grids] == [2 * 132] * 2, "a column for step 0, and one for step 2"
    assert grids[0].height >= drawn * 132 and grids[1].height == 2 * grids[0].height
    cell = grids[0].crop((132, 0, 132 + 48, 32))
    assert np.abs(np.asarray(cell, int) - np.asarray(open_image(plain / "000_0.png"), int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("calls", [0, 1, 5, 12])
def test_stopped_in_the_middle_leaves_nothing(ready: Callable[..., SampleWriter], calls: int):
    """Passes when Stopped comes out, no new folder stays, and the samples before and after it are whole."""
    sampler = ready()
    sampler.run(1, None)
    before, left = files(sampler.folder), [calls]

    def idle() -> None:
        if left[0] == 0:
            raise Stopped
        left[0] -= 1

    sampler.answerer.idle = idle
    with pytest.raises(Stopped):
        sampler.run(2, None)
    assert files(sampler.folder) == before and [path.name for path in sampler.folder.iterdir()] == ["step_1"]
    assert sampler.model.training and not sampler.model.language_model.model._forward_pre_hooks
    sampler.answerer.idle = lambda: None
    sampler.run(2, None)
    assert files(sampler.folder / "step_2") == files(sampler.folder / "step_1")


@pytest.mark.slow
def test_what_fails_is_a_warning_and_the_other_prompts_are_answered(
    ready: Callable[..., SampleWriter],
    prompts: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    sampler = ready()
    (prompts.parent / "a.png").unlink()
    sampler.run(1, None)
    index = json.loads((sampler.folder / "step_1" / "index.json").read_text("utf-8"))
    assert ["error" in line for line in index] == [False, True, True, False]
    assert "a.png" in index[1]["error"] and index[1]["pieces"] == []
    assert f"No sample of {prompts}:2 on rank 0" in caplog.text and "Traceback" not in caplog.text

    draw_picture(prompts.parent / "a.png", 1)
    caplog.clear()

    def no_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nA long explanation")

    monkeypatch.setattr(sampler.model.codec, "decode", no_memory)
    sampler.run(2, None)
    index = json.loads((sampler.folder / "step_2" / "index.json").read_text("utf-8"))
    assert [line.get("error") for line in index][:3] == [
        "OutOfMemoryError: CUDA out of memory.",
        None,
        "OutOfMemoryError: CUDA out of memory.",
    ]
    assert caplog.text.count("No sample of") >= 2 and sampler.model.training
    monkeypatch.undo()

    caplog.clear()
    # a mistake in the code: its lines are shown
    monkeypatch.setattr(sampler.model, "velocities", lambda hidden: hidden[0][0])
    sampler.run(3, None)
    assert "Traceback" in caplog.text and (sampler.folder / "step_3" / "index.json").exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_a_warning(
    ready: Callable[..., SampleWriter], caplog: pytest.LogCaptureFixture
):
    sampler, tracker = ready(), Listener()
    sampler.folder.parent.mkdir(parents=True)
    sampler.folder.write_text("not a folder")
    sampler.run(1, tracker)
    assert "cannot be written" in caplog.text and tracker.heard == []
    sampler.folder.unlink()
    (sampler.folder / ".step_9.new").mkdir(parents=True)  # by a kill
    sampler.run(2, tracker)
    assert [path.name for path in sampler.folder.iterdir()] == ["step_2"] and tracker.heard


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("not to be written"), Stopped()]
)
def test_what_ends_the_writing_leaves_no_half_folder(
    error: BaseException,
    ready: Callable[..., SampleWriter],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """Passes when a disk that fails is a warning, Stopped comes out, and the folder is as before: the last
    file fails, the pictures lie there already."""
    sampler, tracker = ready(), Listener()
    sampler.run(1, None)
    before = files(sampler.folder)

    def fails(path: Path, *_: Any, **__: Any) -> None:
        assert path.name == "index.json" and list(path.parent.glob("*.png"))
        raise error

    monkeypatch.setattr(Path, "write_text", fails)
    for step in (1, 2):
        if isinstance(error, Exception):
            sampler.run(step, tracker)
            assert f"The samples of step {step} cannot be written" in caplog.text
        else:
            with pytest.raises(Stopped):
                sampler.run(step, tracker)
    assert files(sampler.folder) == before and [path.name for path in sampler.folder.iterdir()] == ["step_1"]
    assert tracker.heard == []


@pytest.mark.slow
def test_when_samples_are_due(ready: Callable[..., SampleWriter]):
    sampler = ready(sample_steps=3)
    assert [step for step in range(1, 10) if sampler.pace.due(step, step == 4, last=False)] == [3, 6, 9]
    sampler = ready()
    assert [step for step in range(1, 10) if sampler.pace.due(step, step == 4, last=False)] == [4]


@pytest.mark.slow
def test_what_this_model_cannot_do_is_told(ready: Callable[..., SampleWriter], prompts: Path):
    with pytest.raises(PromptError, match=f"{prompts}:1: kind is draw, but with visual_gen=false"):
        ready(visual_gen=False)
    with pytest.raises(PromptError, match=f"{prompts}:2: with visual_und=false"):
        ready(visual_und=False)
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "height": 32, "width": 100000}\n')
    with pytest.raises(PromptError, match=f"{prompts}:2: width is 100000"):
        ready()
    sampler = ready(visual_gen=False, sample_prompts=["write"])
    sampler.run(1, None)
    (line,) = json.loads((sampler.folder / "step_1" / "index.json").read_text("utf-8"))
    assert line["pieces"] and all("text" in piece for piece in line["pieces"])
