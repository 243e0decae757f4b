"""Does a picture hold the objects that were asked for, in number, colour and place? The checks of GenEval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from unigen.bars import each
from unigen.evaluation.detectors import DetectedObject, Detector
from unigen.evaluation.features import Picture, resized
from unigen.evaluation.results import CannotRun, Result, digest_of, identity, metric, same_length
from unigen.evaluation.statistics import estimate
from unigen.evaluation.towers import PictureTower
from unigen.sequence.images import open_image, to_image

SCORES = (0.3, 0.9)  # from which an object counts: in general, and where objects are counted
MOST = 16  # objects of a kind
SLACK = 0.1  # of the sizes of two objects: their centres are level within it
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
ASKED = (
    "a photo of a {colour} {thing}",
    "a photo of a {colour}-colored {thing}",
    "a photo of a {colour} object",
)
LEAST = 8  # pixels of an object's side
GREY = 153  # behind an object whose colour is asked for
_NO_CLIP = ("a colour is asked for, and no CLIP is given", "--clip FOLDER, of a CLIP or SigLIP")

Wanted = Mapping[str, Any]  # a line of GenEval's evaluation_metadata.jsonl
Colours = Callable[[Sequence[DetectedObject], str], list[str]]


@metric("geneval", "Ghosh et al. 2023; djghosh13/geneval, evaluation/evaluate_images.py")
def geneval(
    pictures: Sequence[Sequence[Picture]],
    wanted: Sequence[Wanted],
    *,
    detector: Detector,
    clip: PictureTower | None = None,
    scores: tuple[float, float] = SCORES,
    seed: int = 0,
) -> Result:
    """Share of pictures that hold what was asked for: the mean over prompts of the share of its pictures.

    Args:
        pictures: of each prompt.
        wanted: for each prompt a line of ``evaluation_metadata.jsonl``: ``include`` (with ``class``,
            ``count`` and perhaps ``color``, ``position``) and ``exclude``; ``tag`` ``counting`` takes the
            second score.
        clip: tells the colours of objects; only where one is asked for.
        scores: from which an object counts, in general and for ``counting``. The published numbers have 0.3
            and 0.9 with a Mask2Former, and a CLIP ViT-L/14.
    """
    n = same_length(pictures, wanted)
    detector.check(thing for one in wanted for thing in things(one))
    if clip is None and any("color" in part for one in wanted for part in one.get("include", [])):
        raise CannotRun(*_NO_CLIP)
    teller = None if clip is None else _Teller(clip)
    values = np.zeros(n)
    for number, (drawn, one) in enumerate(each("objects", list(zip(pictures, wanted, strict=True)))):
        values[number] = np.mean([_is_right(picture, one, detector, teller, scores) for picture in drawn])
    name = identity(
        "geneval", detector.name, colours=clip and clip.name, scores=f"{scores[0]:g},{scores[1]:g}", n=n,
        pictures=sum(map(len, pictures)), lib=detector.libraries,
    )  # fmt: skip
    return estimate(name, values, seed=seed, data=digest_of([dict(one) for one in wanted]))


def things(wanted: Wanted) -> list[str]:
    """What the parts of a line name, each once."""
    parts = [*wanted.get("include", []), *wanted.get("exclude", [])]
    return list(dict.fromkeys(part["class"] for part in parts))


def _is_right(
    picture: Picture, wanted: Wanted, detector: Detector, teller: _Teller | None, scores: tuple[float, float]
) -> bool:
    least, whole = scores[wanted.get("tag") == "counting"], open_image(picture)
    found = {
        thing: [one for one in ones if one.score > least][:MOST]
        for thing, ones in detector.find(whole, things(wanted)).items()
    }
    return not faults(found, wanted, lambda ones, thing: [] if teller is None else teller(whole, ones, thing))


def faults(found: Mapping[str, Sequence[DetectedObject]], wanted: Wanted, colours: Colours) -> list[str]:
    """What is wrong with the objects that were found, the surest of each kind first; empty: nothing is.

    Every part of ``include`` must be there ``count`` times, in its ``color`` where it has one and, as
    ``position`` [relation, number of the part], so to all of that part's objects; no part of ``exclude`` may
    be there ``count`` times. Only the ``count`` surest objects are looked at.
    """
    wrong: list[str] = []
    right: list[Sequence[DetectedObject] | None] = []
    for part in wanted.get("include", []):
        thing, count = part["class"], part["count"]
        ones = found.get(thing, [])[:count]
        fault = "" if len(ones) == count else f"{len(ones)} of {count} {thing}"
        if not fault and "color" in part:
            seen = colours(ones, thing)
            if seen.count(part["color"]) < count:
                fault = f"{thing} is {', '.join(seen)}, not {part['color']}"
        if not fault and "position" in part:
            relation, other = part["position"]
            others = right[other]
            if others is None or not all(relation in relations(a, b) for a in ones for b in others):
                fault = f"{thing} is not {relation} the other"
        wrong += [fault] if fault else []
        right.append(None if fault else ones)
    for part in wanted.get("exclude", []):
        if len(found.get(part["class"], [])) >= part["count"]:
            wrong.append(f"{part['count']} or more {part['class']}")
    return wrong


def relations(first: DetectedObject, second: DetectedObject) -> set[str]:
    """Where the first object is, seen from the second: ``left of``, ``right of``, ``above``, ``below``; one
    of each axis at most, none where the centres are level within a tenth of both sizes."""
    boxes = np.array([first.box, second.box]).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - SLACK * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    sides = (("left of", x < -0.5), ("right of", x > 0.5), ("above", y < -0.5), ("below", y > 0.5))
    return {name for name, holds in sides if holds}


class _Teller:
    """Tells the colours of objects by a CLIP, on grey where their masks are known."""

    def __init__(self, clip: PictureTower):
        self.clip = clip
        self._texts: dict[str, np.ndarray] = {}

    def __call__(self, picture: Any, ones: Sequence[DetectedObject], thing: str) -> list[str]:
        if thing not in self._texts:
            asked = [text.format(colour=colour, thing=thing) for colour in COLOURS for text in ASKED]
            features = _unit(self.clip.texts(asked).float().cpu().numpy())
            self._texts[thing] = _unit(features.reshape(len(COLOURS), len(ASKED), -1).mean(1))
        crops = torch.stack([resized(_cut(picture, one), self.clip.size, crop=True) for one in ones])
        seen = _unit(self.clip.pictures(crops).float().cpu().numpy())
        return [COLOURS[number] for number in (seen @ self._texts[thing].T).argmax(1)]


def _cut(picture: Any, one: DetectedObject) -> Any:
    """The object's box of a picture, at least ``LEAST`` pixels wide and high."""
    left, top, right, bottom = (round(side) for side in one.box)
    if one.mask is not None:
        levels = np.where(one.mask[..., None], np.asarray(picture), GREY)
        picture = to_image(torch.from_numpy(levels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1))
    return picture.crop((left, top, max(right, left + LEAST), max(bottom, top + LEAST)))


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)
