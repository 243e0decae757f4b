"""Every option once. A topic is a dataclass; :class:`Config` is their union, and its names are flat.

Recipes (YAML) and flags are read by ``unigen/cli.py``; a flag wins over a recipe, an unknown key is an error
that names the nearest known one.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal


class UserError(ValueError):
    """Something the user can put right; the command line shows the message alone, without a traceback."""


class ConfigError(UserError):
    """An option has a value that cannot work; the message says which, why, and the fix."""


@dataclass
class ModelOptions:
    """Which model, and which of its parts learn.

    Args:
        model_path: Folder of the checkpoint to start from, in the published BAGEL layout. Required.
        freeze_llm: Keep the whole decoder (both experts, embeddings and text head) as it is.
        freeze_vit: Keep the vision transformer as it is.
        freeze_und: Train the generation expert only; the understanding side keeps its weights and its
            answers.
        timestep_shift: Shift of the flow-matching time law; default: the checkpoint's own, 1.0 where it says
            nothing.
    """

    model_path: str | None = None
    freeze_llm: bool = False
    freeze_vit: bool = False
    freeze_und: bool = False
    timestep_shift: float | None = None


@dataclass
class Source:
    """One entry of ``train_sources``.

    Args:
        path: Files or folders, as train_data_path.
        name: Its name in logs. Default: the first path's.
        weight: Its rate, relative to the other sources: one of weight 2 is met twice as often as one of
            weight 1 while both run. Default: its number of records, which spreads all evenly over the epoch.
        repeat: Start again, in a new order, when it ends before the others; otherwise each of its records is
            met exactly once an epoch.
        max_image_tokens: As the option of that name, for this source alone.
        max_image_size: Longest side in pixels that the VAE sees. Default: the model's (1024).
        min_image_size: Shortest side in pixels that the VAE sees. Default: the model's (512).
    """

    path: str | list[str]
    name: str = ""
    weight: float | None = None
    repeat: bool = False
    max_image_tokens: int | None = None
    max_image_size: int | None = None
    min_image_size: int | None = None

    @classmethod
    def read(cls, values: dict[str, Any], where: str) -> Source:
        """Raises ConfigError for an unknown key, a missing path, or a value of another type or out of
        range."""
        kinds = {
            "path": (str, list), "name": (str,), "weight": (int, float), "repeat": (bool,),
            "max_image_tokens": (int,), "max_image_size": (int,), "min_image_size": (int,),
        }  # fmt: skip
        if not isinstance(values, dict):
            raise ConfigError(
                f"{where} is {values!r}; write a mapping such as {{path: data.jsonl, weight: 2}}"
            )
        for key, value in values.items():
            if key not in kinds:
                near = nearest(str(key), list(kinds))
                raise ConfigError(
                    f"{where}: unknown key {key!r}"
                    + (f"; did you mean {near}?" if near else f" (keys: {', '.join(kinds)})")
                )
            good = isinstance(value, kinds[key]) and (key == "repeat" or not isinstance(value, bool))
            if good and isinstance(value, list):
                good = bool(value) and all(isinstance(item, str) for item in value)
            if good and isinstance(value, int | float) and key != "repeat":
                good = math.isfinite(value) and value > 0
            if not good:
                raise ConfigError(f"{where}: {key} is {value!r}; expected {_SOURCE_WORDS[key]}")
        if "path" not in values:
            raise ConfigError(f"{where}: path is missing; name the files or folders of this source")
        source = cls(**values)
        first = source.path if isinstance(source.path, str) else source.path[0]
        source.name = source.name or first.rstrip("/").rpartition("/")[2]
        return source


_SOURCE_WORDS = {
    "path": "a path, or a list of paths",
    "name": "a text",
    "weight": "a number above 0",
    "repeat": "true or false",
    "max_image_tokens": "a whole number above 0",
    "max_image_size": "a whole number above 0",
    "min_image_size": "a whole number above 0",
}


@dataclass
class DataOptions:
    """How a record becomes tokens, the same in training, check and preview.

    Args:
        visual_gen: Let the model draw; false leaves the generation expert out (half the memory), and records
            with an image to draw cannot be used.
        visual_und: Let the model see pictures through its ViT; false leaves the ViT out, and records with
            pictures but none to draw cannot be used.
        data_root: Folder that every picture must lie in, links resolved; for data one does not trust.
            Default: no limit.
        max_sequence_length: Longest sample in tokens; a longer one has its text targets cut. Default: the
            model's limit.
        max_image_tokens: Most latent tokens of one picture; larger pictures are scaled down (4096 is 1024 x
            1024).
        train_transitions: Train the tokens that decide what comes next (write, draw, stop), so that
            generation stops by itself.
        single_image_stop_prob: Chance that an answer of one single image also learns to stop after it.
        text_cond_dropout_prob: Chance that a context text is left out of a sample that draws (classifier-free
            guidance).
        vit_cond_dropout_prob: The same for the ViT tokens of a context image.
        vae_cond_dropout_prob: The same for the clean VAE tokens of a context image.
    """

    visual_gen: bool = True
    visual_und: bool = True
    data_root: str | None = None
    max_sequence_length: int | None = None
    max_image_tokens: int = 4096
    train_transitions: bool = True
    single_image_stop_prob: float = 0.15
    text_cond_dropout_prob: float = 0.1
    vit_cond_dropout_prob: float = 0.3
    vae_cond_dropout_prob: float = 0.3

    def check_data(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name in ("max_image_tokens", "max_sequence_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1 (--{name} ...)")
        for name in (f.name for f in fields(DataOptions) if f.name.endswith("_prob")):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; a probability lies in [0, 1] (--{name} ...)")


@dataclass
class LoaderOptions:
    """Which data is read, and how it is packed.

    Args:
        train_data_path: JSON, JSONL (also .gz, .zst) or Parquet files, data sets saved by Hugging Face
            datasets, folders of them. Required, or train_sources.
        train_sources: Several sources with weights, as a list in a recipe, in place of train_data_path; see
            docs/data.md.
        val_data_path: Held-out data of the same kinds, for validation.
        cache_dir: Folder that "unigen cache" filled; pictures found there are not encoded again.
        batch_size: Samples in a packed sequence.
        max_num_tokens: Token budget of a packed sequence; when given, it decides how many samples one holds.
        on_bad_record: error stops before training; skip leaves the record out, lists it, and stops above 1 %.
        check_pictures: Before training, decode every picture (full), read their headers only (headers), or
            decide by their number (auto).
        num_workers: Processes that decode and pack; 0 does it in the training process. Default: the cores but
            one for each training process, at most 4.
    """

    train_data_path: str | list[str] | None = None
    train_sources: list[dict[str, Any]] | None = None
    val_data_path: str | list[str] | None = None
    cache_dir: str | None = None
    batch_size: int = 1
    max_num_tokens: int | None = None
    on_bad_record: Literal["error", "skip"] = "error"
    check_pictures: Literal["auto", "full", "headers"] = "auto"
    num_workers: int | None = None


@dataclass
class OptimOptions:
    """How the weights move.

    Args:
        num_epochs: Passes over the data.
        max_steps: Optimiser steps; when given, it decides instead of num_epochs.
        gradient_accumulation_steps: Micro-batches of each process in one optimiser step; a micro-batch is one
            packed sequence.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of matrices (never of biases, norms and embeddings).
        adam_beta1: AdamW's first decay.
        adam_beta2: AdamW's second decay.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: Gradients are clipped to this total norm; 0 turns clipping off.
        max_skipped_steps: Stop after so many steps in a row that had to be skipped, their loss or gradient
            not being finite.
        spike_sigma: Skip a step whose gradient norm is so many standard deviations above the mean of the last
            100. Default: none is.
        early_stopping_patience: Stop after so many validations in a row without a lower val_loss. Default:
            never.
        lr_scheduler_type: Shape of the learning rate after the warm-up, over optimiser steps.
        warmup_ratio: Share of all steps over which the learning rate rises from zero.
        warmup_steps: The same as a number of steps; wins over warmup_ratio.
        text_loss_weight: Weight of the text cross-entropy.
        image_loss_weight: Weight of the image flow-matching loss.
        ema: Decay of the exponential moving average of the weights (for example 0.9999); none keeps no
            average.
        optimizer: adamw, or adamw8bit with its two moments in 8 bits (2 bytes a parameter instead of 8; needs
            bitsandbytes).
    """

    num_epochs: int = 3
    max_steps: int | None = None
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 10
    spike_sigma: float | None = None
    early_stopping_patience: int | None = None
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.0
    warmup_steps: int | None = None
    text_loss_weight: float = 1.0
    image_loss_weight: float = 1.0
    ema: float | None = None
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"


@dataclass
class RunOptions:
    """Where and how it runs.

    Args:
        output_dir: Folder of the run: checkpoints, metrics.jsonl, logs.
        precision: Matrix products in bf16, fp16 (with loss scaling) or fp32; auto is bf16 on a GPU that has
            it, else fp32.
        fp16: The same as precision fp16.
        bf16: The same as precision bf16; when off (--no_bf16), auto does not choose it.
        gradient_checkpointing: Recompute activations in the backward pass: slower, far less memory.
        compile: Compile the decoder layers, which takes a minute or less in the warm-up batch and makes steps
            faster; auto does on a GPU, but for selective checkpointing and deepspeed. Where nothing can be
            compiled auto says so and goes on; on stops.
        checkpointing_policy: With gradient_checkpointing: full keeps nothing of a layer; selective keeps the
            results of attention and of every second matrix product.
        engine: single, ddp, fsdp2 (all of the model and its state sharded) or deepspeed (ZeRO); auto is
            single, or ddp with several processes. See docs/distributed.md.
        shard_size: With fsdp2, processes that share one copy of the model (hybrid sharding); the others hold
            further copies. Default: all share one.
        cpu_offload: With fsdp2, keep parameters, gradients and moments in host memory; far less GPU memory,
            slower.
        deepspeed_config: With deepspeed, an ordinary DeepSpeed JSON; "auto" and what is missing come from the
            options here. Default: ZeRO 2.
        hang_timeout: Seconds without progress after which a process reports its rank, step, phase and stack,
            and ends the run; 0: never.
        logging_steps: Steps between two lines of the log.
        eval_steps: Steps between two validations; default: once an epoch.
        save_steps: Steps between two checkpoints.
        save_total_limit: Newest checkpoints to keep; the best one is kept besides.
        async_save: Write checkpoints in the background while training goes on; costs host memory for a copy
            of what is saved.
        low_space: When the disk cannot hold the next checkpoint: stop, prune the oldest checkpoints, or wait
            for space.
        min_free_gb: Gigabytes (10^9 bytes) of the disk that stay free after a checkpoint.
        resume_from_checkpoint: A step_N folder, or auto for the newest in output_dir.
        seed: Seed of everything random.
        device: cuda, cpu, or auto.
        dry_run: Do everything up to the first step, then stop.
    """

    output_dir: str = "outputs/unified_training"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    fp16: bool | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    checkpointing_policy: Literal["full", "selective"] = "full"
    engine: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    shard_size: int | None = None
    cpu_offload: bool = False
    deepspeed_config: str | None = None
    hang_timeout: float = 1800.0
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int = 500
    save_total_limit: int | None = None
    async_save: bool = True
    low_space: Literal["stop", "prune", "wait"] = "stop"
    min_free_gb: float = 1.0
    resume_from_checkpoint: str | None = None
    seed: int = 42
    device: str = "auto"
    dry_run: bool = False


@dataclass
class TrackingOptions:
    """Who is told.

    Args:
        wandb_project: Log to this Weights & Biases project.
        wandb_run_name: Name of the run there.
        wandb_mode: online, offline (kept in the run's folder, sent later by "wandb sync"), or disabled.
            Default: what WANDB_MODE says.
        tensorboard: Write TensorBoard's event files into the run's folder.
        trackio_project: Log to this Trackio project (kept on this machine).
        sample_prompts: Texts, or a file of one prompt a line, that the model answers with text or a picture
            while it trains.
        sample_steps: Steps between two such answers; default: with every validation, or else with every
            checkpoint.
    """

    wandb_project: str | None = None
    wandb_run_name: str | None = None
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    tensorboard: bool = False
    trackio_project: str | None = None
    sample_prompts: str | list[str] | None = None
    sample_steps: int | None = None


TOPICS = (ModelOptions, DataOptions, LoaderOptions, OptimOptions, RunOptions, TrackingOptions)


@dataclass
class Config(ModelOptions, DataOptions, LoaderOptions, OptimOptions, RunOptions, TrackingOptions):
    """Every option of a training run, flat."""

    def resolve(self) -> Config:
        """Checks what can be checked without touching a file, and returns itself.

        Raises:
            ConfigError: an option is missing or out of range, or two exclude each other.
        """
        checks = [
            (self.model_path, "model_path", "is missing; give the folder of a BAGEL checkpoint"),
            (
                self.train_data_path or self.train_sources,
                "train_data_path",
                "is missing; give a JSON or JSONL file, or a folder of them",
            ),
            (
                not (self.train_data_path and self.train_sources),
                "train_sources",
                "and train_data_path exclude each other; keep one",
            ),
            (
                self.visual_gen or self.visual_und or not self.freeze_llm,
                "freeze_llm",
                "with no visual part leaves nothing to train",
            ),
            (
                not (self.freeze_und and not self.visual_gen),
                "freeze_und",
                "trains the generation expert, which visual_gen=false leaves out",
            ),
            (
                not (self.freeze_und and self.freeze_llm),
                "freeze_und",
                "with freeze_llm leaves only the latent heads; choose one of them",
            ),
        ]
        counts = ("batch_size", "gradient_accumulation_steps", "num_epochs", "logging_steps", "save_steps")
        for name in (*counts, "max_skipped_steps"):
            checks.append(
                (getattr(self, name) >= 1, name, f"is {getattr(self, name)}; it must be at least 1")
            )
        optional = ("max_steps", "eval_steps", "max_num_tokens")
        for name in (*optional, "save_total_limit", "early_stopping_patience", "shard_size", "sample_steps"):
            value = getattr(self, name)
            checks.append((value is None or value >= 1, name, f"is {value}; it must be at least 1"))
        for name in (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_ratio",
            "text_loss_weight",
            "image_loss_weight",
        ):
            value = getattr(self, name)
            checks.append(
                (
                    math.isfinite(value) and value >= 0,
                    name,
                    f"is {value}; it must be a finite number of at least 0",
                )
            )
        sigma = self.spike_sigma
        checks.append(
            (
                sigma is None or (math.isfinite(sigma) and sigma > 0),
                "spike_sigma",
                f"is {sigma}; it must be a number above 0",
            )
        )
        checks.append(
            (
                self.early_stopping_patience is None or self.val_data_path is not None,
                "early_stopping_patience",
                "needs val_data_path",
            )
        )
        checks.append(
            (
                self.warmup_ratio <= 1,
                "warmup_ratio",
                f"is {self.warmup_ratio}; it is a share of all steps, at most 1",
            )
        )
        checks.append(
            (
                self.ema is None or 0 < self.ema < 1,
                "ema",
                f"is {self.ema}; a decay lies between 0 and 1, such as 0.9999",
            )
        )
        checks.append(
            (
                self.num_workers is None or self.num_workers >= 0,
                "num_workers",
                f"is {self.num_workers}; it must be 0 or more",
            )
        )
        for name in ("shard_size", "cpu_offload"):
            checks.append(
                (
                    not getattr(self, name) or self.engine == "fsdp2",
                    name,
                    "needs engine fsdp2 (--engine fsdp2)",
                )
            )
        for name, value in (("hang_timeout", self.hang_timeout), ("min_free_gb", self.min_free_gb)):
            checks.append(
                (
                    math.isfinite(value) and value >= 0,
                    name,
                    f"is {value}; it must be a finite number of at least 0",
                )
            )
        checks += [
            (
                self.deepspeed_config is None or self.engine == "deepspeed",
                "deepspeed_config",
                "needs engine deepspeed (--engine deepspeed)",
            ),
            (
                self.optimizer == "adamw" or self.engine != "deepspeed",
                "optimizer",
                "adamw8bit does not work with engine deepspeed; use fsdp2",
            ),
            (
                self.sample_steps is None or self.sample_prompts is not None,
                "sample_steps",
                "needs sample_prompts",
            ),
            (
                self.compile != "on" or not self.recomputes_selectively,
                "compile",
                (
                    "is on, but checkpointing_policy selective cannot see the products inside of compiled"
                    " layers; use full, or compile off"
                ),
            ),
            (
                self.compile != "on" or self.engine != "deepspeed",
                "compile",
                "is on, which engine deepspeed cannot; use fsdp2",
            ),
        ]
        for good, name, problem in checks:
            if not good:
                raise ConfigError(f"{name} {problem} (--{name} ...)")
        self.check_data()
        self.asked_precision()
        self.sources()
        return self

    @property
    def recomputes_selectively(self) -> bool:
        return self.gradient_checkpointing and self.checkpointing_policy == "selective"

    def asked_precision(self) -> str:
        """``precision`` and its two switches as one: bf16, fp16, fp32 or auto. Without bf16, auto can only be
        fp32.

        Raises:
            ConfigError: they contradict each other.
        """
        switches = {"bf16": self.bf16, "fp16": self.fp16}
        on = [name for name, value in switches.items() if value]
        if len(on) == 2:
            raise ConfigError(
                "fp16 and bf16 exclude each other. Fix: keep one, bf16 where the GPU has it (--no_fp16"
                " --precision bf16)"
            )
        said = [*(name for name in on if self.precision not in ("auto", name))]
        if said or switches.get(self.precision) is False:
            switch, turn = (
                (f"{said[0]} is on", f"--no_{said[0]}")
                if said
                else (f"{self.precision} is off", f"--{self.precision}")
            )
            raise ConfigError(
                f"precision is {self.precision}, but {switch}. Fix: {turn}, or another --precision"
            )
        if on:
            return on[0]
        return "fp32" if self.precision == "auto" and self.bf16 is False else self.precision

    def sources(self) -> list[Source]:
        """The training data as sources: ``train_sources``, or ``train_data_path`` as the only one.

        Raises:
            ConfigError: an entry of ``train_sources`` has an unknown key or a bad value, or two have one
                name.
        """
        if not self.train_sources:
            return [Source(path=self.train_data_path or [], name="train_data_path")]
        found = [Source.read(values, f"train_sources[{i}]") for i, values in enumerate(self.train_sources)]
        names = [source.name for source in found]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"train_sources: two sources are called {name!r}; give them a name each (name: ...)"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class SamplingOptions:
    """How texts are written and pictures drawn.

    The command line, Python and samples while training take these names and defaults.

    Args:
        think: Let the model reason in text before it answers or draws.
        max_new_tokens: Most tokens of one text, thinking included.
        do_sample: Sample tokens instead of taking the most likely one.
        temperature: Temperature of sampled tokens; read only with do_sample.
        height: Height of a drawn picture in pixels; default: the last picture's, or the largest square's.
        width: Width of a drawn picture in pixels; default: the last picture's, or the largest square's.
        num_timesteps: Points of the time grid from noise to picture; N points are N - 1 Euler steps.
        timestep_shift: Shift of the time grid; larger spends more steps near the noise.
        cfg_text_scale: Guidance by the text (w_text of docs/model.md); 1 turns it off.
        cfg_img_scale: Guidance by the context pictures, on top of the text's (w_img); 1 turns it off.
        cfg_interval: The times (low, high] in which guidance acts.
        cfg_renorm_min: Least factor by which a guided velocity is scaled back to its unguided length.
        cfg_renorm_type: Lengths are those of the whole picture (global), of each token (channel), or of each
            token right after the text step (text_channel).
        seed: Seed of the noise and of the sampled tokens; none takes another one each time.
    """

    think: bool = False
    max_new_tokens: int = 1000
    do_sample: bool = False
    temperature: float = 0.3
    height: int | None = None
    width: int | None = None
    num_timesteps: int = 50
    timestep_shift: float = 3.0
    cfg_text_scale: float = 3.0
    cfg_img_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.4, 1.0)
    cfg_renorm_min: float = 0.0
    cfg_renorm_type: Literal["global", "channel", "text_channel"] = "global"
    seed: int | None = 42


def known_options() -> list[str]:
    return [f.name for f in fields(Config)]


def nearest(name: str, known: list[str] | None = None) -> str | None:
    """The known option a misspelt one most likely meant, or None."""
    found = difflib.get_close_matches(name.replace("-", "_"), known or known_options(), n=1, cutoff=0.5)
    return found[0] if found else None
