"""Objects in pictures, found by a detector of transformers: boxes, scores and, where it draws them, masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unigen.evaluation.features import AS_IT_IS
from unigen.evaluation.results import CannotRun
from unigen.evaluation.results import libraries as versions
from unigen.evaluation.towers import load_detector, short_name, weights_digest
from unigen.sequence.images import open_image

MOST = 100  # pairs of a query and a class of a Mask2Former, as in its own evaluation
# What label files of detectors call otherwise than GenEval.
_SAME = {
    "computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "tv": "tvmonitor",
    "couch": "sofa", "motorcycle": "motorbike", "airplane": "aeroplane", "potted plant": "pottedplant",
    "dining table": "diningtable",
}  # fmt: skip


class DetectedObject(NamedTuple):
    """An object.

    Args:
        score: from 0 to 1.
        box: left, top, right and bottom in pixels.
        mask: which pixels are its own [height, width]; None where the detector does not say.
    """

    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


@dataclass
class Detector:
    """A detector: DETR and its kin, Mask2Former (with masks), OWL-ViT (asked in words).

    Args:
        name: of the model and its weights' digest.
        labels: number of each thing that it knows; None where it is asked in words.
        size: what its folder says of the size of pictures.
        mean, std: of the channels, over [0, 1].
    """

    model: nn.Module
    tokenizer: Any
    name: str
    labels: dict[str, int] | None
    size: dict[str, int]
    mean: Tensor
    std: Tensor
    device: str
    square: bool = False
    stride: int = 1

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> Detector:
        """From a folder. Raises CannotRun: it cannot be loaded, or is no detector."""
        model, tokenizer, said = load_detector(folder, device)
        labels = None
        if tokenizer is None:
            labels = {label: int(number) for number, label in model.config.id2label.items()}
            for ours, other in _SAME.items():
                if other in labels:
                    labels.setdefault(ours, labels[other])
        plain = said.get("do_normalize") is False
        mean, std = (
            [value] * 3 if plain or said.get(key) is None else said[key]
            for key, value in (("image_mean", 0.0), ("image_std", 1.0))
        )
        kind = model.config.model_type
        stride = said.get("size_divisor", said.get("size_divisibility", 32)) if kind == "mask2former" else 1
        as_channels = [torch.tensor(values, device=device)[:, None, None] for values in (mean, std)]
        name = f"{short_name(folder)}@{weights_digest(model)}"
        return cls(
            model, tokenizer, name, labels, said["size"], *as_channels, device, kind == "owlv2", stride or 1
        )

    @property
    def libraries(self) -> str:
        return versions("torch", "transformers", "pillow")

    def check(self, things: Iterable[str]) -> None:
        """Raises CannotRun: it does not know one of them."""
        unknown = sorted({thing for thing in things if self.labels is not None and thing not in self.labels})
        if unknown:
            raise CannotRun(
                f"the detector does not know {unknown[0]} ({len(unknown)} such things)",
                "give one that was trained on COCO, or an OWL-ViT, which is asked in words",
            )

    @torch.no_grad()
    def find(self, picture: Any, things: Sequence[str]) -> dict[str, list[DetectedObject]]:
        """Each of the things in a picture, those with the highest scores first.

        Raises:
            CannotRun: it does not know one of them.
            PictureError: the picture cannot be read.
        """
        self.check(things)
        picture = open_image(picture)
        pixels = self._prepared(picture)
        if self.tokenizer is not None:
            asked = self.tokenizer(
                [f"a photo of a {thing}" for thing in things], padding="max_length", truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt",
            ).to(self.device)  # fmt: skip
            output = self.model(
                pixel_values=pixels, **{key: asked[key] for key in ("input_ids", "attention_mask")}
            )
            numbers = {thing: number for number, thing in enumerate(things)}
        else:
            output = self.model(pixel_values=pixels)
            assert self.labels is not None
            numbers = {thing: self.labels[thing] for thing in things}
        if hasattr(output, "masks_queries_logits"):
            return _masked(output, picture.size, numbers)
        side = max(picture.size)
        return _boxed(output, (side, side) if self.square else picture.size, numbers, self.model.config)

    def _prepared(self, picture: Any) -> Tensor:
        """[1, 3, H, W], normalised."""
        if self.square:  # to a square, the picture in its corner, the rest grey
            side, whole = max(picture.size), picture
            picture = whole.crop((0, 0, side, side))
            picture.paste((128, 128, 128), (0, 0, side, side))
            picture.paste(whole, (0, 0))
        width, height = self._canvas(*picture.size)
        levels = AS_IT_IS.levels(picture, size=(width, height)).float().to(self.device) / 255
        return ((levels - self.mean) / self.std)[None]

    def _canvas(self, width: int, height: int) -> tuple[int, int]:
        """The size that it sees a picture in."""
        if "height" in self.size:
            return self.size["width"], self.size["height"]
        short, most = self.size.get("shortest_edge", 800), self.size.get("longest_edge", 1333)
        scale = min(short / min(width, height), most / max(width, height))
        wide, high = (round(side * scale) for side in (width, height))
        return -(-wide // self.stride) * self.stride, -(-high // self.stride) * self.stride


def _boxed(
    output: Any, size: tuple[int, int], numbers: dict[str, int], config: Any
) -> dict[str, list[DetectedObject]]:
    """Of logits [1, Q, C] and boxes [1, Q, 4], centre and size as shares of the picture. A class more than
    there are labels is that of nothing: classes then exclude each other, and a query is what is likeliest."""
    logits, boxes = output.logits[0].float(), output.pred_boxes[0].float().cpu()
    words = config.model_type.startswith("owl")
    exclusive = logits.shape[-1] == len(config.id2label) + 1 and not words
    scores = logits.softmax(-1)[:, :-1] if exclusive else logits.sigmoid()
    if exclusive or words:
        likeliest = logits[:, : scores.shape[-1]].argmax(-1, keepdim=True)
        scores = torch.zeros_like(scores).scatter(-1, likeliest, scores.gather(-1, likeliest))
    scores = scores.cpu()
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    corners = torch.cat([centre - half, centre + half], 1) * torch.tensor([*size, *size])
    found: dict[str, list[DetectedObject]] = {}
    for thing, number in numbers.items():
        column = scores[:, number]
        order = column.argsort(descending=True, stable=True)
        found[thing] = [
            DetectedObject(float(column[q]), tuple(corners[q].tolist()))
            for q in order.tolist()
            if column[q] > 0  # type: ignore[arg-type]
        ]
    return found


def _masked(output: Any, size: tuple[int, int], numbers: dict[str, int]) -> dict[str, list[DetectedObject]]:
    """Of classes [1, Q, C + 1] and masks [1, Q, h, w]: the score is that of the class times the mean of the
    mask within itself (Cheng et al. 2022, as evaluated on COCO's instances)."""
    classes = output.class_queries_logits[0].float().softmax(-1)[:, :-1].cpu()
    masks = nn.functional.interpolate(
        output.masks_queries_logits.float(), size=(size[1], size[0]), mode="bilinear", align_corners=False
    )[0].cpu()
    flat = classes.flatten()
    best = set(flat.topk(min(MOST, len(flat))).indices.tolist())
    found: dict[str, list[DetectedObject]] = {thing: [] for thing in numbers}
    for thing, number in numbers.items():
        for query in range(len(classes)):
            mask = masks[query] > 0
            if query * classes.shape[1] + number not in best or not mask.any():
                continue
            score = float(classes[query, number]) * float(masks[query].sigmoid()[mask].mean())
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            found[thing].append(DetectedObject(score, box, mask.numpy()))
        found[thing].sort(key=lambda one: -one.score)
    return found
