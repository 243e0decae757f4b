"""How far one picture is from another, pixel by pixel and as people see it: PSNR, SSIM, LPIPS; and of edits:
did what should change, and did what should stay?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigen.evaluation.features import AS_IT_IS, Picture
from unigen.evaluation.results import (
    CannotRun,
    Result,
    Unfit,
    digest_of,
    digest_of_numbers,
    identity,
    libraries,
    metric,
    same_length,
)
from unigen.evaluation.statistics import estimate
from unigen.evaluation.towers import weights_digest
from unigen.printing import first_line
from unigen.sequence.images import open_image

PSNR_CAP = 100.0  # decibels: equal pictures would have infinitely many
WINDOW, SIGMA = 11, 1.5
CHANGES = 0.1  # of the range of levels: from there on the reference of an edit changes a pixel
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _by_pairs(
    kind: str,
    pictures: Sequence[Picture],
    others: Sequence[Picture],
    measure: Callable[[Any, Any], float],
    *variant: str,
    to: str,
    seed: int,
    higher_is_better: bool = True,
) -> Result:
    """The mean of what ``measure`` says of each opened picture and its other, at the picture's size."""
    n = same_length(pictures, others)
    values, digests, changed = [], [], 0
    for one, two in zip(pictures, others):
        picture, other = open_image(one), open_image(two)
        digests.append(digest_of_numbers(np.asarray(other)))
        changed += other.size != picture.size
        values.append(measure(picture, AS_IT_IS.resize(other, size=picture.size)))
    notes = (f"{changed} of {n} were of another size and were resized to their picture's",) if changed else ()
    return estimate(
        identity(kind, *variant, f"to={to}", n=n, lib=libraries("pillow")),
        np.array(values),
        seed=seed,
        # an edit should be near its source and yet another picture: neither end is good
        higher_is_better=None if to == "source" else higher_is_better,
        notes=notes,
        data=digest_of(digests),
    )


@metric("psnr", "10 log10(255^2 / mean squared error), mean of the pictures, decibels")
def psnr(
    pictures: Sequence[Picture], others: Sequence[Picture], *, to: str = "reference", seed: int = 0
) -> Result:
    """Peak signal-to-noise ratio of each picture to its other, over RGB levels; at most 100 dB. ``to`` says
    in the name what the others are (``reference``, ``source``)."""

    def measure(picture: Any, other: Any) -> float:
        error = float(((np.asarray(picture, np.float64) - np.asarray(other, np.float64)) ** 2).mean())
        return min(PSNR_CAP, 10 * float(np.log10(255**2 / error))) if error else PSNR_CAP

    return _by_pairs("psnr", pictures, others, measure, "rgb", f"cap={PSNR_CAP:g}", to=to, seed=seed)


@metric("ssim", "Wang et al. 2004, equations 13-17: luminance, 11 x 11 Gaussian window, K 0.01 and 0.03")
def ssim(
    pictures: Sequence[Picture], others: Sequence[Picture], *, to: str = "reference", seed: int = 0
) -> Result:
    """Structural similarity of each picture to its other, -1 to 1: the mean over all windows that lie
    inside."""

    def measure(picture: Any, other: Any) -> float:
        if min(picture.size) < WINDOW:
            raise Unfit(f"a picture is smaller than the window of {WINDOW}", "leave small pictures out")
        x, y = (torch.tensor(np.asarray(p.convert("L"), np.float64)) for p in (picture, other))
        return structural_similarity(x, y)

    return _by_pairs("ssim", pictures, others, measure, "luminance", f"window={WINDOW}", to=to, seed=seed)


def structural_similarity(x: Tensor, y: Tensor) -> float:
    """Mean SSIM of two pictures of gray levels [H, W], 0 to 255, float64."""
    at = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    row = torch.exp(-(at**2) / (2 * SIGMA**2))
    row = row / row.sum()
    stack = torch.stack([x, y, x * x, y * y, x * y])[:, None]
    stack = F.conv2d(F.conv2d(stack, row.view(1, 1, 1, -1)), row.view(1, 1, -1, 1))[:, 0]
    mean_x, mean_y, square_x, square_y, product = stack
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variance_x, variance_y, covariance = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean())


@metric("lpips", "Zhang et al. 2018, equation 1, version 0.1 with AlexNet")
def lpips(
    pictures: Sequence[Picture],
    others: Sequence[Picture],
    *,
    alexnet: str | Path,
    weights: str | Path | None = None,
    to: str = "reference",
    device: str = "cpu",
    seed: int = 0,
) -> Result:
    """Learned perceptual distance of each picture to its other, 0 for equal ones; lower is nearer.

    Args:
        alexnet: ``alexnet-owt-7be5be79.pth``, the ImageNet weights of PyTorch.
        weights: ``alex.pth`` of the lpips package, version 0.1; default: that of the package where installed.
    """
    network = Lpips.load(alexnet, weights or _installed_weights()).to(device)

    def measure(picture: Any, other: Any) -> float:
        if min(picture.size) < 64:
            raise Unfit("a picture has a side below 64 pixels, too few for AlexNet", "leave it out")
        x, y = (AS_IT_IS(p, size=p.size).to(device)[None] for p in (picture, other))
        return float(network(x, y)[0])

    variant = (f"alexnet@{weights_digest(network)}", "v0.1")
    return _by_pairs("lpips", pictures, others, measure, *variant, to=to, seed=seed, higher_is_better=False)


def _installed_weights() -> Path:
    """``alex.pth`` within the lpips package, which is not imported: it would bring torchvision."""
    spec = find_spec("lpips")
    if spec is None or spec.origin is None:
        raise CannotRun("alex.pth is not given and lpips is not installed", "pip install --no-deps lpips")
    return Path(spec.origin).parent / "weights" / "v0.1" / "alex.pth"


# AlexNet's convolutions: number within torchvision's ``features``; inputs, outputs, kernel, stride, padding;
# whether the input is pooled first.
_ALEXNET = (
    (0, (3, 64, 11, 4, 2), False), (3, (64, 192, 5, 1, 2), True), (6, (192, 384, 3, 1, 1), True),
    (8, (384, 256, 3, 1, 1), False), (10, (256, 256, 3, 1, 1), False),
)  # fmt: skip


class Lpips(nn.Module):
    """Distances [B] of pictures [B, 3, H, W] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(*shape) for _, shape, _ in _ALEXNET)
        self.weights = nn.ParameterList(torch.zeros(shape[1]) for _, shape, _ in _ALEXNET)

    @classmethod
    def load(cls, alexnet: str | Path, weights: str | Path) -> Lpips:
        """From the two files. Raises CannotRun: one is missing or another file."""
        network = cls()
        fix = "place alexnet-owt-7be5be79.pth of PyTorch's models and alex.pth of the lpips package"
        try:
            trunk = torch.load(alexnet, map_location="cpu", weights_only=True)
            heads = torch.load(weights, map_location="cpu", weights_only=True)
            for place, ((number, _, _), convolution) in enumerate(zip(_ALEXNET, network.convolutions)):
                own = {name: trunk[f"features.{number}.{name}"] for name in ("weight", "bias")}
                convolution.load_state_dict(own)
                network.weights[place].data.copy_(heads[f"lin{place}.model.1.weight"].flatten())
        except Exception as error:  # the unpickler raises what it likes
            raise CannotRun(f"LPIPS' weights cannot be loaded ({first_line(error)})", fix) from None
        return network.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = (torch.tensor(values, device=x.device)[:, None, None] for values in (_SHIFT, _SCALE))
        both, distance = (torch.cat([x, y]) - shift) / scale, torch.zeros(len(x), device=x.device)
        for (_, _, pooled), convolution, weight in zip(_ALEXNET, self.convolutions, self.weights):
            both = F.relu(convolution(F.max_pool2d(both, 3, stride=2) if pooled else both))
            unit = both / (both.norm(dim=1, keepdim=True) + 1e-10)
            difference = (unit[: len(x)] - unit[len(x) :]) ** 2
            distance = distance + (difference * weight[:, None, None]).sum(1).mean((1, 2))
        return distance


# ---- edits


@metric("edit_changed", "share of the difference from source to reference that was made, where they differ")
def edit_changed(
    pictures: Sequence[Picture], sources: Sequence[Picture], references: Sequence[Picture], *, seed: int = 0
) -> Result:
    """Did what should change? Over the pixels that the reference changes: ``1 - |picture - reference| /
    |source - reference|``, sums of absolute differences, 1 as in the reference, 0 as far from it as the
    source, at least -1. Means of the edits that change something."""

    def measure(picture: Any, source: Any, reference: Any) -> float:
        return max(-1.0, 1 - float(np.abs(picture - reference).sum() / np.abs(source - reference).sum()))

    return _by_region("edit_changed", pictures, sources, references, measure, inside=True, seed=seed)


@metric("edit_stayed", "1 - mean absolute difference to the source, where source and reference agree")
def edit_stayed(
    pictures: Sequence[Picture], sources: Sequence[Picture], references: Sequence[Picture], *, seed: int = 0
) -> Result:
    """Did what should stay? Over the pixels that the reference leaves as they are: 1 minus the mean absolute
    difference of picture and source, levels from 0 to 1. Means of the edits that leave something."""

    def measure(picture: Any, source: Any, reference: Any) -> float:
        return 1 - float(np.abs(picture - source).mean())

    return _by_region("edit_stayed", pictures, sources, references, measure, inside=False, seed=seed)


def _by_region(
    kind: str, pictures: Any, sources: Any, references: Any, measure: Any, *, inside: bool, seed: int
) -> Result:
    """The mean of what ``measure`` says of the pixels [k, 3] that the reference changes (``inside``), or
    leaves."""
    n = same_length(pictures, sources, references)
    parts, digests = np.zeros((n, 2)), []
    for number, three in enumerate(zip(pictures, sources, references)):
        size = open_image(three[0]).size
        picture, source, reference = (
            np.asarray(AS_IT_IS.resize(open_image(one), size=size), np.float64) / 255 for one in three
        )
        digests += [digest_of_numbers(source), digest_of_numbers(reference)]
        there = (np.abs(reference - source).mean(-1) > CHANGES) == inside
        if there.any():
            parts[number] = measure(picture[there], source[there], reference[there]), 1
    if not parts[:, 1].any():
        why = "no reference changes a pixel" if inside else "no reference leaves a pixel"
        raise Unfit(why, "give edits that do")
    counted = int(parts[:, 1].sum())
    notes = () if counted == n else (f"{counted} of {n} edits count",)
    name = identity(kind, "rgb", f"threshold={CHANGES:g}", n=n)
    samples = np.where(parts[:, 1] > 0, parts[:, 0], np.nan)
    return estimate(name, parts, "ratio", seed=seed, samples=samples, data=digest_of(digests), notes=notes)
