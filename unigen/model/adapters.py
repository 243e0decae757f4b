"""Low-rank adapters (Hu et al. 2021, "LoRA"; Kalajdzievski 2023, rsLoRA; Liu et al. 2024, DoRA) over the
matrices of a model whose parameters keep the names of the published checkpoint.

peft puts them around the matrices and computes with them. On disk they are what peft writes::

    adapter_config.json         rank, alpha, matrices, the base; under "unigen" what a check of the base needs
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight [r, in], .lora_B.weight [out, r],
                                .lora_magnitude_vector [out] (DoRA), base_model.model.NAME of parts trained
                                whole

``lora.py`` puts them into a model; what is here needs neither PyTorch nor peft.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unigen.config import UserError
from unigen.model.mistakes import ADAPTER
from unigen.model.parts import ADAPTER_MARKS, is_adapter
from unigen.model.storage import Stored, checkpoint_json, few, scan_set

GROUP = "adapter_model"  # of files, as ``adapter_model.safetensors``
# of peft's configs: what changes the numbers in ways that are not known here
_UNUSED = (
    "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "fan_in_fan_out", "target_parameters",
    "trainable_token_indices", "megatron_config",
)  # fmt: skip
PREFIX = "base_model.model."
VLLM = "bagel."  # where vLLM-Omni registers the model, which stands behind the prefix in an export for it
NAME = "default"  # peft's name of the adapter that trains


class AdapterError(UserError):
    """An adapter that cannot be made, read or bound; the message says why and the fix."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, without its numbers."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # modules, by their whole names
    variant: str = "lora"  # or rslora, or dora
    whole: tuple[str, ...] = ()  # parameters that are trained whole beside it
    base: str = ""  # folder or name of the model below
    digest: str = ""  # of the base's matrices, see :func:`base_digest`
    seed: int = 0  # of lora_A

    @property
    def scaling(self) -> float:
        """What ``B A`` is multiplied with: alpha / r, with rsLoRA alpha / sqrt(r)."""
        return self.alpha / (math.sqrt(self.rank) if self.variant == "rslora" else self.rank)

    def names(self) -> list[str]:
        """All its parameters, as the model calls them."""
        marks = ADAPTER_MARKS if self.variant == "dora" else ADAPTER_MARKS[:2]
        found = [f"{target}.{mark}.{NAME}.weight" for target in self.targets for mark in marks]
        return [*found, *self.whole]


# ---- on disk


def disk_name(name: str, inside: str = "") -> str:
    """peft's key of a parameter of the adapter that trains; ``inside``: where a program that wraps the model
    has it."""
    name = name.replace(f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector")
    return PREFIX + inside + name.replace(f".{NAME}.weight", ".weight")


def own_name(key: str, adapter: str = NAME) -> str:
    """The model's name of the parameter whose key in the file is ``key``."""
    name = key.removeprefix(PREFIX)
    for mark in ADAPTER_MARKS[:2]:
        name = name.replace(f".{mark}.weight", f".{mark}.{adapter}.weight")
    return name.replace(".lora_magnitude_vector", f".lora_magnitude_vector.{adapter}.weight")


def config_of(adapter: Adapter, linear: Iterable[str]) -> dict[str, Any]:
    """``adapter_config.json``. ``linear``: names of all linear modules of the base."""
    return {
            "peft_type": "LORA", "task_type": None, "inference_mode": True,
            "base_model_name_or_path": adapter.base,
            "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": False, "target_modules": short_targets(adapter.targets, linear),
            "use_rslora": adapter.variant == "rslora", "use_dora": adapter.variant == "dora",
            "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.whole}) or None,
            "unigen": {"targets": list(adapter.targets), "whole": list(adapter.whole),
            "digest": adapter.digest},
        }  # fmt: skip


def short_targets(targets: Iterable[str], linear: Iterable[str]) -> list[str]:
    """Ends of names that mean exactly ``targets`` among ``linear`` (peft compares ends of names), as short as
    can be."""
    wanted, meant = set(targets), defaultdict(set)
    for name in linear:
        for end in _ends(name):
            meant[end].add(name)
    return sorted({next(end for end in _ends(target) if meant[end] <= wanted) for target in wanted})


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[-count:]) for count in range(1, len(parts) + 1))


def parse_adapter(text: str | Path) -> tuple[Path, float]:
    """``FOLDER`` or ``FOLDER:FACTOR``; the factor is 1 where none is given.

    Raises:
        AdapterError: the factor is no finite number, or there is no adapter there.
    """
    folder, colon, last = str(text).rpartition(":")
    if not colon or Path(text).exists():
        folder, last = str(text), "1"
    try:
        factor = float(last)
    except ValueError:
        folder, factor = str(text), 1.0
    if not math.isfinite(factor):
        raise AdapterError(f"adapter {text}: the factor is no finite number. Fix: FOLDER:0.5")
    if not (Path(folder) / ADAPTER).is_file():
        raise AdapterError(
            f"adapter {folder}: there is no {ADAPTER}. Fix: give a step_N folder of a run with adapters"
        )
    return Path(folder), factor


def read_adapter(folder: Path) -> tuple[Adapter, dict[str, Stored]]:
    """An adapter's config, and where its numbers lie, by the model's names.

    Raises:
        AdapterError: it is no adapter that this program can use.
        CheckpointFolderError: a file is missing or damaged.
    """
    config = checkpoint_json(folder / ADAPTER)
    stored = scan_set(folder, f"{GROUP}.safetensors")
    if stored is None:
        raise AdapterError(f"{folder} has {ADAPTER} but no {GROUP}.safetensors. Fix: copy the whole folder")
    if stored and all(key.startswith(PREFIX + VLLM) for key in stored):
        raise AdapterError(
            f"{folder} is an adapter exported for vLLM-Omni: the names of its matrices begin with {VLLM!r}."
            " Fix: give the folder that it was exported from, a step_N or best of its run, or export that"
            " again without --format vllm-omni"
        )
    named = {own_name(key): entry for key, entry in stored.items()}
    ours = config.get("unigen")
    ours = ours if isinstance(ours, dict) else {}
    rank, alpha = config.get("r"), config.get("lora_alpha")
    fits = type(rank) is int and rank > 0 and isinstance(alpha, int | float)
    if not fits or config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder / ADAPTER}: peft_type {config.get('peft_type')!r}, r {rank!r}, lora_alpha {alpha!r} is"
            " no LoRA adapter. Fix: give a folder that peft or unigen wrote for LoRA"
        )
    odd = [key for key in _UNUSED if config.get(key)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    odd += ["use_rslora with use_dora"] if config.get("use_rslora") and config.get("use_dora") else []
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva"):
        odd.append("init_lora_weights")  # its base is not the published one
    if odd:
        raise AdapterError(f"{folder / ADAPTER}: {few(odd)} is not supported. Fix: merge it with peft")
    targets = tuple(dict.fromkeys(n.partition(".lora_")[0] for n in named if is_adapter(n)))
    variant = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    adapter = Adapter(
        rank=rank, alpha=float(alpha), targets=targets, variant=variant,
        whole=tuple(n for n in named if not is_adapter(n)),
        base=str(config.get("base_model_name_or_path") or ""),
        digest=str(ours.get("digest") or ""),
    )  # fmt: skip
    if odd := [name for name in named if name not in adapter.names()]:
        raise AdapterError(
            f"{folder}: the adapter holds {few(odd, 3)}, which is no part of LoRA. Fix: merge it with peft"
        )
    lacking = [name for name in adapter.names() if name not in named]
    lacking += [target for target in ours.get("targets", []) if target not in targets]
    if lacking or not targets:
        raise AdapterError(
            f"{folder}: the adapter lacks {few(lacking, 5) or 'all its matrices'}. Fix: copy it again"
        )
    return adapter, named


def adapters_line(adapter: Adapter) -> str:
    extra = f", {len(adapter.whole)} tensors whole" if adapter.whole else ""
    about = f"{adapter.variant} rank {adapter.rank}, alpha {adapter.alpha:g}"
    return f"{about}, {len(adapter.targets)} matrices{extra}"
