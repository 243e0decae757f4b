"""Adapters in a model: around its matrices by peft, their first values, their binding, and merging.

See ``adapters.py`` for what they are and how they lie on disk.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigen.config import nearest
from unigen.model.adapters import NAME, Adapter, AdapterError, read_adapter
from unigen.model.hub import without_hub_kernels
from unigen.model.parts import (
    ADAPTED,
    ADAPTER_MARKS,
    TRAINED_WHOLE,
    Patterns,
    is_adapter,
    is_left_out,
    is_table,
    matches,
)
from unigen.model.quantise import ROUNDS, dequantised, holds_int8, holds_quantised
from unigen.model.storage import Quantised, Stored, few

AnyBagel = Any  # the model's file knows what an adapter is

# ---- what is adapted


def targets_of(model: nn.Module, wanted: Iterable[str]) -> tuple[str, ...]:
    """The linear modules that ``lora_targets`` means: keys of ADAPTED, or patterns of module names.

    Raises:
        AdapterError: one means no linear module of this model.
    """
    return _chosen("lora_targets", wanted, ADAPTED, linear_modules(model))


def whole_of(model: nn.Module, wanted: Iterable[str]) -> tuple[str, ...]:
    """The parameters that ``train_also`` means: keys of TRAINED_WHOLE, or patterns of parameter names.

    Raises:
        AdapterError: one means no parameter of this model that can learn.
    """
    names = [name for name, _ in model.named_parameters() if not is_table(name)]
    return _chosen("train_also", wanted, TRAINED_WHOLE, names)


def linear_modules(model: nn.Module) -> list[str]:
    """Published names of all linear modules, which adapters can go around."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name.removesuffix(".base_layer") for name in names if not is_adapter(f"{name}.")]


def _chosen(option: str, wanted: Iterable[str], known: Patterns, names: list[str]) -> tuple[str, ...]:
    chosen: set[str] = set()
    for word in wanted:
        found = {name for name in names if matches(name, word, known)}
        if not found and word in known:
            left_out = "visual_gen" if is_left_out(known[word][0], False, True) else "visual_und"
            raise AdapterError(
                f"{option}: {word!r} is a part that {left_out}=false leaves out. Fix: leave it out of"
                f" {option}, or --{left_out} true"
            )
        if not found:
            close = nearest(word, [*known, *{part for name in names for part in name.split(".")}])
            raise AdapterError(
                f"{option}: {word!r} means nothing in this model"
                f"{f' (did you mean {close}?)' if close else ''}. Fix: use {', '.join(known)}, or a pattern"
                " of names such as *.q_proj_moe_gen"
            )
        chosen |= found
    return tuple(name for name in names if name in chosen)


# ---- putting it in


def add_adapter(model: AnyBagel, adapter: Adapter, name: str = NAME) -> None:
    """Puts an adapter around its matrices, in place. Its parameters lie nowhere yet; ``model.adapters`` knows
    it.

    Raises:
        AdapterError: peft is not installed, or refuses.
    """
    try:
        with without_hub_kernels():  # it imports bitsandbytes
            from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        fix = "pip install 'peft>=0.20' (the extra lora)"
        raise AdapterError(f"adapters need peft ({error}). Fix: {fix}") from None
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets),
        use_rslora=adapter.variant == "rslora", use_dora=adapter.variant == "dora",
    )  # fmt: skip
    try:
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise AdapterError(f"the adapter cannot be added: {' '.join(str(error).split())}") from error
    model.adapters[name] = adapter


def take_inputs_as_they_are(model: nn.Module) -> None:
    """Spares adapters the copy of their input in float32, which autocast would take back to the dtype of
    products: the numbers stay the same."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # of peft


@dataclass(frozen=True)
class Binding:
    """Proof that an adapter does something: the size of the change it makes to each of its matrices."""

    bound: int
    wanted: int
    low: float  # least Frobenius norm of a change
    high: float

    def __str__(self) -> str:
        return f"bound {self.bound} of {self.wanted} modules, |dW| {self.low:.3g} .. {self.high:.3g}"


def binding_of(model: AnyBagel, name: str = NAME) -> Binding:
    """How far the adapter changes each of its matrices.

    Raises:
        AdapterError: a module that it names has no adapter.
    """
    adapter = model.adapters[name]
    modules = dict(model.named_modules())
    bound = [t for t in adapter.targets if name in getattr(modules.get(t), "lora_A", ())]
    if len(bound) < len(adapter.targets) or not bound:
        lacking = [target for target in adapter.targets if target not in bound]
        raise AdapterError(
            f"only {len(bound)} of {len(adapter.targets)} modules were bound; without an adapter:"
            f" {few(lacking, 5)}. Fix: use the base that the adapter was trained on"
        )
    sizes = []
    for module in (modules[target] for target in bound):
        a, b = (getattr(module, mark)[name].weight.detach() for mark in ADAPTER_MARKS[:2])
        sizes.append(_size(a, b, module.scaling[name]))
    return _proven(sizes, adapter)


def _proven(sizes: list[float], adapter: Adapter) -> Binding:
    binding = Binding(len(sizes), len(adapter.targets), min(sizes), max(sizes))
    if binding.high == 0 and adapter.variant != "dora" and not adapter.whole:
        raise AdapterError(
            f"the adapter changes nothing ({binding}). Fix: use a checkpoint after its first steps"
        )
    return binding


def binding_on_disk(adapter: Adapter, stored: Mapping[str, Stored]) -> Binding:
    """:func:`binding_of` an adapter whose numbers lie where ``stored`` says. Raises AdapterError."""
    sizes = []
    for target in adapter.targets:
        a, b = (stored[f"{target}.{mark}.{NAME}.weight"].read() for mark in ADAPTER_MARKS[:2])
        sizes.append(_size(a, b, adapter.scaling))
    return _proven(sizes, adapter)


def _size(a: Tensor, b: Tensor, scaling: float) -> float:
    """Frobenius norm of ``scaling B A``, by two products of r x r: |BA|^2 = tr((B'B)(AA'))."""
    a, b = a.float(), b.float()
    return scaling * math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def _refuse_share(adapter: Adapter, factor: float) -> None:
    if adapter.variant == "dora" and factor not in (0, 1):
        raise AdapterError(
            f"a DoRA adapter cannot take part by {factor:g}: it learnt the lengths of rows. Fix: 1, or 0 for"
            " off"
        )


def activate(model: AnyBagel, weights: Mapping[str, float]) -> None:
    """Which adapters take part from now on, and how much: name -> factor of the adapter's own scaling.

    Raises:
        AdapterError: a part of a DoRA adapter is asked for.
    """
    for name, factor in weights.items():
        _refuse_share(model.adapters[name], factor)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            taking_part = [name for name, factor in weights.items() if factor and name in module.lora_A]
            module.set_adapter(taking_part, inference_mode=True)
            for name in taking_part:
                module.set_scale(name, weights[name])


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as the base below its adapters."""
    # peft's own enable_adapters would also change what trains, which a wrapped model does not bear
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


# ---- values


def fresh_values(model: AnyBagel, name: str, shape: tuple[int, ...], stored: Mapping[str, Stored]) -> Tensor:
    """The first values [shape] float32 of an adapter's parameter: A uniform in +-1 / sqrt(inputs), B zero, so
    that nothing changes at first (Hu et al. 2021, section 4.1); DoRA's magnitudes are the norms of the base's
    rows.

    ``stored`` says where the base lies; quantised matrices are there already. The same numbers for every
    engine: they depend on seed and name alone.
    """
    if ".lora_A." in name:
        digest = hashlib.sha256(f"{model.adapters[NAME].seed} {name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return (torch.rand(shape, generator=draw) * 2 - 1) / math.sqrt(shape[1])
    if ".lora_B." in name:
        return torch.zeros(shape)
    target = name.partition(".lora_")[0]
    below = model.get_submodule(f"{target}.base_layer")
    matrix = dequantised(below) if holds_quantised(below) else stored[f"{target}.weight"].read().float()
    return matrix.norm(dim=1)


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """The matrix [out, in] float32 that does what ``weight`` and its adapter do together:
    W + s B A; with DoRA m (W + s B A) / |W + s B A| by rows (Liu et al. 2024, eq. 5).

    Args:
        weight: [out, in]; a: [r, in]; b: [out, r]; scaling: of ``B A``; magnitude: [out].
    """
    changed = weight.float() + scaling * (b.float() @ a.float())
    if magnitude is None:
        return changed
    return changed * (magnitude.float() / changed.norm(dim=1))[:, None]


def check_fits(
    folder: Path, adapter: Adapter, named: Mapping[str, Stored], base: Mapping[str, Stored]
) -> None:
    """Does the adapter fit the base whose tensors are ``base``?

    Raises:
        AdapterError: modules or shapes of another model, or another base of the same shape.
    """
    odd = [target for target in adapter.targets if f"{target}.weight" not in base]
    odd += [name for name in adapter.whole if name not in base or base[name].shape != named[name].shape]
    for target in adapter.targets:
        if f"{target}.weight" in base:
            out, inputs = base[f"{target}.weight"].shape
            shapes = [named[f"{target}.{mark}.{NAME}.weight"].shape for mark in ADAPTER_MARKS[:2]]
            if shapes != [(adapter.rank, inputs), (out, adapter.rank)]:
                odd.append(f"{target} {shapes}, the base's matrix is {[out, inputs]}")
    if odd:
        raise AdapterError(
            f"{folder}: the adapter was made for another model; {len(odd)} of its parts do not fit:"
            f" {few(odd, 3)}. Fix: use its base ({adapter.base or 'not named'})"
        )
    if adapter.digest and adapter.digest != base_digest(base):
        raise AdapterError(
            f"{folder}: the adapter was trained on other weights of the same shape (their digest differs)."
            f" Fix: use its base ({adapter.base or 'not named'})"
        )


def check_same_parts(folder: Path, parameters: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> None:
    """Does a run that goes on have the adapters of its checkpoint? ``stored``: where the numbers of base (of
    ``folder``) and adapter lie, by the model's names.

    Raises:
        AdapterError: one of them has matrices that the other has not.
    """
    ours = {name for name in parameters if is_adapter(name)}
    theirs = {name for name in stored if is_adapter(name)}
    if odd := sorted(ours ^ theirs):
        raise AdapterError(
            f"the checkpoint's adapter over {folder} changes other matrices than this run's: {few(odd, 3)}."
            " Fix: resume with the run's own --lora_targets"
        )


def base_digest(base: Mapping[str, Stored]) -> str:
    """Tells one base from another by numbers from four places of each of its tensors, in bfloat16: the same
    for copies of other dtypes and other cuts into files. Position tables do not count, which copies may
    lack. A quantised copy has that of the model that it was made of, where it knows it."""
    digest = hashlib.sha256()
    for name in sorted(name for name in base if not is_table(name) and not is_adapter(name)):
        entry = base[name]
        if isinstance(entry, Quantised):
            if entry.origin:
                return entry.origin
            entry = dict(entry.pieces)["weight"]
        digest.update(f"{name} {list(entry.shape)}".encode())
        for at in sorted({entry.numel * part // 4 for part in range(4)}):
            some = entry.read(at, min(at + 32, entry.numel)).to(torch.bfloat16)
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- trained ones


@torch.no_grad()
def bind(
    model: AnyBagel, folder: Path, factor: float, name: str, base: Mapping[str, Stored],
    device: torch.device | str,
) -> Binding:  # fmt: skip
    """Loads the adapter of a folder, by ``name``, into a model whose weights are there, in float32;
    ``factor`` of it is added, also of what it trained whole. ``base``: where the tensors of the model's base
    lie.

    Raises:
        AdapterError: it is no adapter, was made for another base, or does not bind.
    """
    adapter, stored = read_adapter(folder)
    check_fits(folder, adapter, stored, base)
    _refuse_share(adapter, factor)
    modules = dict(model.named_modules())
    if adapter.variant == "dora" and any(holds_int8(modules.get(target)) for target in adapter.targets):
        raise AdapterError(
            f"{folder}: DoRA does not work over int8. Fix: the full weights, or --quantize nf4 over them"
        )
    add_adapter(model, adapter, name)
    for own in adapter.names():
        if own in adapter.whole:
            if holds_quantised(model.get_submodule(own.rpartition(".")[0])):
                raise AdapterError(
                    f"{folder}: the adapter trained {own} whole, which is quantised here. Fix: use it without"
                    " quantize, over the full weights"
                )
            weight = model.get_parameter(own)
            weight.add_((stored[own].read().float() - base[own].read().float()).to(weight), alpha=factor)
        else:
            owner, _, last = own.replace(f".{NAME}.", f".{name}.").rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, last, nn.Parameter(stored[own].read().float().to(device), requires_grad=False))
    return binding_of(model, name)


def merges(
    folder: Path, base: Mapping[str, Stored], raw: Mapping[str, Stored] | None = None
) -> dict[str, Callable[[], Tensor]]:
    """What makes each tensor of ``base`` that the adapter of a folder changes: published name -> float32
    tensor of its shape. ``raw``: where other numbers of the adapter lie (those that train, say), in place of
    the folder's.

    Raises:
        AdapterError: as :func:`bind`.
    """
    adapter, stored = read_adapter(folder)
    if any(isinstance(entry, Quantised) for entry in base.values()):
        raise AdapterError(
            f"{folder} cannot be merged into a quantised base: the sum would be rounded anew, by about"
            f" {ROUNDS['nf4']} of each matrix with nf4 and {ROUNDS['int8']} with int8, which is more than"
            " most adapters change. Fix: --base with the folder of the full weights; or use both as they are"
            " (unigen generate --model_path BASE --adapter ADAPTER)"
        )
    check_fits(folder, adapter, stored, base)
    stored = stored if raw is None else {**stored, **raw}

    def make(target: str) -> Tensor:
        parts = [stored.get(f"{target}.{mark}.{NAME}.weight") for mark in ADAPTER_MARKS]
        a, b, magnitude = (None if part is None else part.read() for part in parts)
        return merged(base[f"{target}.weight"].read(), a, b, adapter.scaling, magnitude)

    found = {f"{target}.weight": lambda target=target: make(target) for target in adapter.targets}
    return found | {name: lambda name=name: stored[name].read().float() for name in adapter.whole}
