"""What is done to a model for training, from outside and in one order (:func:`prepare`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unigen.config import RATED, Config, ConfigError
from unigen.model.adapters import Adapter, adapters_line
from unigen.model.bagel import Bagel
from unigen.model.compiling import CompiledLayers
from unigen.model.lora import add_adapter, take_inputs_as_they_are, targets_of, whole_of
from unigen.model.parts import GEN, is_frozen, rated_part
from unigen.model.products import linear
from unigen.model.quantise import is_quantised, need_backend, quantise_layers
from unigen.training.recompute import recompute_layers

log = logging.getLogger("unigen")


def prepare(
    model: Bagel, config: Config, device: str, engine: str, computes: torch.dtype, fresh: bool = True
) -> CompiledLayers | None:
    """Makes a model ready for training, in place; returns its compiled layers, if they are.

    The one order: adapters, quantise, freeze, compile, checkpointing; the engine shards last
    (``Engine.place``). Wrappers of a layer go from the inside out: what is recomputed runs compiled, and the
    frozen half is neither.

    Args:
        model: its parameters may lie nowhere yet.
        device, engine: their names; device is cuda or cpu.
        computes: dtype of matrix products.
        fresh: no earlier run's weights go on.

    Raises:
        ConfigError: nothing would be left to train.
        QuantiseError: quantised matrices cannot be computed on this device.
    """
    need_backend(config.quantize, device)
    if config.timestep_shift is not None:
        model.config.timestep_shift = config.timestep_shift  # saved with the model
    add_adapters(model, config, computes, fresh)
    if config.quantize is not None:
        # after the adapters, since peft cannot put DoRA around a quantised layer that lies nowhere yet
        quantise_layers(model, config.quantize, config.double_quant, computes)
    freeze(model, config)
    embed_in_float32(model)
    if computes == torch.float32:
        widen(model)
    compiled = compile_layers(model, config, device, engine)
    if config.gradient_checkpointing:
        recompute_layers(model, config.checkpointing_policy)
    if config.freeze_und:
        hold_understanding(model)
    return compiled


def add_adapters(model: Bagel, config: Config, computes: torch.dtype, fresh: bool = True) -> None:
    """Puts low-rank adapters around the matrices that the config names, if it does.

    Raises:
        AdapterError, ConfigError: as :func:`adapted`.
    """
    if config.lora_rank is None:
        return
    targets, whole = adapted(model, config, fresh)
    adapter = Adapter(
        rank=config.lora_rank,
        alpha=config.alpha,
        targets=targets,
        variant=config.lora_variant,
        whole=whole,
        base=os.path.abspath(config.model_path or ""),  # it is looked for from other folders, too
        seed=config.seed,
    )
    add_adapter(model, adapter)
    if computes != torch.float32 and config.lora_variant != "dora":
        take_inputs_as_they_are(model)
    log.info("Adapters: %s", adapters_line(adapter))


def adapted(model: Bagel, config: Config, fresh: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The matrices that adapters go around, and the parameters that train whole beside them; none without
    ``lora_rank``.

    Raises:
        AdapterError: ``lora_targets`` or ``train_also`` means nothing in this model.
        ConfigError: both mean the same, or what stays as it is; a ``fresh`` adapter would be larger than a
            matrix; those that trained so go on.
    """
    if config.lora_rank is None:
        return (), ()
    targets = targets_of(model, config.lora_targets or ["gen"])
    whole = whole_of(model, config.train_also or [])
    _refuse_names(config, targets, whole)
    sides = {name: max(model.get_submodule(name).weight.shape) for name in targets}
    least = min(sides, key=lambda name: sides[name])
    if fresh and config.lora_rank > sides[least]:
        raise ConfigError(
            f"lora_rank is {config.lora_rank}, and {least} has {sides[least]} numbers a side: such an adapter"
            " is larger than the matrix. Fix: --lora_rank 64, or less"
        )
    return targets, whole


def _refuse_names(config: Config, targets: tuple[str, ...], whole: tuple[str, ...]) -> None:
    """Raises ConfigError for names that cannot do what was asked of them."""
    for name in whole:
        module = name.rpartition(".")[0]
        if module in targets:
            raise ConfigError(
                f"train_also means {name}, whose matrix lora_targets adapts. Fix: leave it out of one of them"
            )
        if config.quantize is not None and is_quantised(module):
            raise ConfigError(
                f"train_also means {name}, whose matrix is quantised. Fix: leave it out, or give the full"
                " weights without quantize"
            )
    still = [name for name in (*targets, *whole) if config.freeze_und and rated_part(name) != "gen"]
    if still:
        raise ConfigError(
            f"freeze_und keeps {still[0]} as it is, which lora_targets or train_also means"
            f" ({len(still)} of them). Fix: name the generation expert's, such as *norm*_moe_gen*"
        )


def freeze(model: Bagel, config: Config) -> None:
    """Takes gradients from what the config freezes.

    Raises:
        ConfigError: nothing would be left to train, or as :func:`refuse_idle_rates`.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(name, config))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("freeze_llm, freeze_vit and freeze_und leave nothing to train; drop one of them")
    refuse_idle_rates(config, trained)


def refuse_idle_rates(config: Config, trained: Iterable[str]) -> None:
    """Raises ConfigError where a part has a rate or a decay of its own and none of the ``trained``
    parameters."""
    parts = set(map(rated_part, trained))
    idle = [part for part in RATED if part not in parts]
    for option in (f"{rule}_{part}" for part in idle for rule in ("learning_rate", "weight_decay")):
        if getattr(config, option) is not None:
            raise ConfigError(
                f"{option} says nothing: nothing of that part trains. Fix: leave it out, or let the part"
                " train (lora_targets and train_also, or freeze_llm, freeze_vit, freeze_und, visual_gen"
                " and visual_und decide it)"
            )


def embed_in_float32(model: Bagel) -> None:
    """Lets texts enter the residual stream in float32, also where their embedding is held in bfloat16."""
    words = model.language_model.model.embed_tokens
    if words.weight.dtype == torch.bfloat16:
        words.forward = lambda ids: F.embedding(ids, words.weight).float()  # type: ignore[method-assign]


def widen(model: Bagel) -> None:
    """Lets linear layers that train in bfloat16 compute in float32, as those that are held in it do; under
    autocast they need no help."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.dtype == torch.bfloat16:
            module.forward = partial(_widened, module)  # type: ignore[method-assign]


def _widened(module: torch.nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight.float(), None if module.bias is None else module.bias.float())


def hold_understanding(model: Bagel) -> None:
    """Stops gradients through the understanding tokens, as the reference does with ``freeze_und``: their half
    records none and passes none on."""
    decoder = model.language_model.model
    for layer in decoder.layers:
        layer.before, layer.after = _held(layer.before), _held(layer.after)
    decoder.normed = _held(decoder.normed)


def _held(part: Callable[..., Any]) -> Callable[..., Any]:
    """``part``, whose last argument is the expert, without gradients for the understanding one."""

    def run(*args: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and args[-1] == GEN):
            return part(*args)

    return run


def compiles(config: Config, device: str, engine: str) -> tuple[bool, str]:
    """Are the layers of a run compiled, and why so? ``device`` is cuda or cpu."""
    if config.compile != "auto":
        return config.compile == "on", "asked for"
    if device != "cuda":
        return False, "auto: steps on a CPU gain less than compiling costs"
    if config.recomputes_selectively:
        return False, "auto: checkpointing_policy is selective"
    if config.lora_variant == "dora":
        return False, "auto: dora"
    if config.quantize is not None:
        return False, "auto: the matrices are quantised"
    if engine == "deepspeed":
        return False, "auto: the engine is deepspeed"
    return True, "auto: the device is a GPU"


def compile_layers(model: Bagel, config: Config, device: str, engine: str) -> CompiledLayers | None:
    """Compiles the layers of a prepared model where the config says so, and logs it."""
    on, why = compiles(config, device, engine)
    log.info("Layers: %s (%s)", "compiled, in the warm-up batch" if on else "not compiled", why)
    return CompiledLayers(model, strict=config.compile == "on") if on else None
