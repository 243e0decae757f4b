"""The part of ``gpu.py`` that trains adapters over the whole model: memory against the card's and the plan."""

from __future__ import annotations

import torch
from gpu_setup import GB, Here, forget_peak, fresh, packed, peak, published, say, seconds, tried
from plan import engine_of

from unigen.commands.plan.command import room_of
from unigen.config import Config
from unigen.model.sizes import Load
from unigen.training.memory_plan import Machine, plan_memory
from unigen.training.step import Counts, forward_backward

QLORA = {
    "quantize": "nf4", "double_quant": True, "optimizer": "adamw8bit", "freeze_und": True,
    "checkpointing_policy": "offload",
}  # fmt: skip
# name -> pictures of 1024 x 1024 (4,098 tokens and a short text each), options, gigabytes of the card's name
RUNS = {
    "QLoRA, 4k tokens, 16 GB": (1, QLORA, 16),
    "QLoRA, 16k tokens, 24 GB": (4, QLORA, 24),
    "QLoRA, 16k tokens, all on the GPU": (4, QLORA | {"checkpointing_policy": "full"}, 32),
    "LoRA bf16, 12k tokens, 48 GB": (3, {}, 48),
}


def adapters() -> None:
    """Two optimiser steps with the published shape and random weights."""
    for name, (pictures, options, card) in RUNS.items():
        with tried(name):
            fresh()
            model = published(2 if Here.small else 28)
            config = Config(
                device=Here.device, precision="bf16", compile="off", gradient_checkpointing=True,
                **{"lora_rank": 64, **options},
            )  # fmt: skip
            engine, pack = engine_of(config, model), packed(model, "drawing", pictures)
            counts = Counts.of([pack])

            def step(engine=engine, pack=pack, counts=counts, config=config) -> None:
                for _ in forward_backward(engine, [pack], counts, config):
                    pass
                engine.step(1e-4, engine.grad_norm())

            forget_peak()
            step()
            took = seconds(step, repeats=1, warm=0)
            planned = plan_memory(model, config, Load.of(pack), Machine(Here.device, computes=torch.bfloat16))
            tensors = sum(n for part, n in planned.at_peak.items() if part not in ("program", "fragments"))
            # the VAE is not loaded here
            expected = (tensors - planned.at_peak["vae"]) / GB
            room = room_of(card) / GB
            say(f"{name}: peak", peak(), "GB", formula=expected, room=room, planned=planned.peak / GB)
            say(f"{name}: tokens a second", len(pack) / took, "tokens/s", tokens=len(pack))
