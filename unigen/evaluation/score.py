"""All metrics that fit the answers to a data set, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unigen.evaluation import images, text
from unigen.evaluation.answers import Prediction
from unigen.evaluation.cases import IMAGE, TEXT, Case
from unigen.evaluation.features import Extractor, FeatureStore
from unigen.evaluation.results import Result, identity, metric
from unigen.evaluation.statistics import estimate
from unigen.evaluation.towers import PictureTower

EDIT = "edit"


@dataclass(frozen=True)
class Tools:
    """What metrics need besides the answers; without one its metrics are left out.

    Args:
        extractor: of features, for distances and similarities of pictures.
        clip: a CLIP or SigLIP with its texts, for ``clip_score``.
        bert: folder of a text encoder, for ``bertscore``; layer: which of its layers.
        wordnet: nltk's folder, for synonyms in METEOR.
        alexnet: file of its weights, for LPIPS.
        lang: language of the texts, for BLEU's tokenizer; default by their script.
        cache: of features.
    """

    extractor: Extractor | None = None
    clip: PictureTower | None = None
    bert: str | Path | None = None
    layer: int | None = None
    wordnet: str | Path | None = None
    alexnet: str | Path | None = None
    lang: str | None = None
    cache: FeatureStore | None = None
    device: str = "cpu"
    seed: int = 0


def score(cases: Sequence[Case], predictions: Sequence[Prediction], tools: Tools) -> dict[str, list[Result]]:
    """The metrics of each task that the cases have, tasks in the order of their names.

    A text that is asked for and missing counts as an empty one; a picture that is missing is left out, and
    ``structure`` says so. ``predictions`` are those of the cases, in their order.
    """
    assert [case.number for case in cases] == [found.number for found in predictions], "other cases' answers"
    scores = {}
    for task in sorted({case.task for case in cases}):
        pairs = [
            (case, found.pieces) for case, found in zip(cases, predictions, strict=True) if case.task == task
        ]
        scores[task] = [
            structure(pairs, seed=tools.seed),
            *_texts(pairs, tools),
            *_pictures(pairs, task == EDIT, tools),
        ]
    return scores


def as_json(scores: dict[str, list[Result]]) -> dict[str, list[dict[str, Any]]]:
    """What ``metrics.json`` holds of :func:`score`."""
    return {task: [result.as_json() for result in results] for task, results in scores.items()}


def _kinds(pieces: Sequence[Any]) -> tuple[str, ...]:
    return tuple(TEXT if isinstance(piece, str) else IMAGE for piece in pieces)


@metric("structure", "share of answers with the pieces of their record, in number and order")
def structure(pairs: Sequence[tuple[Case, Sequence[Any]]], *, seed: int = 0) -> Result:
    """Share of answers, each beside its case, whose texts and pictures come in the number and order of the
    record's."""
    right = np.array([_kinds(pieces) == case.outputs for case, pieces in pairs], float)
    return estimate(identity("structure", n=len(right)), right, seed=seed)


def _texts(pairs: Sequence[tuple[Case, Sequence[Any]]], tools: Tools) -> list[Result]:
    made, wanted = [], []
    for case, pieces in pairs:
        said = [piece for piece in pieces if isinstance(piece, str)]
        # a thought comes before what was asked for
        said = said[-len(case.texts) :] if case.texts else []
        made += said + [""] * (len(case.texts) - len(said))
        wanted += [list(right) for right in case.texts]
    if not wanted:
        return []
    seed = {"seed": tools.seed}
    results = [
        text.bleu(made, wanted, lang=tools.lang, **seed),
        text.chrf(made, wanted, **seed),
        *(text.rouge(made, wanted, kind=kind, **seed) for kind in ("1", "2", "L", "Lsum")),
        text.meteor(made, wanted, wordnet=tools.wordnet, **seed),
        text.exact_match(made, wanted, **seed),
        text.accuracy(made, wanted, **seed),
        text.anls(made, wanted, **seed),
        text.length_ratio(made, wanted, **seed),
        text.distinct(made, **seed),
    ]
    if tools.bert is not None:
        results.append(
            text.bertscore(made, wanted, model=tools.bert, layer=tools.layer, device=tools.device, **seed)
        )
    return results


def _pictures(pairs: Sequence[tuple[Case, Sequence[Any]]], edits: bool, tools: Tools) -> list[Result]:
    drawn, wanted, sources, prompts = [], [], [], []
    for case, pieces in pairs:
        right = [given for kind, given in zip(case.outputs, case.references) if kind == IMAGE]
        there = [piece for piece in pieces if not isinstance(piece, str)]
        for picture, reference in zip(there, right):
            drawn.append(picture)
            wanted.append(reference)
            sources.append(case.source)
            prompts.append(next((p for p in reversed(case.prompt) if isinstance(p, str)), ""))
    if not drawn:
        return []
    seed: dict[str, Any] = {"seed": tools.seed}
    results = []
    against = {"reference": wanted, **({"source": sources} if edits else {})}
    if edits:
        for to, others in against.items():
            results += [images.psnr(drawn, others, to=to, **seed), images.ssim(drawn, others, to=to, **seed)]
            if tools.alexnet is not None:
                results.append(
                    images.lpips(drawn, others, alexnet=tools.alexnet, to=to, device=tools.device, **seed)
                )
    if tools.extractor is not None:
        made = tools.extractor(drawn, tools.cache)
        real = {to: tools.extractor(others, tools.cache) for to, others in against.items()}
        results += [images.similarity(made, features, to=to, **seed) for to, features in real.items()]  # type: ignore[arg-type]
        given = real["reference"]
        results += [
            images.frechet_distance(made, given, **seed),
            images.frechet_distance_infinity(made, given, **seed),
            images.kid(made, given, **seed),
            images.cmmd(made, given, **seed),
        ]
        results += [
            images.neighbours(made, given, kind=kind, **seed)
            for kind in ("precision", "recall", "density", "coverage")
        ]
    if tools.clip is not None and all(prompts):
        results.append(images.clip_score(drawn, prompts, model=tools.clip, cache=tools.cache, **seed))
    return results
