"""``unigen demo``: real handwritten digits, a tiny model from scratch, minutes on a CPU.

The ordinary ``unigen train`` and the ordinary inferencer do the work; this file writes the data and the
model, asks the questions and counts the right answers.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unigen.commands.demo.digits import NUMBERS, QUESTION, DigitReader, DigitSet, word_texts, write_digits
from unigen.commands.demo.measure import FOLDER, evaluate_digits
from unigen.commands.init.model import create_model
from unigen.commands.train import train
from unigen.config import Config
from unigen.files import remove
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.options import sampling_options
from unigen.messages import in_language, spoken
from unigen.outputs import claim, output_folder, unwritten
from unigen.printing import typed
from unigen.runs import layout
from unigen.runs.checkpoint import steps
from unigen.runs.metrics import read_log
from unigen.sequence.images import open_image
from unigen.show import pages
from unigen.show.charts import Line, line_chart
from unigen.show.language import Words
from unigen.show.terminal import line, say, table

SIDE = 8  # pixels of a picture's side: what the digits have


@dataclass(frozen=True)
class DemoSize:
    """How much of the same line is done."""

    steps: int
    questions: int  # of each kind, at most
    learning_rate: float
    ema: float
    per_epoch: dict[str, int] = field(default_factory=dict)  # records a task, where not as in digits.TASKS
    model: dict[str, int] = field(default_factory=dict)  # sizes of the model, where not the defaults


FULL = DemoSize(steps=1600, questions=300, learning_rate=3e-3, ema=0.99)
QUICK = DemoSize(
    steps=520, questions=50, learning_rate=3e-3, ema=0.97,
    per_epoch={
        "draw": 800, "caption": 100, "ask": 1300, "ask_messages": 100,
        "edit": 2700, "edit_steps": 60, "add": 1100, "add_sequence": 60,
    },
    model={"width": 96, "layers": 3, "inner": 256},
)  # fmt: skip
SAMPLES = 5  # times that the model is asked while it trains
TRAINING = {"batch_size": 64, "warmup_steps": 20, "weight_decay": 0.1, "logging_steps": 20}
SAMPLING = {
    "num_timesteps": 24,
    "timestep_shift": 1.0,
    "cfg_text_scale": 1.0,
}
# with guidance by the text
GUIDED = SAMPLING | {"cfg_text_scale": 2.0, "cfg_img_scale": 1.0, "cfg_interval": (0.0, 1.0)}
# What the full demo is expected to reach on two cores, and what guessing would.
BARS = {
    "understanding_accuracy": 0.95,
    "generation_accuracy": 0.90,
    "edit_accuracy": 0.85,
    "interleaved_accuracy": 0.70,
}
DEMO = "unigen demo"  # the mark of its folder and its report
MARK = {True: "✓", False: "✕"}
_WIDE = 20  # columns of a score that is drawn
NOT_HELD = (
    "This is --quick, a smaller model and fewer steps: it is not held to what the full demo should reach."
)
CHANCE = {
    "understanding_accuracy": 0.1,
    "generation_accuracy": 0.1,
    "edit_accuracy": 0.0,
    "interleaved_accuracy": 0.0,
}


class Interrupted(Exception):
    """A signal ended the training; its last finished step is saved."""


def run(output_dir: Path, quick: bool = False, seed: int = 42) -> dict[str, Any]:
    """The whole demo; what ``metrics.json`` holds."""
    began = time.perf_counter()
    output_dir, size = output_folder("output_dir", output_dir), QUICK if quick else FULL
    with unwritten("output_dir", output_dir):
        claim("output_dir", output_dir, DEMO, sorted(os.listdir(output_dir)) if output_dir.is_dir() else [])
    digits = write_digits(output_dir / "data", seed=0, per_epoch=size.per_epoch)
    create_model(output_dir / "model", word_texts(), seed, side=SIDE, **size.model)
    prepared = time.perf_counter()
    checkpoint = _train(output_dir, size, seed, _write_prompts(output_dir / "prompts.jsonl", digits))
    trained = time.perf_counter()
    exam = Exam(checkpoint, digits, limit=size.questions, seed=seed)
    metrics: dict[str, Any] = exam.take()
    asked = time.perf_counter()
    limit = min(size.questions, 100)
    evaluation = evaluate_digits(output_dir, digits, exam.judge, limit, seed, SAMPLING)
    ended = time.perf_counter()
    metrics |= {
        "judge_heldout_accuracy": exam.judge.heldout_accuracy,
        "seconds_preparing": prepared - began,
        "seconds_training": trained - prepared,
        "seconds_sampling": asked - trained,
        "seconds_evaluating": ended - asked,
        "seconds_total": ended - began,
        "steps": size.steps,
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}",
    }
    say(*_scores(metrics, quick))
    with unwritten("output_dir", output_dir):
        (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        page = _write_report(output_dir, metrics, exam, quick)
    say(f"{metrics['seconds_total']:.0f} s in all. Look at {page}")
    say(f"The checkpoints of {size.steps // 2} and {size.steps} steps, compared: {evaluation}")
    say(f"How it learned: unigen watch {typed(output_dir / 'run')} --html {typed(output_dir / 'run.html')}")
    return metrics


def _scores(metrics: dict[str, Any], quick: bool) -> list[Any]:
    """What was right beside what is wanted (●), each marked."""
    rows = []
    for name, *shares, marked in _rows(metrics):
        right, at = metrics[name], min(_WIDE - 1, int(BARS[name] * _WIDE))
        drawn = "".join("●" if n == at else "█" if n < round(right * _WIDE) else "─" for n in range(_WIDE))
        style = "good" if right >= BARS[name] else "bad"
        rows.append([_named(name), line(drawn), *shares, line((marked, style))])
    header = ["on held-out digits", "", "right", "wanted", "by chance", ""]
    judged = f"The judge reads {metrics['judge_heldout_accuracy']:.1%} of real held-out digits."
    return [table(header, rows), judged, *([NOT_HELD] if quick else [])]


def _rows(metrics: dict[str, Any]) -> Iterator[list[str]]:
    """Name, what was right, what is wanted and what guessing would reach, and whether it is reached."""
    for name, wanted in BARS.items():
        shares = (f"{share:.1%}" for share in (metrics[name], wanted, CHANCE[name]))
        reached = metrics[name] >= wanted
        said = in_language("reached") if reached else in_language("not reached")
        yield [name, *shares, f"{MARK[reached]} {said}"]


def _named(name: str) -> str:
    return in_language(name.replace("_", " "))


def _write_prompts(path: Path, digits: DigitSet) -> Path:
    """What the model is asked now and then while it trains; ``unigen watch`` shows the answers over the
    steps."""

    def first(task: str) -> dict[str, Any]:
        with open(digits.heldout / f"{task}.jsonl", encoding="utf-8") as lines:
            record: dict[str, Any] = json.loads(next(lines))
        return record

    def place(picture: str) -> str:
        return os.path.relpath(digits.heldout / picture, path.parent)

    asked, edit, add = first("ask"), first("edit"), first("add")
    addends = [place(piece["image_path"]) for piece in add["input_sequence"] if "image_path" in piece]
    prompts = [
        *({"prompt": f"draw {NUMBERS[n]}", "kind": "draw"} for n in (0, 3, 7)),
        {"prompt": QUESTION, "image": place(asked["conversations"][0]["image_path"]), "kind": "answer"},
        {
            "prompt": edit["editing_steps"][0]["instruction"],
            "image": place(edit["input_image"]),
            "kind": "draw",
        },
        {"prompt": "add", "image": addends, "kind": "decide"},
    ]
    with open(path, "w", encoding="utf-8") as lines:
        for prompt in prompts:
            sampling = SAMPLING if prompt["kind"] != "answer" else {}  # which draws nothing
            lines.write(json.dumps(prompt | sampling) + "\n")
    return path


def _goes_on(run: Path, metrics: Path, flags: dict[str, Any]) -> bool:
    """Was an earlier demo of the same options stopped before its end?"""
    try:
        options = json.loads((run / layout.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = isinstance(options, dict) and all(options.get(name) == value for name, value in flags.items())
    return same and bool(steps(run)) and not metrics.exists()


def _train(output_dir: Path, size: DemoSize, seed: int, prompts: Path) -> Path:
    """Trains as ``unigen train`` with the printed flags does; the last checkpoint."""
    flags: dict[str, Any] = {
        "model_path": str(output_dir / "model"), "train_data_path": str(output_dir / "data" / "train"),
        "output_dir": str(output_dir / "run"), "max_steps": size.steps, "save_steps": size.steps // 2,
        "learning_rate": size.learning_rate,
        "ema": size.ema, "seed": seed, "sample_prompts": str(prompts), "sample_steps": size.steps // SAMPLES,
        **TRAINING,
    }  # fmt: skip
    metrics = output_dir / "metrics.json"
    if _goes_on(output_dir / "run", metrics, flags):
        flags["resume_from_checkpoint"] = "auto"
    else:
        remove(output_dir / FOLDER)  # of an earlier demo
    metrics.unlink(missing_ok=True)  # of an earlier demo, which had come to its end
    say("unigen train " + " ".join(f"--{name} {value}" for name, value in flags.items()))
    if train(Config(**flags)) != 0:
        raise Interrupted
    return output_dir / "run" / layout.step_name(size.steps)


class Exam:
    """Asks a trained model about held-out digits, in batches, and marks the answers. The model decides by
    itself what to write, what to draw and when to stop."""

    def __init__(self, checkpoint: Path, digits: DigitSet, limit: int, seed: int):
        self.inferencer = InterleaveInferencer.from_pretrained(checkpoint, "cpu")
        self.digits, self.limit, self.seed = digits, limit, seed
        self.judge = DigitReader(digits)
        self.drawings: list[tuple[str, Any]] = []  # caption, picture
        self.edits: list[tuple[str, Any]] = []
        self.sums: list[tuple[str, Any]] = []

    def take(self) -> dict[str, float]:
        """The shares of right answers by their names."""
        return {
            **self.understanding(), **self.generation(), **self.editing(), **self.chains(), **self.sums_(),
        }  # fmt: skip

    def records(self, task: str) -> list[dict[str, Any]]:
        """Held-out records with the whole paths of their pictures."""
        lines = (self.digits.heldout / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        inside = json.dumps(f"{self.digits.heldout}/pictures/")[:-1]
        return [json.loads(line.replace('"pictures/', inside)) for line in lines[: self.limit]]

    def ask(
        self, prompts: Sequence[Sequence[Any]], outputs: Sequence[str] | None = None, **sampling: Any
    ) -> list[list[Any]]:
        answers: list[list[Any]] = []
        for start in range(0, len(prompts), 100):
            part = prompts[start : start + 100]
            asked = sampling_options(**(SAMPLING | sampling), seed=self.seed + start, max_new_tokens=16)
            self.inferencer.requests.usual = asked  # nobody asked for what has no effect
            answers += self.inferencer.unified_generate_batch(
                part, outputs=outputs, options=asked, max_pieces=4
            )
        return answers

    def understanding(self) -> dict[str, float]:
        """Held-out digit and question in, the number's word out, and nothing after it."""
        records = self.records("ask")
        answers = self.ask([[Path(r["conversations"][0]["image_path"]), QUESTION] for r in records])
        wanted = [[NUMBERS[r["metadata"]["label"]]] for r in records]
        return {"understanding_accuracy": _share([a == b for a, b in zip(answers, wanted, strict=True)])}

    def generation(self) -> dict[str, float]:
        """A word in, one drawing out that the judge reads as that number, and nothing after it."""
        labels = [i % 10 for i in range(min(self.limit, 300))]
        answers = self.ask([[f"draw {NUMBERS[label]}"] for label in labels], **GUIDED)
        drawn = [(label, made[0]) for label, made in zip(labels, answers, strict=True) if _is_picture(made)]
        self.drawings = [(NUMBERS[label], picture) for label, picture in drawn[:60]]
        right = sum(int(self.judge.classify([picture])[0]) == label for label, picture in drawn)
        return {"generation_accuracy": right / len(labels)}

    def editing(self) -> dict[str, float]:
        """Held-out digit and one instruction in, the exact edit out."""
        records = self.records("edit")
        answers = self.ask([[Path(r["input_image"]), r["editing_steps"][0]["instruction"]] for r in records])
        right: dict[str, list[bool]] = {"invert": [], "rotate": []}
        for r, answer in zip(records, answers, strict=True):
            (name,) = r["metadata"]["edits"]
            expected = open_image(Path(r["editing_steps"][0]["result_image"]))
            right[name].append(_is_picture(answer) and self.is_edit(answer[0], expected, r["metadata"]))
            if _is_picture(answer) and len(self.edits) < 36:
                self.edits += [
                    (in_language("given"), open_image(Path(r["input_image"]))),
                    (f"{in_language(name)} {MARK[right[name][-1]]}", answer[0]),
                    (in_language("exact"), expected),
                ]
        return {
            "edit_accuracy": _share([*right["invert"], *right["rotate"]]),
            **{f"edit_{name}_accuracy": _share(ones) for name, ones in right.items()},
        }

    def is_edit(self, produced: Any, expected: Any, about: dict[str, Any]) -> bool:
        return self.judge.edit_correct(produced, expected, about["label"], about["edits"])

    def chains(self) -> dict[str, float]:
        """Two instructions one after the other, each on the model's own picture; the last one is marked."""
        records = self.records("edit_steps")
        prompts: list[list[Any]] = [[Path(r["input_image"])] for r in records]
        for step in range(2):
            for prompt, r in zip(prompts, records, strict=True):
                prompt.append(r["editing_steps"][step]["instruction"])
            for prompt, made in zip(prompts, self.ask(prompts, outputs=["image"]), strict=True):
                prompt.append(made[0])
        right = [
            self.is_edit(prompt[-1], open_image(Path(r["editing_steps"][1]["result_image"])), r["metadata"])
            for prompt, r in zip(prompts, records, strict=True)
        ]
        return {"two_step_edit_accuracy": _share(right)}

    def sums_(self) -> dict[str, float]:
        """Two held-out digits in; the sum in figures and its drawing out, then a stop of the model's own."""
        records = self.records("add")
        terms = [[Path(piece["image_path"]) for piece in r["input_sequence"][:2]] for r in records]
        answers = self.ask([[*pictures, "add"] for pictures in terms])
        wrote, drew = [], []
        for r, pictures, answer in zip(records, terms, answers, strict=True):
            whole = len(answer) == 2 and isinstance(answer[0], str) and not isinstance(answer[1], str)
            wrote.append(whole and answer[0] == r["target_sequence"][0]["content"])
            drew.append(whole and self.judge.classify(answer[1:])[0] == r["metadata"]["label"])
            if whole and len(self.sums) < 36:
                given = [(in_language("given"), open_image(picture)) for picture in pictures]
                self.sums += [*given, (f"{answer[0]} {MARK[bool(wrote[-1] and drew[-1])]}", answer[1])]
        return {
            "interleaved_accuracy": _share([a and b for a, b in zip(wrote, drew, strict=True)]),
            "interleaved_text_accuracy": _share(wrote),
            "interleaved_drawing_accuracy": _share(drew),
        }


def _is_picture(answer: Sequence[Any]) -> bool:
    """Is the answer one single picture?"""
    return len(answer) == 1 and not isinstance(answer[0], str)


def _share(right: Sequence[Any]) -> float:
    return sum(map(bool, right)) / max(len(right), 1)


def _write_report(output_dir: Path, metrics: dict[str, Any], exam: Exam, quick: bool = False) -> Path:
    log = read_log(output_dir / "run" / layout.METRICS)
    pages.contact_sheet([picture for _, picture in exam.drawings[:60]], 10, 48).save(
        output_dir / "drawings.png"
    )
    words = Words(spoken(), "common")
    lines = [
        Line(in_language(name), log.points(f"{name}_loss"), n) for n, name in enumerate(("text", "image"))
    ]
    values = {
        # the sign alone, as a phone has no room for its word
        "scores": [(_named(name), *shares, marked[0]) for name, *shares, marked in _rows(metrics)],
        "not_held": in_language(NOT_HELD) if quick else "",
        "figures": [
            (_named(name), in_language(value) if isinstance(value, str) else value)
            for name, value in metrics.items()
            if name not in BARS
        ],
        "losses": line_chart(in_language("Training loss"), lines, words, log=True),
        **{
            name: [(caption, pages.embed(picture)) for caption, picture in found]
            for name, found in (("drawings", exam.drawings), ("edits", exam.edits), ("sums", exam.sums))
        },
    }
    return pages.write_page(
        output_dir / "report.html",
        "report.html",
        values,
        by=DEMO,
        title=in_language("Unigen demo: handwritten digits"),
        styles=["charts"],
        script="charts",
    )
