"""Start and step of training adapters, beside training all weights, on this CPU.

    python benchmarks/adapters.py --repeats 3    two minutes, on a machine that does nothing else
    python benchmarks/adapters.py --small        seconds; tells only that the script works

Model and packed sequence are those of train_step.py: hidden 512, 8 layers, 2,872 tokens, float32, no gradient
checkpointing; adapters have rank 64. A start takes the model from its folder until it is ready to train
(weights, adapters, quantising, optimiser); a step is forward, backward and update. All variants run in turn.
What peft and bitsandbytes take to be imported comes once more to the first start of a process.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import in_turn
import torch
from in_turn import PLAIN
from small_bagel import FULL, SMALL, build_model, training_pack

from unigen.config import Config
from unigen.model.hub import without_hub_kernels
from unigen.model.weights import save_bagel
from unigen.sequence.types import Pack
from unigen.training.engine import Engine, open_engine
from unigen.training.step import Counts, forward_backward

BOTH = {"lora_targets": ["both"]}
VARIANTS: dict[str, dict[str, Any] | None] = {  # None: all weights train
    PLAIN: None,
    "LoRA of the generation expert": {},
    "LoRA of both experts": BOTH,
    "DoRA of both experts": BOTH | {"lora_variant": "dora"},
    "LoRA of both over NF4": BOTH | {"quantize": "nf4"},
    "LoRA of both over INT8": BOTH | {"quantize": "int8"},
}


def opened(folder: Path, given: dict[str, Any] | None, rank: int) -> Engine:
    """A training that is ready for its first step."""
    options = {} if given is None else {"lora_rank": rank, **given}
    engine = open_engine(Config(device="cpu", precision="fp32", model_path=str(folder), **options))
    engine.load_model(folder)
    engine.start()
    return engine


def step(engine: Engine, pack: Pack) -> None:
    """One step of training."""
    for _ in forward_backward(engine, [pack], Counts.of([pack]), engine.config):
        pass
    engine.step(1e-4, engine.grad_norm())


def imported() -> dict[str, float]:
    """Seconds that the libraries of adapters and of quantised matrices take to be imported."""
    found = {}
    with without_hub_kernels():
        for name in ("bitsandbytes", "peft"):
            began = time.perf_counter()
            importlib.import_module(name)
            found[name] = time.perf_counter() - began
    return found


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The results as JSON values, and as lines to read."""
    size, rank = (SMALL, 8) if options.small else (FULL, 64)
    imports = imported()
    with tempfile.TemporaryDirectory() as place:
        folder, model = Path(place) / "model", build_model(size)
        save_bagel(model, folder)
        pack = training_pack(model.config, size)
        del model
        starts = {name: lambda given=given: opened(folder, given, rank) for name, given in VARIANTS.items()}
        start = in_turn.time_in_turn(starts, options)
        engines = {name: opened(folder, given, rank) for name, given in VARIANTS.items()}
        steps = in_turn.time_in_turn(
            {name: lambda engine=engine: step(engine, pack) for name, engine in engines.items()}, options
        )
    trained = {name: sum(s.numel for s in e.shards() if s.trains) for name, e in engines.items()}
    times = {"start": start, "step": steps}
    results = {
        "benchmark": "adapters", "small": options.small, "machine": in_turn.machine(), "tokens": len(pack),
        "imports": imports, "trained": trained, "times": {name: t.to_dict() for name, t in times.items()},
    }  # fmt: skip
    lines = [in_turn.headline(results), f"{PLAIN}: all weights train; {len(pack):,} tokens"]
    lines.append(", ".join(f"import of {name} {seconds:.2f} s" for name, seconds in imports.items()))
    for name, found in times.items():
        lines += ["", in_turn.HEAD, *in_turn.table(name, found)]
    return results, [*lines, "", *(f"{count:>12,} train: {name}" for name, count in trained.items())]


def main(arguments: Sequence[str] | None = None) -> None:
    torch.manual_seed(0)
    in_turn.run(measure, in_turn.parser(__doc__), arguments)


if __name__ == "__main__":
    main()
