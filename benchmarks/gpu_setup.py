"""What the parts of ``gpu.py`` share: results, time and memory, random models, packed sequences, FLOPs."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import gpu_predictions
import torch
from torch import Tensor
from transformers import Qwen2Config, SiglipVisionConfig

from unigen.config import Config
from unigen.model.attention import prepare_attention
from unigen.model.bagel import Bagel
from unigen.model.codec import FluxCodec, VaeConfig
from unigen.model.config import BagelConfig
from unigen.model.mask import Tokens, allowed
from unigen.model.parts import dtype_of
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Block, Kind, Pack
from unigen.training.engine import Engine, open_engine
from unigen.training.prepare import prepare as prepare_for_training

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
GB = 1e9
# Dense bfloat16 products with float32 sums, FLOP/s, from NVIDIA's data sheets (half of what they give "with
# sparsity").
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Here:
    """The part that runs in this process."""

    part = ""
    small = False
    device = "cuda"
    results: IO[str]


# ---- results


def prepare(part: str, small: bool, results: IO[str]) -> None:
    """Before the part begins; nothing here touches the GPU."""
    Here.part, Here.small, Here.device, Here.results = part, small, "cpu" if small else "cuda", results


def begin(seconds: float) -> None:
    """The part begins. A moment before its time is over, the stacks of its threads go to its messages."""
    faulthandler.dump_traceback_later(max(1.0, seconds - 1.0))
    torch.manual_seed(0)
    if Here.small:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU is visible to PyTorch; --small runs this on a CPU")


def card() -> str:
    """The name of the device."""
    return torch.cuda.get_device_name() if Here.device == "cuda" else "cpu"


def say(name: str, measured: Any, unit: str = "", formula: float | None = None, **more: Any) -> None:
    """Writes one result, and beside it what was predicted; ``formula`` is the value that a formula
    predicts."""
    expected, good = gpu_predictions.judged(Here.part, name, measured, card(), formula)
    line = {
        "name": name,
        "measured": rounded(measured),
        "unit": unit,
        "predicted": expected,
        "pass": good,
        **rounded(more),
    }
    Here.results.write(json.dumps(line, ensure_ascii=False) + "\n")
    Here.results.flush()


def rounded(value: Any) -> Any:
    """Numbers to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def tried(name: str) -> Iterator[None]:
    """One measurement; its failure is a result, and the next one goes on."""
    try:
        yield
    except Exception as error:
        failed = f"{type(error).__name__}: {str(error)[:800]}"
        Here.results.write(
            json.dumps({"name": name, "measured": None, "pass": False, "failed": failed}) + "\n"
        )
        Here.results.flush()
    finally:
        free()


# ---- time and memory


def sync() -> None:
    """Waits for the device."""
    if Here.device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
    """The median wall time of ``work`` with the device drained; good for milliseconds and more."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        sync()
        began = time.perf_counter()
        work()
        sync()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def free() -> None:
    """Gives memory that nothing uses back to the device."""
    if Here.device == "cuda":
        import gc

        gc.collect()
        torch.cuda.empty_cache()


def fresh() -> None:
    """Forgets what was compiled (files of it are kept): a process may hold few versions, and a run has one
    model."""
    free()
    torch._dynamo.reset()


def forget_peak() -> None:
    """The peak counts from here on."""
    if Here.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak() -> float | None:
    """Most bytes of tensors since :func:`forget_peak`, in GB; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GB if Here.device == "cuda" else None


def share_of_peak(flops: float, took: float) -> float | None:
    """Which share of the card's bfloat16 peak that is; None where the card's peak is not known."""
    most = next((peak for name, peak in PEAK_FLOPS.items() if name in card()), None)
    return flops / took / most if most else None


def kernel_times(work: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """(name, milliseconds, calls) of every kernel of ``work`` (on a CPU: operator), the longest first."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = Here.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        work()
        sync()
    of, kind = (
        ("self_device_time_total", DeviceType.CUDA) if on_gpu else ("self_cpu_time_total", DeviceType.CPU)
    )
    # Beside kernels there are the host's calls that launch them, and ranges that span several.
    events = [e for e in profiled.key_averages() if e.device_type == kind]
    events = [e for e in events if not e.is_user_annotation and not e.key.startswith("## ")]
    return sorted(((e.key, getattr(e, of) / 1e3, e.count) for e in events), key=lambda e: -e[1])


# ---- models


def published(layers: int = 28) -> BagelConfig:
    """The config of BAGEL-7B-MoT with so many decoder layers; a tiny one with --small."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if Here.small:
        llm = Qwen2Config(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2,
            rope_parameters=rope, tie_word_embeddings=False,
        )  # fmt: skip
        vit = SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=980,
            patch_size=14,
        )
        sides = {"max_size": 64, "min_size": 32}
        vae = VaeConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
        return BagelConfig(llm, vit, vae, vae_transform=sides, vit_transform={"max_size": 56, "min_size": 28})
    llm = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_parameters=rope,
        tie_word_embeddings=False,
    )  # fmt: skip
    vit = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=980,
        patch_size=14,
    )
    return BagelConfig(llm, vit, VaeConfig())


def random_model(config: BagelConfig, dtype_for: Callable[[str], torch.dtype]) -> Bagel:
    """A model with random weights, made on the device: 14.6 billion of them in about a second."""
    with torch.device("meta"):
        model = Bagel(config)
    for name, p in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        value = torch.empty(p.shape, dtype=dtype_for(name), device=Here.device)
        if p.ndim < 2:
            value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            value.normal_(std=min(0.02, p.shape[-1] ** -0.5))
        setattr(model.get_submodule(owner), last, torch.nn.Parameter(value, requires_grad=p.requires_grad))
    return model


def random_codec(config: VaeConfig) -> FluxCodec:
    """The VAE with the random weights it is made with, in float32 as a checkpoint's."""
    with torch.device(Here.device):
        return FluxCodec(config).to(Here.device).eval().requires_grad_(False)


def engine_of(layers: int, compiled: bool = False, **options: Any) -> Engine:
    """A training engine with a random model of so many decoder layers, prepared as a run with these options
    does."""
    fresh()
    compile = "on" if compiled else "off"
    config = Config(device=Here.device, precision="bf16", compile=compile, **options)
    engine = open_engine(config)
    model = random_model(published(layers), lambda name: dtype_of(name, config, engine.dtype))
    engine.compiled = prepare_for_training(model, config, engine.device.type, engine.name, engine.dtype)
    engine.model = model.train()
    engine.start()
    return engine


# ---- packed sequences


def packed(config: BagelConfig, what: str, pictures: int = 4) -> Pack:
    """A packed sequence on the device, of pictures of 1024 x 1024 whose latents are ready.

    ``drawing``: ``pictures`` short prompts, each with the picture to draw. ``edit``: two pictures, each seen by VAE
    and ViT, with an instruction and the picture to draw.
    """
    side, seen = (4, 3) if Here.small else (64, 37)
    p, vit_patch = config.latent_patch_size, config.vit.patch_size

    def text(n: int, loss: bool = False) -> Block:
        return Block(Kind.TEXT, n, ids=[7] * n, loss=loss)

    def picture(kind: Kind, segment: int) -> Block:
        noised = (
            {"noise": torch.randn(side * side, config.patch_dim), "u": 0.3, "loss": True}
            if kind == Kind.NOISED
            else {}
        )
        latent = torch.randn(config.vae.z_channels, side * p, side * p)
        return Block(kind, side * side, segment, (side, side), latent=latent, **noised)

    def look() -> Block:
        patches = torch.randint(0, 255, (seen * seen, vit_patch**2 * 3), dtype=torch.uint8)
        return Block(Kind.VIT, seen * seen, 0, (seen, seen), patches=patches)

    if what == "drawing":
        samples = [[text(60, loss=True), picture(Kind.NOISED, 0)] for _ in range(pictures)]
    else:
        samples = [
            [picture(Kind.CLEAN, 0), look(), text(30, loss=True), picture(Kind.NOISED, 1)] for _ in range(2)
        ]
    return pack_blocks(samples, SpecialIds(1, 2, 3, 4, 5), config.geometry, masks=True).to(Here.device)


def pairs(pack: Pack) -> int:
    """How many pairs of tokens attend."""
    tokens, total = Tokens.of(pack), 0
    for rows in torch.arange(len(pack), device=pack.ids.device).split(1024):
        total += int(allowed(tokens.at(rows).unsqueeze(1), tokens.unsqueeze(0)).sum())
    return total


def attention_of(pack: Pack) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Training's attention of a packed sequence: q [T, H, d], k and v [T, G, d] -> [T, H, d]."""
    attention, halves = prepare_attention(pack), [pack.n_und, len(pack) - pack.n_und]
    return lambda *qkv: torch.cat(attention(*(x.split(halves) for x in qkv)))


def training_flops(config: BagelConfig, pack: Pack) -> tuple[float, float]:
    """FLOPs of forward and backward: (by the reference's formula, of what has to be computed when all
    trains).

    The reference (``train/pretrain_unified_navit.py``) counts for every token six for each weight of one
    expert, of the embeddings and of the text head, and for every sample 12 x width x layers x its length
    squared. The other counts the products of each token's own expert, the head for labels, and the pairs that
    attend. ViT and VAE are in neither.
    """
    c = config.llm
    width = c.hidden_size // c.num_attention_heads
    q, kv = c.num_attention_heads * width, c.num_key_value_heads * width
    layer = c.hidden_size * (3 * c.intermediate_size + 2 * q + 2 * kv)
    head, layers = c.vocab_size * c.hidden_size, c.num_hidden_layers
    squares = float((torch.bincount(pack.sample).double() ** 2).sum())
    reference = 6 * (layer * layers + 2 * head) * len(pack) + 12 * q * layers * squares
    needed = 6 * layer * layers * len(pack) + 6 * head * pack.n_text_labels + 12 * q * layers * pairs(pack)
    return reference, needed
