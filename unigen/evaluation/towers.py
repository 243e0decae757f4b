"""Encoders of transformers for metrics, from local folders: pictures, pictures beside texts, tokens.

The only file of this room that imports transformers. Nothing is downloaded: a folder, or a name that is in
the hub's local cache. Weights are read from safetensors, and no code of a folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unigen.cache.encoders import digest_weights
from unigen.evaluation.results import CannotRun
from unigen.evaluation.results import libraries as versions
from unigen.printing import first_line

# Layers that bert-score (0.3.13, utils.py) takes for these models: those nearest to human judgement.
BERT_LAYERS = {
    "bert-base-uncased": 9, "bert-large-uncased": 18, "bert-base-multilingual-cased": 9,
    "bert-base-chinese": 8, "roberta-base": 10, "roberta-large": 17, "roberta-large-mnli": 19,
    "distilroberta-base": 5, "distilbert-base-uncased": 5, "xlm-roberta-base": 9, "xlm-roberta-large": 17,
    "deberta-base-mnli": 9, "deberta-large-mnli": 18, "deberta-xlarge-mnli": 40, "deberta-v3-base": 9,
    "deberta-v3-large": 12,
}  # fmt: skip
# Means and deviations of the channels in [0, 1], where a folder has no preprocessor_config.json.
_CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_HALF = ([0.5] * 3, [0.5] * 3)
_ANY = "give the folder of a transformers model with config.json and model.safetensors"
_CHANNELS = {"clip": _CLIP, "siglip": _HALF, "siglip2": _HALF, "dinov2": _IMAGENET, "dinov3_vit": _IMAGENET}


def short_name(model: str | Path) -> str:
    """A folder's or hub name's last part, harmless within the name of a metric."""
    name = Path(model).resolve().name if Path(model).is_dir() else str(model).rpartition("/")[2]
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def weights_digest(module: nn.Module) -> str:
    """Twelve hexadecimal digits of all parameters and buffers."""
    return digest_weights(module.state_dict().items(), type(module).__name__)[:12]


def _folder(model: str | Path, fix: str) -> Path:
    """The folder of a model, given itself or by its name in the hub's local cache. Asked for a name,
    transformers would connect to the hub for files that the cache need not have. Raises CannotRun: there is
    none."""
    from huggingface_hub import snapshot_download

    if Path(model).is_dir():
        return Path(model)
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise CannotRun(f"{model} is not a folder", fix)
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (OSError, ValueError):
        raise CannotRun(
            f"{model} is not a folder, and the hub's local cache has no model of that name",
            f"{fix}, or bring it into the local cache first (hf download {model})",
        ) from None


def _load(model: str | Path, device: str, kind: str = "AutoModel", fix: str = _ANY) -> nn.Module:
    """The model of a folder in float32, for inference, by a class of transformers. Raises CannotRun: it
    cannot be had."""
    import transformers

    folder = _folder(model, fix)
    try:
        with _without_bars():
            loaded = getattr(transformers, kind).from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CannotRun(f"{model} cannot be loaded ({first_line(error)})", fix) from None
    return loaded.requires_grad_(False).eval().to(device)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws one for each model it loads."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _load_tokenizer(model: str | Path) -> Any:
    from transformers import AutoTokenizer

    fix = "put the model's tokenizer.json and tokenizer_config.json there"
    try:
        return AutoTokenizer.from_pretrained(str(_folder(model, fix)), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CannotRun(f"{model} has no tokenizer ({first_line(error)})", fix) from None


def _most_tokens(tokenizer: Any, config: Any) -> int:
    """Longest text in tokens: by the tokenizer where it says so (many do not), and by the positions."""
    most = getattr(config, "max_position_embeddings", None) or 512
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        most -= 2  # their positions start behind that of padding
    return min(int(most), int(getattr(tokenizer, "model_max_length", None) or most))


def _too_long(tokenizer: Any, texts: Sequence[str], most: int) -> int:
    """How many of the texts have more tokens."""
    return sum(len(ids) > most for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"])


def cut_note(texts: int) -> tuple[str, ...]:
    """What the reader of a result must know of so many texts that were cut."""
    return (f"{texts} texts are longer than the model reads and were cut",) if texts else ()


@dataclass
class TokenTower:
    """A text encoder that gives a vector for each token.

    Args:
        truncated: texts that were cut to what the model reads, so far.
    """

    model: nn.Module
    tokenizer: Any
    layer: int
    identity: str
    device: str
    truncated: int = 0

    @classmethod
    def load(cls, model: str | Path, layer: int | None, device: str = "cpu") -> TokenTower:
        """From a folder, or a name in the local cache.

        Raises:
            CannotRun: it cannot be loaded, or the layer is unknown.
        """
        name = short_name(model)
        layer = layer if layer is not None else BERT_LAYERS.get(name)
        if layer is None:
            named = ", ".join(sorted(BERT_LAYERS)[:4])
            fix = f"give layer (--bert_layer), or call the folder by its name ({named}, ...)"
            raise CannotRun(f"no layer is known for a model called {name}", fix)
        loaded = _load(model, device)
        deepest = loaded.config.num_hidden_layers
        if not 0 <= layer <= deepest:
            raise CannotRun(f"{name} has no layer {layer}", f"give layer (--bert_layer) from 0 to {deepest}")
        identity = f"{name}@{weights_digest(loaded)}|layer={layer}"
        return cls(loaded, _load_tokenizer(model), layer, identity, device)

    @property
    def libraries(self) -> str:
        return versions("torch", "transformers")

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 32) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text, unit vectors [tokens, width] float32 and which of the tokens count [tokens]: not
        those that only frame a text."""
        most = _most_tokens(self.tokenizer, self.model.config)
        found: list[Any] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            stripped = [texts[number].strip() for number in chosen]
            batch = self.tokenizer(
                stripped, truncation=True, max_length=most, padding=True, return_special_tokens_mask=True
            )
            self.truncated += _too_long(self.tokenizer, stripped, most)
            ids, mask = (
                torch.tensor(batch[key], device=self.device) for key in ("input_ids", "attention_mask")
            )
            hidden = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            vectors = nn.functional.normalize(hidden.hidden_states[self.layer], dim=-1).cpu().numpy()
            special = np.array(batch["special_tokens_mask"], bool)
            for row, number in enumerate(chosen):
                there = np.array(batch["attention_mask"][row], bool)
                found[number] = vectors[row][there], ~special[row][there]
        return found


@dataclass
class PictureTower:
    """A picture encoder, with a text encoder beside it where the model has one (CLIP, SigLIP).

    Args:
        name: of the model and its weights' digest.
        size: side of the square pictures it sees, in pixels.
        mean, std: of the channels, over [0, 1].
        pooling: what of its output is the feature: ``projected``, ``pooled`` or ``mean`` (of the patches).
    """

    model: nn.Module
    name: str
    size: int
    mean: Tensor
    std: Tensor
    pooling: str
    device: str
    tokenizer: Any = None
    truncated: int = 0

    @classmethod
    def load(cls, model: str | Path, device: str = "cpu", *, texts: bool = False) -> PictureTower:
        """From a folder, or a name in the local cache; ``texts``: with its text encoder.

        Raises:
            CannotRun: it cannot be loaded, sees no pictures, or reads no texts.
        """
        loaded = _load(model, device)
        config = loaded.config
        vision = getattr(config, "vision_config", config)
        both = hasattr(loaded, "get_image_features") and hasattr(loaded, "get_text_features")
        if not hasattr(vision, "image_size") and not hasattr(vision, "patch_size"):
            raise CannotRun(f"{model} sees no pictures", "give a CLIP, SigLIP or DINOv2 folder")
        if texts and not both:
            raise CannotRun(f"{model} reads no texts", "give a CLIP or SigLIP folder")
        size, mean, std = _preprocessing(model, config, vision)
        pooling = "projected" if both else "pooled"
        name = f"{short_name(model)}@{weights_digest(loaded)}"
        as_channels = [torch.tensor(values, device=device)[:, None, None] for values in (mean, std)]
        return cls(
            loaded, name, size, *as_channels, pooling, device, _load_tokenizer(model) if texts else None
        )

    @property
    def libraries(self) -> str:
        return versions("torch", "transformers", "pillow")

    @torch.no_grad()
    def pictures(self, pixels: Tensor) -> Tensor:
        """[B, 3, size, size] in [0, 1] -> features [B, d]."""
        pixels = (pixels.to(self.device) - self.mean) / self.std
        if self.pooling == "projected":
            return _pooled(self.model.get_image_features(pixel_values=pixels))
        return _pooled(self.model(pixel_values=pixels))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """n texts -> features [n, d]; ``truncated`` counts those that are longer than the model reads, which
        are cut."""
        assert self.tokenizer is not None, "load it with texts=True"
        config = self.model.config.text_config
        most = _most_tokens(self.tokenizer, config)
        self.truncated += _too_long(self.tokenizer, list(texts), most)
        # SigLIP was trained with padded texts and without a mask
        siglip = self.model.config.model_type.startswith("siglip")
        batch = self.tokenizer(
            list(texts), truncation=True, max_length=most, padding="max_length" if siglip else True,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        keys = ["input_ids"] if siglip else ["input_ids", "attention_mask"]
        return _pooled(self.model.get_text_features(**{key: batch[key] for key in keys}))


def _pooled(output: Any) -> Tensor:
    """The feature of an answer of transformers: itself, its pooled vector, or the mean of its patches."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    pooled = output.last_hidden_state if pooled is None else pooled
    if pooled.ndim == 3:
        return pooled.mean(1)
    return pooled.flatten(2).mean(2) if pooled.ndim == 4 else pooled


def _preprocessing(model: str | Path, config: Any, vision: Any) -> tuple[int, list[float], list[float]]:
    """Side in pixels, means and deviations of the channels."""
    said = _said_of_pictures(model)
    fix = "put its preprocessor_config.json there"
    size: Any = said.get("crop_size") if said.get("do_center_crop", True) else None
    size = size or said.get("size") or getattr(vision, "image_size", None)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    mean, std = said.get("image_mean"), said.get("image_std")
    if mean is None or std is None:
        known = _CHANNELS.get(getattr(vision, "model_type", "").removesuffix("_vision_model"))
        if known is None:
            raise CannotRun(f"{model} does not say how its pictures are normalised", fix)
        mean, std = known
    if not isinstance(size, int):
        raise CannotRun(f"{model} does not say the size of its pictures", fix)
    return size, list(mean), list(std)


def _said_of_pictures(model: str | Path) -> dict[str, Any]:
    """A model's ``preprocessor_config.json``; empty where there is none."""
    path = _folder(model, _ANY) / "preprocessor_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CannotRun(f"{path} is no JSON ({error})", "copy the model's folder again") from None


# ---- detectors

# model_type -> the class of transformers, for those that are none of AutoModelForObjectDetection.
_DETECTORS = {
    "owlvit": "AutoModelForZeroShotObjectDetection", "owlv2": "AutoModelForZeroShotObjectDetection",
    "mask2former": "AutoModelForUniversalSegmentation",
}  # fmt: skip


def load_detector(model: str | Path, device: str = "cpu") -> tuple[nn.Module, Any, dict[str, Any]]:
    """An object detector of a folder, the tokenizer of one that is asked for things in words (else None), and
    what its folder says of how pictures are prepared.

    Raises:
        CannotRun: it cannot be loaded, or is no detector.
    """
    from transformers import AutoConfig

    fix = "give the folder of a DETR, Mask2Former or OWL-ViT, or of another detector of transformers"
    try:
        kind = AutoConfig.from_pretrained(str(_folder(model, fix)), local_files_only=True).model_type
    except (OSError, ValueError, KeyError) as error:
        raise CannotRun(f"{model} cannot be loaded ({first_line(error)})", fix) from None
    loaded = _load(model, device, _DETECTORS.get(kind, "AutoModelForObjectDetection"))
    said = _said_of_pictures(model)
    if not isinstance(said.get("size"), dict):
        raise CannotRun(
            f"{model} does not say the size of its pictures", "put its preprocessor_config.json there"
        )
    return loaded, _load_tokenizer(model) if kind.startswith("owl") else None, said
