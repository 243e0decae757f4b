#!/usr/bin/env python
"""Compiles the kernels of training for GPUs on a machine without one, and checks them.

    make gpu-compile
    make gpu-compile GPU_ARGS="--cards sm_90 --models bagel-7b --parts flex"

Flex attention and the compiled parts of a decoder layer, forward and backward, are lowered and compiled for
each card. Checked: everything compiles; every kernel fits the card's shared memory; attention uses tensor
cores; no more is spilled than ``SPILLS`` says. One JSON line a kernel, then a table; the exit status is
non-zero where a check fails. Nothing is executed, so nothing here says how fast a kernel is or that its
result is right. A layer's own matrix products are cuBLAS's and not compiled here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from pretended_gpu import CARDS, INSTRUCTION, Binary, Card, PretendedGPU, disassembled, tensor_core_counts

from unigen.config import ConfigError
from unigen.model import flex, mot
from unigen.model.backends import use_tf32
from unigen.model.compiling import CompiledLayers, reason_of
from unigen.sequence.pack import Geometry, pack_blocks
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Block, Kind, Pack
from unigen.training.precision import DeviceFacts, Precision, check_head_width


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder that its kernels depend on."""

    heads: int
    kv_heads: int
    width: int  # of a head
    hidden: int
    inner: int  # of the MLP
    dtype: torch.dtype = torch.bfloat16  # of what attention gets; float32 multiplies in TF32

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=self.width,
            hidden_size=self.hidden, intermediate_size=self.inner, rms_norm_eps=1e-6,
        )  # fmt: skip


MODELS = {
    "bagel-7b": Model(28, 4, 128, 3584, 18944),
    "small-64": Model(4, 2, 64, 256, 512),
    "small-32": Model(4, 2, 32, 128, 256),
    "small-16": Model(4, 2, 16, 64, 128),
    "bagel-7b-float32": Model(28, 4, 128, 3584, 18944, torch.float32),
    "small-64-float32": Model(4, 2, 64, 256, 512, torch.float32),
}
PARTS = ("flex", "layer")
LENGTHS = (60, 107, 128, 300, 1000, 16384)
"""Tokens of packed sequences: less than a block of 128, about one, several, and as many as a recipe's."""

HALVES = (300, 3000, 16384)
"""Tokens of the half that a layer's part gets; Inductor fuses reductions of few and of many differently."""

FLOAT32_LENGTHS = (300,)
"""The lengths for float32, which is not what anybody trains large models in."""

SPILLS: dict[tuple[str, str, str, str], int] = {
    ("bagel-7b", "flex", "backward", "sm_90"): 392,
    ("bagel-7b", "flex", "backward", "sm_89"): 512,
    ("bagel-7b", "flex", "backward", "sm_120"): 904,
    ("small-64", "flex", "forward", "sm_90"): 48,
    ("small-64", "flex", "backward", "sm_90"): 16,
    ("small-64", "flex", "inference", "sm_90"): 48,
    ("small-64", "flex", "backward", "sm_89"): 128,
    ("small-64", "flex", "inference", "sm_89"): 8,
    ("small-64", "flex", "forward", "sm_120"): 24,
    ("small-64", "flex", "backward", "sm_120"): 168,
    ("small-64", "flex", "inference", "sm_120"): 24,
    ("small-32", "flex", "backward", "sm_89"): 8,
    ("small-32", "flex", "backward", "sm_120"): 32,
}
"""Bytes that a thread may spill, by model, part, direction and card; 0 where nothing is written down.

Measured: the most of the versions that ``pretended_gpu.py`` names.
"""


class Case(NamedTuple):
    """What is compiled for which card."""

    card: str
    model: str
    part: str  # flex, before (attention), after (attention)


@dataclass(frozen=True)
class Line:
    """What is printed of one kernel, or of one call that did not compile."""

    card: str
    model: str
    part: str  # flex, before (attention), after (attention)
    direction: str
    tokens: int  # of the call that had it compiled
    kernel: str
    configurations: int  # that fit the card; the other numbers are of the one that spills least
    registers: int
    spill_bytes: int
    spill_limit: int
    shared_bytes: int
    shared_limit: int
    tensor_cores: str  # wgmma or mma.sync; empty: none
    tensor_core_instructions: int
    failure: str  # empty: passed


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if not torch.version.cuda:
        print(f"PyTorch {torch.__version__} is not a build for CUDA. Fix: make gpu-compile", file=sys.stderr)
        return 2
    if options.here:
        (card,) = options.cards
        for line in compile_all(card, options.models, options.parts):
            print(json.dumps(asdict(line)), flush=True)
        return 0
    lines, ended = [], []
    for card in options.cards:
        found, status = in_a_process(card, options)
        lines += found
        ended += [card] if status else []
    print("\n".join(table(lines)))
    bad = [line for line in lines if line.failure]
    for line in bad:
        where = f"{line.card} {line.model} {line.part} {line.direction}, {line.tokens} tokens"
        print(f"FAILED {where}: {line.kernel}: {line.failure}")
    for card in ended:
        print(f"FAILED {card}: the process that compiles for it ended early")
    passed = bool(lines) and not bad and not ended
    verdict = "all passed" if passed else f"{len(bad) + len(ended)} failed"
    print(f"{len(lines)} kernels, PyTorch {torch.__version__}, Triton {version('triton')}: {verdict}")
    return 0 if passed else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compile the kernels of training for GPUs, and check them.")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS), help="compute capabilities")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="sizes of decoders")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of a decoder layer")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one card, in this process
    return parser.parse_args(argv)


def version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def in_a_process(card: str, options: argparse.Namespace) -> tuple[list[Line], int]:
    """Compiles for a card in a process and with caches of its own; lines are passed on as they come."""
    command = [sys.executable, str(Path(__file__).resolve()), "--here", "--cards", card]
    command += ["--models", *options.models, "--parts", *options.parts]
    lines = []
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        environment = os.environ | caches | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for text in process.stdout:
                print(text, end="", flush=True)
                lines.append(Line(**json.loads(text)))
    return lines, process.returncode


# ---- what is compiled


def compile_all(card: str, models: Sequence[str], parts: Sequence[str]) -> Iterator[Line]:
    """Every kernel of the models' parts on a card."""
    torch.set_num_threads(1)
    use_tf32()
    gpu = PretendedGPU(CARDS[card])
    for model in models:
        if is_refused(MODELS[model], CARDS[card]):
            continue
        if "flex" in parts:
            yield from compile_calls(gpu, Case(card, model, "flex"), flex_calls(MODELS[model]))
        if "layer" in parts and MODELS[model].dtype == torch.bfloat16:
            for part in ("before", "after"):
                yield from compile_calls(gpu, Case(card, model, part), layer_calls(MODELS[model], part))


def is_refused(model: Model, card: Card) -> bool:
    """Does training refuse the model on the card, since float32 takes too much shared memory?"""
    precision = Precision({torch.bfloat16: "bf16", torch.float32: "fp32"}[model.dtype], "")
    facts = DeviceFacts("cuda", card.example, has_bf16=True, shared_memory=card.shared)
    try:
        check_head_width(precision, model.width, facts)
    except ConfigError:
        return True
    return False


Call = tuple[int, bool, Callable[[], Any]]  # tokens, with gradients?, what to call


def compile_calls(gpu: PretendedGPU, case: Case, calls: Iterator[Call]) -> Iterator[Line]:
    """The kernels of a run that makes these calls one after another; many of them need no new ones."""
    torch._dynamo.reset()
    for tokens, gradients, call in calls:
        direction = "forward" if gradients else "inference"
        try:
            with torch.set_grad_enabled(gradients):
                graphs = gpu.compile(call)
        except Exception as error:
            yield failed(case, direction, tokens, reason_of(error))
            continue
        for graph in graphs:
            if case.part == "flex" and not any(map(is_attention, graph.kernels)):
                yield failed(case, graph.direction, tokens, "no kernel of attention was compiled")
            for binaries in graph.kernels.values():
                yield judged(case, graph.direction, tokens, binaries)


def packed(tokens: int) -> Pack:
    """A packed sequence: a text, and where there is more than a block of tokens a noised picture."""
    n_text = tokens // 3 if tokens > 128 else tokens
    blocks = [Block(Kind.TEXT, n_text - 2, ids=[0] * (n_text - 2))]
    if tokens > n_text:
        blocks.append(Block(Kind.NOISED, tokens - n_text - 2, grid=(tokens - n_text - 2, 1)))
    sizes = Geometry(16, 2, patch_dim=64, max_latent_size=64, vit_patch=14, vit_side=70)
    return pack_blocks([blocks], SpecialIds(1, 2, 3, 4, 5), sizes, masks=True)


def flex_calls(model: Model) -> Iterator[Call]:
    """Flex attention as in training, called with the halves of packed sequences.

    Past ``Flex.__call__``, which would answer an error of the compiler by falling back.
    """
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        flex._compiled()  # is remembered
    on_gpu = flex._options(True)
    with mock.patch.object(flex, "_options", lambda _: on_gpu):
        for gradients in (True, False):
            for tokens in LENGTHS if model.dtype == torch.bfloat16 else FLOAT32_LENGTHS:
                pack = packed(tokens)
                sizes = (pack.n_und, len(pack) - pack.n_und)
                heads = (model.heads, model.kv_heads, model.kv_heads)
                blank = partial(torch.empty, dtype=model.dtype, requires_grad=gradients)
                halves = [tuple(blank(n, h, model.width) for n in sizes) for h in heads]
                yield tokens, gradients, lambda pack=pack, halves=halves: flex.Flex(pack)._flex(*halves)


def layer_calls(model: Model, name: str) -> Iterator[Call]:
    """A compiled part of a decoder layer, called with one expert's half under autocast, as in training."""
    with torch.device("meta"):
        layer = mot.Layer(model.config, visual_gen=True)
    layer = layer.to_empty(device="cpu").train()
    decoder = SimpleNamespace(layers=[layer])
    CompiledLayers(SimpleNamespace(language_model=SimpleNamespace(model=decoder)), strict=True)
    part = getattr(layer, name)
    for gradients in (True, False):
        for tokens in HALVES:
            x = torch.empty(tokens, model.hidden, requires_grad=gradients)
            angles = torch.empty(tokens, 1, model.width)
            shape = (tokens, model.heads, model.width)
            attended = torch.empty(shape, dtype=torch.bfloat16, requires_grad=gradients)
            more = {"before": (angles, angles), "after": (attended,)}[name]

            def call(inputs: tuple[torch.Tensor, ...] = (x, *more)) -> None:
                with torch.autocast("cpu", torch.bfloat16):  # the traced graph holds the casts
                    part(*inputs, mot.GEN)

            yield tokens, gradients, call


def failed(case: Case, direction: str, tokens: int, why: str) -> Line:
    """The line of what has no kernel."""
    return Line(*case, direction, tokens, "", 0, 0, 0, 0, 0, CARDS[case.card].shared, "", 0, why)


# ---- judging


def judged(case: Case, direction: str, tokens: int, binaries: Sequence[Binary]) -> Line:
    """The line of a kernel, given the configurations of it that fit the card."""
    limits = CARDS[case.card]
    best = min(binaries, key=lambda binary: (binary.spill, binary.shared))
    allowed = SPILLS.get((case.model, case.part, direction, case.card), 0)
    products = is_attention(best.kernel)
    counts = tensor_core_counts(disassembled(best.code)) if products else {}
    opcode = max(counts, key=lambda name: counts[name], default="")
    wanted = (limits.tensor_cores,) if MODELS[case.model].dtype == torch.bfloat16 else tuple(INSTRUCTION)
    failure = complaint(limits, best, allowed, opcode, wanted if products else ())
    return Line(
        *case, direction, tokens, best.kernel, len(binaries), best.registers, best.spill, allowed,
        best.shared, limits.shared, INSTRUCTION.get(opcode, opcode), counts[opcode] if opcode else 0, failure,
    )  # fmt: skip


def is_attention(kernel: str) -> bool:
    """Is it a kernel that multiplies matrices? Inductor names what it makes from templates so."""
    return kernel.startswith("triton_tem_")


def complaint(limits: Card, kernel: Binary, spill_limit: int, opcode: str, wanted: Sequence[str]) -> str:
    """What is wrong with a kernel; empty: nothing. Its ``opcode`` should be one of ``wanted``, if any."""
    if kernel.shared > limits.shared:
        return f"{kernel.shared} bytes of shared memory, and the card has {limits.shared}"
    if kernel.spill > spill_limit:
        return f"spills {kernel.spill} bytes a thread; the table allows {spill_limit}"
    if wanted and opcode not in wanted:
        used = INSTRUCTION.get(opcode, opcode) or "no tensor cores"
        return f"uses {used}, not {' or '.join(INSTRUCTION[name] for name in wanted)}"
    return ""


def table(lines: Sequence[Line]) -> list[str]:
    """Lines of text: a kernel of attention each, a part's others together; the most of each number."""
    rows: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        kernel = line.kernel if is_attention(line.kernel) or not line.kernel else "others"
        rows.setdefault((line.card, line.model, line.part, line.direction, kernel), []).append(line)
    names = "card,model,part,direction,kernel,kernels,registers,spill,shared,tensor cores,result"
    head = tuple(names.split(","))
    cells = [head]
    for key, group in rows.items():
        numbers = ("registers", "spill_bytes", "shared_bytes")
        worst = [str(max(getattr(line, name) for line in group)) for name in numbers]
        cores = max(group, key=lambda line: line.tensor_core_instructions)
        used = f"{cores.tensor_core_instructions} {cores.tensor_cores}" if cores.tensor_cores else "-"
        result = "FAILED" if any(line.failure for line in group) else "pass"
        cells.append((*key, str(len(group)), *worst, used, result))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    padded = ([text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in cells)
    return ["  ".join(row).rstrip() for row in padded]


if __name__ == "__main__":
    sys.exit(main())
