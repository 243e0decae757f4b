"""Real handwritten digits as training data for the demo, the words that go with them, and their judge.

The pictures are the 1,797 digits of 8 x 8 pixels that scikit-learn ships (``load_digits``: the test part of
"Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
1998). They become PNG files and JSONL records in all seven data formats. The split is made once: no held-out
picture ever appears in the training records.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unigen.commands.init.model import pre_tokens
from unigen.config import UserError
from unigen.sequence.images import area_means, to_image

SIDE = 8  # pixels of a digit's side
INK = 16  # the darkest value of a digit; its PNG holds value * 255 / 16

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTION = "what is this"
WORDS = ("draw", *QUESTION.split(), *NUMBERS, "invert", "rotate", "add", "+", "=")

EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "invert": lambda pixels: 255 - pixels,
    "rotate": lambda pixels: np.rot90(pixels, -1),  # a quarter turn clockwise
}
UNDO: dict[str, Callable[[np.ndarray], np.ndarray]] = {"invert": EDITS["invert"], "rotate": np.rot90}
CHAINS = (("invert", "rotate"), ("rotate", "invert"), ("rotate", "rotate"))
ADDITIONS = [(a, b) for a in range(10) for b in range(10 - a)]  # the 55 sums that are one digit

# A produced edit must also match the expected picture this well, both brought to 8 x 8 and [0, 1]. Of the
# held-out digits, the exact result under noise of standard deviation 0.15 passes in 97 % of the cases,
# another digit of its class in 6 % (with 0.8 in 28 %); half the contrast, which a correlation cannot see,
# fails on the difference.
MIN_CORRELATION = 0.9
MAX_DIFFERENCE = 0.12  # mean absolute


@dataclass(frozen=True)
class DigitSet:
    """The split and where it was written: ``train`` and ``heldout`` are folders of JSONL files, one a task.

    Pictures are ``[N, 8, 8]`` uint8 in 0..16, labels ``[N]`` int64 in 0..9.
    """

    train: Path
    heldout: Path
    train_images: np.ndarray
    train_labels: np.ndarray
    heldout_images: np.ndarray
    heldout_labels: np.ndarray


class _Half:
    """One half of the split: writes pictures when a record first names them, and deals them out class by
    class."""

    def __init__(self, folder: Path, images: np.ndarray, labels: np.ndarray, seed: int):
        self.folder, self.images, self.labels, self.seed = folder, images, labels, seed
        self.written: set[str] = set()
        self.by_class = [np.flatnonzero(labels == k) for k in range(10)]
        self.order = self._order(np.random.default_rng(seed))
        (folder / "pictures").mkdir(parents=True, exist_ok=True)

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Every picture once, the classes taking turns, so that any number of records is balanced."""
        turn = np.empty(len(self.labels))
        for members in self.by_class:
            turn[rng.permutation(members)] = np.arange(len(members))
        return np.lexsort((self.labels, turn))

    def pick(self, i: int) -> tuple[int, int]:
        """The picture of record ``i`` and its label; after the last picture comes the first again."""
        n = int(self.order[i % len(self.order)])
        return n, int(self.labels[n])

    def picture(self, n: int, *edits: str) -> str:
        """Path, relative to the JSONL file, of picture ``n`` after ``edits``."""
        name = "pictures/" + "_".join([f"{n:04d}", *edits]) + ".png"
        if name not in self.written:
            _picture(apply_edits(to_pixels(self.images[n]), edits)).save(self.folder / name)
            self.written.add(name)
        return name


def to_pixels(image: np.ndarray) -> np.ndarray:
    """A digit's values 0..16 as gray values 0..255, uint8."""
    return np.rint(image * (255.0 / INK)).astype(np.uint8)


def apply_edits(pixels: np.ndarray, edits: Sequence[str]) -> np.ndarray:
    """``pixels`` ``[H, W]`` uint8 after the named edits, in order: the exact picture an edit must produce."""
    for name in edits:
        pixels = EDITS[name](pixels)
    return pixels


def _picture(pixels: np.ndarray) -> Any:
    """The grayscale PIL picture of ``[H, W]`` uint8: half a level is added because ``to_image`` rounds
    down."""
    values = (torch.from_numpy(pixels.astype(np.float32)) + 0.5) / 127.5 - 1
    return to_image(values.expand(3, -1, -1)).convert("L")


MakesRecord = Callable[[_Half, int], dict[str, Any]]
"""What makes a task's record, by its number."""


def _of_one(make: Callable[[str, str], dict[str, Any]]) -> MakesRecord:
    """Records of one picture, which ``make`` makes of its path and of its number in words."""

    def record(half: _Half, i: int) -> dict[str, Any]:
        n, label = half.pick(i)
        return {**make(half.picture(n), NUMBERS[label]), "metadata": {"label": label}}

    return record


def _turns(picture: str, word: str) -> dict[str, Any]:
    asked = [{"type": "image", "image_path": picture}, {"type": "text", "content": QUESTION}]
    turns = [{"role": "user", **turn} for turn in asked]
    return {"conversations": [*turns, {"role": "assistant", "type": "text", "content": word}]}


def _messages(picture: str, word: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"<image>{QUESTION}"}, {"role": "assistant", "content": word}]
    return {"messages": messages, "images": [picture]}


def _edits(chains: Sequence[Sequence[str]]) -> MakesRecord:
    """Records of one picture and its edits, the chains taking turns."""

    def record(half: _Half, i: int) -> dict[str, Any]:
        (n, label), edits = half.pick(i // len(chains)), chains[i % len(chains)]
        steps = [
            {"step": k, "instruction": name, "result_image": half.picture(n, *edits[:k])}
            for k, name in enumerate(edits, start=1)
        ]
        metadata = {"label": label, "edits": list(edits)}
        return {"input_image": half.picture(n), "editing_steps": steps, "metadata": metadata}

    return record


def _addition(half: _Half, i: int, salt: int) -> tuple[list[str], str, dict[str, Any]]:
    """Three pictures (two terms and their sum), the text, and the metadata; every 55 records show all
    sums."""
    rounds, place = divmod(i, len(ADDITIONS))
    rng = np.random.default_rng([half.seed, salt, rounds])
    a, b = ADDITIONS[rng.permutation(len(ADDITIONS))[place]]
    draws = np.random.default_rng([half.seed, salt, rounds, place])
    pictures = [half.picture(int(draws.choice(half.by_class[k]))) for k in (a, b, a + b)]
    return pictures, f"{a} + {b} = {a + b}", {"label": a + b, "terms": [a, b]}


def _add(half: _Half, i: int) -> dict[str, Any]:
    (first, second, result), text, metadata = _addition(half, i, salt=1)
    given = [
        {"type": "image", "image_path": first},
        {"type": "image", "image_path": second},
        {"type": "text", "content": "add"},
    ]
    wanted = [{"type": "text", "content": text}, {"type": "image", "image_path": result}]
    return {"input_sequence": given, "target_sequence": wanted, "metadata": metadata}


def _add_sequence(half: _Half, i: int) -> dict[str, Any]:
    (first, second, result), text, metadata = _addition(half, i, salt=2)
    sequence = [
        {"type": "image", "image_path": first},  # a first image is context by itself; the next two say so
        {"type": "image", "image_path": second, "target": False},
        {"type": "text", "content": "add", "target": False},
        {"type": "text", "content": text},
        {"type": "image", "image_path": result},
    ]
    return {"sequence": sequence, "metadata": metadata}


@dataclass(frozen=True)
class Task:
    """How a task's records are made, and how many there are of them."""

    record: MakesRecord
    per_epoch: int
    heldout: int


TASKS = {
    "draw": Task(_of_one(lambda path, word: {"text_prompt": f"draw {word}", "image_path": path}), 1500, 100),
    # "seven", without a question
    "caption": Task(_of_one(lambda path, word: {"image_path": path, "caption": word}), 500, 297),
    "ask": Task(_of_one(_turns), 1500, 297),  # conversations: "what is this", "seven"
    "ask_messages": Task(_of_one(_messages), 1500, 297),  # messages + images: the same
    # editing_steps, one step: "invert" or "rotate"
    "edit": Task(_edits([(name,) for name in EDITS]), 1500, 200),
    "edit_steps": Task(_edits(CHAINS), 300, 60),  # editing_steps, two steps
    # input_sequence + target_sequence: two pictures and "add", "3 + 4 = 7" and a drawn 7
    "add": Task(_add, 1500, 110),
    "add_sequence": Task(_add_sequence, 300, 55),  # sequence: the same
}
TRAINED, HELD_OUT = 1500, 297  # digits, of 1,797


def write_digits(folder: Path, *, seed: int = 0, per_epoch: Mapping[str, int] | None = None) -> DigitSet:
    """Writes the digits as grayscale PNG files and as ``train/<task>.jsonl`` and ``heldout/<task>.jsonl``
    under ``folder``.

    Args:
        seed: Seed of the split, the order and the choice of terms; the same seed writes the same bytes.
        per_epoch: Training records per task, where it is not what ``TASKS`` says; 0 leaves the task out.

    Raises:
        UserError: scikit-learn is missing.
    """
    asked = {name: task.per_epoch for name, task in TASKS.items()} | dict(per_epoch or {})
    assert asked.keys() == TASKS.keys(), "a task of that name"
    digits = _split(folder, seed)
    learnt = _Half(digits.train, digits.train_images, digits.train_labels, seed)
    kept = _Half(digits.heldout, digits.heldout_images, digits.heldout_labels, seed)
    for name, task in TASKS.items():
        _write_task(learnt, name, asked[name])
        _write_task(kept, name, task.heldout)
    return digits


def _write_task(half: _Half, name: str, count: int) -> None:
    path = half.folder / f"{name}.jsonl"
    if count == 0:
        path.unlink(missing_ok=True)
        return
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for i in range(count):
            record = TASKS[name].record(half, i)
            record["metadata"] = {"task": name, **record["metadata"]}
            file.write(json.dumps(record) + "\n")


def _split(folder: Path, seed: int) -> DigitSet:
    """The digits, stratified by their classes. Raises UserError where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError(
            f"the digits come from scikit-learn, which is not installed ({error}). Fix: pip install"
            " 'scikit-learn>=1.5' (the extra demo)"
        ) from error
    data = load_digits()
    learnt, kept = train_test_split(
        np.arange(len(data.target)), train_size=TRAINED, test_size=HELD_OUT, stratify=data.target,
        random_state=seed,
    )  # fmt: skip
    images, labels = data.images.astype(np.uint8), data.target.astype(np.int64)
    trained, held_out = ((images[part], labels[part]) for part in (learnt, kept))
    return DigitSet(folder / "train", folder / "heldout", *trained, *held_out)


class DigitReader:
    """Reads drawn digits: a support vector machine fitted on the real training digits only.

    ``heldout_accuracy`` is its share of right answers on the held-out digits, the ceiling of every score it
    gives.
    """

    def __init__(self, digits: DigitSet):
        from sklearn.svm import SVC

        self._classifier = SVC(C=10.0, gamma=0.384)
        self._classifier.fit(digits.train_images.reshape(-1, SIDE * SIDE) / INK, digits.train_labels)
        heldout = digits.heldout_images.reshape(-1, SIDE * SIDE) / INK
        self.heldout_accuracy = float(self._classifier.score(heldout, digits.heldout_labels))

    def classify(self, images: Sequence[Any]) -> np.ndarray:
        """The digits that PIL pictures of any size and mode show (light ink on dark, upright): ``[N]`` int64
        in 0..9."""
        if not len(images):
            return np.zeros(0, np.int64)
        return self._read(np.stack([shrink(image) for image in images]))

    def decide(self, images: np.ndarray) -> np.ndarray:
        """How much each picture of ``[N, 8, 8]`` gray values in [0, 1] looks like each digit: ``[N, 10]``
        float32."""
        values = self._classifier.decision_function(images.reshape(len(images), SIDE * SIDE))
        return values.astype(np.float32)

    def edit_correct(self, produced: Any, expected: Any, label: int, edits: Sequence[str]) -> bool:
        """Whether PIL picture ``produced`` is ``expected``, the picture of a ``label`` after ``edits``.

        Both must hold: with the edits undone it reads as the label, and it is close to the expected picture
        (``MIN_CORRELATION``, ``MAX_DIFFERENCE``), so that another digit of the class, edited alike, does not
        count.
        """
        pixels, wanted = shrink(produced), shrink(expected)
        upright = pixels * 255.0
        for name in reversed(edits):
            upright = UNDO[name](upright)
        reads = int(self._read(upright[None] / 255.0)[0]) == label
        return bool(
            reads
            and _correlation(pixels, wanted) >= MIN_CORRELATION
            and np.abs(pixels - wanted).mean() <= MAX_DIFFERENCE
        )

    def _read(self, images: np.ndarray) -> np.ndarray:
        return self._classifier.predict(images.reshape(len(images), SIDE * SIDE)).astype(np.int64)


def shrink(image: Any) -> np.ndarray:
    """A PIL picture of any size as ``[8, 8]`` gray values in [0, 1]."""
    return area_means(image, (SIDE, SIDE)) / 255.0


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two pictures; 0 where one of them is flat."""
    a, b = a - a.mean(), b - b.mean()
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norm) if norm > 1e-9 else 0.0


def word_texts(words: Iterable[str] = WORDS) -> list[str]:
    """Texts from which a tokenizer learns each word as one token, alone and after a space.

    A word must be one that the pre-tokenizer leaves whole: Qwen2 splits at spaces and digits, and letters
    from signs.
    """
    words = list(words)
    assert all(len(pre_tokens(word)) == 1 for word in words), "no merge makes one token of two parts"
    return [*words, *(f" {word}" for word in words)]
