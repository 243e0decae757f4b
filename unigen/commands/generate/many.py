"""``unigen generate --prompts_file``: the prompts of a benchmark into the folder that its scorer reads.

A picture that is there is done: each file is whole or absent, and what belongs beside it is written before
it. :data:`STATE` in the folder holds what the pictures depend on (``answers.json``), so that a run which was
killed, or another process, goes on with the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from unigen.bars import Bar
from unigen.cache.encoders import digest_weights
from unigen.commands.generate.one import checkpoint_of, held_bits
from unigen.commands.generate.options import GenerateOptions
from unigen.config import ConfigError, SamplingOptions
from unigen.evaluation.answers import ABOUT, claim_answers, digest_of_pictures, factors_of, same_threads
from unigen.evaluation.benchmarks import LAYOUTS, PRESETS, Layout, Preset, beaten
from unigen.evaluation.prompt_files import Asked, read_asked
from unigen.evaluation.results import digest_of
from unigen.files import atomic, json_of, sha256_of
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.options import NAMES, InferenceError
from unigen.model.backends import pick_device
from unigen.outputs import output_folder, unwritten
from unigen.runs.channel import processes
from unigen.sequence.images import image_size, open_image
from unigen.show.terminal import say
from unigen.version import __version__

STATE = ".unigen"  # folder of what is ours and no scorer's
QUARTERED, QUARTERS = "quarters", 4


class Drawing(NamedTuple):
    """Picture ``k`` of a record; ``shape``: height and width, where those of the options do not hold."""

    asked: Asked
    k: int
    seed: int
    shape: tuple[int, int] | None


@dataclass(frozen=True)
class Plan:
    """What is drawn, and where to.

    Args:
        folder: that the scorer reads.
        pictures: of each record.
        rank, world: which share of the groups is this process's.
    """

    options: GenerateOptions
    layout: Layout
    preset: Preset | None
    asked: list[Asked]
    folder: Path
    pictures: int
    rank: int = 0
    world: int = 1

    def file(self, asked: Asked, k: int) -> Path:
        """Where picture k of a record is drawn to: of a grid a quarter, which is put in its place later."""
        if self.layout.grid:
            return self.folder / STATE / QUARTERED / f"{asked.record['item_id']}-{k}.png"
        return self.folder / asked.places[k]

    def thought(self, asked: Asked, k: int) -> Path:
        """Where the thought of picture k of a record stands: beside what the scorer reads."""
        place = self.folder / asked.places[0 if self.layout.grid else k]
        return place.with_name(f"{place.stem}-{k}.txt") if self.layout.grid else place.with_suffix(".txt")

    def beside(self, asked: Asked, k: int) -> dict[str, Path]:
        """What stands beside picture k of a record, by its kind."""
        places = (self.layout.beside or {}).items()
        return {kind: self.folder / place(asked.places[k]) for kind, place in places}

    def lists(self) -> dict[Path, Any]:
        """The lists of all pictures, as JSON, with the thoughts that are there."""
        if self.layout.listing is None:
            return {}
        paths = [str((self.folder / one.places[0]).resolve()) for one in self.asked]
        texts = [self.thought(one, 0) for one in self.asked if self.options.think]
        thoughts = [text.read_text(encoding="utf-8") if text.is_file() else "" for text in texts]
        held = self.layout.listing([one.record for one in self.asked], paths, thoughts or [""] * len(paths))
        return {self.folder / name: value for name, value in held.items()}

    def files(self) -> Iterator[Path]:
        """All that will be written for the scorer, and the thoughts."""
        for asked in self.asked:
            yield from (self.folder / place for place in asked.places)
            for k in range(self.pictures):
                yield from self.beside(asked, k).values()
                yield from [self.thought(asked, k)] if self.options.think else []
        yield from self.lists()

    def is_done(self, asked: Asked, k: int) -> bool:
        return self.file(asked, k).is_file() or (self.layout.grid and self.is_whole(asked))

    def is_whole(self, asked: Asked) -> bool:
        """Is all there that the scorer reads of a record?"""
        return all((self.folder / place).is_file() for place in asked.places)

    def groups(self) -> Iterator[tuple[int, list[Asked]]]:
        """Records that this process takes together, as many as ``batch_size`` has room for, and the number of
        the first."""
        size = max(1, self.options.batch_size // self.pictures)
        for start in range(self.rank * size, len(self.asked), self.world * size):
            yield start, self.asked[start : start + size]


def write_many(o: GenerateOptions) -> None:
    """Draws what is not there yet, and says how it was sampled.

    Raises:
        UserError: an option cannot work, the prompts or the checkpoint cannot be read, or the folder holds
            other pictures or cannot be written.
    """
    preset, layout, pictures = _chosen(o)
    prompts = Path(o.prompts_file or "")
    images = Path(o.image_root) if o.image_root else None
    asked = read_asked(prompts, layout, pictures, images, o.samples)
    inputs = [o.model_path, *([prompts] if prompts.is_dir() else [])]
    folder = output_folder("output_dir", o.output_dir, inputs)
    plan = Plan(o, layout, preset, asked, folder, pictures)
    there = next((path for path in plan.files() if os.path.lexists(path)), None)
    if there and not (folder / STATE / ABOUT).exists():
        raise ConfigError(
            f"output_dir is {folder}, which holds {there.relative_to(folder)} that is not ours. Fix: name"
            " another folder (--output_dir ...)"
        )
    empty, load = checkpoint_of(o)
    empty.requests.usual = SamplingOptions(**preset.settings) if preset else SamplingOptions()
    for one in asked:
        try:
            empty.requests.prepare([_prompt(one)], ["image"], o)
        except InferenceError as error:
            raise InferenceError(f"{one.where}: {error}") from None
    with processes() as (rank, channel):
        if o.shard and channel.world > 1:
            raise ConfigError("shard is given to one of several processes. Fix: leave it to torchrun")
        part, parts = map(int, o.shard.split("/")) if o.shard else (rank + 1, channel.world)
        if part > parts:
            raise ConfigError(
                f"shard is {o.shard}, and the last is {parts}/{parts}. Fix: one from 1/{parts} on"
            )
        plan = replace(plan, rank=part - 1, world=parts)
        if rank == 0:
            unset = "no preset: sampled by the options alone"
            say(f"preset {o.preset}: {preset.source}" if preset else unset, *beaten(o.preset, o))
        inferencer = load(str(pick_device(o.device, rank)))
        inferencer.requests = empty.requests  # which has told what there is to tell
        with unwritten("output_dir", folder):
            claim_answers(folder / STATE, _about(o, plan, inferencer))
            if inferencer.model.device.type == "cpu":
                same_threads(folder / STATE)
            _draw(plan, inferencer)
            channel.gather("")
            if rank == 0:
                _finish(plan)


def _chosen(o: GenerateOptions) -> tuple[Preset | None, Layout, int]:
    """The preset, the layout and how many pictures each prompt has. Raises ConfigError."""
    preset = PRESETS[o.preset] if o.preset else None
    name = o.layout or (preset.layout if preset else None)
    if name is None:
        raise ConfigError(f"prompts_file is given without layout. Fix: --layout, of {', '.join(LAYOUTS)}")
    if o.seed is None:
        raise ConfigError("seed is none, and pictures without one cannot be drawn again. Fix: --seed 42")
    layout = LAYOUTS[name]
    pictures = o.num_images or (preset.pictures if preset else 1)
    most = QUARTERS if layout.grid else 1
    if pictures > most and not layout.several:
        raise ConfigError(
            f"num_images is {pictures}, and layout {name} has room for {most} of a prompt. Fix: --num_images"
            f" {most}"
        )
    if preset and preset.one_seed and o.batch_size > 1:
        raise ConfigError(
            f"batch_size is {o.batch_size}, and preset {o.preset} draws every picture with the same seed."
            " Fix: --batch_size 1"
        )
    return preset, layout, pictures


def _prompt(asked: Asked) -> list[Any]:
    return [*asked.pictures, asked.text]


def _about(o: GenerateOptions, plan: Plan, inferencer: InterleaveInferencer) -> dict[str, Any]:
    """What the pictures depend on."""
    path = Path(o.prompts_file or "")
    return {
        "preset": o.preset, "source": plan.preset.source if plan.preset else None,
        "layout": o.layout or (plan.preset.layout if plan.preset else None),
        "sampling": {name: getattr(o, name) for name in NAMES},
        "checkpoint": digest_weights(inferencer.model.state_dict().items(), None)[:12],
        "prompts": sha256_of(path)[:12] if path.is_file() else digest_of([one.text for one in plan.asked]),
        "records": len(plan.asked), "pictures": plan.pictures, "batch_size": o.batch_size,
        "guidance": plan.preset.guidance._asdict() if plan.preset else None,
        "one_seed": plan.preset is not None and plan.preset.one_seed,
        "device": inferencer.model.device.type, "quantize": held_bits(o), "version": __version__,
        "images": digest_of_pictures(picture for one in plan.asked for picture in one.pictures),
        "adapter": factors_of(o.adapter),
    }  # fmt: skip


# ---- drawing


def _draw(plan: Plan, inferencer: InterleaveInferencer) -> None:
    mine = list(plan.groups())
    total = sum(len(group) for _, group in mine) * plan.pictures
    with Bar("pictures", total, shown=plan.rank == 0) as shown:
        for first, group in mine:
            for batch in _batches(plan, first, group, inferencer):
                if not all(plan.is_done(one.asked, one.k) for one in batch):
                    _answer(plan, batch, inferencer)
                shown.update(len(batch))
            for one in group:
                if plan.layout.grid and not plan.is_whole(one):
                    _join(plan, one)


def _batches(
    plan: Plan, first: int, group: Sequence[Asked], inferencer: InterleaveInferencer
) -> Iterator[list[Drawing]]:
    """The pictures of some records as they are drawn together. Of the seeds and the batches no one depends on
    the number of processes, nor on what is done."""
    o, count = plan.options, plan.pictures
    same = plan.preset is not None and plan.preset.one_seed
    assert o.seed is not None
    drawings = [
        Drawing(one, k, o.seed + (0 if same else (first + n) * count + k), _shape(plan, one, inferencer))
        for n, one in enumerate(group)
        for k in range(count)
    ]
    for _, alike in groupby(drawings, key=lambda drawing: drawing.shape):
        ones = list(alike)
        yield from (ones[start : start + o.batch_size] for start in range(0, len(ones), o.batch_size))


def _shape(plan: Plan, asked: Asked, inferencer: InterleaveInferencer) -> tuple[int, int] | None:
    """Of several pictures the reference draws in the size of the first; by itself a canvas has the last
    one's."""
    if len(asked.pictures) < 2 or plan.preset is None or plan.options.height is not None:
        return None
    width, height = inferencer.vae_transform.size(*image_size(asked.pictures[0]))
    return height, width


def _answer(plan: Plan, batch: Sequence[Drawing], inferencer: InterleaveInferencer) -> None:
    """Draws a batch, and writes what is not there of it."""
    options = plan.options
    if batch[0].shape is not None:
        options = replace(options, height=batch[0].shape[0], width=batch[0].shape[1])
    answers = inferencer.unified_generate_batch(
        [_prompt(one.asked) for one in batch], outputs=["image"], options=options, seed=batch[0].seed
    )
    for one, pieces in zip(batch, answers, strict=True):
        if plan.is_done(one.asked, one.k):
            continue
        path = plan.file(one.asked, one.k)
        path.parent.mkdir(parents=True, exist_ok=True)
        for kind, place in plan.beside(one.asked, one.k).items():
            _write_beside(kind, one.asked, place)
        thought = [piece for piece in pieces if isinstance(piece, str)]
        if thought:
            _write(plan.thought(one.asked, one.k), thought[0].encode("utf-8", "replace"))
        with atomic(path) as file:
            pieces[-1].save(file, format="PNG")


def _write_beside(kind: str, asked: Asked, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "record":
        _write(path, json.dumps(asked.record).encode())
    else:
        with atomic(path) as file:
            open_image(asked.pictures[0]).save(file, format="PNG")


def _write(path: Path, data: bytes) -> None:
    with atomic(path) as file:
        file.write(data)


# ---- what all pictures make


def _join(plan: Plan, asked: Asked) -> None:
    """The pictures of a record as quarters of one: the first two above, the others below."""
    files = [plan.file(asked, k) for k in range(plan.pictures)]
    quarters = [open_image(file) for file in files]
    width, height = quarters[0].size
    rows = (len(quarters) + 1) // 2
    whole = quarters[0].crop((0, 0, width * min(len(quarters), 2), height * rows))
    for k, quarter in enumerate(quarters):
        whole.paste(quarter, (k % 2 * width, k // 2 * height))
    with atomic(plan.folder / asked.places[0]) as file:
        whole.save(file, format="PNG")
    for file_ in files:
        file_.unlink(missing_ok=True)


def _finish(plan: Plan) -> None:
    """Writes the lists of all pictures once all are there, and says what is."""
    lacking = sum(not plan.is_whole(one) for one in plan.asked)
    if lacking:
        done = len(plan.asked) - lacking
        say(f"{done:,} of {len(plan.asked):,} prompts are drawn; the other shards draw the rest")
        return
    for path, held in plan.lists().items():
        _write(path, json_of(held, indent=1).encode() + b"\n")
    shutil.rmtree(plan.folder / STATE / QUARTERED, ignore_errors=True)
    say(f"{len(plan.asked):,} prompts are drawn in {plan.folder}; how: {plan.folder / STATE / ABOUT}")
