"""What the options of a run may be together: tables of refusals by topic, for ``Config.resolve``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from unigen.topics import RATED

Rules = Iterator[tuple[Any, str]]
"""(is it refused?, the option, what is wrong with it and the fix)."""

_EXAMPLES = {"lora_rank": "--lora_rank 64", "preserve_weight": "--preserve_weight 1"}
_NEEDS = {
    "split": "train_data_path",
    **dict.fromkeys(("val_split", "eval_metrics", "early_stopping_patience"), "val_data_path"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), "val_data_path"),
    **dict.fromkeys(("eval_features", "eval_clip"), "eval_metrics"),
    "stop_on_drift": "probe_data_path",
    **dict.fromkeys(("sample_steps", "sample_kind"), "sample_prompts"),
    **dict.fromkeys(("wandb_run_name", "wandb_mode"), "wandb_project"),
    **dict.fromkeys(("lora_alpha", "lora_targets", "train_also", "lora_variant"), "lora_rank"),
    **dict.fromkeys(("preserve_data_path", "preserve_share"), "preserve_weight"),
}
"""Option -> the one without which it says nothing."""
_OF_ENGINES = {"shard_size": "fsdp2", "cpu_offload": "fsdp2", "deepspeed_config": "deepspeed"}
_SHARDED = ("quantize", "weights")  # what no engine that shards can take
_REFUSED = {
    "fsdp2": _SHARDED,
    "deepspeed": (
        *(f"{what}_{part}" for part in RATED for what in ("learning_rate", "weight_decay")),
        *("lora_rank", "preserve_weight", "optimizer", *_SHARDED),
    ),
}
"""Engine -> options that do not work with it."""
_DRAWING = (
    *("image_loss_weight", "timestep_shift", "expect_image_loss"),
    *("text_cond_dropout_prob", "vit_cond_dropout_prob", "vae_cond_dropout_prob"),
)


def conflicts(c: Any) -> Rules:
    """All rules for a ``Config``, whether broken or not."""
    for topic in (_missing, _nothing_to_learn, _at_odds, _adapters, _quantised, _preserving, _low):
        yield from topic(c)


def _given(c: Any, name: str) -> bool:
    return getattr(c, name) != getattr(type(c), name)


# do adapters train? -> who they are of, usual learning rates, and beyond which numbers one is surely a slip
_RATES = {
    False: ("the weights themselves", "1e-5", ("1e-6", "1e-4"), (1e-8, 1e-2)),
    True: ("weights of adapters", "1e-4", ("1e-5", "1e-3"), (1e-7, 5e-2)),
}


def unusual(c: Any) -> Iterator[str]:
    """What of a ``Config`` works and hardly is meant: learning rates far from those of fine-tuning. 0 is
    meant; of the optimiser of a plugin nothing is known."""
    what, usual, (least, most), (low, high) = _RATES[c.lora_rank is not None]
    for name in ("learning_rate", *(f"learning_rate_{part}" for part in RATED)):
        rate = getattr(c, name)
        if not rate or low <= rate <= high or c.optimizer not in ("adamw", "adamw8bit"):
            continue
        why = (
            "AdamW moves each weight by about that much in a step, whatever the size of its gradient, and"
            " most weights of a model are smaller than 0.1: what it knows is lost in a few steps"
            if rate > high
            else "steps so small are lost in rounding: nothing is learnt"
        )
        yield f"{name} is {rate:g}, and {what} usually take {least} to {most}: {why}. Fix: --{name} {usual}"


def _missing(c: Any) -> Rules:
    """What is not given, and what is given without the option that it belongs to."""
    yield not c.model_path, "model_path is missing. Fix: give the folder of a BAGEL checkpoint"
    yield (
        not (c.train_data_path or c.train_sources),
        "train_data_path is missing. Fix: give a JSON or JSONL file, or a folder of them",
    )
    needs = _NEEDS | ({"eval_samples": "val_data_path"} if c.eval_samples else {})
    for name, other in needs.items():
        fix = _EXAMPLES.get(other, "give that, too")
        lacks = _given(c, name) and getattr(c, other) is None
        yield lacks, f"{name} needs {other}. Fix: {fix}, or leave {name} out"
    for name, engine in _OF_ENGINES.items():
        yield _given(c, name) and c.engine != engine, f"{name} needs engine {engine}. Fix: --engine {engine}"
    for name in _DRAWING:
        given = not c.visual_gen and getattr(c, name) and _given(c, name)
        yield given, f"{name} says nothing with visual_gen=false. Fix: leave {name} out"
    yield (
        _given(c, "single_image_stop_prob") and c.single_image_stop_prob and not c.train_transitions,
        "single_image_stop_prob says nothing with train_transitions=false. Fix: leave one of them out",
    )
    yield (
        _given(c, "max_bad_share") and c.on_bad_record != "skip",
        "max_bad_share needs on_bad_record skip. Fix: --on_bad_record skip, or leave max_bad_share out",
    )
    yield (
        c.eval_steps is not None and c.val_data_path is None and c.probe_data_path is None,
        "eval_steps has nothing to measure. Fix: give val_data_path or probe_data_path, or leave it out",
    )
    yield (
        c.eval_samples == 0 and c.eval_metrics is not None,
        "eval_metrics has no records to measure, as eval_samples is 0. Fix: leave one of them out",
    )
    yield (
        c.checkpointing_policy != "full" and not c.gradient_checkpointing,
        f"checkpointing_policy is {c.checkpointing_policy}, but gradient_checkpointing is off. Fix:"
        " --gradient_checkpointing, or leave the policy out",
    )


def _nothing_to_learn(c: Any) -> Rules:
    """Parts and losses that leave out all that could be trained."""
    yield (
        not (c.visual_gen or c.visual_und) and c.freeze_llm,
        "freeze_llm with no visual part leaves nothing to train. Fix: leave freeze_llm out",
    )
    yield (
        c.freeze_und and not c.visual_gen,
        "freeze_und trains the generation expert, which visual_gen=false leaves out. Fix: leave one of them"
        " out",
    )
    yield (
        c.freeze_und and c.freeze_llm,
        "freeze_und with freeze_llm leaves only the latent heads. Fix: choose one of them",
    )
    yield (
        c.text_loss_weight == 0 and (c.image_loss_weight == 0 or not c.visual_gen),
        "text_loss_weight is 0, and so is all else that could be learnt. Fix: give one loss a weight above 0",
    )


def _at_odds(c: Any) -> Rules:
    """Options that exclude each other."""
    for name in _REFUSED.get(c.engine, ()):
        fix = "ddp" if name in _SHARDED else "fsdp2"
        value, engine = getattr(c, name), c.engine
        yield _given(c, name), f"{name} is {value}, which does not work with engine {engine}. Fix: use {fix}"
    for name in (f"learning_rate_{part}" for part in RATED):
        rated = _given(c, name) and c.learning_rate == 0
        yield rated, f"{name} follows learning_rate, which is 0. Fix: a rate above 0"
    yield (
        c.train_data_path and c.train_sources,
        "train_sources and train_data_path exclude each other. Fix: keep one",
    )
    yield (
        None not in (c.warmup_steps, c.max_steps) and c.warmup_steps > c.max_steps,
        f"warmup_steps is {c.warmup_steps}, above max_steps {c.max_steps}: the learning rate would never"
        " reach its peak. Fix: fewer",
    )
    yield (
        c.learning_rate * c.weight_decay >= 1,
        f"weight_decay is {c.weight_decay}: times the learning rate of {c.learning_rate} a step takes away"
        " more than there is. Fix: a smaller one",
    )
    for name in ("expect_text_loss", "expect_image_loss"):
        low, high = getattr(c, name) or (0.0, 0.0)
        said = f"{name} is {low:g} to {high:g}, which nothing lies in. Fix: the smaller number first"
        yield low > high, said
    yield (
        c.optimizer not in ("adamw", "adamw8bit") and c.weights == "bf16",
        f"weights is bf16, which optimizer {c.optimizer} does not round for. Fix: float32, or --optimizer"
        " adamw",
    )
    for refuses, what in (
        (c.recomputes_selectively, "checkpointing_policy selective"),
        (c.engine == "deepspeed", "engine deepspeed"),
        (c.lora_variant == "dora", "lora_variant dora"),
        (c.quantize, f"quantize {c.quantize}"),
    ):
        refused = c.compile == "on" and refuses
        yield refused, f"compile is on, which {what} does not allow. Fix: --compile auto"


def _adapters(c: Any) -> Rules:
    """Adapters, and what says nothing without or beside them."""
    if c.lora_rank is None:
        return
    for name in ("freeze_llm", "freeze_vit"):
        yield (
            getattr(c, name),
            f"{name} says nothing beside lora_rank: what lora_targets leaves out stays as it is. Fix: leave"
            " it out",
        )
    words = {*(c.lora_targets or ()), *(c.train_also or ())}
    yield (
        c.freeze_und and {"und", "both", "vit", "connector"} & words,
        "freeze_und excludes adapters of the understanding side. Fix: --lora_targets gen",
    )
    yield c.lora_targets == [], "lora_targets is empty. Fix: name a part, such as gen"
    yield (
        not c.visual_gen and c.lora_targets is None,
        "lora_targets is gen, which visual_gen=false leaves out. Fix: --lora_targets und",
    )
    yield (
        c.timestep_shift is not None,
        "timestep_shift would be lost: a checkpoint of adapters has no config.json. Fix: set it in the"
        " base's config.json",
    )
    yield (
        c.recomputes_selectively,
        "checkpointing_policy is selective, which does not know the products of adapters. Fix:"
        " --checkpointing_policy full",
    )


def _quantised(c: Any) -> Rules:
    """Matrices of 4 and 8 bits."""
    other = c.fp16 or c.precision in ("fp16", "fp32") or c.bf16 is False
    yield (
        c.model_load_mode == 1 and other,
        "model_load_mode is 1, bfloat16, and the precision is another. Fix: leave model_load_mode out, or"
        " --precision bf16",
    )
    if c.quantize is None:
        return
    yield (
        c.model_load_mode == 1 and c.quantised_folder,
        f"model_load_mode is 1, bfloat16, and {c.quantised_folder} holds {c.quantize}. Fix: leave it out,"
        " or give the folder of the full weights",
    )
    yield (
        c.model_load_mode not in (None, {"nf4": 2, "int8": 3}[c.quantize]),
        f"model_load_mode is {c.model_load_mode}, and quantize {c.quantize}. Fix: keep one of them",
    )
    yield (
        c.lora_rank is None and c.quantised_folder,
        f"model_path is {c.quantised_folder}, which holds {c.quantize}: such matrices cannot train"
        " themselves. Fix: --lora_rank 64, or give the folder of the full weights",
    )
    yield (
        c.lora_rank is None,
        "quantize needs lora_rank: quantised matrices cannot train themselves. Fix: --lora_rank 64",
    )
    yield (
        c.lora_variant == "dora" and c.quantize == "int8",
        "lora_variant dora does not work over int8. Fix: --lora_variant lora, or the full weights with"
        " --quantize nf4",
    )


def _preserving(c: Any) -> Rules:
    """The distance to the model as it was."""
    marked = any(isinstance(s, dict) and s.get("preserve") for s in c.train_sources or ())
    if c.preserve_weight is None:
        yield marked, "train_sources has preserve, which needs preserve_weight. Fix: --preserve_weight 1"
        return
    yield c.preserve_share == 0, "preserve_share is 0, so that nothing is kept. Fix: a share above 0"
    yield (
        c.preserve_share == 1 and c.preserve_data_path,
        "preserve_share is 1, which leaves no sample to learn from. Fix: a share below 1",
    )
    yield (
        c.preserve_share is not None and marked and not c.preserve_data_path,
        "preserve_share says nothing beside sources with preserve, whose weights say it. Fix: leave it out",
    )


def _low(c: Any) -> Rules:
    """Trained weights in bfloat16."""
    if c.weights != "bf16":
        return
    yield (
        c.lora_rank is not None,
        "weights is bf16, which adapters are too small to gain from; they train in float32. Fix: leave it"
        " out",
    )
    yield (
        c.fp16 or c.precision == "fp16",
        "weights is bf16, whose gradients have no loss scale. Fix: --precision bf16",
    )
