"""Folders of runs as a training leaves them, made from a seed."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

GB = 10**9
PROMPTS = ["A red house beside a tree, watercolour", "一只在雪地里奔跑的橘猫"]


def row(step: int, random_: random.Random, total: int = 2000, **changes: Any) -> dict[str, Any]:
    """A line of training as the trainer logs it."""
    progress = step / total
    text = 1.1 + 2.2 * math.exp(-6 * progress) + random_.gauss(0, 0.06)
    image = 0.22 + 0.5 * math.exp(-9 * progress) + random_.gauss(0, 0.012)
    values = {
        "step": step,
        "loss": text + image,
        "grad_norm": abs(0.8 + 2 * math.exp(-8 * progress) + random_.gauss(0, 0.15)),
        "learning_rate": 2e-5 * min(1.0, step / (0.05 * total)) * (0.5 + 0.5 * math.cos(math.pi * progress)),
        "epoch": 3 * progress,
        "text_tokens": 1024,
        "image_tokens": 4096,
        "tokens_per_second": 21_500 + random_.gauss(0, 400),
        "data_wait": abs(random_.gauss(0.012, 0.006)),
        "text_loss": text,
        "image_loss": image,
        "time": 1.7e9 + 2.9 * step,
    }
    return values | changes


def validation(step: int, random_: random.Random, total: int = 2000) -> dict[str, Any]:
    clean = row(step, random.Random(0), total)
    text, image = (
        clean["text_loss"] + 0.08 + random_.gauss(0, 0.02),
        clean["image_loss"] + 0.02 + random_.gauss(0, 0.004),
    )
    values = {"step": step, "val_text_loss": text, "val_image_loss": image, "val_loss": text + image}
    for n, task in enumerate(("understand", "interleaved")):
        values[f"val/text_loss_by_task/{task}"] = text * (0.8 + 0.5 * n)
    for n, task in enumerate(("generate", "edit", "interleaved")):
        values[f"val/image_loss_by_task/{task}"] = image * (1.2 - 0.2 * n)
    values |= {"probe/drift/text": 0.05, "eval/accuracy/understand": 0.5}
    for n in range(4):
        values[f"val/image_loss_by_time/{n / 4:.2f}-{(n + 1) / 4:.2f}"] = image * (1.5 - 0.3 * n)
    return values


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def write_rank(folder: Path, rank: int, **changes: Any) -> None:
    """A heartbeat of this moment from another machine, unless ``changes`` say otherwise."""
    now = time.time()
    values = {
        "rank": rank,
        "step": 1240,
        "phase": "forward/backward",
        "since": now - 1,
        "time": now,
        "pid": 4000 + rank,
        "host": "node-1",
    }
    (folder / "ranks").mkdir(parents=True, exist_ok=True)
    (folder / "ranks" / f"rank_{rank}.json").write_text(json.dumps(values | changes))


def write_checkpoint(folder: Path, name: str, step: int, age: float, size: int = 88 * GB) -> None:
    (folder / name).mkdir(parents=True)
    files = {
        "ema.safetensors": {"size": size // 3, "sha256": "0" * 64},
        "optimizer.safetensors": {"size": size - size // 3, "sha256": "0" * 64},
    }
    manifest = {"format": 2, "step": step, "time": time.time() - age, "world": 8, "files": files}
    (folder / name / "manifest.json").write_text(json.dumps(manifest))


def picture(seed: int, noise: float, side: int = 128) -> PILImage.Image:
    """A house under a sky, as seen through noise in [0, 1]."""
    y, x = np.mgrid[0:side, 0:side] / side
    pixels = np.stack([0.45 + 0.3 * y, 0.65 + 0.2 * y, 0.95 - 0.1 * y], -1)
    shift = 0.06 * (seed % 3) - 0.05
    pixels[y > 0.72] = (0.36, 0.58, 0.30)
    pixels[(abs(x - 0.42 - shift) < 0.2) & (y > 0.48) & (y < 0.8)] = (
        (0.80, 0.25, 0.22),
        (0.92, 0.62, 0.25),
        (0.35, 0.45, 0.75),
    )[seed % 3]
    pixels[(y > 0.28) & (y < 0.48) & (abs(x - 0.42 - shift) < (y - 0.26) * 1.2)] = (0.42, 0.20, 0.16)
    pixels[(x - 0.8) ** 2 + (y - 0.52) ** 2 < 0.018] = (0.16, 0.45, 0.22)
    grain = np.random.default_rng(seed).normal(0.5, 0.25, pixels.shape)
    return PILImage.fromarray((np.clip((1 - noise) * pixels + noise * grain, 0, 1) * 255).astype(np.uint8))


def write_samples(folder: Path, steps: list[int], prompts: list[str] = PROMPTS, total: int = 2000) -> None:
    for step in steps:
        place = folder / "samples" / f"step_{step}"
        place.mkdir(parents=True)
        entries = []
        for n, prompt in enumerate(prompts):
            picture(n, max(0.0, 0.95 * (1 - step / (0.7 * total)))).save(place / f"{n:03}.png")
            words = f"Here is what I drew after {step} steps."
            given = {"given": [f"{n:03}_given_0.png"]} if n == 1 else {}
            for name in given.get("given", []):
                picture(n, 1.0).resize((48, 48)).save(place / name)
            entries.append(
                {
                    "prompt": prompt,
                    "seed": 42 + n,
                    **given,
                    "pieces": [{"text": words}, {"image": f"{n:03}.png"}],
                    # an average answered, and beside it the weights
                    **({"raw": {"pieces": [{"image": f"{n:03}.png"}]}} if n == 1 and step > steps[0] else {}),
                }
            )
        (place / "index.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def beat(folder: Path, steps: int = 1240, total: int = 2000, ranks: int = 8) -> None:
    """Heartbeats of this moment."""
    for rank in range(ranks):
        write_rank(
            folder,
            rank,
            step=steps,
            host=f"node-{1 + rank // 4}",
            **({"total_steps": total} if rank == 0 else {}),
        )


def record(
    folder: Path, steps: int = 1240, *, total: int = 2000, seed: int = 0, ranks: int = 8, **changes: Any
) -> Path:
    """A run in its middle, alive on another machine; ``changes`` are options of its config."""
    random_ = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows.append(row(step, random_, total))
        if step in (412, 413):
            rows[-1] |= {"grad_norm": 41.0 + step % 3, "skipped": 1.0}
        if step % 100 == 0:
            rows.append(validation(step, random_, total))
    write_metrics(folder / "metrics.jsonl", rows)
    config = {
        "model_path": "models/BAGEL-7B-MoT",
        "output_dir": str(folder),
        "save_steps": 500,
        "eval_steps": 100,
        "max_steps": total,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    beat(folder, steps, total, ranks)
    for step in range(500, steps + 1, 500):
        write_checkpoint(folder, f"step_{step}", step, 2.9 * (steps - step) + 60)
    if steps >= 1200:
        write_checkpoint(folder, "best", 1200, 180.0, 29 * GB)
    write_samples(folder, [step for step in range(200, steps + 1, 200)], total=total)
    skipped = [
        {
            "step": s,
            "why": "its gradient norm 41 is a spike (the last 100: 0.9 ± 0.2)",
            "records": [["data/train.jsonl", 17]],
        }
        for s in (412, 413)
    ]
    write_metrics(folder / "bad_steps.jsonl", skipped)
    bad = {
        "file": "data/train.jsonl",
        "line": 88,
        "index": 87,
        "code": "broken_picture",
        "found": "pictures/88.png is cut short",
    }
    write_metrics(folder / "bad_records.jsonl", [bad])
    return folder
