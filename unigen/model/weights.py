"""The published layout in and out, strict.

Weights are read tensor by tensor straight into memory of their final device and dtype, so the host never holds them twice,
and written one after another without a second copy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unigen.config import DataOptions
from unigen.model.bagel import Bagel
from unigen.model.codec import CODECS, FluxCodec, VaeConfig
from unigen.model.config import BagelConfig, CheckpointFolderError, read_config, read_json
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import Tokenizer, WordTokenizer

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SIDE_FILES = (
    "llm_config.json",
    "vit_config.json",
    "vae_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
    "ae.safetensors",
)
WEIGHTS = "ema.safetensors"


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor in host memory of its own, in the stored dtype."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if self.nbytes:
            view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            with open(self.file, "rb", buffering=0) as f:
                f.seek(self.offset)
                done = 0
                while done < self.nbytes:
                    got = f.readinto(view[done:])
                    if not got:
                        raise CheckpointFolderError(f"{self.file} ends too early. Cure: download or copy it again")
                    done += got
        return tensor


def scan_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, from its header alone.

    Raises:
        CheckpointFolderError: the file is missing, damaged or truncated.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError("its header length makes no sense")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if 8 + length + end > size:
                raise ValueError(f"it is truncated: {name} ends at byte {8 + length + end:,}, the file at {size:,}")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            stored = Stored(path, 8 + length + start, end - start, dtype, shape)
            if stored.nbytes != torch.Size(shape).numel() * dtype.itemsize:
                raise ValueError(f"{name} has {stored.nbytes} bytes, not those of shape {shape}")
            tensors[name] = stored
        return tensors
    except FileNotFoundError:
        raise CheckpointFolderError(f"{path} is missing. Cure: check the path, or download the whole repository") from None
    except KeyError as error:
        raise CheckpointFolderError(f"{path} has a tensor of dtype or entry {error}, which is not supported") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointFolderError(f"{path} is not a whole safetensors file: {error}. Cure: download or copy it again") from None


def scan_folder(folder: Path, prefer: tuple[str, ...] = (WEIGHTS, "model.safetensors")) -> dict[str, Stored]:
    """The model's tensors in a checkpoint folder: ``ema.safetensors``, a sharded set with its index, or ``model.safetensors``."""
    if not folder.is_dir():
        raise CheckpointFolderError(f"{folder} is not a folder; model_path must be the folder of a BAGEL checkpoint. Cure: check the path")
    for name in prefer:
        if (folder / name).exists():
            return scan_safetensors(folder / name)
        if (folder / f"{name}.index.json").exists():
            return _scan_shards(folder / f"{name}.index.json")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        return _scan_shards(indexes[0])
    raise CheckpointFolderError(
        f"{folder} has neither {WEIGHTS} nor a sharded set (*.safetensors.index.json). "
        "Cure: check the path, or download the whole repository"
    )


def _scan_shards(index: Path) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointFolderError(f"{index} has no weight_map. Cure: download it again")
    found: dict[str, Stored] = {}
    for shard in sorted(set(weight_map.values())):
        tensors = scan_safetensors(index.parent / shard)
        missing = [name for name, file in weight_map.items() if file == shard and name not in tensors]
        if missing:
            raise CheckpointFolderError(
                f"{index.parent / shard} lacks {_few(missing)}, which {index.name} promises. Cure: download it again"
            )
        found.update({name: tensors[name] for name, file in weight_map.items() if file == shard})
    return found


def load_planner(folder: str | Path | None, options: DataOptions) -> Planner:
    """The planner of a checkpoint folder, without its weights.

    Without a folder: the picture sizes of BAGEL-7B-MoT, and texts counted in words (:class:`WordTokenizer`), an estimate.

    Raises:
        CheckpointFolderError, TokenizerError: the folder lacks a file, or one cannot be used.
    """
    if folder is None:
        from transformers import Qwen2Config, SiglipVisionConfig

        llm, vit = Qwen2Config(max_position_embeddings=32768), SiglipVisionConfig(image_size=980, patch_size=14)
        return BagelConfig(llm, vit, VaeConfig()).planner(WordTokenizer(), options)
    folder = Path(folder)
    held = any(folder.glob("*.safetensors*"))  # configs and tokenizer alone will do, where config.json says the sizes
    shapes = {name: stored.shape for name, stored in scan_folder(folder).items()} if held else {}
    return read_config(folder, shapes).planner(Tokenizer.load(folder), options)


def load_bagel(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
    *,
    visual_gen: bool = True,
    visual_und: bool = True,
    constants: Mapping[str, Any] | None = None,
    weights: tuple[str, ...] = (WEIGHTS, "model.safetensors"),
) -> Bagel:
    """Loads a checkpoint folder in the published layout.

    Args:
        folder: the folder (see ``docs/model.md``).
        device: where the weights go, tensor by tensor.
        dtype: their dtype, or a function from a parameter's name to it; default as stored.
        visual_gen: false leaves the generation expert and the VAE out.
        visual_und: false leaves the ViT out.
        constants: values that win over ``config.json``, for checkpoints whose files do not say them.
        weights: file names to look for, in this order.

    Raises:
        CheckpointFolderError: a file is missing or damaged, or keys are missing, unexpected or misshapen (all listed).
    """
    folder = Path(folder)
    dtype_for = dtype if callable(dtype) else lambda name: dtype
    stored = scan_folder(folder, weights)
    shapes = {name: entry.shape for name, entry in stored.items()}
    config = read_config(folder, shapes, visual_gen=visual_gen, visual_und=visual_und, **dict(constants or {}))
    with torch.device("meta"):
        model = Bagel(config)
    _check_keys(folder, model, shapes)
    for name, parameter in list(model.named_parameters()):
        entry, table = stored.get(name), name.endswith("pos_embed.pos_embed")
        owner = model.get_submodule(name.rpartition(".")[0])
        if table and (entry is None or entry.shape != tuple(parameter.shape)):
            value = torch.empty(parameter.shape, dtype=dtype_for(name) or torch.float32, device=device)
        else:
            assert entry is not None
            value = entry.read().to(device=device, dtype=dtype_for(name) or entry.dtype)
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=parameter.requires_grad))
        if table and (entry is None or entry.shape != tuple(parameter.shape)):
            owner.fill()
    object.__setattr__(model, "codec", load_codec(folder, config, device) if visual_gen else None)
    model.source = folder
    return model.eval()


def load_codec(folder: Path, config: BagelConfig, device: torch.device | str = "cpu"):
    """The frozen codec of a checkpoint folder, in float32.

    Raises:
        CheckpointFolderError: ``ae.safetensors`` is missing, damaged, or of another shape than ``vae_config.json`` says.
    """
    try:
        codec = CODECS[config.vae.type](config.vae)
        if isinstance(codec, FluxCodec):
            codec.load({name: entry.read().float() for name, entry in scan_safetensors(folder / "ae.safetensors").items()})
    except CheckpointFolderError:
        raise
    except ValueError as error:
        raise CheckpointFolderError(f"{folder}: {error}") from error
    return codec.to(device).eval().requires_grad_(False)


def _check_keys(folder: Path, model: Bagel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tables = {name for name in wanted if name.endswith("pos_embed.pos_embed")}
    missing = [name for name in wanted if name not in shapes and name not in tables]
    unexpected = [name for name in shapes if name not in wanted and not _left_out(name, model.config)]
    misshapen = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape and name not in tables
    ]
    problems = [
        f"{len(names)} {title}: {_few(names)}"
        for title, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointFolderError(
            f"{folder}: the weights do not fit llm_config.json, vit_config.json and config.json.\n  "
            + "\n  ".join(problems)
            + "\nCure: take weights and config files of one and the same checkpoint"
        )


def _left_out(name: str, config: BagelConfig) -> bool:
    """Is this key of a part that the caller asked to leave out?"""
    gen = "_moe_gen" in name or name.startswith(("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed."))
    und = name.startswith(("vit_model.", "connector.", "vit_pos_embed."))
    return (gen and not config.visual_gen) or (und and not config.visual_und)


def _few(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def save_bagel(model: Bagel, folder: Path | str, *, weights: Mapping[str, Tensor] | None = None, filename: str = WEIGHTS) -> None:
    """Writes a checkpoint folder in the published layout, for the reference code and serving engines to load.

    A tensor that still has the value it was loaded with keeps its stored bytes (also where the model computes in another
    dtype); tensors of parts that were left out are copied from the folder the model came from.

    Args:
        model: the model.
        folder: where to; made when missing.
        weights: values to write instead of the model's own, by name (an average, say).
        filename: name of the weights file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = scan_folder(model.source) if model.source is not None else {}
    values: dict[str, Tensor] = dict(model.state_dict())
    values.update(weights or {})
    plan: dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]] = {}
    for name in [*source, *(n for n in values if n not in source)]:
        value, entry = values.get(name), source.get(name)
        if value is None or (entry is not None and _unchanged(value, entry)):
            assert entry is not None
            plan[name] = (entry.dtype, entry.shape, entry.read)
        else:
            plan[name] = (value.dtype, tuple(value.shape), lambda value=value: value.detach().cpu())
    write_safetensors(folder / filename, plan)
    if model.source is not None:
        for name in SIDE_FILES:
            origin = model.source / name
            if origin.exists() and not (folder / name).exists():
                shutil.copyfile(origin, folder / name)
    else:
        for name, part in (("llm_config", model.config.llm.to_diff_dict()), ("vit_config", model.config.vit.to_diff_dict())):
            write_json(folder / f"{name}.json", part)
    if model.config.vae.type != "flux" and not (folder / "vae_config.json").exists():
        write_json(folder / "vae_config.json", model.config.vae.to_dict())
    stored = read_json(model.source / "config.json") if model.source is not None and (model.source / "config.json").exists() else {}
    write_json(folder / "config.json", {**stored, **model.config.to_dict()})


def _unchanged(value: Tensor, entry: Stored) -> bool:
    if value.dtype == entry.dtype or tuple(value.shape) != entry.shape:
        return False  # nothing to keep: written in the same dtype, equal values are equal bytes
    return torch.equal(entry.read().to(value.dtype), value.detach().cpu())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: Path, plan: Mapping[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]]) -> None:
    """Writes tensors (dtype, shape, and a function that makes them) one after another, so that only one is in host memory.

    The library's own writer wants all of them on the host at once, which for an optimiser is three times the weights. It also
    refuses shared storage; here each tensor is simply written out.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Wide types first keeps every tensor aligned, as readers that map the file expect.
    order = sorted(plan, key=lambda name: -plan[name][0].itemsize)
    offset = 0
    for name in order:
        dtype, shape, _ = plan[name]
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")  # `plan` may read from the very file that is being replaced
    try:
        with open(part, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for piece in _bytes_of(plan, order):
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _bytes_of(plan: Mapping[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]], order: list[str]) -> Iterator[memoryview]:
    for name in order:
        dtype, shape, make = plan[name]
        tensor = make().contiguous()
        assert tensor.dtype == dtype and tuple(tensor.shape) == shape, name
        if tensor.numel():
            yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
