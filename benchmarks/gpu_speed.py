"""Parts of ``gpu.py`` that time the card itself, answering, drawing, and the ViT."""

from __future__ import annotations

import importlib
import platform
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from gpu_setup import (
    GB,
    GOLDEN,
    Here,
    card,
    forget_peak,
    kernel_times,
    peak,
    published,
    random_codec,
    random_model,
    say,
    seconds,
    share_of_peak,
    sync,
    tried,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from unigen.inference.inferencer import InterleaveInferencer
from unigen.sequence.images import to_image
from unigen.sequence.tokens import Tokenizer
from unigen.version import __version__

PACKAGES = (
    "triton",
    "transformers",
    "bitsandbytes",
    "jsonargparse",
    "peft",
    "accelerate",
    "numpy",
    "PIL",
)

# ---- the card


def env() -> None:
    """Versions, the card, and how fast it copies and multiplies."""
    found: dict[str, Any] = {
        "unigen": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.import_module(name).__version__
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:200]
    say("versions", found)
    if Here.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        say(
            "card",
            {
                "name": p.name,
                "GB": p.total_memory / GB,
                "SMs": p.multi_processor_count,
                "capability": f"{p.major}.{p.minor}",
            },
        )
    else:
        say("card", {"name": card(), "threads": torch.get_num_threads()})
    with tried("copy"):
        x = torch.empty(2**16 if Here.small else 2**31, dtype=torch.uint8, device=Here.device)
        y = torch.empty_like(x)
        say("copy", 2 * len(x) / seconds(lambda: y.copy_(x)) / 1e12, "TB/s")
    products()


def products() -> None:
    """TFLOP/s of the model's matrix products."""
    shapes = {
        "gate, up": (16384, 3584, 18944), "down": (16384, 18944, 3584), "q, o": (16384, 3584, 3584),
        "k, v": (16384, 3584, 512),
        "gate, up of 4,096 tokens": (4096, 3584, 18944),
    }  # fmt: skip
    for name, shape in shapes.items():
        with tried(f"product: {name}"):
            shape = (64, 64, 64) if Here.small else shape
            say(f"product: {name}", product(*shape, torch.bfloat16), "TFLOP/s", shape=shape)
    side = 64 if Here.small else 4096
    for name, precision in {"product: float32": "highest", "product: float32, TF32": "high"}.items():
        with tried(name):
            torch.set_float32_matmul_precision(precision)
            say(name, product(side, side, side, torch.float32), "TFLOP/s")
    torch.set_float32_matmul_precision("highest")


def product(t: int, k: int, n: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(rows, k, device=Here.device, dtype=dtype) for rows in (t, n))
    return 5 * 2 * t * k * n / seconds(lambda: [F.linear(a, b) for _ in range(5)]) / 1e12


# ---- answers


def infer() -> None:
    """The whole model in bfloat16, with random weights: writing, drawing, reading a long prompt, the VAE."""
    with tried("weights"):
        began = time.perf_counter()
        model = random_model(published(2 if Here.small else 28), lambda name: torch.bfloat16).eval()
        object.__setattr__(model, "codec", random_codec(model.config.vae))
        sync()
        nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
        say("weights", nbytes / GB, "GB", seconds=time.perf_counter() - began, peak=peak())
    inferencer = InterleaveInferencer(model, tokenizer=Tokenizer.load(GOLDEN / "model"))
    writing(inferencer)
    drawing(inferencer)
    reading(inferencer)
    vae(model.codec)


def write(inferencer: InterleaveInferencer, prompt: str, tokens: int) -> int:
    """Answers ``prompt`` in so many tokens, or fewer where the random model stops; how many."""
    trace: dict[str, list[torch.Tensor]] = {}
    inferencer.interleave_inference(
        [prompt], understanding_output=True, max_think_token_n=tokens, trace=trace
    )
    return len(trace["tokens"][0])


def writing(inferencer: InterleaveInferencer) -> None:
    """Milliseconds a token, and kernels a token, as differences of a short and a long answer."""
    prompt, few, many = "a red circle on a white table " * 8, 4, 12 if Here.small else 52
    with tried("decode"):
        write(inferencer, prompt, few)
        times, lengths = {}, {}
        for n in (few, many):
            times[n] = seconds(
                lambda n=n: lengths.update({n: write(inferencer, prompt, n)}), repeats=3, warm=0
            )
        more = lengths[many] - lengths[few]
        took = (times[many] - times[few]) / more if more > 0 else float("nan")
        say("decode", took * 1e3, "ms a token", tokens_a_second=1 / took, tokens=lengths)
    with tried("kernels a token"):
        profiles = [kernel_times(lambda n=n: write(inferencer, prompt, n)) for n in (few, few + 4)]
        counts = [sum(calls for _, _, calls in profile) for profile in profiles]
        say(
            "kernels a token",
            (counts[1] - counts[0]) / 4,
            "kernels" if Here.device == "cuda" else "operators",
        )


def drawing(inferencer: InterleaveInferencer) -> None:
    """Seconds of an Euler step, as the difference of a short and a long drawing."""
    side = 64 if Here.small else 1024
    picture = to_image(torch.rand(3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    for name, prompt, text in (
        ("text guidance", ["a red circle"], 4.0),
        ("text and image guidance", [picture, "a red circle"], 4.0),
        ("no guidance", ["a red circle"], 1.0),
    ):
        with tried(f"Euler step, {name}"):
            options = {"cfg_text_scale": text, "cfg_img_scale": 1.5, "cfg_interval": (0.0, 1.0), "seed": 0}

            def draw(points: int, prompt: list[Any] = prompt, options: dict[str, Any] = options) -> None:
                inferencer.interleave_inference(
                    prompt, image_shapes=(side, side), num_timesteps=points, **options
                )

            draw(2)
            forget_peak()
            times = [seconds(lambda n=n: draw(n), repeats=1, warm=0) for n in (2, 6)]
            say(f"Euler step, {name}", (times[1] - times[0]) / 4, "s", first_and_rest=times[0], peak=peak())


def reading(inferencer: InterleaveInferencer) -> None:
    """Tokens a second of a long prompt."""
    prompt = "a red circle on a white table " * (4 if Here.small else 400)
    with tried("prefill"):
        n = len(inferencer.tokenizer.encode(prompt)) + 2
        took = seconds(lambda: write(inferencer, prompt, 1))
        c = inferencer.model.config.llm
        width = c.hidden_size // c.num_attention_heads
        layer = c.hidden_size * (
            3 * c.intermediate_size + 2 * c.hidden_size + 2 * c.num_key_value_heads * width
        )
        flops = c.num_hidden_layers * (2 * layer * n + 2 * c.hidden_size * n * n)
        say(
            "prefill",
            n / took,
            "tokens/s",
            tokens=n,
            seconds=took,
            share_of_peak=share_of_peak(flops, took),
            peak=peak(),
        )


def vae(codec: Any) -> None:
    """A picture of a megapixel to latents and back."""
    side = 64 if Here.small else 1024
    pixels = torch.rand(1, 3, side, side, device=Here.device) * 2 - 1
    with torch.no_grad():
        latents = codec.encode(pixels)
        for name, work in {
            "encodes": lambda: codec.encode(pixels),
            "decodes": lambda: codec.decode(latents),
        }.items():
            with tried(f"VAE {name} 1024 x 1024"):
                work()
                before = torch.cuda.memory_allocated() / GB if Here.device == "cuda" else None
                forget_peak()
                say(f"VAE {name} 1024 x 1024", seconds(work), "s", dtype=str(codec.dtype))
                say(f"VAE {name} 1024 x 1024: peak", None if before is None else peak() - before, "GB")


# ---- the ViT


def vit() -> None:
    """What a size costs that was not met before: the first time less the second."""
    sizes = (20, 21, 22, 30) if Here.small else (1369, 1370, 1400, 2000, 4900)
    with tried("a new size costs"):
        model = random_model(published(1), lambda name: torch.float32).vit_model
        times: dict[int, list[float]] = {n: [] for n in sizes}
        look(model, 36 if Here.small else 1024)  # whatever is compiled once
        for n in sizes * 2:
            times[n].append(seconds(lambda n=n: look(model, n), repeats=1, warm=0))
        say(
            "a new size costs",
            max(a - b for a, b in times.values()),
            "s",
            first=[t[0] for t in times.values()],
        )
        n = sizes[-1]
        took = statistics.median(seconds(lambda: look(model, n), repeats=1, warm=0) for _ in range(3))
        say("patches a second", n / took, "patches/s", patches=n, ms=took * 1e3)
    if Here.device == "cuda":
        cudnn()


def look(model: torch.nn.Module, n: int) -> None:
    """Forward and backward of the ViT on one picture of ``n`` patches."""
    patches = torch.randint(0, 255, (n, 588), dtype=torch.uint8, device=Here.device)
    with torch.autocast(Here.device, torch.bfloat16):
        model(patches, torch.zeros(n, dtype=torch.int64, device=Here.device), [n]).sum().backward()
    sync()


def cudnn() -> None:
    """Attention by cuDNN, which plans for every new shape: why the model goes without it where shapes
    change."""
    with tried("cuDNN, a new shape costs"), sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        q, k = (torch.randn(1, 28, n, 128, device="cuda", dtype=torch.bfloat16) for n in (1, 400))
        F.scaled_dot_product_attention(q, k, k)
        times = []
        for n in (401, 402, 403):
            for _ in range(2):
                x = torch.randn(1, 28, n, 128, device="cuda", dtype=torch.bfloat16)
                times.append(seconds(lambda x=x: F.scaled_dot_product_attention(q, x, x), repeats=1, warm=0))
        say(
            "cuDNN, a new shape costs",
            statistics.median(a - b for a, b in zip(times[::2], times[1::2])),
            "s",
            all=times,
        )
