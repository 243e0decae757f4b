"""The published layout in and out, strict.

Weights are read tensor by tensor straight into memory of their final device and dtype, so the host never
holds them twice, and written one after another without a second copy.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from unigen import foreign
from unigen.bars import Bar
from unigen.config import ConfigError, DataOptions, TrainSource
from unigen.model.adapters import (
    NAME,
    AdapterError,
    config_of,
    parse_adapter,
    read_adapter,
)
from unigen.model.backends import use_expandable_segments
from unigen.model.bagel import Bagel
from unigen.model.codec import CODECS, FluxCodec, VaeConfig
from unigen.model.config import BagelConfig, read_config
from unigen.model.layers import sincos_table
from unigen.model.lora import activate, bind, fresh_values, linear_modules
from unigen.model.mistakes import ADAPTER, is_adapter_folder, merge_command
from unigen.model.parts import WORDS, is_adapter, is_left_out, is_table, published_name
from unigen.model.quantise import (
    QuantiseError,
    bits_of,
    check_bits,
    holds_quantised,
    large_blocks_apart,
    need_backend,
    quantise_layers,
    restore_weight,
    store,
)
from unigen.model.run_options import RUN_OPTIONS, carried
from unigen.model.schemas import vae_misfits
from unigen.model.storage import (
    FLOATS,
    WEIGHTS,
    CheckpointFolderError,
    Quantised,
    Stored,
    config_json,
    few,
    json_bytes,
    scan_folder,
    scan_safetensors,
    write_safetensors,
    wrong,
)
from unigen.printing import typed
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import Tokenizer, WordTokenizer
from unigen.values import PathText, read_value, shown

log = logging.getLogger("unigen")

SIDE_FILES = (
    "llm_config.json", "vit_config.json", "vae_config.json", "generation_config.json",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "LICENSE", "ae.safetensors",
)  # fmt: skip


def load_planner(
    folder: str | Path | None, options: DataOptions | None = None, source: TrainSource | None = None
) -> Planner:
    """The planner of a checkpoint folder (an adapter's: its base's), without its weights; ``source``: whose
    records it plans.

    Without a folder: the picture sizes of BAGEL-7B-MoT, and texts counted in words (:class:`WordTokenizer`),
    an estimate.

    Raises:
        CheckpointFolderError, TokenizerError: the folder lacks a file, or one cannot be used.
    """
    options = options or DataOptions()
    if folder is None:
        from transformers import Qwen2Config, SiglipVisionConfig

        llm = Qwen2Config(max_position_embeddings=32768)
        vit = SiglipVisionConfig(image_size=980, patch_size=14)
        return BagelConfig(llm, vit, VaeConfig()).planner(WordTokenizer(), options, source)
    folder = base_of(folder)[0]
    check_side_files(folder)
    return read_shape(folder).planner(Tokenizer.load(folder), options, source)


def read_shape(folder: Path, options: DataOptions | None = None) -> BagelConfig:
    """The shape of a checkpoint folder's model, without the parts that ``options`` leave out. Config files
    alone will do, where config.json says the sizes.

    Raises:
        CheckpointFolderError: as :func:`unigen.model.config.read_config`.
    """
    shapes = {name: stored.shape for name, stored in _held(folder).items()}
    parts = {} if options is None else {name: getattr(options, name) for name in ("visual_gen", "visual_und")}
    return read_config(folder, shapes, **parts)


def dtype_of_words(folder: Path) -> torch.dtype | None:
    """The dtype that the embedding of texts is stored in; None where the folder holds no weights."""
    words = _held(folder).get(WORDS)
    return words and words.dtype


def _held(folder: Path) -> Mapping[str, Stored]:
    """The folder's tensors, where it holds any."""
    return scan_folder(folder) if folder.is_dir() and any(folder.glob("*.safetensors*")) else {}


def load_bagel(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
    *,
    visual_gen: bool = True,
    visual_und: bool = True,
    constants: Mapping[str, Any] | None = None,
    weights: tuple[str, ...] = (WEIGHTS, "model.safetensors"),
    adapters: str | Path | Sequence[str | Path] = (),
    quantize: str | None = None,
    double_quant: bool = False,
) -> Bagel:
    """Loads a checkpoint folder in the published layout, or an adapter over the base that it names.

    Args:
        folder: the folder (see ``docs/model.md``).
        device: where the weights go, tensor by tensor.
        dtype: their dtype, or a function from a parameter's name to it; default as stored.
        visual_gen: false leaves the generation expert and the VAE out.
        visual_und: false leaves the ViT out.
        constants: values that win over ``config.json``, for checkpoints whose files do not say them.
        weights: file names to look for, in this order.
        adapters: folders of adapters to add up, ``FOLDER`` or ``FOLDER:FACTOR``.
        quantize: ``nf4`` or ``int8`` for the decoder's matrices; double_quant: with NF4, its scales, too. A
            folder that is quantised needs neither.

    Raises:
        CheckpointFolderError: a file is missing or damaged, or keys are missing, unexpected or misshapen (all
            listed); or weights are not finite.
        AdapterError: an adapter was made for another base.
        QuantiseError: the folder holds another kind than ``quantize``, or it cannot be computed here.
    """
    if not (dtype is None or isinstance(dtype, torch.dtype) or callable(dtype)):
        raise ConfigError(f"dtype is {shown(dtype)}. Fix: torch.bfloat16, torch.float16 or torch.float32")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device is {shown(device)}. Fix: cpu, cuda, or one GPU such as cuda:0") from None
    folder, adapters = base_of(folder, adapters)
    quantize, double_quant = bits_of(folder, quantize, double_quant)
    need_backend(quantize, device)
    if device.type == "cuda":
        use_expandable_segments()
    model, stored = build_bagel(
        folder, dtype, visual_gen=visual_gen, visual_und=visual_und, constants=constants, weights=weights
    )
    if quantize is not None:
        computes = torch.float32 if device.type == "cpu" else torch.bfloat16
        quantise_layers(model, quantize, double_quant, computes)
    place_parameters(model, stored, device, quantises=quantize is not None)
    refuse_nonfinite(folder, nonfinite(model.named_parameters()))
    object.__setattr__(model, "codec", load_codec(folder, model.config, device) if visual_gen else None)
    factors = {}
    for number, (place, factor) in enumerate(map(parse_adapter, adapters)):
        name = f"adapter_{number}"
        log.info("Adapter %s: %s", place, bind(model, place, factor, name, stored, device))
        factors[name], model.trained_in = factor, place
    if factors:
        activate(model, factors)
        refuse_nonfinite(Path(str(adapters[0])), nonfinite(model.named_parameters()))
    return model.eval()


def base_of(
    folder: Path | str, adapters: str | Path | Sequence[str | Path] = ()
) -> tuple[Path, list[str | Path]]:
    """The folder of a model, and the adapters over it: an adapter's folder stands for its base and itself."""
    folder = Path(read_value(PathText, folder, "the checkpoint's folder"))
    adapters = [adapters] if isinstance(adapters, str | Path) else adapters
    if is_adapter_folder(folder):
        base = read_adapter(folder)[0].base
        if not base or not Path(base).is_dir():
            raise AdapterError(
                f"{folder} is an adapter, and its base is not there ({base or 'it names none'}). Fix: give"
                f" the base, --model_path BASE, and --adapter {typed(folder)} where the command takes one"
            )
        return Path(base), [folder, *adapters]
    return folder, list(adapters)


def build_bagel(
    folder: Path | str,
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
    *,
    visual_gen: bool = True,
    visual_und: bool = True,
    constants: Mapping[str, Any] | None = None,
    weights: tuple[str, ...] = (WEIGHTS, "model.safetensors"),
    stored: dict[str, Stored] | None = None,
) -> tuple[Bagel, dict[str, Stored]]:
    """The model of a checkpoint folder on the meta device, without codec, its parameters in their final
    dtypes; and where the values lie (see :func:`read_parameter`). Arguments and errors as :func:`load_bagel`;
    ``stored`` says where the weights lie in place of ``weights``."""
    folder = Path(folder)
    if is_adapter_folder(folder):
        raise CheckpointFolderError(
            f"{folder} holds an adapter, no model. Fix: give the model that it was trained on (--model_path),"
            f" or merge them ({merge_command(folder)})"
        )
    dtype_for = dtype if callable(dtype) else lambda name: dtype
    stored = scan_folder(folder, weights) if stored is None else stored
    check_side_files(folder)
    _check_names_and_dtypes(folder, stored)
    shapes = {name: entry.shape for name, entry in stored.items()}
    config = read_config(
        folder, shapes, visual_gen=visual_gen, visual_und=visual_und, **dict(constants or {})
    )
    check_bits(folder, stored)
    with torch.device("meta"):
        model = Bagel(config)
    _check_keys(folder, model, shapes)
    for name, parameter in list(model.named_parameters()):
        known = name in stored and stored[name].shape == tuple(parameter.shape)
        final = dtype_for(name) or (stored[name].dtype if known else torch.float32)
        if final != parameter.dtype:
            owner, _, last = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=final, device="meta")
            held = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(owner), last, held)
    model.source = folder
    return model, stored


def place_parameters(
    model: Bagel,
    stored: Mapping[str, Stored],
    device: torch.device | str,
    *,
    quantises: bool,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """:func:`place_parameter` for all of them, with a bar; ``tick`` is called before each."""
    named = list(model.named_parameters())
    label = "loading and quantising weights" if quantises else "loading weights"
    with (
        large_blocks_apart() if quantises else contextlib.nullcontext(),
        Bar(label, sum(p.nbytes for _, p in named), "B") as shown,
    ):
        for name, p in named:
            tick()
            place_parameter(model, name, p, stored, device)
            shown.update(p.nbytes)


def place_parameter(
    model: Bagel, name: str, p: torch.nn.Parameter, stored: Mapping[str, Stored], device: torch.device | str
) -> None:
    """Gives a parameter, which lies nowhere yet, its memory on a device and its value; quantised where its
    module is."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    quantised = last == "weight" and holds_quantised(module)
    entry = stored.get(published_name(name))
    if quantised and isinstance(entry, Quantised):
        restore_weight(module, entry, device)
        return
    dtype = stored[published_name(name)].dtype if quantised else p.dtype
    value = torch.empty(p.shape, dtype=dtype, device=device)
    read_parameter(model, name, stored, value.view(-1))
    if quantised:
        refuse_nonfinite(model.source or Path(), nonfinite([(published_name(name), value)]))
        store(module, value)
    else:
        setattr(module, last, torch.nn.Parameter(value, requires_grad=p.requires_grad))


@torch.no_grad()
def read_parameter(
    model: Bagel, name: str, stored: Mapping[str, Stored], out: Tensor, start: int = 0
) -> None:
    """Elements [start, start + len(out)) of a flattened parameter into the flat tensor ``out``, of any dtype
    and device.

    A position table that the checkpoint lacks, or holds for another size, is computed; an adapter that it
    lacks is new.
    """
    entry, shape = stored.get(published_name(name)), tuple(model.get_parameter(name).shape)
    if entry is None and is_adapter(name):
        fresh = fresh_values(model, name, shape, stored)
        out.copy_(fresh.view(-1)[start : start + len(out)])
    elif is_table(name) and (entry is None or entry.shape != shape):
        table = sincos_table(math.isqrt(shape[0]), shape[1])
        out.copy_(table.view(-1)[start : start + len(out)])
    else:
        assert entry is not None
        entry.read_into(out, start)


@torch.no_grad()
def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity. Each is read once; a device is waited for once."""
    named = [(name, value.detach()) for name, value in tensors if value.numel()]
    sums = [value.sum(dtype=torch.float32) for _, value in named]
    doubted = torch.stack([total.isfinite() for total in sums]).logical_not().tolist() if sums else []
    # the sum of finite numbers can be too large
    return [n for (n, value), odd in zip(named, doubted, strict=True) if odd and not value.isfinite().all()]


def refuse_nonfinite(folder: Path, names: Sequence[str]) -> None:
    """Raises CheckpointFolderError where tensors of a folder are not finite."""
    if names:
        raise CheckpointFolderError(
            f"{folder}: {len(names)} tensors hold NaN or infinity: {few(list(names), 5)}. Fix: use a"
            " checkpoint from before the training diverged, or download the weights again"
        )


def load_codec(folder: Path, config: BagelConfig, device: torch.device | str = "cpu"):
    """The frozen codec of a checkpoint folder, in float32.

    Raises:
        CheckpointFolderError: ``ae.safetensors`` is missing, damaged, or of another shape than
            ``vae_config.json`` says.
    """
    try:
        kind = CODECS[config.vae.type]
        stored = scan_safetensors(folder / "ae.safetensors") if kind is FluxCodec else {}
        if found := vae_misfits(config.vae, {name: entry.shape for name, entry in stored.items()}):
            raise wrong(folder, "; ".join(found), "take both files of one and the same checkpoint")
        codec = kind(config.vae)
        if isinstance(codec, FluxCodec):
            values = {name: entry.read().float() for name, entry in stored.items()}
            refuse_nonfinite(folder / "ae.safetensors", nonfinite(values.items()))
            codec.load(values)
    except CheckpointFolderError:
        raise
    except ValueError as error:
        raise CheckpointFolderError(f"{folder}: {error}") from error
    return codec.to(device).eval().requires_grad_(False)


def _check_names_and_dtypes(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointFolderError where all names have the prefix of a wrapper, or weights are no floats."""
    for prefix in ("module.", "_orig_mod.", "model.", "bagel."):
        if stored and all(name.startswith(prefix) for name in stored):
            raise wrong(
                folder,
                f"{_file(stored)}: the names of all weights begin with {prefix!r}, as a wrapper of the model"
                " saves them",
                f"write the file anew with names without {prefix!r}:"
                f" {{name.removeprefix({prefix!r}): tensor ...}}, or save the wrapped model itself",
            )
    if odd := [name for name, entry in stored.items() if entry.code not in FLOATS]:
        codes = ", ".join(sorted({stored[name].code for name in odd}))
        raise wrong(
            folder,
            f"{_file(stored, odd[0])}: {len(odd)} weights have dtype {codes}, as quantised ones do:"
            f" {few(odd)}",
            "use the weights in bfloat16, float16 or float32, from before they were quantised",
        )


def _file(stored: Mapping[str, Stored], name: str | None = None) -> str:
    """The file of a tensor, or of the first."""
    parts = stored[name or next(iter(stored))].parts
    return parts[0].file.name if parts else WEIGHTS  # an empty tensor may have none


def _check_keys(folder: Path, model: Bagel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tables = {name for name in wanted if is_table(name)}
    missing = [name for name in wanted if name not in shapes and name not in tables]
    parts = model.config.visual_gen, model.config.visual_und
    unexpected = [name for name in shapes if name not in wanted and not is_left_out(name, *parts)]
    odd = [name for name in wanted if name not in tables and shapes.get(name, wanted[name]) != wanted[name]]
    misshapen = [f"{name} {list(shapes[name])} instead of {list(wanted[name])}" for name in odd]
    found = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if problems := [f"{len(names)} {title}: {few(names)}" for title, names in found.items() if names]:
        raise CheckpointFolderError(
            f"{folder}: the weights do not fit llm_config.json, vit_config.json and config.json:"
            f" {'; '.join(problems)}. Fix: take weights and config files of one and the same checkpoint"
        )


def save_bagel(
    model: Bagel, folder: Path | str, *, weights: Mapping[str, Tensor] | None = None, filename: str = WEIGHTS
) -> None:
    """Writes a checkpoint folder in the published layout, for the reference code and serving engines to load.

    A tensor that still has the value it was loaded with keeps its stored bytes (also where the model computes
    in another dtype); tensors of parts that were left out are copied from the folder the model came from.
    ``weights``: values to write instead of the model's own, by name (an average, say).
    """
    if model.adapters:
        raise AdapterError(
            "a model with adapters cannot be saved as one. Fix: unigen ckpt export ADAPTER NEW_FOLDER --merge"
        )
    if any(map(holds_quantised, model.modules())):
        raise QuantiseError(
            "a quantised model cannot be saved. Fix: unigen ckpt export FULL_MODEL NEW_FOLDER --quantize nf4"
        )
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
    write_side_files(side_files(model) | carried(model.source), folder)


def side_files(model: Bagel) -> dict[str, bytes]:
    """What a folder of the published layout holds beside its weights, by name: configs, tokenizer, VAE. A
    model with adapters has their config alone: the rest is the base's.

    Raises:
        CheckpointFolderError: one of those that the model came with cannot be read.
    """
    if model.adapters:
        return {ADAPTER: json_bytes(config_of(model.adapters[NAME], linear_modules(model)))}
    files: dict[str, bytes] = {}
    for name in (*SIDE_FILES, "config.json") if model.source is not None else ():
        if os.path.lexists(model.source / name):
            with _open_side_file(model.source, name) as file:
                files[name] = file.read()
    parts: dict[str, dict[str, Any]] = {}
    if model.source is None:
        parts["llm_config.json"] = model.config.llm.to_diff_dict()
        vit = model.config.vit
        parts["vit_config.json"] = {"num_attention_heads": vit.num_attention_heads, **vit.to_diff_dict()}
    if model.config.vae.type != "flux" and "vae_config.json" not in files:
        parts["vae_config.json"] = model.config.vae.to_dict()
    stored = config_json(model.source) if model.source else {}
    parts["config.json"] = {**stored, **model.config.to_dict()}
    return files | {name: json_bytes(part) for name, part in parts.items()}


def write_side_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes what :func:`side_files` gave; of what is there already only ``config.json`` and the
    options of the run that trained the weights are replaced."""
    for name, data in files.items():
        if name in ("config.json", RUN_OPTIONS) or not (folder / name).exists():
            (folder / name).write_bytes(data)


def check_side_files(folder: Path) -> None:
    """Opens every file that :func:`side_files` would read out of a folder.

    Raises:
        CheckpointFolderError: one leads out of the folder, is no regular file, is far too large, or cannot be
            read.
    """
    for name in SIDE_FILES:
        if os.path.lexists(folder / name):
            _open_side_file(folder, name).close()


def _open_side_file(folder: Path, name: str) -> BinaryIO:
    limit = foreign.MAX_FILE if name.endswith(".safetensors") else foreign.MAX_JSON
    try:
        return foreign.open_file(folder / name, foreign.roots_of(folder), limit)
    except foreign.ForeignFileError as error:
        raise CheckpointFolderError(str(error)) from None


def _unchanged(value: Tensor, entry: Stored) -> bool:
    if value.dtype == entry.dtype or tuple(value.shape) != entry.shape:
        return False  # nothing to keep: written in the same dtype, equal values are equal bytes
    return torch.equal(entry.read().to(value.dtype), value.detach().cpu())
