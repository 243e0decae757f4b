"""What a training will take, before there is one: memory of the device at every point of a step, memory of
the host, disk, work. From config files and options alone; the arithmetic of activations is in
``model/sizes.py``.

    weights + moments + average + VAE          always
    gradients                                  grow with the backward pass; there from the second micro-batch
    activations                                largest between forward and backward
    work                                       of one layer, of the logits, of the optimiser, for a moment

The plan is the largest sum over the points of a step. Training compares it with what it took
(:func:`compared`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from unigen.config import Config, ConfigError
from unigen.messages import in_language
from unigen.model import sizes
from unigen.model.config import BagelConfig
from unigen.model.parts import GEN, is_adapter, is_embedding, is_linear, title
from unigen.model.sizes import Half, Load, Widths, half_of, vit_kept, work_of
from unigen.training.census import ParameterEntry, census, codec_numbers
from unigen.training.engine import engine_name

CONTEXT = 700_000_000  # bytes that CUDA and its libraries take of a GPU
FRAGMENTS = 0.04  # of all tensors: what the allocator cannot give out again
PROGRAM = 400_000_000  # bytes of `unigen train` on a CPU with a tiny model, measured (0.39 to 0.40 GB)
HOST = 2_000_000_000  # bytes of a process that uses a GPU, with its libraries; an estimate
PIECE = 1 << 27  # bytes of a tensor that are read at once, with their copy
PINNED = 1 << 27  # of the two buffers that checkpoints go through


@dataclass(frozen=True)
class Machine:
    """Where it runs."""

    kind: str = "cuda"  # or cpu
    world: int = 1  # processes, one a GPU
    engine: str = "single"  # or ddp, fsdp2
    shards: int = 1  # processes that share one copy of the model
    offload: bool = False
    computes: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, config: Config, kind: str, world: int, computes: torch.dtype) -> Machine:
        """What the options make of ``world`` processes.

        Raises:
            ConfigError: the engine is deepspeed, or ``shard_size`` does not divide the processes.
        """
        engine = engine_name(config, world)
        if engine == "deepspeed":
            raise ConfigError(
                "engine deepspeed is not planned: its JSON decides what it holds. Fix: --engine fsdp2"
            )
        if engine == "single" and world > 1:
            raise ConfigError("engine is single, with several GPUs. Fix: --engine ddp or fsdp2, or --gpus 1")
        shards = (config.shard_size or world) if engine == "fsdp2" else 1
        if world % shards:
            raise ConfigError(f"shard_size is {shards}, which does not divide {world}. Fix: --shard_size ...")
        return cls(kind, world, engine, shards, config.cpu_offload, computes)


@dataclass
class MemoryPlan:
    """Bytes of each process, but for ``disk``."""

    moments: dict[str, dict[str, float]]  # point of a step -> what lies in the device's memory then
    host: dict[str, tuple[float, float]]  # phase -> pinned and other memory of the host
    disk: float  # of a checkpoint, all processes together
    best: float  # of best/, which holds weights alone
    trained: int
    parameters: int
    parts: dict[str, int] = field(default_factory=dict)  # title -> numbers that train
    flop: float = 0.0  # of a step, all processes together
    tokens: int = 0  # of a step, all processes together

    @property
    def point(self) -> str:
        """The point of a step with the peak."""
        return max(self.moments, key=lambda point: sum(self.moments[point].values()))

    @property
    def at_peak(self) -> dict[str, float]:
        return self.moments[self.point]

    @property
    def peak(self) -> float:
        return sum(self.at_peak.values())


def plan_memory(
    model: BagelConfig, config: Config, load: Load, machine: Machine, words: torch.dtype | None = None
) -> MemoryPlan:
    """What a training takes whose largest packed sequence is ``load``.

    Args:
        words: dtype that the embedding of texts is stored in; None is as published, bfloat16.

    Raises:
        AdapterError: as :func:`census`.
    """
    return _Planner(model, config, load, machine, words).plan()


class _Planner:
    """The terms of one plan, and their sums."""

    def __init__(
        self, model: BagelConfig, config: Config, load: Load, machine: Machine, words: torch.dtype | None
    ):
        self.model, self.config, self.load, self.machine = model, config, load, machine
        self.c = machine.computes.itemsize
        self.entries = census(model, config, machine.computes, words)
        self.widths = Widths.of(model.llm, self.c)
        self.gpu = machine.kind == "cuda"
        policy = config.checkpointing_policy if config.gradient_checkpointing else "none"
        self.away = self.gpu and policy == "offload"  # the inputs of layers wait in memory of the host
        self.policy = "full" if policy == "offload" else policy
        self.copied = not self.gpu and load.samples > 1 and load.gen > 0  # see sdpa.Groups.moves
        self.trained = [entry for entry in self.entries if entry.trains]
        # tokens of both halves, and those of them that go on behind the last attention
        self.tokens, self.read = (load.und, load.gen), (load.labels, load.noised)
        prefix = "language_model.model.layers."
        self.layers: list[list[ParameterEntry]] = [[] for _ in range(model.llm.num_hidden_layers)]
        self.root: list[ParameterEntry] = []  # what is no layer of the decoder nor of the ViT
        self.vit: list[ParameterEntry] = []
        for entry in self.entries:
            if entry.name.startswith(prefix):
                self.layers[int(entry.name.removeprefix(prefix).split(".")[0])].append(entry)
            elif ".encoder.layers." in entry.name:
                self.vit.append(entry)
            else:
                self.root.append(entry)
        self.kept = [self._kept(i, self.policy) for i in range(len(self.layers))]
        self.patch = self._vit_kept(self.policy)

    # ---- activations

    def _halves(self, i: int) -> tuple[Half, Half]:
        layer, recorded = f"language_model.model.layers.{i}.", self._recorded()
        trains = {entry.name: entry.shape for entry in self.layers[i] if entry.trains}
        und = half_of(layer, trains, False, recorded and not self.config.freeze_und)
        return und, half_of(layer, trains, True, recorded)

    def _recorded(self) -> bool:
        """Does a gradient come through the decoder?"""
        behind = ("language_model.lm_head", "language_model.model.norm", "llm2vae")
        return any(not entry.name.startswith(behind) for entry in self.trained)

    def _kept(self, i: int, policy: str) -> float:
        """Bytes that layer ``i`` keeps for the backward pass."""
        if not self._recorded():
            return 0.0
        last = i == len(self.layers) - 1
        kept = 0.0
        for half, n, read in zip(self._halves(i), self.tokens, self.read, strict=True):
            kept += n * self.widths.kept(half, policy, self.copied, read / max(n, 1) if last else None)
        return kept if policy == "full" else kept + self._copies(self.layers[i])

    def _copies(self, entries: Sequence[ParameterEntry]) -> float:
        """Bytes of the copies of matrices in the dtype of products, where they are held in the other one."""
        other = 6 - self.c  # bytes a number: of float32 for bfloat16, and the other way round
        found = [e for e in entries if len(e.shape) == 2 and is_linear(e.name)]
        return float(sum(self.c * e.numel for e in found if e.nbytes == other * e.numel))

    def _around(self) -> float:
        """Bytes beside the layers while they run: rotary angles."""
        return float(8 * self.widths.head * self.load.tokens)

    def _behind(self, back: bool) -> float:
        """Bytes of what comes out of the last layer: its normed result, the velocities and their errors;
        ``back``: of the errors, and of the gradient of a layer's tokens on its way down."""
        D, drawn = self.widths.D, self.model.patch_dim * self.load.noised
        return float(4 * D * self.load.tokens + 4 * drawn if back else 4 * D * sum(self.read) + 12 * drawn)

    def _vit_kept(self, policy: str) -> float:
        if not self.model.visual_und or not any(e.trains for e in self.entries if "vit_model" in e.name):
            return 0.0
        layers = 1 if self.away else self.model.vit.num_hidden_layers - 1
        kept = layers * vit_kept(self.model.vit, self.c, policy) * self.load.patches
        return kept if policy == "full" else kept + self._copies(self.vit)

    def _logits(self, back: bool) -> float:
        """Bytes of the logits that are there at once: as computed, in float32, their logarithm, its
        gradient."""
        n = min(self.load.labels, sizes.CHUNK)
        kept = 8 * (self.config.preserve_weight is not None)  # the divergence's own two
        return float(n * self.model.llm.vocab_size * (self.c * (self.c < 4) + 8 + 4 * back + kept))

    def _product(self, tokens: tuple[int, int]) -> float:
        """A product of the larger half's MLP, and what an adapter adds to it."""
        return float(max(tokens) * 2 * self.widths.c * self.widths.I)

    def _forward_work(self) -> float:
        """While a layer's MLP runs."""
        return max(self.tokens) * 6 * self.widths.D + self._product(self.tokens)

    def _backward_work(self, i: int) -> float:
        w, tokens = self.widths, self.read if i == len(self.layers) - 1 else self.tokens
        again = self._kept(i, "none") if self.policy == "full" else 0.0
        if self.policy == "selective" and self._recorded():  # one part of one half at a time
            parts = zip(tokens, self._halves(i), strict=True)
            again = max(n * (w.after(half) - w.c * w.I) * half.recorded for n, half in parts)
        return again + self._product(tokens) + self._around() + self._behind(True) + self._whole_matrix()

    def _whole_matrix(self) -> float:
        """One quantised matrix as it is computed with; what DoRA makes of one to know the lengths of its
        rows."""
        times = self.c * (self.config.quantize is not None)
        times += 12 * (self.config.lora_rank is not None and self.config.lora_variant == "dora")
        return float(times * self.widths.D * self.widths.I)

    def _mask(self) -> float:
        """What may attend to what, as numbers and as bits: where that is no plain causal sequence."""
        plain = self.load.samples == 1 and not self.load.gen and not self.load.patches
        return 0.0 if self.gpu or plain else (1.0 + self.c) * self.load.squares

    # ---- what lies there

    def _gathered(self, back: bool) -> float:
        """With fsdp2, beside the shards: the root, two layers, and the gradients of both on their way."""
        if self.machine.engine != "fsdp2":
            return 0.0
        root, trained = sum(e.nbytes for e in self.root), sum(e.gradient for e in self.root)
        layer = max(self.layers, key=lambda entries: sum(e.numel for e in entries))
        numbers, learn = sum(e.numel for e in layer), sum(e.numel for e in layer if e.trains)
        return root + 2 * self.c * numbers + back * (trained + (self.c + 4) * learn)

    def always(self) -> dict[str, float]:
        """What lies in the device's memory all the time."""
        m, c = self.machine, self.config
        found = {
            "weights": sum(e.nbytes for e in self.entries) / m.shards,
            "moments": sum(e.moments(c.optimizer) for e in self.entries) / m.shards,
            "average": (c.ema is not None) * sum(4.0 * e.numel for e in self.trained) / m.shards,
        }
        if m.offload and self.gpu:
            found = dict.fromkeys(found, 0.0)
        return found | {"vae": 4.0 * codec_numbers(self.model), "teacher": self._teacher()}

    def _teacher(self) -> float:
        """The weights of before and what they say of labels, where the model is to stay near them."""
        if self.config.preserve_weight is None:
            return 0.0
        before = sum(e.nbytes for e in self.trained if not is_adapter(e.name)) / self.machine.shards
        return before + float(self.load.kept[0] * self.model.llm.vocab_size * self.c)

    def gradients(self) -> float:
        return sum(e.gradient for e in self.trained) / self.machine.shards

    # ---- points of a step

    def points(self) -> dict[str, dict[str, float]]:
        """Point of a step -> what lies in the device's memory then, beside :meth:`always`."""
        whole = self.gradients() if not (self.machine.offload and self.gpu) else 0.0
        there = self.config.gradient_accumulation_steps > 1 or self.machine.engine == "ddp"
        before = whole if there else 0.0
        seen = self.patch + self._mask()
        kept = self._waits_here(len(self.layers))
        share = whole / max(sum(e.gradient for e in self.trained), 1)
        head = share * sum(e.gradient for e in self.root if "lm_head" in e.name)
        embed = share * sum(e.gradient for e in self.root if "embed_tokens" in e.name)
        layers = share * sum(e.gradient for entries in self.layers[1:] for e in entries)
        # its gradient, that in the dtype of products, and the copies that products were computed with
        heads = head + head / 2 * (self.c < 4) + self._copies(self.root)
        twice = there * max(head, embed)  # a gradient before it is added to what is there
        ahead = self._forward_work() + self._around() + self._whole_matrix() + self._gathered(False)
        logits = self._logits(True) + self._behind(False) + heads * (self.load.labels > 0)
        last = [self._backward(i, before, head, share) for i in range(len(self.layers))[-2:]]
        back = self._gathered(True)
        found = {
            "encode": (self._encoding(), before, 0.0),
            "forward": (ahead, before, kept),
            "logits": (logits, before, kept),
            "backward": max(last, key=sum),
            "first layer": (self._backward_work(0) + back, before or head + layers, self._waits_here(1)),
            "embeddings": (twice + self._behind(True) + back, whole, seen),
            "update": (self._update(), whole, 0.0),
        }
        parts = ("work", "gradients", "activations")
        return {point: dict(zip(parts, bytes_, strict=True)) for point, bytes_ in found.items()}

    def _waits_here(self, layers: int) -> float:
        """Bytes of the device's memory that the first so many layers hold for the backward pass."""
        kept = self.kept[:layers]
        return (max(kept) if self.away else sum(kept)) + self.patch + self._mask()

    def _backward(self, i: int, before: float, head: float, share: float) -> tuple[float, float, float]:
        """Work, gradients and activations while layer ``i`` is on its way back. In the last one products are
        small: the peak may be that of the one before, when what the last kept is gone."""
        done = share * sum(e.gradient for entries in self.layers[i + 1 :] for e in entries)
        return self._backward_work(i) + self._gathered(True), before or head + done, self._waits_here(i + 1)

    def _encoding(self) -> float:
        if self.model.vae.type == "pixel" or not self.load.pixels:
            return 0.0
        return float(sizes.VAE_PIXEL * self.model.vae.ch / 128 * min(self.load.pixels, sizes.VAE_AT_ONCE))

    def _update(self) -> float:
        """Of AdamW, beside the step's latents: in one kernel nothing, group by group a root of all second
        moments."""
        return self._adamw() + 4.0 * self.model.patch_dim * self.load.gen

    def _adamw(self) -> float:
        if self.config.weights == "bf16":  # one by one, in float32
            return 12.0 * max((e.numel for e in self.trained), default=0) / self.machine.shards
        if (self.gpu and not self.machine.offload) or self.config.optimizer == "adamw8bit":
            return 0.0
        still = sum(4.0 * e.numel for e in self.trained if len(e.shape) < 2 or is_embedding(e.name))
        return max(still, sum(4.0 * e.numel for e in self.trained) - still) / self.machine.shards

    def saved(self) -> float:
        """Bytes that this process copies for a checkpoint that is written in the background."""
        times = 8 + 4 * (self.config.ema is not None)
        return sum(e.nbytes + times * e.numel for e in self.trained) / self.machine.shards

    def plan(self) -> MemoryPlan:
        always, points = self.always(), self.points()
        moments = {point: always | found for point, found in points.items()}
        copy = self.saved() if self.config.async_save else 0.0
        if not self.gpu:
            busiest = max(moments.values(), key=lambda found: sum(found.values()))
            last = self.config.max_steps is not None and self.config.save_steps >= self.config.max_steps
            moments["save"] = (always if last else busiest) | {"copy": copy}
        for found in moments.values():
            fixed = CONTEXT if self.gpu else PROGRAM
            found["program"] = fixed
            found["fragments"] = FRAGMENTS * (sum(found.values()) - fixed) if self.gpu else 0.0
        parts: dict[str, int] = {}
        for entry in self.trained:
            parts[title(entry.name)] = parts.get(title(entry.name), 0) + entry.numel
        disk, best = self._disk()
        steps = self.config.gradient_accumulation_steps * self.machine.world
        return MemoryPlan(
            moments, self._host(moments, copy), disk, best, sum(e.numel for e in self.trained),
            sum(e.numel for e in self.entries), parts, steps * self._flop(), steps * self.load.tokens,
        )  # fmt: skip

    def _host(self, moments: dict[str, dict[str, float]], copy: float) -> dict[str, tuple[float, float]]:
        largest = max(e.numel for e in self.entries)
        if not self.gpu:
            held = sum(e.nbytes for e in self.entries) / self.machine.shards
            train = max(sum(found.values()) for point, found in moments.items() if point != "save")
            loaded = held + PROGRAM + 2.0 * largest * bool(self.config.quantize)
            saved = sum(moments["save"].values())
            return {"load": (0.0, loaded), "train": (0.0, train), "save": (0.0, saved)}
        offloaded = 0.0
        if self.machine.offload:
            state = sum(e.nbytes + e.gradient + e.moments(self.config.optimizer) for e in self.entries)
            offloaded = state / self.machine.shards
        batch = self._batch()
        pinned, other = offloaded + self._waiting() + 2 * batch, HOST + 4 * batch
        weights = offloaded and sum(e.nbytes for e in self.entries) / self.machine.shards
        return {
            "load": (weights, PROGRAM + PIECE),
            "train": (pinned, other),
            "save": (pinned + PINNED * bool(copy), other + copy),
        }

    def _waiting(self) -> float:
        """Bytes of pinned memory that the inputs of layers wait in: PyTorch takes powers of two."""
        if not self.away:
            return 0.0
        halves = [4 * self.widths.D * tokens for tokens in (self.load.und, self.load.gen) if tokens]
        found = len(self.layers) * self._recorded() * sum(map(_power, halves))
        return float(found + (self.model.vit.num_hidden_layers - 1) * _power(int(self.patch)))

    def _batch(self) -> float:
        """Bytes of a packed sequence on the host: pixels, patches, noise, ids."""
        pictures = 3 * self.load.pixels + 3 * self.model.vit.patch_size**2 * self.load.patches
        return float(pictures + 4 * self.model.patch_dim * self.load.gen + 100 * self.load.tokens)

    def _disk(self) -> tuple[float, float]:
        """Bytes of a checkpoint, and of one with weights alone; what does not train keeps its stored dtype,
        which is taken for 16 bits."""
        extra = 1 + 2 + (self.config.ema is not None)
        learnt = sum(e.nbytes * extra for e in self.trained), sum(e.nbytes for e in self.trained)
        if self.config.lora_rank:
            return learnt
        left = sum(2.0 * e.numel for e in self.entries if not e.trains and not is_adapter(e.name))
        left += 4.0 * codec_numbers(self.model)
        return learnt[0] + left, learnt[1] + left

    def _flop(self) -> float:
        learns: dict[str, bool] = {}
        if self._recorded():
            learns |= {"gen": False} if self.config.freeze_und else {"und": False, "gen": False}
        for entry in self.trained:
            part = _worker(entry.name)
            if part and (part in learns or part in ("head", "vit")):
                learns[part] = learns.get(part, False) or not is_adapter(entry.name)
        flop = work_of(self.model, self.load, learns, self.policy == "full")
        if self.config.preserve_weight is not None:  # the forward of the model as it was
            labels, noised = self.load.kept
            before = replace(self.load, labels=labels, noised=noised, pixels=0)
            flop += work_of(self.model, before, {}, False)
        return flop


def _power(count: int) -> int:
    """The next power of two; 0 for nothing."""
    return 1 << (count - 1).bit_length() if count else 0


def _worker(name: str) -> str:
    """The word of :func:`work_of` for the matrices that a parameter is of; "" for none of them."""
    if ".layers." in name and name.startswith("language_model"):
        return "gen" if GEN in name else "und"
    return "head" if "lm_head" in name else "vit" if name.startswith("vit_model") else ""


# ---- planned and taken


def compared(
    model: BagelConfig,
    config: Config,
    engine: tuple[str, int, torch.dtype],
    load: Load,
    gpu_peak: int,
    built: int,
    words: torch.dtype | None = None,
    resumed: bool = False,
) -> str:
    """What a run took, beside what was planned; empty where it was not planned.

    Args:
        engine: cuda or cpu, how many processes, dtype of products.
        load: the run's largest packed sequence.
        gpu_peak: most bytes of tensors on the GPU; not read on a CPU, where the process's resident memory
            counts.
        built: bytes that the process held before the first step, with its weights: what the program itself
            takes hangs on libraries, options and system.
        words: as :func:`plan_memory`.
        resumed: were the moments of an earlier run there by then, too?
    """
    kind, world, computes = engine
    try:
        plan = plan_memory(model, config, load, Machine.of(config, kind, world, computes), words)
    except ConfigError:
        return ""
    point = plan.point
    planned = plan.moments[point]
    there = ("weights", "average", "vae", "teacher", *(["moments"] if resumed else []))
    held = sum(planned[part] for part in there)
    planned |= {"program": 0.0, "fragments": 0.0} if kind == "cuda" else {"program": max(built - held, 0.0)}
    total = sum(planned.values())
    taken = gpu_peak if kind == "cuda" else resident_peak()
    largest = sorted(planned, key=lambda name: -planned[name])[:3]
    told = ", ".join(f"{in_language(name)} {planned[name] / 1e9:.2f}" for name in largest)
    what = "of tensors" if kind == "cuda" else "of the process"
    return (
        f"Memory {what}: at most {taken / 1e9:.2f} GB, planned {total / 1e9:.2f} GB"
        f" ({in_language(point)}: {told}); {taken / total - 1:+.0%}"
    )


def resident_peak(now: bool = False) -> int:
    """Most bytes of this process that ever lay in memory; ``now``: those that do, where the system says
    it."""
    import resource

    # ru_maxrss is also that of the process which started this one, as it was then
    with contextlib.suppress(OSError, StopIteration):
        lines, key = Path("/proc/self/status").read_text().splitlines(), "VmRSS" if now else "VmHWM"
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
