"""Memory of training steps on this CPU beside what is planned: ``python benchmarks/plan.py [--only NAME ...]``.

Each configuration runs in a process of its own: a model with random weights takes two optimiser steps, and the
most resident memory of the process (VmHWM), less what lay there before the model was made (the program), stands
beside the plan of ``unigen/training/memory_plan.py``. Freed memory goes back
to the system at once (``MALLOC_MMAP_THRESHOLD_``), so that what is measured is what was in use.
``tests/training/test_memory_plan.py`` runs one of them, and counts bytes of many more on small models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, SiglipVisionConfig

from unigen.config import Config
from unigen.model.bagel import Bagel
from unigen.model.codec import PixelCodec, VaeConfig
from unigen.model.config import BagelConfig
from unigen.model.parts import dtype_of
from unigen.model.quantise import holds_quantised, store
from unigen.model.sizes import Load
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Block, Kind, Pack
from unigen.training.ema import EMA
from unigen.training.engine import Engine, open_engine
from unigen.training.memory_plan import PROGRAM, Machine, MemoryPlan, plan_memory, resident_peak
from unigen.training.prepare import prepare
from unigen.training.step import Counts, forward_backward

GB = 1e9


@dataclass(frozen=True)
class Size:
    """A model and a packed sequence."""

    hidden: int = 768
    inner: int = 3072
    layers: int = 6
    vocabulary: int = 8192
    vit: int = 256
    side: int = 24  # latent tokens along a side of the picture to draw
    seen: int = 12  # ViT tokens along a side of the picture to see
    text: int = 200
    samples: int = 1


TINY = Size(hidden=128, inner=448, layers=3, vocabulary=512, vit=64, side=16, seen=8, text=100)
AGAIN = {"gradient_checkpointing": True}
LONG = {"side": 48, "text": 600}


@dataclass(frozen=True)
class Case:
    """A configuration: options of the run, and what of :class:`Size` is another."""

    options: dict[str, Any] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)


CASES = {
    "everything": Case(),
    "everything, average": Case({"ema": 0.999}),
    "everything, longer": Case(size=LONG),
    "everything, longer, recomputed": Case(AGAIN, LONG),
    "everything, longer, selective": Case({**AGAIN, "checkpointing_policy": "selective"}, LONG),
    "everything, two micro-batches, bf16": Case(
        {"gradient_accumulation_steps": 2, "precision": "bf16"}, LONG
    ),
    "drawing, longer": Case({"freeze_und": True, "freeze_vit": True}, LONG),
    "reading": Case({"visual_gen": False}, {"text": 1200, "hidden": 1024, "inner": 4096}),
    "adapters, wider": Case({"lora_rank": 64}, {"hidden": 1024, "inner": 4096, "side": 32}),
    "adapters of both, recomputed": Case(
        {"lora_rank": 64, "lora_targets": ["both"], **AGAIN}, {"hidden": 1024, "inner": 4096, "side": 48}
    ),
}


def model_config(size: Size, **parts: bool) -> BagelConfig:
    """The shape of the model; its latents are pixels."""
    llm = Qwen2Config(
        hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64, num_key_value_heads=2, vocab_size=size.vocabulary,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, tie_word_embeddings=False,
    )  # fmt: skip
    vit = SiglipVisionConfig(
        hidden_size=size.vit, intermediate_size=5 * size.vit // 2, num_hidden_layers=3, num_attention_heads=4,
        image_size=980, patch_size=14,
    )  # fmt: skip
    return BagelConfig(llm, vit, VaeConfig(type="pixel", downsample=4, z_channels=16), **parts)


def packed(config: BagelConfig, size: Size) -> Pack:
    """Samples of a picture to see, a text to write, and a picture to draw."""
    found = []
    for _ in range(size.samples):
        patches = torch.zeros(size.seen**2, 588, dtype=torch.uint8)
        sample = [Block(Kind.VIT, size.seen**2, 0, (size.seen, size.seen), patches=patches)]
        sample += [Block(Kind.TEXT, size.text, ids=[7] * size.text, loss=True)]
        if config.visual_gen:
            side = size.side
            drawn: dict[str, Any] = {"latent": torch.randn(16, side * 2, side * 2), "u": 0.3, "loss": True}
            noise = torch.randn(side * side, config.patch_dim)
            sample += [Block(Kind.NOISED, side * side, 1, (side, side), noise=noise, **drawn)]
        found.append(sample)
    return pack_blocks(found, SpecialIds(1, 2, 3, 4, 5), config.geometry)


def engine_of(config: Config, model: BagelConfig) -> Engine:
    """A training engine with random weights, prepared as a run with these options does."""
    engine = open_engine(config)
    with torch.device("meta"):
        made = Bagel(model)
    for name, p in list(made.named_parameters()):
        value = torch.empty(p.shape, dtype=dtype_of(name, config, engine.dtype), device="meta")
        _put(made, name, torch.nn.Parameter(value, requires_grad=p.requires_grad))
    engine.compiled = prepare(made, config, engine.device.type, "single", engine.dtype)
    for name, p in list(made.named_parameters()):
        owner, _, last = name.rpartition(".")
        if last == "weight" and holds_quantised(made.get_submodule(owner)):
            store(made.get_submodule(owner), torch.empty(p.shape, device=engine.device).normal_(std=0.02))
        else:
            value = torch.empty(p.shape, dtype=p.dtype, device=engine.device).normal_(std=0.02)
            _put(made, name, torch.nn.Parameter(value, requires_grad=p.requires_grad))
    if model.vae.type == "pixel":
        object.__setattr__(made, "codec", PixelCodec(model.vae))
    engine.model = made.train()
    engine.start()
    return engine


def _put(model: Bagel, name: str, value: torch.nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, value)


def setting(case: Case) -> tuple[Config, BagelConfig, Pack]:
    """What a configuration runs."""
    size = Size(**case.size)
    config = Config(device="cpu", **{"precision": "fp32", **case.options})
    model = model_config(size, visual_gen=config.visual_gen)
    return config, model, packed(model, size)


def planned(case: Case) -> MemoryPlan:
    """Its plan."""
    config, model, pack = setting(case)
    computes = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return plan_memory(model, config, Load.of(pack), Machine.of(config, "cpu", 1, computes))


def steps_peak(plan: MemoryPlan) -> dict[str, float]:
    """What lies there at the peak of a step, when no checkpoint is written."""
    steps = {name: found for name, found in plan.moments.items() if name != "save"}
    return max(steps.values(), key=lambda found: sum(found.values()))


def run(case: Case) -> None:
    """Takes two steps; prints the bytes of the process before the model was made, and at most."""
    config, model, pack = setting(case)
    before = resident_peak()
    torch.set_num_threads(1)
    engine = engine_of(config, model)
    average = EMA(engine.shards(), config.ema) if config.ema else None
    packs = [pack] * config.gradient_accumulation_steps
    for _ in range(2):
        for _ in forward_backward(engine, packs, Counts.of(packs), config):
            pass
        engine.step(1e-4, engine.grad_norm())
        if average is not None:
            average.update()
    print(json.dumps([before, resident_peak()]))


def measured(name: str) -> tuple[int, int]:
    """Bytes that the process of a configuration had before the model was made, and at most."""
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--run", name], env=env, capture_output=True, text=True, check=True
    )
    before, most = json.loads(done.stdout.splitlines()[-1])
    return before, most


def row(name: str) -> tuple[dict[str, float], int, int]:
    """The plan of a configuration at its peak, and what :func:`measured` says of it."""
    return steps_peak(planned(CASES[name])), *measured(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(CASES[options.run])
        return
    print("| configuration | process, at most | of it the program | the rest, measured | planned | off |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.only:
        plan, before, most = row(name)
        rest, planned_rest = most - before, sum(plan.values()) - PROGRAM
        print(
            f"| {name} | {most / GB:.2f} GB | {before / GB:.2f} GB | {rest / GB:.2f} GB |"
            f" {planned_rest / GB:.2f} GB | {planned_rest / rest - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
