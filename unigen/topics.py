"""Every option once. A topic is a dataclass; ``unigen.config.Config`` is the union of those of training.

What a value may be stands in its type (``unigen/values.py`` reads it), what several may be together in
``unigen/rules.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from unigen.plugins import Registry
from unigen.values import (
    ConfigError,
    Count,
    Device,
    KeysOf,
    NotNegative,
    Options,
    PathText,
    Plugin,
    Positive,
    Range,
    Renames,
    RowOf,
    Seed,
    Share,
    Whole,
    kinds,
    read_keys,
)

# Beyond these a number is a slip of the hand: 1e20 as learning rate, 10^9 workers.
Beta = Annotated[float, Range(0, 1, below=True)]
Shift = Annotated[float, Range(0, 1000, above=True)]  # of times
Loss = Annotated[float, Range(0, math.inf)]  # the weight of one, which counts beside the other's
Workers = Annotated[int, Range(0, 1024)]
Rate = Annotated[float, Range(0, 10)]
USUAL_RATE = 1e-5  # adapters take more
Decay = Annotated[float, Range(0, 1000)]
OPTIMIZERS: Registry[str] = Registry(
    adamw="unigen.training.optim:build_adamw", adamw8bit="unigen.training.adam8bit:build_adamw8bit"
)
"""Name -> the function that makes an optimiser, as module:function, from its groups and a Config. A plugin's
is a ``torch.optim.AdamW`` or a subclass whose state is AdamW's: that is what checkpoints hold."""
SCHEDULES: Registry[Callable[[float], float]] = Registry(
    linear=lambda progress: 1.0 - progress,
    cosine=lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    constant=lambda progress: 1.0,
)
"""Name -> share of the peak learning rate at ``progress`` in [0, 1] between the end of the warm-up and the
end of training. Plugins may add to it."""


@dataclass
class ModelOptions(Options):
    """Which model, and which of its parts learn.

    Args:
        model_path: Folder of the checkpoint to start from, in the published BAGEL layout. Required.
        freeze_llm: Keep the whole decoder (both experts, embeddings and text head) as it is.
        freeze_vit: Keep the vision transformer as it is.
        freeze_und: Train the generation expert only; the understanding side keeps its weights and its
            answers.
        timestep_shift: Shift of the flow-matching time law; default: the checkpoint's own, 1.0 where it says
            nothing.
        lora_rank: Train low-rank adapters of this rank in place of the weights, which stay as they are (64 is
            usual). Default: the weights themselves train.
        lora_alpha: Their strength: what they add is multiplied by lora_alpha / lora_rank. Default: twice
            lora_rank.
        lora_targets: Which matrices they change: gen (the generation expert), und (the understanding expert),
            both, connector, vit, or patterns of module names such as "*.q_proj_moe_gen". Default: gen.
        lora_variant: lora; rslora divides by the root of the rank; dora learns the length of each row apart.
        quantize: Hold the decoder's matrices in 4 bits (nf4) or 8 bits (int8), so that a model fits a smaller
            card; adapters train over them (lora_rank). Default: as they are.
        double_quant: Quantise the scales of nf4, too: 0.4 bits fewer a number.
        model_load_mode: The same by number: 1 bfloat16 (nothing is quantised), 2 nf4, 3 int8.
        weights: How matrices that train are held: float32; or bf16, with stochastic rounding of every update
            and no float32 copy: 4 bytes a parameter less in weight and gradient.
        train_also: Parts to train whole beside the adapters: time_embedder, vae2llm, llm2vae, connector,
            norms, or patterns of parameter names.
    """

    model_path: PathText | None = None
    freeze_llm: bool = False
    freeze_vit: bool = False
    freeze_und: bool = False
    timestep_shift: Shift | None = None
    lora_rank: Count | None = None
    lora_alpha: Positive | None = None
    lora_targets: list[str] | None = None
    lora_variant: Literal["lora", "rslora", "dora"] = "lora"
    quantize: Literal["nf4", "int8"] | None = None
    double_quant: bool = False
    model_load_mode: Annotated[int, Range(1, 3)] | None = None
    weights: Literal["float32", "bf16"] = "float32"
    train_also: list[str] | None = None


@dataclass
class TrainSource(Options):
    """One entry of ``train_sources``.

    Args:
        path: Files or folders, as train_data_path.
        name: Its name in logs. Default: the first path's.
        weight: Its rate, relative to the other sources: one of weight 2 is met twice as often as one of
            weight 1 while both run. Default: its number of records, which spreads all evenly over the epoch.
        repeat: Start again, in a new order, when it ends before the others; otherwise each of its records is
            met exactly once an epoch.
        preserve: Learn nothing from its records: the model is to stay what it was on them (preserve_weight).
        max_image_tokens: As the option of that name, for this source alone.
        max_image_size: Longest side in pixels that the VAE sees. Default: the model's (1024).
        min_image_size: Shortest side in pixels that the VAE sees. Default: the model's (512).
        image_root: As the option of that name, for this source alone.
        fields: As the option of that name, for this source alone: a mapping such as {text_prompt: caption}.
        trigger_word: As the option of that name, for this source alone.
        split: The split to take of its folders, by its name, or several with + between them.
    """

    path: PathText | list[PathText]
    name: str = ""
    weight: Positive | None = None
    repeat: bool = False
    preserve: bool = False
    max_image_tokens: Count | None = None
    max_image_size: Count | None = None
    min_image_size: Count | None = None
    image_root: PathText | None = None
    fields: Renames = field(default_factory=dict)
    trigger_word: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or self.paths[0].rstrip("/").rpartition("/")[2]
        low, high = self.min_image_size, self.max_image_size
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"min_image_size is {low}, above max_image_size {high}. Fix: swap them, or leave one out"
            )

    @property
    def paths(self) -> list[str]:
        """Its path, or several."""
        return [self.path] if isinstance(self.path, str) else self.path


@dataclass
class DataOptions(Options):
    """How a record becomes tokens, the same in training, check and preview.

    Args:
        visual_gen: Let the model draw; false leaves the generation expert out (half the memory), and records
            with an image to draw cannot be used.
        visual_und: Let the model see pictures through its ViT; false leaves the ViT out, and records with
            pictures but none to draw cannot be used.
        data_root: Folder that every picture must lie in, links resolved; for data one does not trust.
            Default: no limit.
        image_root: Folder that relative paths of pictures start from. Default: that of the file that names
            them.
        fields: What fields of the records are called here, as NAME=PLACE: text_prompt=caption reads caption
            as text_prompt; dots lead into objects, lists and JSON in a text (image=meta.picture.path).
        trigger_word: A word that every caption of a picture to draw begins with (format 11, and folders of
            pictures with captions); [trigger] in a caption stands for it.
        split: The split to take of a folder that holds several, by its name (validation, train_sft), or
            several with + between them. Default: the train split.
        max_sequence_length: Longest sample in tokens; a longer one has its text targets cut. Default: the
            model's limit.
        max_image_tokens: Most latent tokens of one picture; larger pictures are scaled down (4096 is 1024 x
            1024).
        max_bad_share: Share of the records that on_bad_record=skip may leave out.
        plugin: Modules of your own that add formats, kinds of files, metrics, trackers or optimisers, by name
            or as .py files (docs/extending.md).
        allow_control_tokens: Learn special tokens that are written in texts as the tokens that they are, and
            tags such as <image> without a picture as text; without it a record with one is a bad record.
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
    data_root: PathText | None = None
    image_root: PathText | None = None
    fields: Renames = field(default_factory=dict)
    trigger_word: str | None = None
    split: str | None = None
    max_sequence_length: Count | None = None
    max_bad_share: Share = 0.01
    plugin: list[Plugin] = field(default_factory=list)
    allow_control_tokens: bool = False
    max_image_tokens: Count = 4096
    train_transitions: bool = True
    single_image_stop_prob: Share = 0.15
    text_cond_dropout_prob: Share = 0.1
    vit_cond_dropout_prob: Share = 0.3
    vae_cond_dropout_prob: Share = 0.3


@dataclass
class SourceOptions(Options):
    """Which data is read.

    Args:
        train_data_path: JSON, JSONL, Parquet, Arrow, CSV, TSV or tar files, data sets saved by Hugging Face
            datasets, folders of them. Required, or train_sources.
        train_sources: Several sources with weights, as a list in a recipe, in place of train_data_path; see
            docs/data.md.
        val_data_path: Held-out data of the same kinds, for validation.
        val_split: As split, of val_data_path. Default: the validation split.
        preserve_data_path: Data of the same kinds, on which the model stays what it was (preserve_weight).
        probe_data_path: Records that the model could answer before and should answer still: its losses and
            answers on them are held against those of the model that the run began with.
    """

    train_data_path: PathText | list[PathText] | None = None
    train_sources: list[Annotated[dict[str, Any], KeysOf(TrainSource)]] | None = None
    val_data_path: PathText | list[PathText] | None = None
    val_split: str | None = None
    preserve_data_path: PathText | list[PathText] | None = None
    probe_data_path: PathText | None = None

    @classmethod
    def from_training(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a command takes of the options ``given`` by the recipe of a training; it passes over the
        rest."""
        return {name: value for name, value in given.items() if name in kinds(cls)}

    def sources(self) -> list[TrainSource]:
        """The training data as sources: ``train_sources``, or ``train_data_path`` as the only one; and
        ``preserve_data_path``.

        Raises:
            ConfigError: an entry of ``train_sources`` has an unknown key or a bad value, or two have one
                name.
        """
        kept, given = self.preserve_data_path, self.train_data_path
        more = [TrainSource(kept, "preserve_data_path", repeat=True, preserve=True)] if kept else []
        if not self.train_sources:
            split = getattr(self, "split", None)  # of DataOptions
            return [TrainSource(given, "train_data_path", split=split), *more] if given else more
        found = [
            TrainSource(**read_keys(TrainSource, values, f"train_sources[{i}]"))
            for i, values in enumerate(self.train_sources)
        ]
        found += more
        names = [source.name for source in found]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"train_sources: two sources are called {name!r}; give them a name each (name: ...)"
                )
        return found

    def held_out(self) -> list[TrainSource]:
        """The validation data as a source; empty without one."""
        given = self.val_data_path
        return [TrainSource(given, "val_data_path", split=self.val_split)] if given else []

    def probed(self) -> list[TrainSource]:
        """The data of the forgetting probe as a source; empty without one."""
        return [TrainSource(self.probe_data_path, "probe_data_path")] if self.probe_data_path else []


@dataclass
class LoaderOptions(Options):
    """How it is packed.

    Args:
        cache_dir: Folder that "unigen cache" filled; pictures found there are not encoded again.
        batch_size: Samples in a packed sequence.
        max_num_tokens: Token budget of a packed sequence; when given, it decides how many samples one holds.
        on_bad_record: error stops before training; skip leaves the record out, lists it, and stops above
            max_bad_share.
        check_pictures: Before training, decode every picture (full), read their headers only (headers), or
            decide by their number (auto).
        num_workers: Processes that decode and pack; 0 does it in the training process. Default: the cores but
            one for each training process, at most 4.
    """

    cache_dir: PathText | None = None
    batch_size: Count = 1
    max_num_tokens: Count | None = None
    on_bad_record: Literal["error", "skip"] = "error"
    check_pictures: Literal["auto", "full", "headers"] = "auto"
    num_workers: Workers | None = None


RATED = ("und", "gen", "vit", "connector")
"""Parts of the model that can have learning rates and weight decays of their own."""


@dataclass
class OptimOptions(Options):
    """How the weights move.

    Args:
        num_epochs: Passes over the data.
        max_steps: Optimiser steps; when given, it decides instead of num_epochs.
        gradient_accumulation_steps: Micro-batches of each process in one optimiser step; a micro-batch is one
            packed sequence.
        learning_rate: Peak learning rate. Default: 1e-5, with adapters 1e-4.
        weight_decay: Decoupled weight decay of matrices (never of biases, norms and embeddings).
        learning_rate_und: Peak learning rate of the understanding side of the decoder (embeddings and text
            head too), where it is another; likewise learning_rate_gen (generation expert and drawing heads),
            learning_rate_vit, learning_rate_connector.
        learning_rate_gen: The same of the generation expert and of the drawing heads.
        learning_rate_vit: The same of the ViT.
        learning_rate_connector: The same of the connector.
        weight_decay_und: Weight decay of a part, likewise, where it is another.
        weight_decay_gen: The same of the generation expert and of the drawing heads.
        weight_decay_vit: The same of the ViT.
        weight_decay_connector: The same of the connector.
        adam_beta1: AdamW's first decay.
        adam_beta2: AdamW's second decay.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: Gradients are clipped to this total norm; 0 turns clipping off.
        max_skipped_steps: Stop after so many steps in a row that had to be skipped, their loss or gradient
            not being finite.
        max_skipped_share: Stop where a larger share of the last 20 steps had to be skipped.
        spike_sigma: Skip a step whose gradient norm is so many standard deviations above the mean of the last
            100. Default: none is.
        early_stopping_patience: Stop after so many validations in a row without a better
            metric_for_best_model. Default: never.
        lr_scheduler_type: Shape of the learning rate after the warm-up, over optimiser steps: linear, cosine,
            constant, or that of a plugin.
        warmup_ratio: Share of all steps over which the learning rate rises from zero.
        warmup_steps: The same as a number of steps; wins over warmup_ratio.
        text_loss_weight: Weight of the text cross-entropy.
        image_loss_weight: Weight of the image flow-matching loss.
        preserve_weight: Keep what the model could: weight of its distance to the model of model_path, at
            labels and in velocities. Default: no such distance.
        preserve_share: Share of the samples that preserve_data_path gives; without such data, of those of the
            training data that are also kept. Default: 0.25.
        ema: Decay of the exponential moving average of the weights (for example 0.9999); none keeps no
            average.
        optimizer: adamw, or adamw8bit with its two moments in 8 bits (2 bytes a parameter instead of 8; needs
            bitsandbytes).
    """

    num_epochs: Count = 3
    max_steps: Count | None = None
    gradient_accumulation_steps: Count = 1
    learning_rate: Rate = USUAL_RATE
    weight_decay: Decay = 0.0
    learning_rate_und: Rate | None = None
    learning_rate_gen: Rate | None = None
    learning_rate_vit: Rate | None = None
    learning_rate_connector: Rate | None = None
    weight_decay_und: Decay | None = None
    weight_decay_gen: Decay | None = None
    weight_decay_vit: Decay | None = None
    weight_decay_connector: Decay | None = None
    adam_beta1: Beta = 0.9
    adam_beta2: Beta = 0.95
    adam_epsilon: Annotated[float, Range(1e-30, 1)] = 1e-8
    max_grad_norm: NotNegative = 1.0
    max_skipped_steps: Count = 10
    max_skipped_share: Share = 0.25
    spike_sigma: Positive | None = None
    early_stopping_patience: Count | None = None
    lr_scheduler_type: Annotated[str, RowOf(SCHEDULES)] = "cosine"
    warmup_ratio: Share = 0.0
    warmup_steps: Whole | None = None
    text_loss_weight: Loss = 1.0
    image_loss_weight: Loss = 1.0
    preserve_weight: Positive | None = None
    preserve_share: Share | None = None
    ema: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    optimizer: Annotated[str, RowOf(OPTIMIZERS)] = "adamw"


@dataclass
class RunOptions(Options):
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
        checkpointing_policy: With gradient_checkpointing: full keeps a layer's inputs alone; offload keeps
            them in host memory until they are needed (on a CPU that saves nothing); selective keeps the
            results of attention and of every second matrix product, too.
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
        device: auto, cpu, cuda, or one GPU such as cuda:1.
        dry_run: Do everything up to the first step, then stop.
        expect_text_loss: Least and greatest text loss that the first packed sequence and the validation at
            step 0 may have; recipes of trained models say it. Default: any.
        expect_image_loss: The same of the image loss.
        preflight: Where these say that the weights are not what they should be: stop, or warn and go on.
    """

    output_dir: PathText = "outputs/unified_training"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    fp16: bool | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    checkpointing_policy: Literal["full", "offload", "selective"] = "full"
    engine: Literal["auto", "single", "ddp", "fsdp2", "deepspeed"] = "auto"
    shard_size: Count | None = None
    cpu_offload: bool = False
    deepspeed_config: PathText | None = None
    hang_timeout: Annotated[float, Range(0, 1e9)] = 1800.0
    logging_steps: Count = 10
    eval_steps: Count | None = None
    save_steps: Count = 500
    save_total_limit: Count | None = None
    async_save: bool = True
    low_space: Literal["stop", "prune", "wait"] = "stop"
    min_free_gb: NotNegative = 1.0
    resume_from_checkpoint: PathText | None = None
    seed: Seed = 42
    device: Device = "auto"
    dry_run: bool = False
    expect_text_loss: tuple[NotNegative, NotNegative] | None = None
    expect_image_loss: tuple[NotNegative, NotNegative] | None = None
    preflight: Literal["stop", "warn"] = "stop"


@dataclass
class EvaluationOptions(Options):
    """What a run measures of itself, at step 0 and every eval_steps.

    Args:
        eval_metrics: Metrics of the answers to held-out records, by their names in docs/metrics.md. Default:
            accuracy, anls, psnr and ssim, which need nothing more.
        eval_samples: Held-out records that are answered and measured; 0 measures losses alone. Default: 16,
            or as many as add at most 10 % of the time.
        eval_features: Whose features pictures are compared by, as the option features of unigen evaluate.
        eval_clip: Folder of a CLIP or SigLIP, for the CLIP score.
        metric_for_best_model: The number of metrics.jsonl that best and early stopping follow.
        stop_on_drift: End the run where a loss on the probe lies this share above the first one (0.1 for
            10 %).
        greater_is_better: Whether it is better the greater it is. Default: losses are not, other numbers as
            they are meant; a plugin's must be told.
    """

    eval_metrics: list[str] | None = None
    eval_samples: Whole | None = None
    eval_features: str | None = None
    eval_clip: PathText | None = None
    metric_for_best_model: str = "val_loss"
    greater_is_better: bool | None = None
    stop_on_drift: NotNegative | None = None


@dataclass
class TrackingOptions(Options):
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
            checkpoint, as far as that takes at most 10 % of the time.
        sample_kind: What is done with a prompt whose line does not say it: draw a picture, answer in text, or
            decide as the model does; auto draws or answers, as the run trains, where the model that it began
            with was never trained to decide.
        log_level: What the terminal shows: info, or only what is a warning or an error; train.log in the
            run's folder holds everything.
    """

    wandb_project: str | None = None
    wandb_run_name: str | None = None
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    tensorboard: bool = False
    trackio_project: str | None = None
    sample_prompts: str | list[str] | None = None
    sample_steps: Count | None = None
    sample_kind: Literal["auto", "draw", "answer", "decide"] = "auto"
    log_level: Literal["info", "warning", "error"] = "info"


@dataclass
class SamplingOptions(Options):
    """How texts are written and pictures drawn.

    The command line, Python and samples while training take these names and defaults.

    Args:
        think: Let the model reason in text before it answers or draws.
        max_new_tokens: Most tokens of one text, thinking included.
        do_sample: Sample tokens instead of taking the most likely one.
        temperature: Temperature of sampled tokens; read only with do_sample.
        height: Height of a drawn picture in pixels, rounded down to the model's stride (16) with a line
            that says so; needs width. Default: the last picture's, or the largest square's.
        width: Width of a drawn picture in pixels; as height.
        num_timesteps: Points of the time grid from noise to picture; N points are N - 1 Euler steps.
        timestep_shift: Shift of the time grid; larger spends more steps near the noise.
        cfg_text_scale: Guidance by the text (w_text of docs/model.md); 1 or less turns it off.
        cfg_img_scale: Guidance by the context pictures, on top of the text's (w_img); 1 or less
            turns it off.
        cfg_interval: The times (low, high] in which guidance acts.
        cfg_renorm_min: Least factor by which a guided velocity is scaled back to its unguided length.
        cfg_renorm_type: Lengths are those of the whole picture (global), of each token (channel), or of each
            token right after the text step (text_channel).
        seed: Seed of the noise and of the sampled tokens; none takes another one each time.
        allow_control_tokens: Take special tokens that are written in texts as the tokens that they are, and
            tags such as <image> without a picture as text; without it they are refused.
    """

    think: bool = False
    max_new_tokens: Count = 1000
    do_sample: bool = False
    temperature: Annotated[float, Range(0, 100)] = 0.3
    height: Count | None = None
    width: Count | None = None
    num_timesteps: Annotated[int, Range(2, 10_000)] = 50
    timestep_shift: Shift = 3.0
    cfg_text_scale: Annotated[float, Range(0, 1000)] = 3.0
    cfg_img_scale: Annotated[float, Range(0, 1000)] = 1.5
    cfg_interval: tuple[Share, Share] = (0.4, 1.0)
    cfg_renorm_min: Share = 0.0
    cfg_renorm_type: Literal["global", "channel", "text_channel"] = "global"
    seed: Seed | None = 42
    allow_control_tokens: bool = False
