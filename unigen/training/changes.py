"""What a resumed run does otherwise than the one that saved its checkpoint, and what each change does."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import permutations
from pathlib import Path
from types import MappingProxyType
from typing import Any

from unigen import plugins
from unigen.config import RATED, Config, ConfigError, DataOptions, UserError
from unigen.messages import in_language
from unigen.model.mistakes import as_new_run
from unigen.printing import typed
from unigen.tracking.tracker import TRACKERS
from unigen.training.optim import learning_rate_at
from unigen.training.precision import Precision, stored_precision

log = logging.getLogger("unigen")

_RATE = (
    "num_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps",
)  # fmt: skip
_TOLD = {  # by tell_computing
    "precision", "fp16", "bf16", "compile", "quantize", "double_quant", "model_load_mode", "weights",
}  # fmt: skip
_OTHERWISE = "training samples are made otherwise from here on"
_FREE = {  # of no effect on what is learnt, or of this start alone
    "output_dir", "resume_from_checkpoint", "dry_run", "device", "engine", "shard_size", "num_workers",
    "hang_timeout", "async_save", "low_space", "min_free_gb", "deepspeed_config", "cpu_offload",
    "gradient_checkpointing", "checkpointing_policy", "cache_dir", "check_pictures",
    "log_level", "logging_steps", "preflight", "expect_text_loss", "expect_image_loss",
    # compared by what they give:
    "train_data_path", "train_sources", "split", "gradient_accumulation_steps",
}  # fmt: skip
_OTHER_RECORDS = "val_loss is of other data: earlier values, and the best one, do not compare"
_EFFECTS = {
    "only parts that the checkpoint does not hold come from there": ("model_path",),
    "packed sequences have other sizes from here on": ("batch_size", "max_num_tokens"),
    "its moments are read in their new form": ("optimizer",),
    "checkpoints are written at other steps": ("save_steps",),
    "the next save keeps so many": ("save_total_limit",),
    "validations come at other steps": ("eval_steps",),
    _OTHER_RECORDS: ("val_data_path", "val_split"),
    "trackers are told so from the next step on": (
        "tensorboard", "wandb_project", "wandb_run_name", "wandb_mode", "trackio_project",
    ),
    "the next samples are made so": ("sample_prompts", "sample_steps", "sample_kind"),
    "the next evaluations measure so; earlier values need not compare": (
        "eval_metrics", "eval_samples", "eval_features", "eval_clip",
    ),
    "what was best so far is not what counts now": ("metric_for_best_model", "greater_is_better"),
    "the probe asks other records: earlier values do not compare": ("probe_data_path",),
    "the run may end by it from the next validation on": ("stop_on_drift", "early_stopping_patience"),
    "what is skipped, and when that ends the run, is decided so from here on": (
        "max_skipped_steps", "max_skipped_share", "spike_sigma", "on_bad_record",
    ),
    "updates are made so from the next step on": (
        "weight_decay", "weight_decay_und", "weight_decay_gen", "weight_decay_vit", "weight_decay_connector",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    ),
    "that part learns at another rate from the next step on": tuple(f"learning_rate_{p}" for p in RATED),
    "the loss is weighed otherwise: earlier values do not compare": (
        "text_loss_weight", "image_loss_weight", "preserve_weight",
    ),
    "other samples hold the model where it was from here on": ("preserve_share", "preserve_data_path"),
    "noise is drawn otherwise: earlier losses of pictures do not compare": ("timestep_shift",),
    "other parts train from here on, where the checkpoint fits that": (
        "freeze_llm", "freeze_vit", "freeze_und", "train_also", "lora_rank", "lora_alpha", "lora_targets",
        "lora_variant",
    ),
}  # fmt: skip
"""What another value does -> options; of those in no set here the values alone are told."""
_EFFECT_OF = {name: effect for effect, names in _EFFECTS.items() for name in names}
_NAMED = {
    "model_path": {
        True: "the same weights under another name",
        False: "other weights than the run began with; only parts that the checkpoint does not hold come from"
        " there",
    },
    "val_data_path": {True: "the same records under another name", False: _OTHER_RECORDS},
}
"""Option -> what it does where it names the same as before, and where it does not."""
_GROUPED_WITH = "sample_kind"  # an option that checkpoints have since names of trackers are in groups
_LEARNT = {field.name for field in fields(DataOptions)}


def changes(
    folder: Path,
    before: Mapping[str, Any],
    now: Config,
    step: int,
    totals: tuple[int | None, int],
    same: Mapping[str, bool | None] = MappingProxyType({}),
) -> list[str]:
    """Each option that differs from those of the checkpoint ``folder`` (``before``), with what that does:
    ``max_steps 200 -> 120: ...``.

    Args:
        step: optimiser steps done.
        totals: steps of the whole run, then (None where the checkpoint does not say) and now.
        same: is what these options name that of the run, whatever it is called? None where that is not known.

    Raises:
        UserError: an option that the place in the data depends on has changed.
    """
    own = json.loads(json.dumps(now.to_dict()))  # as a checkpoint has them
    differ = {name: (before[name], value) for name, value in own.items() if before.get(name, value) != value}
    if "plugin" in differ and not any(plugins.lacking(*pair) for pair in permutations(differ["plugin"])):
        del differ["plugin"]  # the same by another name
    if "seed" in differ:
        was = differ["seed"][0]
        raise UserError(
            f"seed is {now.seed}, and the checkpoint's run had {was}: the order of the epoch that it is in"
            f" depends on it, so records would be met twice or never. Fix: --seed {was}, or a new run with"
            f" another --output_dir and {as_new_run(folder)}"
        )
    lines = []
    rates = [name for name in _RATE if name in differ]
    if rates:
        told = ", ".join(f"{name} {_short(differ[name])}" for name in rates)
        effect = _rate_effect(before, now, step, totals)
        lines.append(told + (f": {effect}" if effect else ""))
    for name in _NAMED:
        if same.get(name) is False:  # also under the same name
            differ.setdefault(name, (own[name],))
    if same.get("val_data_path") is not None:
        differ.pop("val_split", None)
    for name, pair in differ.items():
        if name in _RATE or name in _TOLD or name in _FREE:
            continue
        effect = _EFFECT_OF.get(name, _OTHERWISE if name in _LEARNT else "")
        if (known := same.get(name)) is not None:
            effect = _NAMED[name][known]
        if name == "ema":
            was, becomes = pair
            effect = "the average goes on with the new decay"
            effect = effect if was and becomes else "the average begins anew" if becomes else "it ends here"
        lines.append(f"{name} {_short(pair)}" + (f": {in_language(effect)}" if effect else ""))
    return lines


def tell_changes(
    lines: Sequence[str], folder: Path, before: Mapping[str, Any], now: Config, step: int
) -> None:
    """Logs the ``lines`` of :func:`changes`, and whether trackers get other names than before."""
    if lines:
        log.warning("Other options than in %s:", folder)
        for line in lines:
            log.warning("  %s", line)
    if _GROUPED_WITH not in before and any(row.asked_for(now) for row in TRACKERS.values()):
        log.warning(
            "Trackers get other names than before step %d, in groups: train/loss for loss, val/loss for"
            " val_loss ...; what they have stays under the old ones", step,
        )  # fmt: skip


def tell_computing(before: Mapping[str, Any], config: Config, precision: Precision, compiled: bool) -> None:
    """Says where a resumed run computes otherwise than its checkpoint, whose options are ``before``."""
    if (was := stored_precision(before)) != precision.name:
        log.warning(
            "This run was computed in %s and goes on in %s (%s), so its losses can differ from here on. Fix: "
            "--precision %s",
            was, precision.name, precision.why, was,
        )  # fmt: skip
    if (was := before.get("compile", "off") == "on") != compiled:
        log.warning(
            "This run's layers were %s and are %s now: its numbers can differ in the last digits from here "
            "on. Fix: --compile %s",
            *("compiled" if so else "not compiled" for so in (was, compiled)), "on" if was else "off",
        )  # fmt: skip
    kind, double, *now = (
        options.get(name) or None
        for options in (before, vars(config))
        for name in ("quantize", "double_quant")
    )
    if [kind, double] != now:
        fix = f"--quantize {kind or 'none'}{' --double_quant' if double else ''}"
        if config.quantised_folder:  # which decides them
            fix = f"--model_path {typed(before.get('model_path'))}, with the weights that lay there"
        log.warning(
            "This run's base was %s and is %s now: its losses change from here on. Fix: %s",
            kind or "as it is stored", now[0] or "as it is stored", fix,
        )  # fmt: skip
    if (was := before.get("weights") or "float32") != config.weights:
        log.warning(
            "This run's weights were held in %s and are in %s now: its numbers change from here on. Fix: "
            "--weights %s",
            was, config.weights, was,
        )  # fmt: skip


def _rate_effect(before: Mapping[str, Any], now: Config, step: int, totals: tuple[int | None, int]) -> str:
    """What becomes of the end of the run and of the learning rate of the next step; empty where neither is to
    come."""
    total_before, total = totals
    then = ""
    if total_before not in (None, total) and step < total:
        then = in_language(f"the run ends at step {total} instead of {total_before}")
    try:
        old = Config(**{name: before[name] for name in (*_RATE, "lora_rank") if name in before})
    except ConfigError:
        return then
    if total_before is None or step >= min(total_before, total):
        return then
    was, becomes = learning_rate_at(step, total_before, old), learning_rate_at(step, total, now)
    moved = f"the learning rate of the next step is {becomes:.3g} instead of {was:.3g}"
    if was == becomes:
        moved = f"the learning rate of the next step stays {was:.3g}, later ones differ"
    moved = in_language(moved)
    return f"{then}; {moved}" if then else moved


def _short(pair: tuple[Any, ...]) -> str:
    return " -> ".join("none" if value is None else f"{value}"[:60] for value in pair)
