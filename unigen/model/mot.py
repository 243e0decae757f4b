"""The decoder: Qwen2 with a mixture of transformers. Text and ViT tokens run through the base weights, VAE
tokens through copies of them with the suffix ``_moe_gen``; attention is joint (Deng et al. 2025, "Emerging
Properties in Unified Multimodal Pretraining"). A packed sequence stores its understanding tokens first, and
its two halves stay two tensors through every layer; they meet in attention alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unigen.model.attention import Attention
from unigen.model.layers import Linear, RMSNorm, SwiGLU, rope_angles, rotate
from unigen.model.parts import GEN
from unigen.model.recompute import recomputed
from unigen.model.sdpa import Halves
from unigen.sequence.types import Pack

EXPERTS = ("", GEN)
"""Suffixes of the experts' parameter names: understanding, generation."""

KEPT_PRODUCTS = {"before": (True, False, False), "after": (True, False, True, False)}
"""Which matrix products of a layer's two parts selective checkpointing keeps, about every second: q, k, v; o,
gate, up, down.

The parts lie before and after attention, whose inputs and results stay anyhow. Recomputing a part ends with
what the backward pass needs last, so the last product of a part is neither kept nor recomputed.
"""


class SelfAttention(nn.Module):
    """The projections and norms of attention, for both experts."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        width, self.heads, self.kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.head_width = getattr(config, "head_dim", None) or width // self.heads
        for expert in EXPERTS[: 1 + visual_gen]:
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                self.add_module(f"{part}_proj{expert}", Linear(width, heads * self.head_width, bias=True))
            self.add_module(f"o_proj{expert}", Linear(self.heads * self.head_width, width, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(self.head_width, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", RMSNorm(self.head_width, config.rms_norm_eps))

    def read(self, x: Tensor, cos: Tensor, sin: Tensor, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [n, H, d], keys and values [n, G, d] of ``x`` [n, D], the tokens of one expert."""
        q, k, v = (
            getattr(self, f"{part}_proj{expert}")(x).unflatten(1, (-1, self.head_width)) for part in "qkv"
        )
        q, k = (
            rotate(getattr(self, f"{part}_norm{expert}")(y), cos, sin).to(v.dtype)
            for part, y in (("q", q), ("k", k))
        )
        return q, k, v


class Layer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.self_attn = SelfAttention(config, visual_gen)
        for expert in EXPERTS[: 1 + visual_gen]:
            self.add_module(f"mlp{expert}", SwiGLU(config.hidden_size, config.intermediate_size))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + expert, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Halves, run: Run, layer: int) -> Halves:
        """Halves ``x`` [n, D] -> [n, D]."""
        read = [
            run.part("before", self.before, i, half, *angles)
            for i, (half, angles) in enumerate(zip(x, run.angles))
        ]
        q, k, v = zip(*read, strict=True)
        y = run.attention(q, k, v, layer)
        return tuple(
            run.part("after", self.after, i, *halves) for i, halves in enumerate(zip(x, y, strict=True))
        )

    def before(self, x: Tensor, cos: Tensor, sin: Tensor, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads of an expert's half ``x`` [n, D] of the layer's input."""
        return self.self_attn.read(getattr(self, f"input_layernorm{expert}")(x), cos, sin, expert)

    def after(self, x: Tensor, y: Tensor, expert: str) -> Tensor:
        """An expert's half [n, D] of the layer's output, from that of its input ``x`` [n, D] and what
        attention gave, ``y`` [n, H, d]."""
        x = x + getattr(self.self_attn, f"o_proj{expert}")(y.flatten(1))
        return x + getattr(self, f"mlp{expert}")(getattr(self, f"post_attention_layernorm{expert}")(x))


class Run:
    """What every layer of one forward shares: the angles of each half, the attention, and how gradients come
    about."""

    def __init__(
        self, angles: Sequence[tuple[Tensor, Tensor]], attention: Attention, frozen: bool, selective: bool
    ):
        self.angles, self.attention = angles, attention
        self.frozen = frozen  # the understanding half learns nothing: it records and passes on no gradients
        self.selective = selective

    def gradients(self, half: int) -> AbstractContextManager[Any]:
        """Around what a half computes."""
        return torch.no_grad() if self.frozen and half == 0 else contextlib.nullcontext()

    def part(self, name: str, f: Callable[..., Any], half: int, *args: Any) -> Any:
        """``f`` of one of a layer's two parts, for a half."""
        with self.gradients(half):
            if self.selective and torch.is_grad_enabled():
                return recomputed(f, *args, EXPERTS[half], kept=KEPT_PRODUCTS[name])
            return f(*args, EXPERTS[half])


class Decoder(nn.Module):
    """Embeddings, layers and final norms; ``forward`` takes embedded tokens."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, visual_gen) for _ in range(config.num_hidden_layers))
        self.visual_gen = visual_gen
        for expert in EXPERTS[: 1 + visual_gen]:
            self.add_module(f"norm{expert}", RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.rope_theta = float(config.rope_parameters["rope_theta"])
        self.gradient_checkpointing, self.checkpointing_policy = False, "full"
        self.freeze_und = False
        # other processes may have generation tokens where this one has none, and need it to gather weights
        self.together = False

    def forward(self, x: Halves, pack: Pack, attention: Attention) -> Halves:
        """Halves ``x`` [n, D] of embedded tokens -> [n, D] after the final norms.

        While gradients are recorded (or with ``together``) the generation expert runs also on no tokens at
        all, so that a sequence without pictures gives its weights gradients of zero instead of none.
        """
        assert self.visual_gen or pack.n_und == len(pack), (
            "generation tokens need a model built with visual_gen"
        )
        if len(x) > 1 and not len(x[1]) and not torch.is_grad_enabled() and not self.together:
            x, rest = x[:1], x[1:]
        else:
            rest = ()
        cos, sin = rope_angles(pack.position, self.layers[0].self_attn.head_width, self.rope_theta)
        angles = list(
            zip(
                cos.split([pack.n_und, len(pack) - pack.n_und]),
                sin.split([pack.n_und, len(pack) - pack.n_und]),
            )
        )
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        full = recompute and self.checkpointing_policy == "full"
        run = Run(angles, attention, self.freeze_und and torch.is_grad_enabled(), recompute and not full)
        if run.frozen:
            x = (x[0].detach(), *x[1:])
        for i, layer in enumerate(self.layers):
            x = checkpoint(layer, x, run, i, use_reentrant=False) if full else layer(x, run, i)
        normed = []
        for i, half in enumerate(x):
            with run.gradients(i):
                normed.append(getattr(self, f"norm{EXPERTS[i]}")(half))
        return (*normed, *rest)


class LanguageModel(nn.Module):
    """Decoder and text head, under the names of the published checkpoint."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.model = Decoder(config, visual_gen)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
