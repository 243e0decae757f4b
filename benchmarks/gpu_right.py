"""Parts of ``gpu.py`` that ask whether the GPU computes what it should."""

from __future__ import annotations

import io
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import compare_reference as reference
import tiny_model as tiny
import torch
from gpu_setup import (
    GOLDEN,
    ROOT,
    Here,
    attention_of,
    fresh,
    packed,
    pairs,
    published,
    say,
    seconds,
    sync,
    tried,
)
from torch import Tensor

import unigen.model.flex
from unigen import cli
from unigen.config import Config
from unigen.model.mask import Tokens, allowed
from unigen.model.weights import load_bagel
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Kind, Pack
from unigen.training.step import loss_sums
from unigen.training.trainer import UnifiedTrainer

# ---- attention

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
HEADS = [
    (BFLOAT16, 28, 4, 128),
    (BFLOAT16, 4, 2, 16),
    (FLOAT32, 4, 2, 16),
    (FLOAT32, 28, 4, 128),
    (BFLOAT16, 4, 2, 32),
    (FLOAT32, 4, 2, 32),
]
LENGTHS = (
    107,
    60,
    128,
    300,
    1000,
)  # 65 to 127 tokens and a power of two of heads a group chose kernels that fail


def flex() -> None:
    """Training's attention against dense float64 attention, and its speed at the published size."""
    for dtype, heads, kv_heads, width in HEADS:
        if Here.small and width > 32:
            continue
        name = f"{str(dtype)[6:]} heads {heads}/{kv_heads} of {width}"
        fresh()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for tokens in LENGTHS:
            with tried(f"{name}, {tokens} tokens: error"):
                began = time.perf_counter()
                errors = attention_errors(dtype, heads, kv_heads, width, tokens)
                took = time.perf_counter() - began
                say(f"{name}, {tokens} tokens: error", max(errors.values()), of=errors, seconds=took)
        say(f"{name}: compilations", torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        if width == published().llm.hidden_size // published().llm.num_attention_heads and dtype == BFLOAT16:
            attention_speed()
    say("fell back to other attention", float(bool(unigen.model.flex._broken)), why=unigen.model.flex._broken)


def attention_errors(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, tokens: int
) -> dict[str, float]:
    """Relative errors (2-norms) of the result and of three gradients."""
    pack = two_samples(tokens)
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(tokens, n, width, generator=g).to(Here.device, dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    way = torch.randn(tokens, heads, width, generator=g).to(Here.device, dtype)
    out = attention_of(pack)(q, k, v)
    ours = (out.detach(), *torch.autograd.grad((out * way).sum(), (q, k, v)))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    dense = dense_attention(*exact, pack)
    theirs = (dense.detach(), *torch.autograd.grad((dense * way.double()).sum(), exact))
    names = ("out", "dq", "dk", "dv")
    return {
        name: float((a.double() - b).norm() / b.norm())
        for name, a, b in zip(names, ours, theirs, strict=True)
    }


def two_samples(tokens: int) -> Pack:
    """A packed sequence of so many tokens: a text and a noised image, and a text."""
    r, model = random.Random(tokens), tiny.build()
    half = (tokens - 6) // 2
    rows = next(n for n in range(int((half / 2) ** 0.5), 0, -1) if (half - half // 2) % n == 0)
    grid = (rows, (half - half // 2) // rows)
    samples = [
        [tiny.text(r, half // 2), tiny.image(r, Kind.NOISED, grid=grid)],
        [tiny.text(r, tokens - half - 6)],
    ]
    pack = tiny.row(samples, model).to(Here.device)
    assert len(pack) == tokens, len(pack)
    return pack


def dense_attention(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    """The mask rule, written out: q [T, H, d], k and v [T, G, d] -> [T, H, d]."""
    tokens, group = Tokens.of(pack), q.shape[1] // k.shape[1]
    mask = allowed(tokens.unsqueeze(1), tokens.unsqueeze(0))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def attention_speed() -> None:
    """TFLOP/s over the pairs that attend (4 and 14 FLOPs a pair and number of a head), and getting ready."""
    c = published().llm
    heads, kv_heads, width = (
        c.num_attention_heads,
        c.num_key_value_heads,
        c.hidden_size // c.num_attention_heads,
    )
    for what in ("drawing", "edit"):
        with tried(f"attention {what}"):
            pack = packed(published(), what)
            number = pairs(pack) * heads * width
            q, k, v = (
                torch.randn(len(pack), n, width, device=Here.device, dtype=BFLOAT16, requires_grad=True)
                for n in (heads, kv_heads, kv_heads)
            )
            attention = attention_of(pack)
            way = torch.randn_like(q)
            forward = seconds(lambda attention=attention, qkv=(q, k, v): attention(*qkv))
            both = seconds(lambda attention=attention, qkv=(q, k, v), way=way: attention(*qkv).backward(way))
            say(
                f"attention {what}: forward",
                4 * number / forward / 1e12,
                "TFLOP/s",
                ms=forward * 1e3,
                tokens=len(pack),
            )
            say(
                f"attention {what}: forward and backward", 14 * number / both / 1e12, "TFLOP/s", ms=both * 1e3
            )
            say(f"attention {what}: made ready", seconds(lambda pack=pack: attention_of(pack)) * 1e3, "ms")


# ---- the reference's numbers


def agree() -> None:
    """The golden checkpoint: the reference's losses, gradients, tokens, latents; bfloat16 against float32."""
    torch.backends.cudnn.allow_tf32 = False  # the VAE's convolutions would round to TF32, which is no error
    worst: dict[str, tuple[float, str]] = {}
    with tried("reference: all cases"):
        for case, error, tolerance in reference.run(GOLDEN, Here.device):
            group = case.split(":")[0]
            ratio = error / tolerance if tolerance else float(error > 0) * 2
            worst[group] = max(
                worst.get(group, (-1.0, "")), (ratio if ratio == ratio else float("inf"), case)
            )
        for group, (ratio, case) in worst.items():
            say(f"reference: {group}", ratio, "of the tolerance", worst=case)
    fresh()
    with tried("bfloat16: losses"):
        wanted, gradients = golden_step(bf16=False)
        losses, ours = golden_step(bf16=True)
        say(
            "bfloat16: losses",
            max(abs(a - b) / b for a, b in zip(losses, wanted, strict=True)),
            float32=wanted,
            bfloat16=losses,
        )
        squares = sum(float(((ours[n] - g) ** 2).sum()) for n, g in gradients.items()) / sum(
            float((g**2).sum()) for g in gradients.values()
        )
        say("bfloat16: gradients", squares**0.5)


def golden_step(bf16: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and gradients of the reference's edit case."""
    model = load_bagel(GOLDEN / "model", Here.device, torch.float32).requires_grad_(True)
    tokenizer = Tokenizer.load(GOLDEN / "model")
    case = json.loads((GOLDEN / "train_cases.json").read_text(encoding="utf-8"))["edit"]
    blocks = reference.reference_blocks(
        case, reference.load_file(GOLDEN / "train_edit.safetensors"), model, tokenizer
    )
    pack = pack_blocks(blocks, tokenizer.special, model.config.geometry).to(Here.device)
    with torch.autocast(Here.device, BFLOAT16, enabled=bf16):
        sums = loss_sums(model(pack))
    sum(sums).backward()
    losses = [x.item() for x in sums if x.item()]
    return losses, {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


# ---- training

VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {"precision": "bf16"},
    "not compiled": {"precision": "bf16", "compile": "off"},
    "draws only": {"precision": "bf16", "freeze_und": True, "freeze_vit": True},
    "float32": {"precision": "fp32"},
    "fsdp2": {"precision": "bf16", "engine": "fsdp2"},
    "8-bit Adam": {"precision": "bf16", "optimizer": "adamw8bit"},
    "selective": {"precision": "bf16", "gradient_checkpointing": True, "checkpointing_policy": "selective"},
    "fsdp2, offloaded": {"precision": "bf16", "engine": "fsdp2", "cpu_offload": True},
    "float16": {"precision": "fp16"},
}


def train() -> None:
    """`unigen train` on the golden checkpoint: as documented, then in many ways, each stopped and resumed."""
    place = Path(tempfile.mkdtemp(prefix="unigen-gpu-train-"))
    try:
        with tried("first documented command"):
            documented(place / "first")
        for name, options in VARIANTS.items():
            with tried(f"{name}: resumed"):
                resumed(name, place / name.replace(" ", "_"), options)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def documented(folder: Path) -> None:
    """The first block of docs/training.md that trains, word for word but for where it writes; less of it with
    --small."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    trains = "python train_unified_generation.py"
    block = next(c for c in re.findall(r"```bash\n(.*?)```", page, re.S) if trains in c)
    block = re.sub(r"\b(data|models)/", rf"{folder}-\1/", block.replace("\\\n", " "))
    less = {
        "shapes.py": ["--train", "4", "--val", "1"],
        trains.split()[1]: ["--device", "cpu", "--batch_size", "2"],
    }
    began = time.perf_counter()
    for line in block.splitlines():
        words = shlex.split(line)
        words = [
            str(folder) if before == "--output_dir" and trains in line else word
            for before, word in zip(["", *words], words)
        ]
        words += less.get(Path(words[1]).name, []) if Here.small else []
        if words[0] == "python" and trains not in line:
            subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
            continue
        code = cli.main(["train", *words[2:]] if trains in line else words[1:])
        if code:
            break
    losses = losses_of(folder)
    say("first documented command", code, "exit code", seconds=time.perf_counter() - began, steps=len(losses))
    say(
        "first documented command: loss",
        losses[-1] / losses[0],
        "of the first",
        first=losses[0],
        last=losses[-1],
    )


def resumed(name: str, folder: Path, options: dict[str, Any]) -> None:
    """A run, and the same run stopped half way and gone on with: the largest difference of their losses."""
    fresh()
    steps = 2 if Here.small else 4
    config = {
        "model_path": str(GOLDEN / "model"),
        "train_data_path": str(ROOT / "examples" / "sample_data_format.json"), "max_steps": steps,
        "learning_rate": 1e-3, "max_image_tokens": 16 if Here.small else 64, "logging_steps": 1,
        "device": Here.device, "num_workers": 0,
        "save_steps": steps // 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    again = folder.with_name(folder.name + "_again")
    began = time.perf_counter()
    UnifiedTrainer(Config(**config, output_dir=str(folder), **options)).train()
    once = time.perf_counter() - began
    shutil.copytree(folder, again)
    shutil.rmtree(again / f"step_{steps}")
    UnifiedTrainer(
        Config(
            **config,
            output_dir=str(again),
            resume_from_checkpoint=str(again / f"step_{steps // 2}"),
            **options,
        )
    ).train()
    whole, later = losses_of(folder), losses_of(again)[-steps // 2 :]
    differences = [abs(a - b) for a, b in zip(whole[-len(later) :], later, strict=True)]
    say(f"{name}: resumed", max(differences), "largest difference of losses", losses=whole, seconds=once)


def losses_of(folder: Path) -> list[float]:
    """The losses of a run, step by step."""
    return [
        json.loads(line)["loss"]
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


# ---- small things


def small() -> None:
    """Sequences that lack something (nothing of size zero may fail), and `unigen generate` from end to
    end."""
    model = tiny.build().to(Here.device).train()
    object.__setattr__(model, "codec", None)
    model.requires_grad_(True)
    r = random.Random(1)
    samples = {
        "no picture": [[tiny.text(r, 140, loss=True)]],
        "no label": [[tiny.text(r, 140), tiny.image(r, Kind.NOISED, grid=(4, 4))]],
        "nothing to draw": [[tiny.image(r, Kind.VIT, grid=(4, 4)), tiny.text(r, 140, loss=True)]],
        "nothing": [],
    }
    for name, sample in samples.items():
        with tried(f"trains on {name}"):
            text, image = loss_sums(model(tiny.row(sample, model).to(Here.device)))
            (text + image).backward()
            sync()
            say(f"trains on {name}", float(text + image), "loss")
    generate()


def generate() -> None:
    """`unigen generate` with the golden checkpoint: a text, a picture, an edit."""
    common = [
        "--model_path",
        str(GOLDEN / "model"),
        "--device",
        Here.device,
        "--max_new_tokens",
        "8",
        "--num_timesteps",
        "4",
    ]
    picture = ["--image", str(GOLDEN / "input.png")]
    with tempfile.TemporaryDirectory() as folder:
        for mode, more in {"text": [], "image": ["--height", "64", "--width", "64"], "edit": picture}.items():
            with tried(f"generate {mode}: exit code"):
                began = time.perf_counter()
                with redirect_stdout(io.StringIO()):
                    code = cli.main(
                        [
                            "generate",
                            *common,
                            "--mode",
                            mode,
                            "--prompt",
                            "a red circle",
                            "--output_dir",
                            f"{folder}/{mode}",
                            *more,
                        ]
                    )
                say(f"generate {mode}: exit code", code, seconds=time.perf_counter() - began)
