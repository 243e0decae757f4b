"""Parts of ``gpu.py`` that time training steps at the published width and look at their memory."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from gpu_predictions import Held, step_peaks
from gpu_setup import (
    GB,
    Here,
    engine_of,
    forget_peak,
    free,
    fresh,
    kernel_times,
    packed,
    peak,
    published,
    say,
    seconds,
    share_of_peak,
    training_flops,
    tried,
)

from unigen.model import flex
from unigen.sequence.types import Pack
from unigen.training.engine import Engine
from unigen.training.step import Counts, forward_backward

DRAWS = {"freeze_und": True, "freeze_vit": True}
EVERYTHING = {"freeze_vit": True}  # of the decoder
FULL = {"gradient_checkpointing": True}
SELECTIVE = {"gradient_checkpointing": True, "checkpointing_policy": "selective"}

COMPILED = {"compiled": True}

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("drawing", "draws only, full recompute", {**DRAWS, **FULL}),
    ("drawing", "draws only, full recompute, compiled", {**DRAWS, **FULL, **COMPILED}),
    ("drawing", "draws only, selective", {**DRAWS, **SELECTIVE}),
    ("edit", "draws only, full recompute", {**DRAWS, **FULL}),
    ("edit", "everything, full recompute", {**EVERYTHING, **FULL}),
    ("drawing", "draws only, no recompute", DRAWS),
    ("drawing", "draws only, no recompute, compiled", {**DRAWS, **COMPILED}),
]
SHORT, LONG = 2, 4  # decoder layers; two more take what a pair of the model's 28 does


def policy(options: dict[str, Any]) -> str:
    """What of a layer stays for the backward pass."""
    return options.get("checkpointing_policy", "full") if options.get("gradient_checkpointing") else "none"


def held(engine: Engine, moments: float = 0.0) -> Held:
    """What :func:`step_peaks` wants to know of a model; ``moments`` are bytes a trained parameter."""
    parameters = dict(engine.model.named_parameters())
    trained = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    first = [name for name in trained if name.startswith("language_model.model.layers.0.")]
    layer = sum(trained[name] for name in first if parameters[name].ndim == 2)
    weights = sum(p.numel() * p.element_size() for p in parameters.values())
    return Held(weights, sum(trained.values()), layer, moments * sum(trained.values()))


# ---- layers


def layers() -> None:
    """Forward and backward with two and with four decoder layers; 12 such differences more make the model of
    28."""
    for what, name, options in VARIANTS:
        if Here.small and "compiled" in options:
            continue  # a C++ compiler takes longer than all the rest, and tests of the model compile
        with tried(f"{what}, {name}"):
            pack = packed(published(), what)
            times = {}
            for n in (SHORT, LONG):
                times[n] = layer_time(n, pack, f"{what}, {name}: {n} layers", options)
            whole = times[SHORT] + (28 - SHORT) / (LONG - SHORT) * (times[LONG] - times[SHORT])
            reference, needed = training_flops(published(28), pack)
            say(f"{what}, {name}: 28 layers", whole, "s", tokens=len(pack), und=pack.n_und)
            say(f"{what}, {name}: 28 layers, tokens a second", len(pack) / whole, "tokens/s")
            say(
                f"{what}, {name}: 28 layers, reference's MFU",
                share_of_peak(reference, whole),
                "of the peak",
                TFLOP=reference / 1e12,
            )
            say(
                f"{what}, {name}: 28 layers, honest MFU",
                share_of_peak(needed, whole),
                "of the peak",
                TFLOP=needed / 1e12,
            )


def layer_time(n: int, pack: Pack, name: str, options: dict[str, Any]) -> float:
    """Seconds of forward and backward of a packed sequence through a model of ``n`` decoder layers."""
    engine, counts = engine_of(n, **options), Counts.of([pack])
    began = time.perf_counter()

    def work() -> None:
        engine.discard()
        for _ in forward_backward(engine, [pack], counts, engine.config):
            pass

    work()
    first = time.perf_counter() - began
    engine.discard()
    forget_peak()
    took = seconds(work, warm=0)
    say(name, took, "s", first=first)
    # What a compiled part keeps for the backward pass is the compiler's choice.
    expected = (
        step_peaks(engine.model.config.llm, policy(options), len(pack), pack.n_und, held(engine))[0] / GB
    )
    say(f"{name}, peak", peak(), "GB", formula=expected)
    return took


# ---- the whole model


def full() -> None:
    """Steps of two micro-batches, drawing only, moments in 8 bits: the whole model, or the layers that
    fit."""
    options = {**DRAWS, **FULL, "optimizer": "adamw8bit"}
    with tried("layers"):
        pack = packed(published(), "drawing")
        n = fitting_layers(pack, options)
        say("layers", n)
        for name, more in {"step": {}, "compiled step": COMPILED}.items():
            if Here.small and more:
                continue
            with tried(name):
                steps_of(name, n, pack, {**options, **more})


def steps_of(name: str, n: int, pack: Pack, options: dict[str, Any]) -> None:
    """Memory at each point of an optimiser step, and its time."""
    engine, counts = engine_of(n, **options), Counts.of([pack, pack])
    whole_step(engine, pack, counts)
    first, later = step_peaks(
        engine.model.config.llm, policy(options), len(pack), pack.n_und, held(engine, moments=2.03)
    )
    forget_peak()
    expected = iter({"first": first, "second": later}.items())
    for _ in forward_backward(engine, [pack, pack], counts, engine.config):
        which, nbytes = next(expected)
        say(f"{name}: peak of the {which} micro-batch", peak(), "GB", formula=nbytes / GB)
    engine.step(1e-5, engine.grad_norm())
    say(f"{name}: peak with the update", peak(), "GB", formula=later / GB, weights=held(engine).weights / GB)
    took = seconds(lambda: whole_step(engine, pack, counts), repeats=1, warm=0)
    reference, needed = training_flops(engine.model.config, pack)
    say(name, took, "s", tokens=2 * len(pack), tokens_a_second=2 * len(pack) / took, layers=n)
    say(f"{name}: reference's MFU", share_of_peak(2 * reference, took), "of the peak")
    say(f"{name}: honest MFU", share_of_peak(2 * needed, took), "of the peak")


def whole_step(engine: Engine, pack: Pack, counts: Counts) -> None:
    """An optimiser step of two micro-batches."""
    for _ in forward_backward(engine, [pack, pack], counts, engine.config):
        pass
    engine.step(1e-5, engine.grad_norm())


def fitting_layers(pack: Pack, options: dict[str, Any]) -> int:
    """How many decoder layers (at most 28) leave a tenth of the card free, by the formula."""
    if Here.small:
        return 2
    memory = torch.cuda.get_device_properties(0).total_memory
    engine = engine_of(1, **options)
    one = held(engine, moments=2.03)
    inside = [
        p for name, p in engine.model.named_parameters() if name.startswith("language_model.model.layers.0.")
    ]
    weights, trained = (
        sum(p.numel() * p.element_size() for p in inside),
        sum(p.numel() for p in inside if p.requires_grad),
    )
    del engine, inside
    gc.collect()
    free()

    def needs(n: int) -> float:
        more = n - 1
        grown = Held(
            one.weights + more * weights,
            one.trained + more * trained,
            one.trained_layer,
            one.moments + 2.03 * more * trained,
        )
        return step_peaks(published(n).llm, policy(options), len(pack), pack.n_und, grown)[1]

    return max((n for n in range(1, 29) if needs(n) < 0.9 * memory), default=1)


# ---- kernels

ATTENTION = (
    "flex",
    "flash",
    "fmha",
    "attention",
    "sdpa",
    "triton_tem",
)  # Inductor's templates serve attention alone here
PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "::mm", "addmm", "bmm")


def kernels() -> None:
    """Where the time of a step's forward and backward goes."""
    with tried("top"):
        pack = packed(published(), "drawing")
        engine, counts = engine_of(SHORT, **DRAWS, **FULL), Counts.of([pack])
        for _ in forward_backward(engine, [pack], counts, engine.config):  # compiles
            pass
        found = kernel_times(lambda: list(forward_backward(engine, [pack], counts, engine.config)))
        total = sum(ms for _, ms, _ in found)
        top = [
            {"kernel": name[:100], "ms": ms, "calls": calls, "share": ms / total}
            for name, ms, calls in found[:25]
        ]
        say("top", top, "", total_ms=total, kernels=sum(calls for _, _, calls in found))
        shares = {"attention": 0.0, "products": 0.0, "other kernels": 0.0}
        for name, ms, _ in found:
            shares[kind_of(name)] += ms / total
        for name, share in shares.items():
            say(f"share of {name}", share, "of a step of two layers")


def kind_of(kernel: str) -> str:
    """Products, attention, or another kernel, by its name."""
    name = kernel.lower()
    if any(word in name for word in ATTENTION):
        return "attention"
    return "products" if any(word in name for word in PRODUCTS) else "other kernels"


# ---- options of flex attention

# All compile for sm_90 with PyTorch 2.11 and fit its shared memory.
KERNEL_OPTIONS: dict[str, dict[str, Any]] = {
    "bounds checked": {"IS_DIVISIBLE": False},
    "forward 128 x 128": {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128},
    "forward 64 x 64": {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64},
    "backward 64 x 64": {f"bwd_BLOCK_{x}": 64 for x in ("M1", "N1", "M2", "N2")},
}


def options() -> None:
    """Flex attention as the model calls it, with other kernel options, and under a plain causal mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    pack = packed(published(), "drawing")
    mask, own = flex.block_mask(pack), flex._options(cuda=Here.device == "cuda") or {}
    length = mask.seq_lengths[0]
    compare_options("as the model", mask, own)
    if Here.small:
        return
    causal = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=Here.device)
    compare_options("causal, whole length", causal, own)
    for name, more in KERNEL_OPTIONS.items():
        compare_options(name, mask, {**own, **more})


def compare_options(name: str, mask: Any, options: dict[str, Any]) -> None:
    """Milliseconds of forward, and of forward and backward, with a mask and options."""
    from torch.nn.attention.flex_attention import flex_attention

    c, length = published().llm, mask.seq_lengths[0]
    width = c.hidden_size // c.num_attention_heads
    on_gpu = Here.device == "cuda"  # uncompiled there are no gradients
    with tried(f"{name}: forward"):
        call = torch.compile(flex_attention, dynamic=True) if on_gpu else flex_attention
        q, k, v = (
            torch.randn(
                1, heads, length, width, device=Here.device, dtype=torch.bfloat16, requires_grad=on_gpu
            )
            for heads in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        )

        def forward() -> torch.Tensor:
            return call(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options if on_gpu else None)

        way = torch.randn_like(q)
        say(f"{name}: forward", seconds(forward) * 1e3, "ms", options=options)
        if on_gpu:
            say(f"{name}: forward and backward", seconds(lambda: forward().backward(way)) * 1e3, "ms")
    fresh()
