"""The model: embeds the three kinds of token, runs the decoder, and reads text and velocity from its hidden
states.

One forward serves training, validation and inference: a :class:`~unigen.sequence.types.Pack` goes in, hidden
states come out; with caches the pack continues them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unigen.model import flow
from unigen.model.adapters import Adapter
from unigen.model.attention import Attention, prepare_attention
from unigen.model.codec import Codec, encode_all
from unigen.model.config import BagelConfig
from unigen.model.kv_cache import Cache
from unigen.model.layers import Connector, Linear, PositionTable, TimeEmbedder, activation
from unigen.model.mot import LanguageModel
from unigen.model.parts import GEN, is_embedding, is_generation_expert, is_table, writes_into_residual
from unigen.model.sdpa import Halves, Rows, join_halves
from unigen.model.vit import VisionModel
from unigen.sequence.grid import patchify
from unigen.sequence.types import Pack


class Output(NamedTuple):
    # each times the weight of its target
    ce: Tensor  # [labels] cross-entropy of each label token, float32, in stored order
    mse: Tensor  # [noised tokens, patch_dim] squared error of the velocity, float32
    read: Any = None  # what the caller's reader made of the hidden states


class StateReader(NamedTuple):
    """What is read of a training forward beside its losses."""

    rows: tuple[Tensor, Tensor]  # of each half, as ``Rows``
    read: Callable[[Bagel, Halves], Any]  # of the model and the hidden states [n, D] of both

    @classmethod
    def of_all(cls, pack: Pack) -> StateReader:
        """Reads the hidden states of all tokens, [T, D] in stored order."""
        at = torch.arange(len(pack), device=pack.ids.device)
        return cls((at[: pack.n_und], at[: len(pack) - pack.n_und]), lambda _, hidden: join_halves(hidden))


class Bagel(nn.Module):
    """BAGEL. Parameter names and shapes are those of the published checkpoint.

    ``codec`` (frozen, in a file of its own) and ``source`` (the folder the weights came from) are set by
    ``load_bagel`` and are not part of ``state_dict()``.
    """

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.config = config
        width = config.llm.hidden_size
        self.language_model = LanguageModel(config.llm, config.visual_gen)
        if config.visual_gen:
            self.time_embedder = TimeEmbedder(width)
            self.vae2llm = Linear(config.patch_dim, width)
            self.llm2vae = Linear(width, config.patch_dim)
            self.latent_pos_embed = PositionTable(config.max_latent_size, width)
        if config.visual_und:
            self.vit_model = VisionModel(config.vit, activation(config.vit.hidden_act))
            self.connector = Connector(config.vit.hidden_size, width, activation(config.connector_act))
            self.vit_pos_embed = PositionTable(config.vit_max_num_patch_per_side, width)
        object.__setattr__(self, "codec", None)  # not a submodule: its weights live in ae.safetensors
        self.source: Path | None = None
        self.trained_in: Path | None = None  # the folder of the run's options, where it is not ``source``
        self.adapters: dict[str, Adapter] = {}  # by name, in the order in which they were put in
        # layers gather their weights from other processes, which must all call the same ones
        self.sharded = False

    codec: Codec | None

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @torch.no_grad()
    def initialise(self, std: float = 0.05) -> None:
        """Random weights to train from scratch; draws from the default generator.

        Matrices are normal with variance 1 / inputs, those that write into the residual stream smaller by the
        root of its 2 x layers (Radford et al. 2019), embeddings and the text head normal with ``std``. The
        generation expert starts as a copy of the understanding one, the velocity head at zero; the fixed
        tables are computed.
        """
        llm, vit = self.config.llm, self.config.vit
        depth = {"language_model": llm.num_hidden_layers, "vit_model": vit.num_hidden_layers - 1}
        parameters = dict(self.named_parameters())
        for name, p in parameters.items():
            if p.ndim < 2:
                nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif is_table(name):
                continue
            elif is_embedding(name) or "lm_head" in name:
                nn.init.normal_(p, std=std)
            else:
                # that add up in the residual stream
                terms = 2 * depth[name.split(".")[0]] if writes_into_residual(name) else 1
                nn.init.normal_(p, std=(p.shape[1] * terms) ** -0.5)
        for name, p in parameters.items():
            if is_generation_expert(name):
                p.copy_(parameters[name.replace(GEN, "")])
        for table in ("latent_pos_embed", "vit_pos_embed"):
            if hasattr(self, table):
                getattr(self, table).fill()
        if self.config.visual_gen:
            nn.init.zeros_(self.llm2vae.weight)

    @torch.no_grad()
    def latents_of(self, pack: Pack) -> list[Tensor]:
        """Normalised latents [C, h, w] of the sequence's VAE pictures: those it brings, then the codec's
        of the others."""
        if not pack.vae_pixels:
            return pack.latents
        assert self.codec is not None, "this model has no codec; load it with load_bagel"
        return pack.latents + encode_all(self.codec, pack.vae_pixels, pack.vae_noise or None)

    def features_of(self, pack: Pack) -> Tensor:
        """ViT features [N, ViT width] of the sequence's ViT tokens: those it brings, and the ViT's of the
        other pictures."""
        if not pack.vit_features:
            return self.vit_model(pack.vit_patches, pack.vit_position, pack.vit_lengths)
        parts: list[Tensor | None] = [None] * len(pack.vit_lengths)
        fresh = [i for i, ready in enumerate(pack.vit_ready) if not ready]
        # a ViT that learns must always run, but features are only ever brought for one that is frozen
        if fresh or self.sharded:
            lengths = [pack.vit_lengths[i] for i in fresh]
            positions = pack.vit_position.split(pack.vit_lengths)
            where = torch.cat([pack.vit_position[:0], *(positions[i] for i in fresh)])
            seen = self.vit_model(pack.vit_patches, where, lengths)
            for i, features in zip(fresh, seen.split(lengths), strict=True):
                parts[i] = features
        ready = iter(pack.vit_features)
        return torch.cat([next(ready) if part is None else part for part in parts])

    def clean_tokens(self, pack: Pack, latents: Sequence[Tensor]) -> Tensor:
        """x_0 of every VAE token, [M, patch_dim] float32, in stored order."""
        p = self.config.latent_patch_size
        tokens = [
            patchify(latents[picture][:, : rows * p, : columns * p], p)
            for picture, (rows, columns) in zip(pack.vae_block, pack.vae_grid, strict=True)
        ]
        return torch.cat(tokens).float() if tokens else pack.noise.new_zeros(0, self.config.patch_dim)

    def embed(self, pack: Pack, x_t: Tensor, t: Tensor) -> Halves:
        """Halves [n, D] of embedded tokens, whose VAE tokens stand at ``x_t`` [M, patch_dim] at times ``t``
        [M], one for each picture.

        While gradients are recorded (or the model is sharded) the generation half is there also without any
        tokens, so that a sequence without pictures gives its weights gradients of zero instead of none.
        """
        words = self.language_model.model.embed_tokens(pack.ids[: pack.n_und])
        if self.config.visual_und and (len(pack.vit_rows) or torch.is_grad_enabled() or self.sharded):
            seen = self.connector(self.features_of(pack)) + self.vit_pos_embed(pack.vit_position)
            words = words.index_copy(0, pack.vit_rows, seen.to(words.dtype))
        if not self.config.visual_gen:
            assert pack.n_und == len(pack), "VAE tokens need a model built with visual_gen"
            return (words,)
        if not len(x_t) and not torch.is_grad_enabled() and not self.sharded:
            return (words,)
        times = self.time_embedder(t[pack.vae_first])[pack.vae_number]
        drawn = self.vae2llm(x_t.to(self.vae2llm.weight.dtype)) + times
        return words, (drawn + self.latent_pos_embed(pack.vae_position)).to(words.dtype)

    def hidden_states(
        self,
        pack: Pack,
        x_t: Tensor,
        t: Tensor,
        caches: Sequence[Cache] | None = None,
        update_cache: bool = True,
        attention: Attention | None = None,
        rows: Rows | None = None,
    ) -> Halves:
        """Halves [n, D] of hidden states after the final norms, of ``rows`` or of all.

        VAE tokens stand at ``x_t`` [M, patch_dim] at times ``t`` [M]. Sample i continues ``caches[i]``; with
        ``update_cache`` its tokens stay in the cache. ``attention`` saves preparing the same pack again.
        """
        attention = attention or prepare_attention(pack, caches, update_cache)
        hidden = self.language_model.model(self.embed(pack, x_t, t), pack, attention, rows)
        if caches is not None and update_cache:
            for cache, n_und, n_gen in zip(caches, pack.und_lengths, pack.gen_lengths, strict=True):
                cache.length += n_und + n_gen
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Text logits [..., vocabulary]."""
        return self.language_model.lm_head(hidden)

    def velocities(self, hidden: Tensor) -> Tensor:
        """Velocities [..., patch_dim] float32."""
        return self.llm2vae(hidden).float()

    def forward(
        self, pack: Pack, latents: Sequence[Tensor] | None = None, reader: StateReader | None = None
    ) -> Output:
        """The training forward: per-token losses of a packed sequence.

        ``latents`` default to the sequence's own pictures, encoded. ``reader`` takes more from the model and
        the hidden states, while parameters that are shared out are gathered. Behind the last attention only
        rows with a loss and those of the reader are computed.
        """
        x0 = self.clean_tokens(pack, self.latents_of(pack) if latents is None else latents)
        t = flow.training_time(pack.u, self.config.timestep_shift)
        rows = [pack.label_rows, pack.noised_rows]
        if reader is not None:
            rows = [torch.cat(pair) for pair in zip(rows, reader.rows, strict=True)]
        words, *rest = self.hidden_states(pack, flow.mix(x0, pack.noise, t), t, rows=rows)
        drawn = rest[0] if rest else words[:0]
        labels, noised = len(pack.label_rows), len(pack.noised_rows)
        ce = token_losses(self.language_model.lm_head, words[:labels], pack.label[pack.label_rows])
        if pack.label_weight is not None:
            ce = ce * pack.label_weight
        seen = reader.read(self, (words[labels:], drawn[noised:])) if reader is not None else None
        if not self.config.visual_gen:
            return Output(ce, words.new_zeros(0, 0, dtype=torch.float32), seen)
        predicted = self.velocities(drawn[:noised])
        mse = (predicted - flow.velocity(x0, pack.noise)[pack.noised_rows]) ** 2
        if pack.noised_weight is not None:
            mse = mse * pack.noised_weight[:, None]
        return Output(ce, mse, seen)


def token_losses(head: nn.Linear, hidden: Tensor, labels: Tensor, chunk: int = 1024) -> Tensor:
    """Cross-entropy [labels] float32 of every label token.

    More than ``chunk`` tokens go through the head in pieces whose logits are recomputed in the backward pass:
    with a vocabulary of 152,064, the logits of 1,024 tokens fill 0.6 GB.
    """

    def losses(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), y, reduction="none")

    if len(labels) <= chunk:
        return losses(hidden, labels)
    pieces = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat([checkpoint(losses, h, y, use_reentrant=False) for h, y in pieces])
