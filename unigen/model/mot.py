"""The decoder: Qwen2 with a mixture of transformers. Text and ViT tokens run through the base weights, VAE
tokens through copies of them with the suffix ``_moe_gen``; attention is joint (Deng et al. 2025, "Emerging
Properties in Unified Multimodal Pretraining"). A packed sequence stores its understanding tokens first, and
its two halves stay two tensors through every layer; they meet in attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from unigen.model.attention import Attention
from unigen.model.layers import Linear, RMSNorm, SwiGLU, embedding, rope_angles, rotate
from unigen.model.parts import GEN
from unigen.model.sdpa import Halves, Rows, join_halves, split
from unigen.sequence.types import Pack

EXPERTS = ("", GEN)
"""Suffixes of the experts' parameter names: understanding, generation."""

Angles = Sequence[tuple[Tensor, Tensor]]
"""Cosines and sines [n, d] of the rotary angles of each half."""


class SelfAttention(nn.Module):
    """The projections and norms of attention, for both experts."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = config.hidden_size
        self.head_width = getattr(config, "head_dim", None) or width // self.heads
        for expert in EXPERTS[: 1 + visual_gen]:
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                self.add_module(f"{part}_proj{expert}", Linear(width, heads * self.head_width, bias=True))
            self.add_module(f"o_proj{expert}", Linear(self.heads * self.head_width, width, bias=False))
            self.add_module(f"q_norm{expert}", RMSNorm(self.head_width, config.rms_norm_eps))
            self.add_module(f"k_norm{expert}", RMSNorm(self.head_width, config.rms_norm_eps))

    def read(self, x: Tensor, cos: Tensor, sin: Tensor, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [n, H, d], keys and values [n, G, d] of ``x`` [n, D], the tokens of one expert."""
        heads = (-1, self.head_width)
        q, k, v = (getattr(self, f"{part}_proj{expert}")(x).unflatten(1, heads) for part in "qkv")
        q, k = (getattr(self, f"{part}_norm{expert}")(y) for part, y in (("q", q), ("k", k)))
        return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v


class Layer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.self_attn = SelfAttention(config, visual_gen)
        for expert in EXPERTS[: 1 + visual_gen]:
            self.add_module(f"mlp{expert}", SwiGLU(config.hidden_size, config.intermediate_size))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + expert, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self, x: Halves, angles: Angles, attention: Attention, layer: int, rows: Rows | None = None
    ) -> Halves:
        """Halves ``x`` [n, D] -> [n, D]; they meet in attention alone. Of the result, only ``rows``."""
        read = [self.before(half, *turn, expert) for half, turn, expert in zip(x, angles, EXPERTS)]
        q, k, v = zip(*read, strict=True)
        y = attention(q, k, v, layer)
        del read, q, k, v  # attention has joined the halves' to copies
        if rows is not None:  # an expert runs also where nobody reads: its gradients are zero, not missing
            x = tuple(half if r is None else half.index_select(0, r) for half, r in zip(x, rows))
            y = tuple(half if r is None else half.index_select(0, r) for half, r in zip(y, rows))
            y = split(join_halves(y), y)  # as attention gives it: compiled parts have one version
        return tuple(self.after(half, seen, expert) for half, seen, expert in zip(x, y, EXPERTS))

    def before(self, x: Tensor, cos: Tensor, sin: Tensor, expert: str) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads of an expert's half ``x`` [n, D] of the layer's input."""
        return self.self_attn.read(getattr(self, f"input_layernorm{expert}")(x), cos, sin, expert)

    def after(self, x: Tensor, y: Tensor, expert: str) -> Tensor:
        """An expert's half [n, D] of the layer's output, from that of its input ``x`` [n, D] and what
        attention gave, ``y`` [n, H, d]."""
        x = x + getattr(self.self_attn, f"o_proj{expert}")(y.flatten(1))
        return x + getattr(self, f"mlp{expert}")(getattr(self, f"post_attention_layernorm{expert}")(x))


class Decoder(nn.Module):
    """Embeddings, layers and final norms; ``forward`` takes embedded tokens."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, visual_gen) for _ in range(config.num_hidden_layers))
        self.visual_gen = visual_gen
        for expert in EXPERTS[: 1 + visual_gen]:
            self.add_module(f"norm{expert}", RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.rope_theta = float(config.rope_parameters["rope_theta"])

    def forward(self, x: Halves, pack: Pack, attention: Attention, rows: Rows | None = None) -> Halves:
        """Halves ``x`` [n, D] of embedded tokens -> [n, D] after the final norms, of ``rows`` where they are
        given: behind its attention the last layer computes no others. The second half may be left out where
        there are no generation tokens."""
        cos, sin = rope_angles(pack.position, self.layers[0].self_attn.head_width, self.rope_theta)
        lengths = [pack.n_und, len(pack) - pack.n_und]
        angles = list(zip(cos.split(lengths), sin.split(lengths)))[: len(x)]
        for i, layer in enumerate(self.layers):
            x = layer(x, angles, attention, i, rows if i == len(self.layers) - 1 else None)
        return tuple(self.normed(half, expert) for half, expert in zip(x, EXPERTS))

    def normed(self, x: Tensor, expert: str) -> Tensor:
        """The final norm of an expert's half ``x`` [n, D]."""
        return getattr(self, f"norm{expert}")(x)


class LanguageModel(nn.Module):
    """Decoder and text head, under the names of the published checkpoint."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.model = Decoder(config, visual_gen)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
