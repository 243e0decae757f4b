"""Metrics of pictures from features: distances of distributions, similarity to texts, sources and references.

Distances take :class:`Features` of what was made and of references, both of one extractor, whose name becomes
part of the metric's. Their intervals hold the references fixed: they say how the number would move with other
pictures of the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from unigen.evaluation.distances import (
    CMMD_SIGMA,
    Cmmd,
    Frechet,
    Kid,
    Neighbours,
    cosines,
    frechet_at_infinity,
)
from unigen.evaluation.features import Features, FeatureStore, Picture, tower_extractor
from unigen.evaluation.results import (
    CannotRun,
    Result,
    Unfit,
    digest_of,
    digest_of_numbers,
    identity,
    metric,
    same_length,
)
from unigen.evaluation.statistics import HALVES, estimate, estimate_by
from unigen.evaluation.towers import PictureTower, cut_note

FEW = 2000  # below so many pictures a Frechet distance says more of their number than of the pictures


def _distance(
    kind: str,
    made: Features,
    references: Features,
    of: Callable[[np.ndarray], Callable[[np.ndarray], float]],
    *variant: str,
    **more: Any,
) -> Result:
    """The result of ``of(references)(made)``; ``variant`` stands in its name, ``more`` goes to
    :func:`estimate_by`. Raises CannotRun: the features cannot be held against each other."""
    for features in (made, references):
        if len(features) < 2:
            raise Unfit("a single picture has no distribution", "give at least two")
    if (made.identity, made.libraries) != (references.identity, references.libraries):
        raise CannotRun(
            f"the features differ in kind: {made.identity} ({made.libraries}) and {references.identity}"
            f" ({references.libraries})",
            "take the features of both sets with one extractor",
        )
    name = identity(
        kind, made.identity, *variant, n=len(made), references=len(references), lib=made.libraries
    )
    data = digest_of_numbers(references.values)
    return estimate_by(name, made.values, of(references.values), data=data, **more)


@metric("fd", "Dowson & Landau 1982; Heusel et al. 2017, equation 6")
def frechet_distance(made: Features, references: Features, *, draws: int = HALVES, seed: int = 0) -> Result:
    """Frechet distance, lower is better: FID where the features are Inception's. ``draws``: halves for the
    interval; 0 for none."""
    fewest = min(len(made), len(references))
    note = (
        f"biased upwards: {fewest} pictures are fewer than {FEW}. Compare equal numbers only, and read"
        " fd_infinity or kid beside it"
    )
    return _distance(
        "fd", made, references, Frechet, draws=draws, seed=seed, bounds=(0, np.inf), higher_is_better=False,
        notes=(note,) if fewest < FEW else (),
    )  # fmt: skip


@metric("fd_infinity", "Chong & Forsyth 2020, section 4, with both sets subsampled")
def frechet_distance_infinity(
    made: Features, references: Features, *, draws: int = 10, seed: int = 0
) -> Result:
    """The Frechet distance extrapolated to infinitely many pictures, lower is better; it may be below 0."""
    fewest, dimensions = min(len(made), len(references)), made.values.shape[1]

    def at_infinity(of_references: np.ndarray) -> Callable[[np.ndarray], float]:
        if fewest < 100:
            raise Unfit(f"{fewest} pictures are too few to extrapolate from", "give 100 or more")
        return lambda x: frechet_at_infinity(x, of_references, seed=seed)

    notes = (f"rough: {fewest} pictures are fewer than the {dimensions} dimensions",)
    result = _distance(
        "fd_infinity", made, references, at_infinity, "points=15", f"seed={seed}", draws=draws, seed=seed,
        least=60, higher_is_better=False, notes=notes if fewest <= dimensions else (),
    )  # fmt: skip
    # Hundreds of exchanges take minutes: checkpoints are compared by fd, whose bias is the same for both.
    return replace(result, rows=None, function=None)


@metric("kid", "Bińkowski et al. 2018, section 4.1: unbiased squared MMD, kernel (x y / d + 1)^3")
def kid(made: Features, references: Features, *, draws: int = HALVES, seed: int = 0) -> Result:
    """Kernel Inception distance over all pictures at once, which has less spread than the mean over subsets
    that most papers give, and the same expectation; not multiplied by 1000. Around 0, also below, where both
    sets are alike; lower is better."""
    known = {"draws": draws, "seed": seed, "higher_is_better": False}
    return _distance("kid", made, references, Kid, "unbiased", "all-pairs", **known)


@metric("cmmd", "Jayasumana et al. 2024, section 4: sigma 10, times 1000")
def cmmd(made: Features, references: Features, *, draws: int = HALVES, seed: int = 0) -> Result:
    """CLIP maximum mean discrepancy, lower is better. Published numbers have the features of
    clip-vit-large-patch14-336."""
    known = {"draws": draws, "seed": seed, "bounds": (0.0, np.inf), "higher_is_better": False}
    return _distance("cmmd", made, references, Cmmd, f"sigma={CMMD_SIGMA:g}", **known)


@metric("neighbours", "Kynkäänniemi et al. 2019, equations 1-2; Naeem et al. 2020, equations 4 and 6")
def neighbours(
    made: Features,
    references: Features,
    *,
    kind: Literal["precision", "recall", "density", "coverage"],
    k: int | None = None,
    draws: int = HALVES,
    seed: int = 0,
) -> Result:
    """Precision or density (are the pictures like the references?), recall or coverage (are all references
    met?), higher is better. ``k``: neighbours; default 3 for the first pair of the literature (precision,
    recall), 5 for the second."""
    k = k or (3 if kind in ("precision", "recall") else 5)
    fewest, bounds = min(len(made), len(references)), (0, np.inf if kind == "density" else 1)
    try:
        if fewest <= k:
            raise Unfit(f"{fewest} pictures have less than {k} neighbours each", f"give more than {k}")
        return _distance(
            kind, made, references, lambda y: getattr(Neighbours(y, k), kind), f"k={k}", draws=draws,
            seed=seed, least=k + 1, bounds=bounds,
        )  # fmt: skip
    except CannotRun as error:  # under its own name
        return Result.without(kind, error)


# ---- picture by picture


@metric("similarity", "cosine of the features of each picture and its partner, mean of the pictures")
def similarity(
    made: Features, others: Features, *, to: Literal["reference", "source"] = "reference", seed: int = 0
) -> Result:
    """Cosine similarity of each picture to its reference or, of an edit, to its source: with DINOv2 of
    structure, with CLIP of meaning. -1 to 1."""
    same_length(made.values, others.values)
    if (made.identity, made.libraries) != (others.identity, others.libraries):
        raise CannotRun("the features differ in kind", "use one extractor")
    name = identity("similarity", made.identity, f"to={to}", n=len(made), lib=made.libraries)
    data = digest_of_numbers(others.values)
    better = None if to == "source" else True  # an edit is near its source and yet another picture
    values = cosines(made.values, others.values)
    return estimate(name, values, seed=seed, data=data, higher_is_better=better)


@metric("clip_score", "Hessel et al. 2021, equation 1, with the weight 100: 100 max(cos, 0)")
def clip_score(
    pictures: Sequence[Picture],
    texts: Sequence[str],
    *,
    model: str | PictureTower,
    cache: FeatureStore | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Result:
    """How well each picture shows its text, 0 to 100, mean of the pictures: cosine of the two embeddings of a
    CLIP or SigLIP, ``model`` its folder. Pictures are scaled by their short side and their centre is cut
    out."""
    same_length(pictures, texts)
    values, seen, notes = _clip_scores(model, device, pictures, [[text] for text in texts], cache)
    name = identity("clip_score", seen.identity, "x100", n=len(values), lib=seen.libraries)
    return estimate(name, values, seed=seed, data=digest_of(list(texts)), notes=notes)


@metric("around_score", "mean over the texts next to a picture of 100 max(cos, 0), as in Hessel et al. 2021")
def around_score(
    pictures: Sequence[Picture],
    around: Sequence[Sequence[str]],
    *,
    model: str | PictureTower,
    cache: FeatureStore | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Result:
    """How well each drawn segment shows the texts just before and after it, 0 to 100: the mean of its CLIP
    scores with them (``around``: one or two texts; a picture without any is left out)."""
    chosen = [(picture, list(texts)) for picture, texts in zip(pictures, around, strict=True) if texts]
    if not chosen:
        raise Unfit("no picture has a text next to it", "ask for texts and pictures")
    pictures, texts = zip(*chosen)
    values, seen, notes = _clip_scores(model, device, pictures, texts, cache)
    name = identity("around_score", seen.identity, "x100", n=len(values), lib=seen.libraries)
    return estimate(name, values, seed=seed, data=digest_of(list(texts)), notes=notes)


def _clip_scores(
    model: str | PictureTower,
    device: str,
    pictures: Sequence[Picture],
    texts: Sequence[Sequence[str]],
    cache: FeatureStore | None,
) -> tuple[np.ndarray, Features, tuple[str, ...]]:
    """For each picture the mean of 100 max(cos, 0) with its texts [n]; the features, and notes."""
    tower = _tower(model, device)
    seen = tower_extractor(tower, crop=True)(pictures, cache)
    said, notes = _text_features(tower, [text for some in texts for text in some])
    owner = np.repeat(np.arange(len(texts)), list(map(len, texts)))
    scores = 100 * np.maximum(cosines(seen.values[owner], said), 0)
    return np.bincount(owner, scores) / np.bincount(owner), seen, notes


@metric("clip_direction", "Gal et al. 2022, equation 2, as a similarity; Brooks et al. 2023, section 4.1")
def clip_direction(
    pictures: Sequence[Picture],
    sources: Sequence[Picture],
    texts: Sequence[str],
    source_texts: Sequence[str],
    *,
    model: str | PictureTower,
    cache: FeatureStore | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Result:
    """Does an edit change the picture as the captions change? Cosine of the two changes in the space of a
    CLIP: from source to edited picture, and from the source's caption to that of the edit. -1 to 1; 0 where
    nothing changed."""
    same_length(pictures, sources, texts, source_texts)
    tower = _tower(model, device)
    extractor = tower_extractor(tower, crop=True)
    after, before = extractor(pictures, cache), extractor(sources, cache)
    said_after, notes = _text_features(tower, texts)
    said_before, more = _text_features(tower, source_texts)
    seen_change = _unit(after.values) - _unit(before.values)
    values = cosines(seen_change, _unit(said_after) - _unit(said_before))
    name = identity("clip_direction", after.identity, n=len(values), lib=after.libraries)
    data = digest_of(list(texts), list(source_texts), digest_of_numbers(before.values))
    return estimate(name, values, seed=seed, data=data, notes=tuple(dict.fromkeys((*notes, *more))))


def _tower(model: str | PictureTower, device: str) -> PictureTower:
    if isinstance(model, PictureTower):
        if model.tokenizer is None:
            raise CannotRun(f"{model.name} was loaded without its texts", "load it with texts=True")
        return model
    return PictureTower.load(model, device, texts=True)


def _text_features(tower: PictureTower, texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Features [n, d], and a note on texts that were cut."""
    before = tower.truncated
    parts = [tower.texts(texts[start : start + 64]) for start in range(0, len(texts), 64)]
    features = np.concatenate([part.float().cpu().numpy() for part in parts])
    return features, cut_note(tower.truncated - before)


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
