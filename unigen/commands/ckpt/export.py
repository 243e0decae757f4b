"""A checkpoint's weights, whoever wrote it, as a folder in the published layout."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unigen.bars import Bar
from unigen.commands.ckpt.listing import checkpoints_of, is_checkpoint_folder
from unigen.commands.ckpt.options import CkptOptions
from unigen.commands.ckpt.verify import RECEIPT, problems_of, receipt_of
from unigen.config import UserError
from unigen.figures import gb
from unigen.files import free_bytes, sha256_of, staged, sweep
from unigen.foreign import copy_file, roots_of
from unigen.model import quantise, storage
from unigen.model.adapters import GROUP, VLLM, disk_name, read_adapter
from unigen.model.config import read_config
from unigen.model.lora import base_digest, binding_on_disk, merges
from unigen.model.mistakes import is_adapter_folder
from unigen.model.parts import GEN
from unigen.model.run_options import RUN_OPTIONS, carried
from unigen.model.weights import SIDE_FILES, check_side_files
from unigen.outputs import output_folder, stranger, unwritten
from unigen.runs import layout
from unigen.runs.checkpoint import GROUPS, read_manifest, scan_weights
from unigen.runs.space import mount_of
from unigen.show.terminal import say
from unigen.version import __version__

MODEL = storage.WEIGHTS.removesuffix(".safetensors")


class ExportError(UserError):
    """A checkpoint cannot be exported; the message says why, and the fix."""


def export(source: Path, out: Path, options: CkptOptions) -> None:
    """Writes the weights of a checkpoint, whoever wrote it, or of a model's folder, as a folder in the
    published layout; with ``quantize`` the decoder's matrices as bitsandbytes stores them.

    Tensors are read, converted and written one after another through one buffer: host memory holds the
    largest tensor, and what quantising it takes. The folder is staged beside its place and renamed when it is
    whole.

    Raises:
        ExportError: the checkpoint is damaged, or has no such weights; the place is taken or too small.
        UserError: there is no checkpoint, its manifest is damaged, or the place cannot be written.
    """
    inside = [] if is_checkpoint_folder(source) or not source.is_dir() else checkpoints_of(source)
    if inside:
        raise ExportError(
            f"{source} is a run. Fix: name one of its checkpoints: {', '.join(p.name for p in inside)}"
        )
    if is_adapter_folder(source) and not is_checkpoint_folder(source):
        read_adapter(source)  # one that was exported for another program is told as that
    given = not is_checkpoint_folder(source) and (source / "llm_config.json").exists()
    manifest, out = _about(source) if given else read_manifest(source), Path(os.path.abspath(out))
    adapted = GROUP in manifest["groups"]
    _check_quantising(source, options, adapted)
    if options.format and (options.merge or not adapted):
        why = "is merged" if adapted else "holds no adapter"
        raise ExportError(f"format {options.format} says nothing here: {source} {why}. Fix: leave it out")
    if options.format == "vllm-omni":
        _check_for_vllm(source)
    for name in ("merge", "base"):
        if getattr(options, name) and not (adapted and options.merge):
            why, more = ("is not merged", ", or add --merge") if adapted else ("holds no adapter", "")
            raise ExportError(f"{name} says nothing here: {source} {why}. Fix: leave --{name} out{more}")
    with unwritten("the new folder", out):
        sweep(out)  # what a killed export left
        replacing = _check_place(source.resolve(), out, options.overwrite)
        output_folder("the new folder", out)
    if options.weights == "raw" and manifest.get("average", True) and "model" not in manifest["groups"]:
        raise ExportError(
            f"{source} holds the average alone. Fix: export a step_N folder, or leave --weights raw out"
        )
    average = options.weights == "ema" and manifest.get("average", True)
    groups = ("ema", GROUP, *(["model"] if options.weights == "raw" else []))
    states = set(map(layout.state_file, manifest["states"]))
    others = [name for name in manifest["files"] if name not in states and not _is_of(name, GROUPS)]
    exported = {*others, RUN_OPTIONS, *(name for name in manifest["files"] if _is_of(name, groups))}
    if options.verify and not given and (problems := problems_of(source, exported.__contains__)):
        raise ExportError(
            f"{source}: damaged checkpoint: {'; '.join(problems)}. Fix: export another one; --no_verify"
            " exports it as it is"
        )
    with unwritten("the new folder", out), staged(out, replace=replacing) as staging:
        tensors, side = _merged(source, options) if options.merge else _stored(source, others, options)
        stem = GROUP if adapted and not options.merge else MODEL
        files = _write_weights(tensors, staging, options, stem)
        if adapted:
            about_adapter, named = read_adapter(source)
            say(f"Adapter: {binding_on_disk(about_adapter, named)}")
        for path in side:
            copy_file(path, staging / path.name, roots_of(path.parent))
        for name, data in carried(source).items():
            (staging / name).write_bytes(data)
            side.append(Path(name))
        side += [Path(f"{stem}.safetensors{storage.INDEX}")] if len(files) > 1 else []
        about = {"unigen": __version__, "step": manifest["step"], "average": average}
        about |= {"dtype": options.dtype, "checkpoint": manifest["sha256"], "files": files}
        if options.quantize:
            about["quantize"] = _describe(source, staging, options)
            side.append(Path("config.json"))
        about["contents"] = {path.name: sha256_of(staging / path.name) for path in side}
        about["contents"] |= {name: file["sha256"] for name, file in files.items()}
        storage.write_json(staging / RECEIPT, about)
    size = sum(entry["size"] for entry in files.values())
    what = f"{source}" if given else f"step {manifest['step']}"
    kind = f"{options.quantize}, " if options.quantize else ""
    say(
        f"Exported {what} ({kind}{'average' if average else 'weights'}, {size:,} bytes,"
        f" {len(files)} file(s)) to {out}"
    )


def _about(source: Path) -> dict[str, Any]:
    """Stands for the manifest of a model's folder that no run wrote."""
    names = [name for name in (*SIDE_FILES, "config.json") if (source / name).is_file()]
    check_side_files(source)
    manifest = {"groups": ["ema"], "states": [], "files": dict.fromkeys(names)}
    return manifest | {"step": None, "average": False, "sha256": None}


def _check_quantising(source: Path, options: CkptOptions, adapted: bool) -> None:
    """Raises ExportError where what is asked for cannot be quantised."""
    if options.double_quant and options.quantize != "nf4":
        raise ExportError("double_quant needs quantize nf4. Fix: --quantize nf4, or leave --double_quant out")
    if not options.quantize or not adapted:
        quantise.need_backend(options.quantize, "cpu")
        return
    if options.merge:
        raise ExportError(
            f"merging and quantising at once is refused: {options.quantize} would round the sum anew, by"
            f" about {quantise.ROUNDS[options.quantize]} of each matrix, which is more than most adapters"
            f" change. Fix: leave --quantize out, or use {source} over the quantised base (--adapter); what"
            " is merged can be quantised by a second export, where its answers stay good enough"
        )
    raise ExportError(
        f"quantize says nothing here: {source} holds an adapter, and no model. Fix: export the base with"
        " --quantize, and the adapter without"
    )


def _check_for_vllm(source: Path) -> None:
    """Raises ExportError where vLLM-Omni would leave out a part of an adapter, which it does in silence."""
    adapter, _ = read_adapter(source)
    bound = "language_model.model.layers."
    unbound = [name for name in adapter.targets if GEN in name or not name.startswith(bound)]
    lost = [*adapter.whole, *unbound] or (["the magnitudes of DoRA"] if adapter.variant == "dora" else [])
    if lost:
        raise ExportError(
            f"{source}: vLLM-Omni binds low-rank factors of the text expert's layers alone, not"
            f" {storage.few(lost, 3)}. Fix: --merge in place of --format vllm-omni"
        )


def _describe(source: Path, staging: Path, options: CkptOptions) -> str:
    """Writes the quantised model's ``config.json``; the kind."""
    stored = _scanned(source, options)
    shapes = quantise.matrices(stored)
    config = read_config(source, {name: entry.shape for name, entry in stored.items()}).to_dict()
    if (staging / "config.json").exists():
        config = storage.checkpoint_json(staging / "config.json") | config
    assert options.quantize
    config["quantization_config"] = quantise.described(options.quantize, options.double_quant, shapes)
    config[storage.ORIGIN] = base_digest(stored)
    storage.write_json(staging / "config.json", config)
    return options.quantize


def _is_of(name: str, groups: Iterable[str]) -> bool:
    return any(storage.is_of_set(name, group) for group in groups)


def _check_place(source: Path, out: Path, overwrite: bool) -> bool:
    """Whether ``out`` is to be replaced. Raises ExportError where it must not be."""
    place = out.resolve()
    if place.is_relative_to(source) or source.is_relative_to(place):
        raise ExportError(f"{out} and the checkpoint {source} lie in each other. Fix: choose another folder")
    if place.parent == source.parent and layout.is_checkpoint(place.name):
        raise ExportError(f"{out} would look like a checkpoint of the run. Fix: choose another name")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not overwrite or not out.is_dir():
        raise ExportError(
            f"{out} exists already. Fix: choose another"
            f" folder{'' if not out.is_dir() else ', or --overwrite'}"
        )
    if not (out / RECEIPT).is_file():
        raise ExportError(
            f"{out} is no earlier export (it has no {RECEIPT}), so --overwrite leaves it. Fix: choose"
            " another folder"
        )
    if strange := stranger(out, RECEIPT, _contents(out)):
        raise ExportError(
            f"{out} holds {strange}, which no export left there as it is now, so --overwrite leaves it."
            " Fix: move that away, or choose another folder"
        )
    return True


def _contents(out: Path) -> dict[str, list[str]]:
    """The files of an earlier export, with their SHA-256."""
    contents = (receipt_of(out) or {}).get("contents", {})
    return {name: [digest] for name, digest in contents.items()}


class _Merged(NamedTuple):
    """A tensor of the base with the adapter added: as :class:`unigen.model.storage.Stored` is seen here."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read_into: Callable[[torch.Tensor], object]


Tensors = Mapping[str, storage.Stored | _Merged]


def _scanned(source: Path, options: CkptOptions) -> Mapping[str, storage.Stored]:
    """What a checkpoint or the folder of a model holds."""
    if is_checkpoint_folder(source):
        return scan_weights(source, raw=options.weights == "raw")
    return storage.scan_folder(source)


def _stored(source: Path, others: list[str], options: CkptOptions) -> tuple[Tensors, list[Path]]:
    """What is stored, by its names on disk, and the files beside it. Raises ExportError where it is quantised
    already."""
    stored: Tensors = _scanned(source, options)
    if small := [entry for entry in stored.values() if isinstance(entry, storage.Quantised)]:
        raise ExportError(
            f"{small[0].parts[0].file.parent} is quantised already, and its full weights are not there. Fix:"
            " copy the folder, or export the full weights"
        )
    if is_adapter_folder(source):
        inside = VLLM if options.format == "vllm-omni" else ""
        stored = {disk_name(name, inside): entry for name, entry in stored.items()}
    return stored, [source / name for name in others]


def _merged(source: Path, options: CkptOptions) -> tuple[Tensors, list[Path]]:
    """The base with the adapter added, and the base's files."""
    folder = Path(options.base or read_adapter(source)[0].base)
    if not folder.is_dir():
        raise ExportError(
            f"the base of {source} is not there ({folder}). Fix: name it by --base, or leave --merge out"
        )
    base, raw = storage.scan_folder(folder), scan_weights(source, raw=options.weights == "raw")
    made = merges(source, base, raw)

    def read(entry: storage.Stored, make: Callable[[], torch.Tensor]) -> _Merged:
        return _Merged(entry.dtype, entry.shape, lambda flat: flat.copy_(make().view(-1)))

    side = [folder / name for name in (*SIDE_FILES, "config.json") if (folder / name).is_file()]
    merged = {name: read(base[name], make) for name, make in made.items() if make is not None}
    return {**base, **merged}, side


def _write_weights(
    stored: Tensors, staging: Path, options: CkptOptions, stem: str
) -> dict[str, dict[str, Any]]:
    """The weights in one file, or in several and their index; size and SHA-256 of each."""
    plan = _planned(stored, options)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape, _) in plan.items()}
    total, free = sum(sizes.values()), free_bytes(staging)
    if free < total:
        raise ExportError(
            f"{staging.parent}: the export takes {gb(total)}, {gb(free)} are free on {mount_of(staging)}."
            " Fix: another disk"
        )
    shards = _shards(sizes, options.max_shard_gb)
    names = [storage.part_name(stem, number, len(shards)) for number in range(len(shards))]
    written = {}
    label = "merging and exporting" if options.merge else "exporting"
    with Bar(label, total, "B") as shown, quantise.large_blocks_apart():

        def make(name: str) -> torch.Tensor:
            shown.update(sizes[name])
            return plan[name][2]()

        for file, shard in zip(names, shards, strict=True):
            of_file = {n: (*plan[n][:2], lambda n=n: make(n)) for n in shard}
            size, digest = storage.write_safetensors(staging / file, of_file)
            written[file] = {"size": size, "sha256": digest}
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        storage.write_json(staging / f"{stem}.safetensors{storage.INDEX}", index)
    return written


def _planned(stored: Tensors, options: CkptOptions) -> storage.Plan:
    """Every tensor that is written, and what makes it: through one buffer, so that each has to be on the disk
    before the next is made."""
    dtypes = {name: _dtype(entry.dtype, options.dtype) for name, entry in stored.items()}
    sizes = {name: math.prod(entry.shape) * dtypes[name].itemsize for name, entry in stored.items()}
    buffer = torch.empty(max(sizes.values(), default=0), dtype=torch.uint8)
    kind, double = options.quantize, options.double_quant
    last: dict[str, dict[str, torch.Tensor]] = {}

    def make(name: str) -> torch.Tensor:
        flat = buffer[: sizes[name]].view(dtypes[name])
        stored[name].read_into(flat)
        return flat.view(stored[name].shape)

    def piece(name: str, key: str) -> torch.Tensor:
        if name not in last:
            last.clear()
            value = make(name)
            if not value.isfinite().all():
                raise ExportError(
                    f"{name} holds NaN or infinity, which cannot be quantised. Fix: export a checkpoint from"
                    " before the training diverged"
                )
            assert kind is not None
            last[name] = quantise.pieces_of(kind, double, value)
        return last[name][key]

    shapes = {name.removesuffix(".weight"): entry.shape for name, entry in stored.items()}
    small = set(quantise.quantised_names(shapes, kind)) if kind else set()
    plan: dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]] = {}
    for name, entry in stored.items():
        module = name.removesuffix(".weight")
        if kind is None or module not in small:
            plan[name] = (dtypes[name], entry.shape, lambda name=name: make(name))
            continue
        for key, (dtype, shape) in quantise.stored_as(kind, double, entry.shape).items():
            plan[f"{module}.{key}"] = (dtype, shape, lambda name=name, key=key: piece(name, key))
    return plan


def _dtype(stored: torch.dtype, asked: str) -> torch.dtype:
    return stored if asked == "as_stored" or not stored.is_floating_point else getattr(torch, asked)


def _shards(sizes: dict[str, int], max_gb: float | None) -> list[list[str]]:
    """The tensors in order, in files of at most ``max_gb``; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    room = most = float("inf") if max_gb is None else max_gb * 1e9
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards
