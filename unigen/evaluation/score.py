"""All metrics that fit the answers to a data set, task by task: one table of metrics, one loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unigen.bars import each
from unigen.evaluation import images, objects, perceptual, text, views
from unigen.evaluation.answers import Prediction
from unigen.evaluation.cases import IMAGE, TEXT, Case
from unigen.evaluation.material import Material, Opinion, Tools, paired
from unigen.evaluation.results import CannotRun, Result, Unfit, digest_of, identity, metric
from unigen.evaluation.statistics import Comparison, compare, estimate
from unigen.messages import in_language
from unigen.plugins import Registry

OF_THE_DATA = ("fd_real", "kid_real")  # metrics that no checkpoint changes
Measure = Callable[[Material], Result]
Function = Callable[..., Result]  # a metric as its users call it
Of = Literal["answers", "texts", "pictures", "drawings", "edits", "objects"]

# What a metric may need, by its name in Tools or in Material.said: why there is none, and the fix.
NEEDS = {
    "extractor": ("no network gives features of pictures", "--features FOLDER"),
    "real": ("no other real pictures are given", "--real FOLDER, pictures that are none of the references"),
    "clip": ("no CLIP is given", "--clip FOLDER, of a CLIP or SigLIP"),
    "bert": ("no text encoder is given", "--bert FOLDER, of a text encoder"),
    "alexnet": ("no weights of AlexNet are given", "--alexnet FILE"),
    "detector": ("no object detector is given", "--detector FOLDER, of a DETR, Mask2Former or OWL-ViT"),
    "likelihood": (
        "no checkpoint was asked how likely the references are", "give a checkpoint, not answers alone",
    ),
    "views": ("the checkpoint was not asked what it sees", "--views, with a checkpoint"),
    "judge": ("no judge is given", "--judge_url http://127.0.0.1:8000/v1"),
}  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A row of :data:`METRICS`.

    Args:
        run: gives the result.
        of: which tasks it fits: those with ``texts`` or ``pictures`` to make, the latter without edits
            (``drawings``) or these alone, those that say which ``objects`` a picture must hold, or all.
        needs: a key of :data:`NEEDS`.
    """

    run: Measure
    of: Of
    needs: str = ""

    def fits(self, of: Material) -> bool:
        if self.of == "texts":
            return any(case.texts for case in of.cases)
        if self.of == "objects":
            return any(case.wanted is not None for case in of.cases)
        if self.of in ("drawings", "edits"):
            return of.draws and of.edits == (self.of == "edits")
        return self.of == "answers" or of.draws


@metric("structure", "share of answers with the pieces of their record, in number and order")
def structure(cases: Sequence[Case], answers: Sequence[Sequence[Any]], *, seed: int = 0) -> Result:
    """Share of answers whose texts and pictures come in the number and order of the record's."""
    kinds = [tuple(TEXT if isinstance(piece, str) else IMAGE for piece in pieces) for pieces in answers]
    right = np.array([found == case.outputs for case, found in zip(cases, kinds)], float)
    return estimate(identity("structure", n=len(right)), right, seed=seed)


@metric("stopped", "share of answers that the model ended itself")
def stopped(predictions: Sequence[Prediction], *, seed: int = 0) -> Result:
    """Share of answers that ended by themselves: no text reached ``max_new_tokens``, and where the model
    chose the pieces it closed the answer."""
    if any(one.stopped is None for one in predictions):
        raise Unfit("the given answers do not say whether they ended by themselves", "give a checkpoint")
    ended = np.array([one.stopped for one in predictions], float)
    return estimate(identity("stopped", n=len(ended)), ended, seed=seed)


_OTHERS = ("reference", "source")
_CLIP, _ALEX = ("model=clip", "cache"), ("alexnet", "device")


def _from(tools: Tools, *names: str) -> dict[str, Any]:
    """Keywords from fields of the tools, ``keyword=field`` where they are called otherwise; and the seed."""
    named = (one.rpartition("=") for one in ("seed", *names))
    return {keyword or field: getattr(tools, field) for keyword, _, field in named}


def _of_texts(function: Function, *tools: str, **options: Any) -> Measure:
    return lambda m: function(*m.texts, **options, **_from(m.tools, *tools))


def _of_drawn(function: Function, *columns: str, tools: Sequence[str] = (), **options: Any) -> Measure:
    return lambda m: function(*map(m.column, columns), **options, **_from(m.tools, *tools))


def _of_features(function: Function, **more: Any) -> Measure:
    to = more.get("to", "reference")
    return lambda m: function(m.features("picture"), m.features(to), **more, seed=m.tools.seed)


def _real_to_real(kind: str, function: Function) -> Measure:
    """The distance of as many other real pictures as were drawn: what a perfect model would reach."""

    def run(m: Material) -> Result:
        assert m.tools.extractor is not None
        count = min(len(m.drawn), len(m.tools.real))
        real = m.tools.extractor(list(m.tools.real)[:count], m.tools.cache)
        result = function(real, m.features("reference"), seed=m.tools.seed)
        return replace(result, name=kind + result.name[len(result.kind) :])

    return run


def _clip_score(m: Material) -> Result:
    if not all(m.column("prompt")):
        raise Unfit("a prompt has no text", "ask with texts")
    return images.clip_score(m.column("picture"), m.column("prompt"), **_from(m.tools, *_CLIP))


def _geneval(m: Material) -> Result:
    drawn = [(case, [one.picture for one in m.drawn if one.case is case]) for case in m.cases]
    there = [(pictures, case.wanted) for case, pictures in drawn if pictures and case.wanted is not None]
    pictures, wanted = [some for some, _ in there], [held for _, held in there]
    return objects.geneval(pictures, wanted, **_from(m.tools, "detector", "clip", "scores"))


METRICS: Registry[list[Metric]] = Registry(
    {
    "structure": [
        Metric(lambda m: structure(m.cases, [p.pieces for p in m.predictions], seed=m.tools.seed), "answers")
    ],
    "stopped": [Metric(lambda m: stopped(m.predictions, seed=m.tools.seed), "answers")],
    "bleu": [Metric(_of_texts(text.bleu, "lang"), "texts")],
    "chrf2": [Metric(_of_texts(text.chrf), "texts")],
    **{
        f"rouge{kind}": [Metric(_of_texts(text.rouge, kind=kind), "texts")]
        for kind in ("1", "2", "L", "Lsum")
    },
    "meteor": [Metric(_of_texts(text.meteor, "wordnet"), "texts")],
    "exact_match": [Metric(_of_texts(text.exact_match), "texts")],
    "accuracy": [Metric(_of_texts(text.accuracy), "texts")],
    "anls": [Metric(_of_texts(text.anls), "texts")],
    "length_ratio": [Metric(_of_texts(text.length_ratio), "texts")],
    "distinct2": [Metric(lambda m: text.distinct(m.texts[0], seed=m.tools.seed), "texts")],
    "bertscore": [Metric(_of_texts(text.bertscore, "model=bert", "layer", "device"), "texts", "bert")],
    "perplexity": [Metric(views.perplexity, "texts", "likelihood")],
    "psnr": [Metric(_of_drawn(perceptual.psnr, "picture", to, to=to), "edits") for to in _OTHERS],
    "ssim": [Metric(_of_drawn(perceptual.ssim, "picture", to, to=to), "edits") for to in _OTHERS],
    "lpips": [
        Metric(_of_drawn(perceptual.lpips, "picture", to, tools=_ALEX, to=to), "edits", "alexnet")
        for to in _OTHERS
    ],
    "edit_changed": [
        Metric(_of_drawn(perceptual.edit_changed, "picture", "source", "reference"), "edits")
    ],
    "edit_stayed": [Metric(_of_drawn(perceptual.edit_stayed, "picture", "source", "reference"), "edits")],
    "similarity": [
        Metric(_of_features(images.similarity), "pictures", "extractor"),
        Metric(_of_features(images.similarity, to="source"), "edits", "extractor"),
    ],
    "fd": [Metric(_of_features(images.frechet_distance), "pictures", "extractor")],
    "fd_real": [Metric(_real_to_real("fd_real", images.frechet_distance), "drawings", "real")],
    "fd_infinity": [Metric(_of_features(images.frechet_distance_infinity), "pictures", "extractor")],
    "kid": [Metric(_of_features(images.kid), "pictures", "extractor")],
    "kid_real": [Metric(_real_to_real("kid_real", images.kid), "drawings", "real")],
    "cmmd": [Metric(_of_features(images.cmmd), "pictures", "extractor")],
    **{
        kind: [Metric(_of_features(images.neighbours, kind=kind), "pictures", "extractor")]
        for kind in ("precision", "recall", "density", "coverage")
    },
    "clip_score": [Metric(_clip_score, "pictures", "clip")],
    "around_score": [
        Metric(_of_drawn(images.around_score, "picture", "around", tools=_CLIP), "pictures", "clip")
    ],
    "geneval": [Metric(_geneval, "objects", "detector")],
    "verify": [Metric(views.verify, "pictures", "views")],
    "verify_margin": [Metric(views.verify_margin, "pictures", "views")],
    "cycle_rougeL": [Metric(views.cycle_rouge, "pictures", "views")],
    "cycle_chrf2": [Metric(views.cycle_chrf, "pictures", "views")],
    "described_as_real": [Metric(views.described_as_real, "pictures", "views")],
    "judge": [Metric(views.judge, "pictures", "judge")],
    }
)  # fmt: skip
"""The metrics by their kinds, in the order in which they are shown."""


def good_end(kind: str) -> bool | None:
    """Is a metric of answers better the greater it is? None: that depends (closeness to an edit's source, a
    ratio of lengths), or only the plugin knows that brings it."""
    if kind not in METRICS.own or kind == "length_ratio":
        return None
    return kind not in ("fd", "fd_infinity", "kid", "cmmd")


def score(
    cases: Sequence[Case],
    predictions: Sequence[Prediction],
    tools: Tools,
    said: Mapping[str, Mapping[int, Opinion]] | None = None,
    kinds: Collection[str] = (),
    more: Callable[[Material], list[Result]] = lambda material: [],
) -> dict[str, list[Result]]:
    """The metrics of each task that the cases have, tasks in the order of their names.

    A text that is asked for and missing counts as an empty one; a picture that is missing is left out, and
    ``structure`` says so. A metric that lacks what it needs has no value.

    Args:
        predictions: those of the cases, in their order.
        said: what models said of the cases (:class:`Material`).
        kinds: of the metrics; default all that fit.
        more: further results of a task.
    """
    assert [case.number for case in cases] == [found.number for found in predictions], "other cases' answers"
    scores = {}
    for task in sorted({case.task for case in cases}):
        those = [(case, found) for case, found in zip(cases, predictions) if case.task == task]
        material = Material(task, [case for case, _ in those], [one for _, one in those], tools, said or {})
        fitting = [
            (kind, one)
            for kind, ones in METRICS.items()
            for one in ones
            if one.fits(material) and (not kinds or kind in kinds)
        ]
        counted = each(f"measuring {in_language(task)}", fitting, "metrics")
        scores[task] = [_measure(kind, one, material) for kind, one in counted] + more(material)
    return scores


def _measure(kind: str, one: Metric, material: Material) -> Result:
    """The metric, or why there is none, always under its own kind."""
    if one.needs and not (getattr(material.tools, one.needs, None) or material.said.get(one.needs)):
        reason, fix = NEEDS[one.needs]
        return Result(kind, None, reason=reason, fix=fix, lacks=one.needs)
    pictures = one.of not in ("answers", "texts")
    if pictures and not material.drawn:
        return Result(kind, None, reason="no picture was drawn", fix="look at the answers", lacks="samples")
    try:
        result = one.run(material)
    except CannotRun as error:
        return Result.without(kind, error)
    if result.value is None:
        return replace(result, name=kind)
    if pictures and one.needs not in ("views", "judge"):  # these say themselves which they measured
        # equal prompts or references do not make a pair where a picture is missing
        return replace(result, data=digest_of(result.data, paired(material.drawn)["data"]))
    return result


@dataclass(frozen=True)
class Answered:
    """What one checkpoint answered, and how well.

    Args:
        name: of the checkpoint, for people.
        about: what the answers depend on.
        predictions: of all cases, in their order.
        scores: metrics by task.
        step: after which a run saved the checkpoint, which lies in the run's folder.
    """

    name: str
    about: dict[str, Any]
    predictions: list[Prediction]
    scores: dict[str, list[Result]]
    step: int | None = None

    @property
    def run(self) -> str:
        """Name of the run that saved the checkpoint; empty where none did."""
        return "" if self.step is None else str(Path(self.name).parent)


def comparisons(base: Answered, other: Answered) -> dict[str, list[Comparison]]:
    """What can be said of each metric of ``other`` against ``base``, task by task, but for those that nobody
    gave what they need and those that say nothing of a checkpoint. Both answered the same cases."""
    return {
        task: [
            compare(a, b)
            for a, b in zip(results, other.scores[task], strict=True)
            if not (a.was_not_given or b.was_not_given or a.kind in OF_THE_DATA)
        ]
        for task, results in base.scores.items()
    }


def as_json(scores: dict[str, list[Result]]) -> dict[str, list[dict[str, Any]]]:
    """What ``metrics.json`` holds of :func:`score`."""
    return {task: [result.as_json() for result in results] for task, results in scores.items()}
