"""The reference's algorithm, written plainly on the weights of a ``Bagel``: what benchmarks compare with.

As in the reference (github.com/ByteDance-Seed/Bagel at 056b5fd), one process, eager, float32:

- Training: a packed sequence in sequence order. Every norm, projection and MLP gathers the rows of each
  expert by index, runs it, and writes into a new tensor at the indices. Keys and values are repeated for
  every query head. Each sample has its own attention with a dense additive mask, made with the row.
- Text: one request, token by token. Each layer's keys and values are concatenated with the past ones.
- Pictures: three forwards a step: in the full context, without the text, and without the picture.

Where the reference does more than its algorithm needs, this does not: its 3-D masks keep PyTorch from its
fast attention for CPUs, these are 2-D (``Row.as_reference`` gives the others); no index lists are made for
every token; contexts share their past
instead of copying it; the picture that was drawn is not decoded.

Shapes: T tokens, D width, H query and G key-value heads of width d, M latent tokens, P tokens of the past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigen.model.bagel import Bagel
from unigen.sequence.grid import grid_positions, patchify, to_unit
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Kind, Pack

GEN = "_moe_gen"
Run = Callable[[str, Tensor], Tensor]  # suffix of an expert, its rows -> what the expert makes of them
Angles = tuple[Tensor, Tensor]  # cosines and sines of rotary embedding, [T, 1, d]
Attend = Callable[..., Tensor]  # number of the layer, q [T, H, d], k and v [T, G, d] -> [T, H, d]


class At(NamedTuple):
    """Where the tokens of each expert stand in the sequence."""

    und: Tensor
    gen: Tensor


# ---- the decoder


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis."""
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps))


def norms(module: nn.Module, name: str) -> Run:
    """The norms of both experts."""
    return lambda suffix, rows: norm(getattr(module, name + suffix), rows)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer as PyTorch computes it by itself (the program's own ``Linear`` chooses the
    operation)."""
    return F.linear(x, module.weight, module.bias)


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    return linear(module.down_proj, F.silu(linear(module.gate_proj, x)) * linear(module.up_proj, x))


def by_expert(run: Run, x: Tensor, at: At | None, width: int | None = None) -> Tensor:
    """``run(suffix, rows)`` of each expert on its rows of ``x``, written into a new tensor.

    ``at=None``: all rows are the understanding expert's.
    """
    if at is None:
        return run("", x)
    out = x.new_zeros(x.shape if width is None else (len(x), width))
    out[at.und] = run("", x[at.und])
    out[at.gen] = run(GEN, x[at.gen])
    return out


def project(block: nn.Module, x: Tensor, at: At | None) -> list[Tensor]:
    """Queries [T, H, d], keys and values [T, G, d]; each expert's rows are gathered once for the three."""
    heads = [block.heads, block.kv_heads, block.kv_heads]
    if at is None:
        made = [linear(getattr(block, f"{n}_proj"), x) for n in "qkv"]
    else:
        und, gen = x[at.und], x[at.gen]
        made = []
        for n, h in zip("qkv", heads, strict=True):
            out = x.new_zeros(len(x), h * block.head_width)
            out[at.und] = linear(getattr(block, f"{n}_proj"), und)
            out[at.gen] = linear(getattr(block, f"{n}_proj{GEN}"), gen)
            made.append(out)
    return [y.view(len(x), h, block.head_width) for y, h in zip(made, heads, strict=True)]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [T, heads, d]."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def run_layer(layer: nn.Module, x: Tensor, at: At | None, angles: Angles, attend: Attend) -> Tensor:
    """One decoder layer, [T, D] -> [T, D]."""
    block = layer.self_attn
    q, k, v = project(block, by_expert(norms(layer, "input_layernorm"), x, at), at)
    q = turned(by_expert(norms(block, "q_norm"), q, at), *angles)
    k = turned(by_expert(norms(block, "k_norm"), k, at), *angles)
    y = attend(q, k, v).reshape(len(x), -1)
    x = x + by_expert(lambda s, rows: linear(getattr(block, f"o_proj{s}"), rows), y, at, x.shape[1])
    normed = norms(layer, "post_attention_layernorm")
    return x + by_expert(lambda s, rows: mlp(getattr(layer, f"mlp{s}"), normed(s, rows)), x, at)


def decode(model: Bagel, x: Tensor, position: Tensor, at: At | None, attend: Attend) -> Tensor:
    """Embedded tokens [T, D] at RoPE positions [T] -> hidden states [T, D] after the final norms."""
    decoder = model.language_model.model
    width = decoder.layers[0].self_attn.head_width
    frequencies = decoder.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    turns = (position[:, None].float() * frequencies).repeat(1, 2)[:, None]
    angles = turns.cos(), turns.sin()
    for number, layer in enumerate(decoder.layers):
        x = run_layer(layer, x, at, angles, partial(attend, number))
    return by_expert(norms(decoder, "norm"), x, at)


def attention(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """Attention of one sample: ``q`` [n, H, d] to ``k`` and ``v`` [m, G, d] -> [n, H, d].

    Keys and values are repeated for every query head.
    """
    copies = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **mask)[0].transpose(0, 1)


def see(model: Bagel, patches: Tensor, position: Tensor, lengths: Sequence[int]) -> Tensor:
    """The ViT, one picture's attention after another, and the connector: patches [N, values] -> [N, D]."""
    vit = model.vit_model.vision_model
    x = linear(vit.embeddings.patch_embedding, patches) + vit.embeddings.position_embedding(position)
    for layer in vit.encoder.layers:
        block, h = layer.self_attn, layer.layer_norm1(x)
        made = (
            linear(f, h).unflatten(1, (block.heads, -1)) for f in (block.q_proj, block.k_proj, block.v_proj)
        )
        q, k, v = (x.split(list(lengths)) for x in made)
        y = torch.cat([attention(*picture) for picture in zip(q, k, v, strict=True)])
        x = x + linear(block.out_proj, y.reshape(len(x), -1))
        inner = layer.mlp.activation(linear(layer.mlp.fc1, layer.layer_norm2(x)))
        x = x + linear(layer.mlp.fc2, inner)
    x = model.connector.activation(linear(model.connector.fc1, vit.post_layernorm(x)))
    x = linear(model.connector.fc2, x)
    return x + model.vit_pos_embed.pos_embed[position]


def time_features(model: Bagel, t: Tensor) -> Tensor:
    """Times [M] -> [M, D]."""
    frequencies = torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
    angles = t[:, None] * frequencies
    first, activation, second = model.time_embedder.mlp
    return linear(second, activation(linear(first, torch.cat([angles.cos(), angles.sin()], dim=-1))))


def latent_tokens(model: Bagel, x_t: Tensor, t: Tensor, position: Tensor) -> Tensor:
    """Latent tokens [M, patch_dim] at times [M] and places [M] of the position table -> [M, D]."""
    return linear(model.vae2llm, x_t) + time_features(model, t) + model.latent_pos_embed.pos_embed[position]


# ---- training


@dataclass(frozen=True)
class Row:
    """A packed sequence in sequence order, as the reference's data set hands it to the step."""

    text: Tensor  # [texts] where text tokens and markers stand, and their ids
    ids: Tensor
    vit: Tensor  # [N] where ViT tokens stand
    vae: Tensor  # [M] where latent tokens stand
    position: Tensor  # [T] RoPE positions
    lengths: list[int]  # tokens of each sample
    masks: list[Tensor]  # [L, L] of each sample: 0 where a query sees a key, -inf elsewhere
    labelled: Tensor  # where the text loss is taken, and the labels
    labels: Tensor
    noised: Tensor  # [M] bool: latent tokens with a loss
    patches: Tensor  # [N, values] float in [-1, 1]
    vit_position: Tensor
    vit_lengths: list[int]
    clean: Tensor  # [M, patch_dim]
    noise: Tensor
    vae_position: Tensor
    u: Tensor  # [M] times before the time law

    def as_reference(self) -> Row:
        """The row with masks [1, L, L], as the reference gives them to ``scaled_dot_product_attention``."""
        return replace(self, masks=[mask[None] for mask in self.masks])

    @classmethod
    def of(cls, pack: Pack, latent_patch: int) -> Row:
        """The row that a pack stores; its pictures bring latents."""
        order = pack.index.argsort()
        kind, label = pack.kind[order], pack.label[order]

        def places(chosen: Tensor) -> Tensor:
            return chosen.nonzero().squeeze(1)

        text, vae = places(kind == Kind.TEXT), places(kind >= Kind.CLEAN)
        clean = [patchify(pack.latents[i], latent_patch) for i in pack.vae_block]
        lengths = torch.bincount(pack.sample, minlength=pack.n_samples).tolist()
        columns = [column[order].split(lengths) for column in (pack.span, pack.image, pack.noised)]
        labelled = places(label >= 0)
        return cls(
            text=text,
            ids=pack.ids[order][text],
            vit=places(kind == Kind.VIT),
            vae=vae,
            position=pack.position[order],
            lengths=lengths,
            masks=[dense_mask(*sample) for sample in zip(*columns, strict=True)],
            labelled=labelled,
            labels=label[labelled],
            noised=kind[vae] == Kind.NOISED,
            patches=to_unit(pack.vit_patches),
            vit_position=pack.vit_position,
            vit_lengths=pack.vit_lengths,
            clean=torch.cat([pack.noise[:0], *clean]),
            noise=pack.noise,
            vae_position=pack.vae_position,
            u=pack.u,
        )


def dense_mask(span: Tensor, image: Tensor, noised: Tensor) -> Tensor:
    """The additive mask [L, L] of one sample from its tokens' spans [L], and what kinds of span they are."""
    seen = torch.zeros(len(span), len(span), dtype=torch.bool)
    counts = torch.unique_consecutive(span, return_counts=True)[1]
    ends = counts.cumsum(0).tolist()
    blocks = list(zip([0, *ends[:-1]], ends, strict=True))
    for start, end in blocks:
        seen[start:end, :start] = True
        inside = torch.ones(end - start, end - start, dtype=torch.bool)
        seen[start:end, start:end] = inside if image[start] else inside.tril()
    for start, end in blocks:
        if noised[start]:
            seen[end:, start:end] = False
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def losses(model: Bagel, row: Row) -> tuple[Tensor, Tensor]:
    """Sums of the text loss over labels and of the image loss over noised tokens (see ``loss_sums``)."""
    words = model.language_model.model.embed_tokens(row.ids)
    x = words.new_zeros(len(row.position), words.shape[1])
    x[row.text] = words
    if row.vit_lengths:
        x[row.vit] = see(model, row.patches, row.vit_position, row.vit_lengths)
    shift, t = model.config.timestep_shift, torch.sigmoid(row.u)
    t = shift * t / (1 + (shift - 1) * t)
    x_t = (1 - t[:, None]) * row.clean + t[:, None] * row.noise
    x[row.vae] = latent_tokens(model, x_t, t, row.vae_position)

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        samples = zip(*(y.split(row.lengths) for y in (q, k, v)), row.masks, strict=True)
        return torch.cat([attention(*qkv, attn_mask=mask) for *qkv, mask in samples])

    hidden = decode(model, x, row.position, At(torch.cat([row.text, row.vit]), row.vae), attend)
    ce = F.cross_entropy(
        linear(model.language_model.lm_head, hidden[row.labelled]), row.labels, reduction="none"
    )
    velocity = linear(model.llm2vae, hidden[row.vae[row.noised]])
    mse = (velocity - (row.noise - row.clean)[row.noised]) ** 2
    return ce.sum(), mse.mean(dim=-1).sum()


# ---- inference


@dataclass
class Past:
    """Keys and values of one context, made anew by every step, and the next RoPE position."""

    keys: dict[int, Tensor] = field(default_factory=dict)  # [P, G, d]
    values: dict[int, Tensor] = field(default_factory=dict)
    position: int = 0

    def copy(self) -> Past:
        return Past(dict(self.keys), dict(self.values), self.position)

    def attend(self, causal: bool, keep: bool) -> Attend:
        """Attention to the past and to the new tokens, whose keys and values stay with ``keep``."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer in self.keys:
                k, v = torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
            if keep:
                self.keys[layer], self.values[layer] = k, v
            n, m = len(q), len(k)
            if not causal or n == 1:
                return attention(q, k, v)
            if n == m:
                return attention(q, k, v, is_causal=True)
            return attention(q, k, v, attn_mask=torch.ones(n, m, dtype=torch.bool).tril(m - n))

        return attend


def add_text(model: Bagel, special: SpecialIds, past: Past, ids: Sequence[int]) -> None:
    """Appends a text with its markers to a context."""
    feed(model, past, [special.text_start, *ids, special.text_end])


def feed(model: Bagel, past: Past, ids: Sequence[int]) -> Tensor:
    """Appends text tokens to a context; their hidden states [n, D]."""
    x = model.language_model.model.embed_tokens(torch.tensor(ids))
    position = torch.arange(past.position, past.position + len(ids))
    hidden = decode(model, x, position, None, past.attend(causal=True, keep=True))
    past.position += len(ids)
    return hidden


def framed(model: Bagel, special: SpecialIds, inner: Tensor) -> tuple[Tensor, At]:
    """A picture's embedded tokens [M, D] between its two markers, and where markers and tokens stand."""
    markers = model.language_model.model.embed_tokens(torch.tensor([special.image_start, special.image_end]))
    at = At(torch.tensor([0, len(inner) + 1]), torch.arange(1, len(inner) + 1))
    x = markers.new_zeros(len(inner) + 2, markers.shape[1])
    x[at.und], x[at.gen] = markers, inner
    return x, at


def add_picture(model: Bagel, special: SpecialIds, past: Past, inner: Tensor, latent: bool) -> None:
    """Appends a picture's embedded tokens: of the VAE (``latent``) or of the ViT."""
    x, at = framed(model, special, inner)
    decode(
        model,
        x,
        torch.full((len(x),), past.position),
        at if latent else None,
        past.attend(causal=False, keep=True),
    )
    past.position += 1


def add_image(model: Bagel, special: SpecialIds, past: Past, picture: Any) -> None:
    """Appends a picture, first as latents, then as the ViT sees it."""
    c, transforms = model.config, model.config.transforms()
    resized = transforms.vae.resize(picture)
    assert model.codec is not None
    latent = model.codec.encode(transforms.vae(resized)[None])[0]
    tokens = patchify(latent, c.latent_patch_size)
    grid = [side // c.latent_patch_size for side in latent.shape[1:]]
    place = grid_positions(*grid, c.max_latent_size)
    inner = latent_tokens(model, tokens, torch.zeros(len(tokens)), place)
    add_picture(model, special, past, inner, latent=True)
    pixels, patch = transforms.vit(resized), c.vit.patch_size
    place = grid_positions(pixels.shape[1] // patch, pixels.shape[2] // patch, c.vit_max_num_patch_per_side)
    seen = see(model, patchify(to_unit(pixels), patch), place, [len(place)])
    add_picture(model, special, past, seen, latent=False)


@torch.no_grad()
def answer(model: Bagel, special: SpecialIds, ids: Sequence[int], max_tokens: int) -> list[int]:
    """The likeliest answer to a text, token by token.

    ``max_tokens`` counts the opening token, which the answer begins with.
    """
    past, written, token = Past(), [], special.text_start
    add_text(model, special, past, ids)
    while len(written) < max_tokens:
        written.append(token)
        logits = linear(model.language_model.lm_head, feed(model, past, [token]))
        token = int(logits[0].argmax())
        if token == special.text_end:
            break
    return written


@dataclass(frozen=True)
class Guided:
    """How a picture is drawn: at every step in three contexts, renormalised over the whole picture."""

    noise: Tensor  # [M, patch_dim] what it starts from
    grid: tuple[int, int]  # rows and columns of its latent tokens
    steps: int
    shift: float
    text_scale: float
    image_scale: float


@torch.no_grad()
def draw(model: Bagel, special: SpecialIds, ids: Sequence[int], picture: Any, how: Guided) -> Tensor:
    """The latent tokens [M, patch_dim] of a text's picture, or of an edit of ``picture``."""
    full, no_image = Past(), Past()
    if picture is not None:
        add_image(model, special, full, picture)
    no_text = full.copy()
    add_text(model, special, full, ids)
    add_text(model, special, no_image, ids)
    times = torch.linspace(1, 0, how.steps + 1)
    times = how.shift * times / (1 + (how.shift - 1) * times)
    place, x = grid_positions(*how.grid, model.config.max_latent_size), how.noise
    for t, t_next in pairwise(times):
        tokens, at = framed(model, special, latent_tokens(model, x, t.expand(len(x)), place))
        v, free_text, free_image = (velocity(model, past, tokens, at) for past in (full, no_text, no_image))
        guided = free_text + how.text_scale * (v - free_text)
        guided = free_image + how.image_scale * (guided - free_image)
        guided = guided * (v.norm() / (guided.norm() + 1e-8)).clamp(max=1.0)
        x = x - guided * (t - t_next)
    return x


def velocity(model: Bagel, past: Past, tokens: Tensor, at: At) -> Tensor:
    """The velocities [M, patch_dim] of a picture's embedded tokens in one context, which stays as it is."""
    position = torch.full((len(tokens),), past.position)
    return linear(model.llm2vae, decode(model, tokens, position, at, past.attend(causal=False, keep=False)))[
        at.gen
    ]
