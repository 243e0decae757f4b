"""How large a model of a given shape is at work: activations a token, work a step. Arithmetic alone.

T tokens, D hidden width, I inner width of the MLP, q and kv the widths of all queries and of all keys, H
heads, c bytes of a number that products are computed in, r rank of adapters. The residual stream is float32.
``tests/training/test_memory_plan.py`` counts the same with the layers themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unigen.model.config import BagelConfig
from unigen.model.parts import ADAPTER_MARKS, GEN, is_adapter, published_name
from unigen.sequence.types import Pack

CHUNK = 1024  # label tokens whose logits are there at once
VAE_PIXEL = 2600  # bytes that FLUX's encoder takes a pixel that is encoded at once, float32
VAE_AT_ONCE = 1 << 20  # pixels
VAE_FLOP = 4.13e6  # of it a pixel encoded
READ, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Load:
    """What one packed sequence asks for."""

    und: int  # tokens of the understanding half
    gen: int  # of the generation half
    patches: int = 0  # that the ViT sees
    labels: int = 0  # rows with a label; one that is learnt and kept is computed twice
    noised: int = 0  # rows that learn to be drawn, likewise
    pixels: int = 0  # that the VAE encodes
    squares: float = 0.0  # sum over samples of their length squared
    samples: int = 1
    kept: tuple[int, int] = (0, 0)  # of labels and noised, those that stay near the model as it was

    @property
    def tokens(self) -> int:
        return self.und + self.gen

    @classmethod
    def of(cls, pack: Pack) -> Load:
        lengths = [u + g for u, g in zip(pack.und_lengths, pack.gen_lengths, strict=True)]
        ready = pack.vit_ready or [False] * len(pack.vit_lengths)
        kept = pack.n_kept_labels, pack.n_kept_image
        return cls(
            und=pack.n_und,
            gen=len(pack) - pack.n_und,
            patches=sum(n for n, done in zip(pack.vit_lengths, ready, strict=True) if not done),
            labels=pack.n_text_labels + kept[0],
            noised=pack.n_image_targets + kept[1],
            pixels=sum(pixels.shape[-1] * pixels.shape[-2] for pixels in pack.vae_pixels),
            squares=float(sum(n * n for n in lengths)),
            samples=pack.n_samples,
            kept=kept,
        )

    def keeping(self, learnt: bool) -> Load:
        """The same where the model is to stay what it was at all of its targets; ``learnt``: which are learnt
        from all the same."""
        targets = self.labels, self.noised
        return replace(self, labels=(1 + learnt) * targets[0], noised=(1 + learnt) * targets[1], kept=targets)

    @classmethod
    def filled(cls, tokens: int, config: BagelConfig, picture: int) -> Load:
        """A sequence of pictures to draw with ``picture`` tokens each, the rest texts to write; a model that
        does not draw sees pictures instead, a quarter of the tokens."""
        if not config.visual_gen:
            patches = tokens // 4 if config.visual_und else 0
            return cls(tokens, 0, patches, tokens - patches, squares=float(tokens) ** 2)
        pictures = max(1, tokens // (picture + 64)) if tokens > picture else 1
        gen = min(pictures * picture, tokens)
        one = tokens / pictures
        pixels = gen * config.latent_stride**2
        return cls(tokens - gen, gen, 0, tokens - gen, gen, pixels, pictures * one * one, pictures)


@dataclass(frozen=True)
class Half:
    """What one expert learns in a layer."""

    own: frozenset[str] = frozenset()  # matrices that train, so that they keep their input
    ranks: Mapping[str, int] = field(default_factory=dict)  # matrices with an adapter -> its rank
    dora: bool = False
    norms: bool = False
    head_norms: bool = False
    recorded: bool = True  # does the backward pass come through?

    def learns(self, matrices: Iterable[str]) -> int:
        """How often one of them, or its adapter, keeps what comes in."""
        return sum((name in self.own) + (name in self.ranks) for name in matrices)


def half_of(layer: str, trains: Mapping[str, tuple[int, ...]], gen: bool, recorded: bool) -> Half:
    """What one expert of a layer learns.

    Args:
        layer: what the names of its parameters begin with.
        trains: names and shapes of the model's trained parameters.
        gen, recorded: the generation expert; see :class:`Half`.
    """
    own, ranks, norms, head_norms, dora = set(), {}, False, False, False
    for name, shape in trains.items():
        if not name.startswith(layer) or (GEN in name) != gen:
            continue
        words = published_name(name).removeprefix(layer).replace(GEN, "").split(".")
        matrix = words[1] if len(words) > 1 else ""
        if is_adapter(name):
            if ADAPTER_MARKS[0] in words:
                ranks[matrix] = shape[0]
            dora |= ADAPTER_MARKS[2] in words
        elif "norm" in name:
            head_norms |= matrix in ("q_norm", "k_norm")
            norms |= "layernorm" in name
        elif name.endswith("weight"):
            own.add(matrix)
    return Half(frozenset(own), ranks, dora, norms, head_norms, recorded)


@dataclass(frozen=True)
class Widths:
    """The numbers of a decoder layer, in bytes a number ``c``."""

    D: int
    I: int  # noqa: E741
    q: int
    kv: int
    heads: int
    c: int

    @property
    def head(self) -> int:
        return self.q // self.heads

    @classmethod
    def of(cls, llm: Any, c: int) -> Widths:
        width = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
        heads, kv = llm.num_attention_heads, llm.num_key_value_heads
        return cls(llm.hidden_size, llm.intermediate_size, heads * width, kv * width, heads, c)

    def inputs(self, half: Half, matrices: tuple[str, ...]) -> int:
        """Bytes a token of a norm's result as the matrices take it: with fewer bits each casts its own."""
        learn = half.learns(matrices)
        return self.c * self.D * (learn if self.c < 4 else min(learn, 1))

    def attention(self, copied: bool = False) -> int:
        """Bytes a token that attention keeps: q, k, v, its result (``copied``: once more in stored order),
        and the scale of each row."""
        return self.c * (2 * self.q + 2 * self.kv + copied * self.q) + 4 * self.heads

    def kept(
        self, half: Half, policy: str = "none", copied: bool = False, read: float | None = None
    ) -> float:
        """Bytes a token that a layer keeps for its backward pass.

        Args:
            half: what learns of the token's expert.
            policy: ``none`` recomputes nothing, ``selective``, ``full``.
            copied: see :meth:`attention`.
            read: of the last layer, the share of the tokens that go on behind attention, as copies.
        """
        D, inner, q, kv, c = self.D, self.I, self.q, self.kv, self.c
        share, copies = (1.0, 0) if read is None else (read, c * q)
        if policy == "full":
            return 4 * D
        if not half.recorded:
            return self.attention()
        if policy == "selective":
            stay = 4 * D + self.attention(copied) + c * q
            return stay + share * (c * (D + inner) + copies + 4 * D * (read is not None))
        before = 4 * D + 4 * D * half.norms + self.inputs(half, READ)
        # the norms of heads compute in float32
        before += 4 * (q + kv) + c * (q + kv) * half.head_norms
        outs = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": D, "down_proj": D}
        low = {name: c * (r + half.dora * 2 * outs.get(name, inner)) for name, r in half.ranks.items()}
        ahead = sum(low.pop(name, 0) for name in READ)
        behind = self.after(half) + sum(low.values()) + copies * half.learns(["o_proj"])
        return before + self.attention(copied) + ahead + share * behind

    def after(self, half: Half) -> int:
        """Bytes a token that what comes after attention keeps, but for adapters."""
        down = min(half.learns(["down_proj"]), 1)
        kept = 4 * self.D + 4 * self.D * half.norms + self.inputs(half, MLP)
        return kept + self.c * self.I * (3 + down)


def work_of(config: BagelConfig, load: Load, learns: Mapping[str, bool], again: bool) -> float:
    """FLOP of forward and backward of a packed sequence: its matrix products, and the pairs that attend.

    Args:
        learns: part ("und", "gen", "head", "vit") -> do its matrices themselves train? A part that is missing
            records nothing; adapters count as nothing.
        again: is the forward of layers computed again?
    """
    w = Widths.of(config.llm, 4)
    layer = w.D * (3 * w.I + 2 * w.q + 2 * w.kv)

    def products(part: str) -> int:  # forward, gradient of inputs, gradient of weights
        return 2 * (1 + (part in learns) * (1 + again) + learns.get(part, False))

    layers, flop = config.llm.num_hidden_layers, 0.0
    flop += layers * layer * (products("und") * load.und + products("gen") * load.gen)
    # behind the last attention only rows with a loss go on
    idle = products("und") * (load.und - load.labels) + products("gen") * (load.gen - load.noised)
    flop -= w.D * (3 * w.I + w.q) * idle
    records = "und" in learns or "gen" in learns
    flop += 2 * w.q * layers * load.squares * (1 + records * (2.5 + again))  # half of all pairs attend
    flop += 2 * (1 + records + learns.get("head", False)) * w.D * config.llm.vocab_size * load.labels
    if config.visual_und:
        v = config.vit
        matrices = (v.num_hidden_layers - 1) * v.hidden_size * (4 * v.hidden_size + 2 * v.intermediate_size)
        flop += products("vit") * matrices * load.patches
    return flop + VAE_FLOP * (config.vae.ch / 128) ** 2 * load.pixels * (config.vae.type != "pixel")


def vit_kept(vit: Any, c: int, policy: str = "none") -> int:
    """Bytes a patch that a layer of the ViT keeps for its backward pass; arguments as :meth:`Widths.kept`."""
    w, inner = vit.hidden_size, vit.intermediate_size
    if policy == "full":
        return 4 * w
    attention = 4 * c * w + c * w + 4 * vit.num_attention_heads
    if policy == "selective":
        return 4 * w + attention
    casts = (3 * c + c) * w if c < 4 else 2 * c * w
    return 8 * w + casts + attention + 2 * c * inner
