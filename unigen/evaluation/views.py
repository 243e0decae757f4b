"""Metrics of what models say: of the references that were to be written, of the pictures that were drawn.

The rows come from ``probes.py`` (the checkpoint itself) and ``judge.py`` (another model).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from unigen.evaluation.material import Drawn, Material, paired
from unigen.evaluation.results import CannotRun, Result, Unfit, digest_of, identity, metric
from unigen.evaluation.statistics import estimate, value_of
from unigen.evaluation.text import accuracy, chrf, rouge

SURE = 0.5  # of an answer that begins with yes or no: below, the model speaks otherwise


@metric("perplexity", "exp of the mean negative log-likelihood of a reference token, training forward")
def perplexity(material: Material) -> Result:
    """Perplexity of the references, given their prompts: of each text's tokens and the token that closes it,
    by the forward of training. Lower is better; per sample its own."""
    rows = [material.said["likelihood"][case.number] for case in material.cases]
    parts = np.array([[row["nll"], row["tokens"]] for row in rows], np.float64)
    name = identity("perplexity", "training-forward", "closing-token", n=len(parts))
    samples = np.array([value_of(part[None], "perplexity") if part[1] else np.nan for part in parts])
    return estimate(
        name, parts, "perplexity", seed=material.tools.seed, samples=samples, higher_is_better=False,
        data=digest_of([row["ids"] for row in rows]),
    )  # fmt: skip


def _of_pictures(material: Material, by: str, *keys: str) -> tuple[list[Drawn], list[list[Any]]]:
    """The drawn pictures of which all is known, and the values of ``keys`` of each."""
    found = [
        (one, [row[key] for key in keys])
        for one, row in zip(material.drawn, material.of_drawn(by))
        if row is not None and all(row.get(key) is not None for key in keys)
    ]
    return [one for one, _ in found], [values for _, values in found]


def _of_views(material: Material, *keys: str) -> tuple[list[Drawn], list[list[Any]]]:
    drawn, values = _of_pictures(material, "views", *keys)
    if not drawn:
        raise Unfit("no prompt of a picture says what to draw", "ask with texts")
    return drawn, values


def _asked(material: Material, which: str) -> str:
    return f"asked={digest_of(material.said['views'][-1][which])}" if -1 in material.said["views"] else ""


def _views(kind: str, material: Material, values: Any, drawn: list[Drawn], question: str) -> Result:
    name = identity(kind, "own-understanding", _asked(material, question), n=len(values))
    return estimate(name, np.array(values, np.float64), seed=material.tools.seed, **paired(drawn))


@metric("verify", "mean probability of yes by yes or no, first token of the answer")
def verify(material: Material) -> Result:
    """How sure the checkpoint's understanding branch is that a picture it drew shows what was asked for, 0 to
    1. A model that always says yes has 1: read ``verify_margin`` beside it."""
    drawn, rows = _of_views(material, "yes", "sure")
    result = _views("verify", material, [yes for yes, _ in rows], drawn, "verify")
    sure = float(np.median([sure for _, sure in rows]))
    if sure >= SURE:
        return result
    note = f"yes and no have a probability of {sure:.2g} together: it does not answer by them"
    return replace(result, notes=(note,))


@metric("verify_margin", "verify, minus the same of the text that another picture was drawn for")
def verify_margin(material: Material) -> Result:
    """How much surer it is of the right text than of another record's, -1 to 1: 0 where it cannot tell."""
    drawn, rows = _of_views(material, "yes", "yes_of_other")
    values = [yes - other for yes, other in rows]
    return _views("verify_margin", material, values, drawn, "verify")


@metric("cycle_rougeL", "ROUGE-L of the prompt and what the checkpoint says that its picture shows")
def cycle_rouge(material: Material) -> Result:
    """Text to picture to text: the description that the understanding branch gives of the picture, beside the
    text it was drawn for."""
    return _cycle("cycle_rougeL", material, rouge)


@metric("cycle_chrf2", "chrF2 of the prompt and what the checkpoint says that its picture shows")
def cycle_chrf(material: Material) -> Result:
    """As :func:`cycle_rouge`, by characters."""
    return _cycle("cycle_chrf2", material, chrf)


def _cycle(kind: str, material: Material, measure: Any) -> Result:
    drawn, rows = _of_views(material, "described", "prompted")
    result = measure([said for said, _ in rows], [one.prompt for one in drawn], seed=material.tools.seed)
    return _renamed(kind, result, material, drawn)


@metric("described_as_real", "accuracy of the description of the picture against that of the reference")
def described_as_real(material: Material) -> Result:
    """Share of pictures that the understanding branch describes in the words it has for the real ones."""
    drawn, rows = _of_views(material, "described", "described_reference")
    result = accuracy([said for said, _ in rows], [real for _, real in rows], seed=material.tools.seed)
    # each checkpoint is held against its own words for the same pictures
    return _renamed("described_as_real", result, material, drawn)


def _renamed(kind: str, result: Result, material: Material, drawn: list[Drawn]) -> Result:
    """A metric of texts as one of what the checkpoint sees. Raises CannotRun: it could not be had."""
    if result.value is None:
        raise CannotRun(result.reason, result.fix)
    inner = result.name.partition("[")[2].rstrip("]")
    name = identity(kind, "own-understanding", _asked(material, "describe"), inner)
    return replace(result, name=name, **paired(drawn))


@metric("judge", "mean score of another model, 0 to 10 divided by 10")
def judge(material: Material) -> Result:
    """What the judge says of the pictures, 0 to 1. Which model it was, and how it was asked, stands in the
    name."""
    about = material.said["judge"][-1]
    if "reason" in about:
        raise CannotRun(about["reason"], about["fix"])
    drawn, scores = _of_pictures(material, "judge", "score")
    if not drawn:
        raise CannotRun("the judge gave no score", "look at what it says, or take another --judge_model")
    pictures, values = len(material.drawn), np.array([score for (score,) in scores], np.float64)
    left = pictures - len(drawn)
    notes = (f"{left} of {pictures} pictures got no score that can be read",) if left else ()
    name = identity("judge", about["model"], f"asked={about['asked']}", n=len(values))
    return estimate(name, values, seed=material.tools.seed, notes=notes, **paired(drawn))
