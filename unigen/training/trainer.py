"""``UnifiedTrainer``: build, restore, the step, evaluate, save."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from unigen.config import Config, ConfigError, Source, UserError
from unigen.data.cache import Tally
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.loader import Place, Row, RowStream, Share, default_workers, load_rows
from unigen.data.mixing import Mixture, Part
from unigen.model.bagel import Bagel
from unigen.model.weights import load_bagel, save_bagel
from unigen.sequence.plan import Planner
from unigen.sequence.tokens import Tokenizer
from unigen.training.adapters import dtype_of, prepare_model
from unigen.training.checkpoint import load_checkpoint, prune_checkpoints, resolve_resume, save_checkpoint, sweep_orphans
from unigen.training.ema import EMA
from unigen.training.encoders import open_cache
from unigen.training.engine import Engine
from unigen.training.guards import Guards, TrainingStopped, lock_folder
from unigen.training.losses import Counts, joint_loss, loss_sums
from unigen.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from unigen.training.tracking import Progress, Tracker

log = logging.getLogger("unigen")


@dataclass
class StepResult:
    """What one optimiser step gave: means over all its targets, on all ranks."""

    text_loss: float
    image_loss: float
    counts: Counts
    tokens: float
    grad_norm: float = float("nan")
    refused: str = ""  # why the step changed nothing


class UnifiedTrainer:
    """Trains a BAGEL checkpoint on text and images, as the config says.

    ``UnifiedTrainer(config).train()`` does everything; ``build()`` alone prepares it (and is what ``dry_run`` ends after).

    Raises:
        UserError: the options, the checkpoint or the data cannot work; raised before the first step.
    """

    def __init__(self, config: Config):
        self.config = config.resolve()
        self.output_dir = Path(config.output_dir)
        self.step = 0
        self.place = Place()
        self.best = math.inf
        self._lock: IO[str] | None = None

    # ---- build -----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, float]:
        """Runs the training; the last metrics."""
        with Engine(self.config) as self.engine:
            try:
                self.build()
                return self._run()
            finally:
                if self._lock is not None:
                    self._lock.close()

    def build(self) -> None:
        """Everything before the first step: folders, data, model, optimiser, state."""
        c, engine = self.config, self.engine
        logging.basicConfig(level=logging.INFO if engine.main else logging.WARNING, format="%(message)s")
        engine.on_main(self._prepare_folder)
        torch.manual_seed(c.seed)  # rows bring their own random numbers; this is for whatever else may draw some
        resume = resolve_resume(c.resume_from_checkpoint, self.output_dir) if c.resume_from_checkpoint else None
        self.model = self._load_model(resume)
        self._load_data()
        self.guards = Guards(engine, c, self.output_dir)
        self.share = Share(engine.rank, engine.world, c.gradient_accumulation_steps)
        self.workers = default_workers(engine.local_world) if c.num_workers is None else c.num_workers
        self.total_steps = c.max_steps or sum(self.stream.steps_in(e, self.share.step_rows) for e in range(c.num_epochs))
        # Counting the steps of an epoch packs it; only where the answer is needed.
        self.eval_every = c.eval_steps or (self.stream.steps_in(0, self.share.step_rows) if self.val_stream else self.total_steps)
        self.optimizer = build_optimizer(self.model, c)
        self.scaler = torch.amp.GradScaler(engine.device.type, enabled=c.fp16)
        self.ema = EMA(self.model, c.ema) if c.ema else None
        if resume is not None:
            self._restore(resume)
        self.wrapped = engine.wrap(self.model)
        self._describe()

    def _prepare_folder(self) -> None:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.output_dir)
            sweep_orphans(self.output_dir)
            (self.output_dir / "config.json").write_text(
                json.dumps(self.config.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"output_dir {self.output_dir} cannot be written ({error}). Cure: choose another --output_dir") from error

    def _load_model(self, resume: Path | None) -> Bagel:
        c = self.config
        assert c.model_path is not None
        # A checkpoint holds the training weights beside the average as model.safetensors.
        folder, names = (
            (resume, ("model.safetensors", "ema.safetensors")) if resume else (Path(c.model_path), ("ema.safetensors", "model.safetensors"))
        )
        model = load_bagel(
            folder, self.engine.device, lambda name: dtype_of(name, c), visual_gen=c.visual_gen, visual_und=c.visual_und, weights=names
        )
        # Saving compares with, and copies from, the folder the run began with.
        model.source = Path(c.model_path)
        return prepare_model(model, c).train()

    def _load_data(self) -> None:
        c, model = self.config, self.model
        tokenizer = Tokenizer.load(Path(c.model_path))
        vocabulary = model.config.llm.vocab_size
        if max(vars(tokenizer.special).values()) >= vocabulary:
            raise ConfigError(f"model_path: the tokenizer's special ids exceed the model's vocabulary of {vocabulary:,}")
        self.cache = open_cache(c.cache_dir, self.model, c) if c.cache_dir else None
        self.tally = Tally()
        held_out = [Source(c.val_data_path, "val_data_path")] if c.val_data_path else []
        self.stream = self._stream(c.sources(), tokenizer, training=True)
        self.val_stream = self._stream(held_out, tokenizer, training=False) if held_out else None

    def _stream(self, sources: list[Source], tokenizer: Tokenizer, training: bool) -> RowStream:
        c = self.config
        parts = []
        for source in sources:
            planner = self.model.config.planner(tokenizer, c, source)
            dataset = self._dataset(source, planner)
            if self.engine.main:
                log.info("%s data (%s)\n%s", "Training" if training else "Validation", source.name, dataset.describe())
            planner.cache = self.cache
            parts.append(Part(source.name, dataset, planner, source.weight, source.repeat))
        mixture = Mixture(parts, c.seed, training)
        if self.engine.main:
            log.info("%s", mixture.describe())
        return RowStream(mixture, c.batch_size, c.max_num_tokens)

    def _dataset(self, source: Source, planner: Planner) -> UnifiedGenerationDataset:
        c, main = self.config, self.engine.main
        dataset = UnifiedGenerationDataset(
            source.path,
            on_bad_record=c.on_bad_record,
            # With "skip" every process must leave out the same records; with "error" one that looks closely is enough.
            check_pictures=c.check_pictures if main or c.on_bad_record == "skip" else "headers",
            measure=planner.measure,
            bad_records_path=self.output_dir / "bad_records.jsonl" if main else None,
            data_root=c.data_root,
        )
        if len(set(self.engine.gather(dataset.fingerprint))) > 1:
            raise UserError(f"{source.name}: the processes read different data. Cure: give every machine the same files")
        return dataset

    def _describe(self) -> None:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        parts: dict[str, int] = {}
        for name, p in self.model.named_parameters():
            part = "generation expert" if "_moe_gen" in name else name.split(".")[0]
            parts[part] = parts.get(part, 0) + p.numel() * p.requires_grad
        log.info(
            "Model: %s parameters, %s train (%s)", f"{total:,}", f"{trained:,}", ", ".join(f"{k} {v:,}" for k, v in parts.items() if v)
        )
        log.info(
            "Run: %d steps on %d process(es), %s, %s; from step %d",
            self.total_steps, self.engine.world, self.engine.device, str(self.engine.dtype).removeprefix("torch."), self.step,
        )  # fmt: skip

    # ---- state -----------------------------------------------------------------------------------------------------

    def _restore(self, folder: Path) -> None:
        tensors, states = load_checkpoint(folder, verify=False)  # resolve_resume has verified it
        if "trainer" not in states:
            raise UserError(
                f"{folder} holds weights only, so a run cannot go on from it. Cure: resume from a step_N folder, or start a new run "
                f"with --model_path {folder}"
            )
        state = states["trainer"]
        if state["fingerprint"] != self.stream.mixture.fingerprint:
            raise UserError(
                f"{folder}: the training data is not what this run began with (its fingerprint differs). "
                "Cure: resume with the same files and weights, or start a new run with --model_path of this checkpoint"
            )
        load_optimizer_tensors(self.optimizer, self.model, tensors["optimizer"])
        if self.ema is not None:
            self.ema.load(tensors["ema_average"]) if "ema_average" in tensors else log.warning("%s has no average; it starts anew", folder)
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(tensors["random"]["cpu"].cpu())
        self.step, self.best = state["step"], state["best"] if state["best"] is not None else math.inf
        self.guards.load(state.get("guards", {}))
        self.place = Place(state["epoch"], state["position"], tuple(state.get("waiting", ())))
        log.info("Resumed from %s at step %d", folder, self.step)

    def _save(self, name: str | None = None) -> None:
        """``step_N``: everything a resume needs. ``best``: weights alone."""

        def write_model(folder: Path) -> None:
            if self.ema is not None:
                save_bagel(self.model, folder, weights=self.ema.tensors())
                if name is None:
                    save_bagel(self.model, folder, filename="model.safetensors")
            else:
                save_bagel(self.model, folder)

        def work() -> None:
            tensors, states = {}, {"training_config": self.config.to_dict()}
            if name is None:
                tensors["optimizer"] = optimizer_tensors(self.optimizer, self.model)
                tensors["random"] = {"cpu": torch.get_rng_state()}
                if self.ema is not None:
                    tensors["ema_average"] = self.ema.tensors()
                states["trainer"] = {
                    "step": self.step,
                    "epoch": self.place.epoch,
                    "position": self.place.position,
                    "waiting": self.place.waiting,
                    "best": self.best if math.isfinite(self.best) else None,
                    "fingerprint": self.stream.mixture.fingerprint,
                    "total_steps": self.total_steps,
                    "guards": self.guards.state(),
                    "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
                }
            folder = save_checkpoint(self.output_dir, self.step, write_model=write_model, tensors=tensors, states=states, name=name)
            if name is None:
                prune_checkpoints(self.output_dir, self.config.save_total_limit, protect=folder)
            self.progress.write(f"Saved {folder}")

        self.engine.on_main(work)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def _run(self) -> dict[str, float]:
        c = self.config
        main = self.engine.main
        self.dry_batch()
        if c.dry_run:
            log.info("Dry run: everything is ready; nothing was trained")
            return {}
        tracker = Tracker(self.output_dir, c, resume_step=self.step) if main else None
        self.progress = Progress(self.total_steps, self.step, c.logging_steps, main)
        try:
            return self._steps(tracker)
        finally:
            self.progress.close()
            if tracker:
                tracker.finish()

    def _steps(self, tracker: Tracker | None) -> dict[str, float]:
        c = self.config
        rows = load_rows(
            self.stream, self.share, self.place,
            num_workers=self.workers, limit=self.total_steps - self.step, pin=self.engine.device.type == "cuda",
        )  # fmt: skip
        metrics: dict[str, float] = {}
        while self.step < self.total_steps:
            began = time.perf_counter()
            step_rows = next(rows)
            self.guards.check_rows(step_rows, self.stream)
            waited = time.perf_counter() - began
            lr = learning_rate_at(self.step, self.total_steps, c)
            result = self.train_step(step_rows, lr)
            self.step, self.place = self.step + 1, step_rows[-1].after
            for row in step_rows:
                self.tally.add(row.pack)
            metrics = self._metrics(result, lr, time.perf_counter() - began, waited)
            if tracker:
                tracker.log(metrics, self.step)
            self.progress.update(self.step, metrics)
            last = self.step == self.total_steps
            if self.val_stream is not None and (self.step % self.eval_every == 0 or last):
                metrics |= self._validate(tracker)
                if self.guards.exhausted:
                    last = True
                    self.progress.write(f"Stopped: {self.guards.stale} validations in a row were no better than {self.best:.4f}")
            if self.step % c.save_steps == 0 or last:
                self._save()
            if last:
                break
        if self.cache is not None:
            self.progress.write(f"Cache: {self.tally}")
        return metrics

    def train_step(self, rows: list[Row], lr: float) -> StepResult:
        """One optimiser step over this process's rows (and, with others, theirs)."""
        c, engine = self.config, self.engine
        packs = [row.pack for row in rows]
        text, image, tokens = engine.sum([*vars(Counts.of(packs)).values(), sum(len(p) for p in packs)])
        counts = Counts(text, image)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        for i, pack in enumerate(packs):
            with engine.accumulate(self.wrapped, last=i == len(packs) - 1):
                with engine.autocast():
                    text_sum, image_sum = loss_sums(self.wrapped(pack.to(engine.device)))
                # Data parallel averages gradients; the loss is a sum over processes.
                loss = joint_loss(text_sum, image_sum, counts, c.text_loss_weight, c.image_loss_weight) * engine.world
                self.scaler.scale(loss).backward()
            sums += torch.stack([text_sum, image_sum]).detach()
        text_sum, image_sum = engine.sum(sums.tolist())
        result = StepResult(text_sum / max(text, 1), image_sum / max(image, 1), counts, tokens)
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients([p for p in self.model.parameters() if p.requires_grad], c.max_grad_norm)
        result.grad_norm = float(norm)
        result.refused = self.guards.refuses((text_sum, image_sum), result.grad_norm)
        if result.refused:
            self.optimizer.zero_grad(set_to_none=True)
            numbers = {"text_loss": result.text_loss, "image_loss": result.image_loss, "grad_norm": result.grad_norm}
            self.guards.skipped(self.step + 1, result.refused, rows, numbers)
        else:
            self.guards.took(result.grad_norm)
            self.scaler.step(self.optimizer)
            if self.ema is not None and math.isfinite(result.grad_norm):
                self.ema.update()
        self.scaler.update()
        return result

    def _metrics(self, result: StepResult, lr: float, seconds: float, waited: float) -> dict[str, float]:
        c = self.config
        values = {
            "loss": c.text_loss_weight * result.text_loss + c.image_loss_weight * result.image_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": lr,
            "epoch": self.place.epoch + self.place.done / len(self.stream.mixture),
            "text_tokens": result.counts.text,
            "image_tokens": result.counts.image,
            "tokens_per_second": result.tokens / seconds,
            "data_wait": waited / seconds,
        }
        if result.counts.text:
            values["text_loss"] = result.text_loss
        if result.counts.image:
            values["image_loss"] = result.image_loss
        if result.refused:
            values["skipped"] = 1.0
        return values

    # ---- before, beside ----------------------------------------------------------------------------------------------

    def dry_batch(self) -> None:
        """Forward and backward of the largest row, so that memory runs out now or never."""
        engine, stream = self.engine, self.stream
        pack = stream.build_largest().pack
        state = torch.get_rng_state()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        try:
            # AdamW will make its two moments at the first step; here their place is only held.
            moments = [torch.empty_like(p) for p in trained for _ in range(2)] if engine.device.type == "cuda" else []
            with engine.autocast():
                text_sum, image_sum = loss_sums(self.wrapped(pack.to(engine.device)))
            joint_loss(text_sum, image_sum, Counts.of([pack]), 1.0, 1.0).backward()
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(
                f"The largest row, {len(pack):,} tokens, does not fit into the memory of {engine.device} ({str(error).splitlines()[0]}). "
                "Cure: --gradient_checkpointing, --bf16, a smaller --batch_size, --max_num_tokens or --max_image_tokens, or freeze a part"
            ) from error
        del moments
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(state)
        peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if engine.device.type == "cuda" else ""
        log.info("Dry batch: %s tokens of %d sample(s) went forward and backward%s", f"{len(pack):,}", pack.n_samples, peak)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses on the validation data with fixed noise and times: the same weights give the same numbers."""
        assert self.val_stream is not None
        engine, totals = self.engine, torch.zeros(4, dtype=torch.float64)
        share = replace(self.share, rows=1)
        steps = self.val_stream.steps_in(0, share.step_rows)
        self.model.eval()
        for (row,) in load_rows(self.val_stream, share, Place(), num_workers=self.workers, limit=steps):
            self.guards.check_rows([row], self.val_stream)
            with engine.autocast():
                text_sum, image_sum = loss_sums(self.model(row.pack.to(engine.device)))
            totals += torch.tensor(
                [float(text_sum), float(image_sum), row.pack.n_text_labels, row.pack.n_image_targets], dtype=torch.float64
            )
        self.model.train()
        text_sum, image_sum, text, image = engine.sum(totals.tolist())
        c, values = self.config, {}
        if text:
            values["val_text_loss"] = text_sum / text
        if image:
            values["val_image_loss"] = image_sum / image
        values["val_loss"] = c.text_loss_weight * values.get("val_text_loss", 0.0) + c.image_loss_weight * values.get("val_image_loss", 0.0)
        return values

    def _validate(self, tracker: Tracker | None) -> dict[str, float]:
        with self.ema.swapped() if self.ema is not None else contextlib.nullcontext():
            values = self.evaluate()
        if tracker:
            tracker.log(values, self.step)
        self.progress.write("Validation: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        better = values["val_loss"] < self.best
        self.guards.validated(better)
        if better:
            self.best = values["val_loss"]
            self._save("best")
        return values
