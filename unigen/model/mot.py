"""The decoder: Qwen2 with a mixture of transformers. Text and ViT tokens run through the base weights, VAE tokens through
their twins with the suffix ``_moe_gen``; attention is joint (Deng et al. 2025, "Emerging Properties in Unified Multimodal
Pretraining"). A row stores its understanding tokens first, so each expert works on one contiguous half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unigen.model.attention import Cache, Plan, attend, store
from unigen.model.layers import RMSNorm, SwiGLU, rope_angles, rotate
from unigen.model.recompute import recomputed
from unigen.sequence.types import Pack

GEN = "_moe_gen"


def kept_products(experts: int) -> dict[str, list[bool]]:
    """Which matrix products of a layer's two parts selective checkpointing keeps, in the order they run: about every second.

    The parts lie before and after attention, whose inputs and results stay anyhow. Recomputing a part ends with what the backward pass
    needs last, so the last product of a part is neither kept nor recomputed.
    """
    before = {"q": True, "k": False, "v": False}
    mlp = {"gate": False, "up": True, "down": True}
    return {
        "before": [keep for keep in before.values() for _ in range(experts)],
        "after": [True] * experts + [*mlp.values()] * (experts - 1) + [*(mlp | {"down": False}).values()],  # o of each, then the MLPs
    }


class Experts(nn.Module):
    """A module whose parts come in two: ``name`` for understanding, ``name_moe_gen`` for generation.

    ``together``: other processes may have rows for a part that this one has none for, and need it to gather the weights.
    """

    together = False

    def both(self, name: str, x: Tensor, n_und: int) -> Tensor:
        """Part ``name`` on the first ``n_und`` rows of ``x``, its twin on the rest.

        While gradients are recorded (or with ``together``) both run, also on no rows at all, so that a row without pictures
        gives the twin's weights gradients of zero instead of none.
        """
        und, gen = getattr(self, name), getattr(self, name + GEN, None)
        if gen is None or (n_und == x.shape[0] and not (torch.is_grad_enabled() or self.together)):
            assert n_und == x.shape[0], "generation tokens need a model built with visual_gen"
            return und(x)
        return torch.cat([und(x[:n_und]), gen(x[n_und:])])


class Attention(Experts):
    def __init__(self, config, visual_gen: bool):
        super().__init__()
        width, self.heads, self.kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_width = getattr(config, "head_dim", None) or width // self.heads
        for twin in ("", GEN)[: 1 + visual_gen]:
            for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                self.add_module(f"{part}_proj{twin}", nn.Linear(width, heads * self.head_width, bias=True))
            self.add_module(f"o_proj{twin}", nn.Linear(self.heads * self.head_width, width, bias=False))
            self.add_module(f"q_norm{twin}", RMSNorm(self.head_width, config.rms_norm_eps))
            self.add_module(f"k_norm{twin}", RMSNorm(self.head_width, config.rms_norm_eps))

    def read(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, d], keys and values [T, G, d] of ``x`` [T, D]."""
        n = run.pack.n_und
        q = self.both("q_proj", x, n).unflatten(1, (self.heads, self.head_width))
        k = self.both("k_proj", x, n).unflatten(1, (self.kv_heads, self.head_width))
        v = self.both("v_proj", x, n).unflatten(1, (self.kv_heads, self.head_width))
        q = rotate(self.both("q_norm", q, n), run.cos, run.sin).to(v.dtype)
        k = rotate(self.both("k_norm", k, n), run.cos, run.sin).to(v.dtype)
        if run.freeze_und:
            k, v = (run.detach_und(t) for t in (k, v))
        return q, k, v


class Layer(Experts):
    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.self_attn = Attention(config, visual_gen)
        for twin in ("", GEN)[: 1 + visual_gen]:
            self.add_module(f"mlp{twin}", SwiGLU(config.hidden_size, config.intermediate_size))
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.add_module(norm + twin, RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, run: Run, layer: int) -> Tensor:
        q, k, v = run.part("before", self.before, x, run)
        y = attend(q, k, v, run.plan, layer, run.caches)
        if run.caches is not None and run.grow:
            store(k, v, run.pack, layer, run.caches)
        return run.part("after", self.after, x, y, run)

    def before(self, x: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads of the layer's input ``x`` [T, D]."""
        return self.self_attn.read(self.both("input_layernorm", x, run.pack.n_und), run)

    def after(self, x: Tensor, y: Tensor, run: Run) -> Tensor:
        """The layer's output [T, D] from its input ``x`` [T, D] and what attention gave, ``y`` [T, H, d]."""
        n = run.pack.n_und
        x = x + self.self_attn.both("o_proj", y.flatten(1), n)
        if run.freeze_und:
            x = run.detach_und(x)
        return x + self.both("mlp", self.both("post_attention_layernorm", x, n), n)


class Run:
    """What every layer of one forward shares: the row, its angles, its attention plan, the caches."""

    def __init__(self, pack: Pack, plan: Plan, angles: tuple[Tensor, Tensor], caches: Sequence[Cache] | None, grow: bool, freeze_und: bool):
        self.pack, self.plan, self.caches, self.grow = pack, plan, caches, grow
        self.cos, self.sin = angles
        self.freeze_und = freeze_und and torch.is_grad_enabled()
        self.kept: dict[str, list[bool]] | None = None  # with selective checkpointing

    def part(self, name: str, f: Callable[..., Any], *args: Any) -> Any:
        """``f(*args)``, one of a layer's two parts."""
        return f(*args) if self.kept is None else recomputed(f, *args, kept=self.kept[name])

    def detach_und(self, x: Tensor) -> Tensor:
        """Stops gradients into the understanding half."""
        n = self.pack.n_und
        return torch.cat([x[:n].detach(), x[n:]])


class Decoder(Experts):
    """Embeddings, layers and final norms; ``forward`` takes embedded tokens."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, visual_gen) for _ in range(config.num_hidden_layers))
        for twin in ("", GEN)[: 1 + visual_gen]:
            self.add_module(f"norm{twin}", RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.rope_theta = float(config.rope_parameters["rope_theta"])
        self.gradient_checkpointing, self.checkpointing_policy = False, "full"
        self.freeze_und = False

    def forward(self, x: Tensor, pack: Pack, plan: Plan, caches: Sequence[Cache] | None = None, grow: bool = True) -> Tensor:
        """``x`` [T, D] embedded tokens in stored order -> [T, D] after the final norms.

        ``caches`` (one per sample) are continued; with ``grow`` the row's keys and values stay in them.
        """
        angles = rope_angles(pack.position, self.layers[0].self_attn.head_width, self.rope_theta)
        run = Run(pack, plan, angles, caches, grow, self.freeze_und)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        full = recompute and self.checkpointing_policy == "full"
        if recompute and not full:
            run.kept = kept_products(experts=1 + hasattr(self, f"norm{GEN}"))
        if run.freeze_und:
            x = run.detach_und(x)
        for i, layer in enumerate(self.layers):
            if full:
                x = checkpoint(layer, x, run, i, use_reentrant=False)
            else:
                x = layer(x, run, i)
            if run.freeze_und:
                x = run.detach_und(x)
        return self.both("norm", x, pack.n_und)


class LanguageModel(nn.Module):
    """Decoder and text head, under the names of the published checkpoint."""

    def __init__(self, config, visual_gen: bool):
        super().__init__()
        self.model = Decoder(config, visual_gen)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
