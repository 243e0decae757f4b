"""The frozen encoders, VAE and ViT, apart from the model: which of their answers a cache may hold, and what
those depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unigen.bars import Bar, each
from unigen.cache.store import Encoder, FeatureCache, Store
from unigen.config import Config
from unigen.messages import in_language, listed
from unigen.model.backends import autocast
from unigen.model.bagel import Bagel
from unigen.model.codec import FluxCodec
from unigen.model.config import BagelConfig, read_config
from unigen.model.parts import ADAPTED, GEN, TRAINED_WHOLE, dtype_of, is_frozen
from unigen.model.storage import CheckpointFolderError, scan_folder
from unigen.model.vit import VisionModel
from unigen.model.weights import load_codec
from unigen.sequence.contents import Seen
from unigen.sequence.grid import grid_positions

log = logging.getLogger("unigen")


Named = Callable[[nn.Module], Iterable[tuple[str, Tensor]]]
"""Gives a module's parameters by name, whole, also where a process holds but a part of them."""


@dataclass
class Encoders:
    """What a cache is worth making for: a VAE with weights, a ViT that does not learn. None where there is no
    such thing.

    ``dtype`` is what they compute in (autocast), as in training.
    """

    config: BagelConfig
    codec: FluxCodec | None
    vit: VisionModel | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Bagel, config: Config, dtype: torch.dtype) -> Encoders:
        """Those of a model that is to be trained with ``config``, computing in ``dtype``."""
        codec = model.codec if isinstance(model.codec, FluxCodec) else None
        vit = model.vit_model if _vit_is_frozen(config) else None
        return cls(model.config, codec, vit, dtype, model.device)

    @classmethod
    def load(cls, config: Config, device: torch.device, dtype: torch.dtype) -> Encoders:
        """Those of the checkpoint ``model_path`` alone, held in the dtypes that training in ``dtype`` holds
        them in.

        Raises:
            CheckpointFolderError: the folder lacks a file, or one is damaged.
        """
        assert config.model_path is not None
        folder = Path(config.model_path)
        stored = scan_folder(folder)
        shapes = {name: entry.shape for name, entry in stored.items()}
        shape = read_config(folder, shapes, visual_gen=config.visual_gen, visual_und=config.visual_und)
        codec = load_codec(folder, shape, device) if config.visual_gen and shape.vae.type != "pixel" else None
        vit = None
        if _vit_is_frozen(config):
            with torch.device("meta"):
                vit = Bagel(shape).vit_model
            names = {name: f"vit_model.{name}" for name, _ in vit.named_parameters()}
            tensors = {
                name: stored[whole].read().to(device, dtype_of(whole, config, dtype))
                for name, whole in each("loading weights", list(names.items()), "tensors")
                if whole in stored
            }
            try:
                vit.load_state_dict(tensors, assign=True)
            except RuntimeError as error:
                raise CheckpointFolderError(
                    f"{folder}: the ViT's weights do not fit vit_config.json: {error}"
                ) from error
            vit.requires_grad_(False).eval()
        return cls(shape, codec, vit, dtype, device)

    @property
    def names(self) -> tuple[str, ...]:
        return ("vae",) * (self.codec is not None) + ("vit",) * (self.vit is not None)

    def identity(self, name: str, whole: Named = nn.Module.named_parameters) -> Encoder | None:
        """What the answers of ``vae`` or ``vit`` depend on, its weights digested; None where there is none to
        cache. ``whole`` gives the ViT's parameters by name."""
        c = self.config
        if name == "vae" and self.codec is not None:
            shape = [c.vae.ch, c.vae.ch_mult, c.vae.num_res_blocks, c.vae.z_channels, c.vae.downsample]
            weights = digest_weights(self.codec.encoder.state_dict().items(), shape)
        elif name == "vit" and self.vit is not None:
            v, g = c.vit, c.geometry
            sizes = [v.hidden_size, v.num_hidden_layers, v.num_attention_heads, v.patch_size, v.image_size]
            shape = [*sizes, v.layer_norm_eps, v.hidden_act, g.vit_side, g.interpolate]
            weights = digest_weights(whole(self.vit), shape)
        else:
            return None
        return Encoder(name, weights, str(self.dtype).removeprefix("torch."))

    def nbytes(self, name: str, size: tuple[int, int]) -> int:
        """About how many bytes the answer for a picture seen at ``size`` (width, height) takes."""
        c, wide = self.config, self.dtype.itemsize
        if name == "vae":  # the standard deviation may be computed in float32 under autocast
            return size[0] * size[1] // c.vae.downsample**2 * c.vae.z_channels * (wide + 4) + 1024
        return size[0] * size[1] // c.vit.patch_size**2 * c.vit.hidden_size * wide + 1024

    @torch.no_grad()
    def encode(self, seen: Seen) -> dict[str, dict[str, Tensor]]:
        """The answers for one picture on its own, by encoder, in host memory: ``mean`` and ``std`` [C, h, w]
        of ``vae``, ``features`` [patches, width] of ``vit``. They are what training computes, in the dtype it
        computes in."""
        found: dict[str, dict[str, Tensor]] = {}
        with autocast(self.device, self.dtype, cache=False):
            if seen.pixels is not None:
                assert self.codec is not None
                mean, std = self.codec.posterior(seen.pixels[None].to(self.device))
                found["vae"] = {"mean": mean[0].cpu(), "std": std[0].cpu()}
            if seen.patches is not None:
                assert self.vit is not None and seen.view.vit is not None
                g = self.config.geometry
                columns, rows = (side // g.vit_patch for side in seen.view.vit)
                position = grid_positions(rows, columns, g.vit_side, g.interpolate).to(self.device)
                features = self.vit(seen.patches.to(self.device), position, [len(seen.patches)])
                # The connector's linear layer casts its input to the autocast dtype, so nothing is lost here.
                found["vit"] = {"features": features.to(self.dtype).cpu()}
        return found


def _vit_is_frozen(config: Config) -> bool:
    """Does no option train the ViT, or a part of it? A pattern that may mean one of its parts counts."""
    if config.lora_rank is not None:
        words = {*(config.lora_targets or ()), *(config.train_also or ())}
        others = ({*ADAPTED, *TRAINED_WHOLE} - {"vit"}) & words
        ours = [word for word in words - others if GEN not in word and not word.startswith("language_model.")]
        return config.visual_und and not ours
    return config.visual_und and is_frozen("vit_model.", config)


def digest_weights(tensors: Iterable[tuple[str, Tensor]], shape: object) -> str:
    """SHA-256 of names, dtypes, shapes and values, and of what else of the config the result depends on."""

    def one(item: tuple[str, Tensor]) -> list[object]:
        name, tensor = item
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        shown.update(tensor.nbytes)
        return [name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(data).hexdigest()]

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # hashing releases the interpreter lock
        Bar("hashing weights", unit="B") as shown,
    ):
        rows = sorted(pool.map(one, tensors))
    return hashlib.sha256(json.dumps([shape, rows]).encode()).hexdigest()


def open_cache(
    cache_dir: str | Path,
    model: Bagel,
    config: Config,
    dtype: torch.dtype,
    whole: Named = nn.Module.named_parameters,
) -> FeatureCache | None:
    """What a training run that computes in ``dtype`` looks up: posteriors of the model's VAE, features of its
    ViT where that is frozen.

    Returns:
        The cache for :attr:`Planner.cache`; None where this model has nothing to look up, which is logged.

    Raises:
        CacheError: the folder is missing or is no cache.
    """
    store = Store.open(cache_dir)
    encoders = Encoders.of(model, config, dtype)
    if not encoders.names:
        log.info(
            "Cache: this model has nothing to look up (no VAE with weights, and no frozen ViT); %s is not"
            " used",
            cache_dir,
        )
        return None
    found = {name: encoders.identity(name, whole) for name in encoders.names}
    known = [name for name, encoder in found.items() if encoder is not None and store.knows(encoder)]
    if known:
        titles = {"vae": "VAE posteriors", "vit": "features of the frozen ViT"}
        log.info(
            "Cache %s: %s are used where they are there",
            cache_dir,
            listed(in_language(titles[name]) for name in known),
        )
    for name in found.keys() - set(known):
        log.warning(
            "Cache: %s holds nothing of this run's %s (its weights, or the precision it computes in, are "
            "others); it is computed. "
            "Fix: run unigen cache with the options of this run",
            cache_dir, {"vae": "VAE", "vit": "ViT"}[name],
        )  # fmt: skip
    vae, vit = (found.get(name) if name in known else None for name in ("vae", "vit"))
    c = model.config
    return FeatureCache(store, vae, vit, c.vae, (c.vit.patch_size, c.vit.hidden_size))
