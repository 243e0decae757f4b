"""What the metrics of one task are computed from: texts and pictures beside what they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from unigen.evaluation.answers import Prediction, drawn_beside
from unigen.evaluation.cases import IMAGE, Case
from unigen.evaluation.detectors import Detector
from unigen.evaluation.features import Extractor, Features, FeatureStore
from unigen.evaluation.objects import SCORES
from unigen.evaluation.results import digest_of
from unigen.evaluation.towers import PictureTower

EDIT = "edit"
Opinion = Mapping[str, Any]  # what a model said of one case


@dataclass(frozen=True)
class Tools:
    """What metrics need besides the answers; a metric without what it needs has no value and says so.

    Args:
        extractor: of features, for distances and similarities of pictures.
        real: other real pictures, for the distance from real to real beside that of what was drawn.
        clip: a CLIP or SigLIP with its texts, for ``clip_score``.
        bert: folder of a text encoder, for ``bertscore``; layer: which of its layers.
        wordnet: nltk's folder, for synonyms in METEOR.
        alexnet: file of its weights, for LPIPS.
        detector: of objects, for the checks of GenEval; scores: from which an object counts, in general and
            where objects are counted.
        lang: language of the texts, for BLEU's tokenizer; default by their script.
        cache: of features.
    """

    extractor: Extractor | None = None
    real: Sequence[Any] = ()
    clip: PictureTower | None = None
    bert: str | Path | None = None
    layer: int | None = None
    wordnet: str | Path | None = None
    alexnet: str | Path | None = None
    detector: Detector | None = None
    scores: tuple[float, float] = SCORES
    lang: str | None = None
    cache: FeatureStore | None = None
    device: str = "cpu"
    seed: int = 0


class Drawn(NamedTuple):
    """A picture that was drawn where the record has one.

    Args:
        picture: of the answer; reference: of the record.
        source: what an edit starts from; None without a picture in the prompt.
        prompt: the last text that was given, empty without one.
        around: the texts next to it, before and after, empty ones left out: of the answer, or the prompt.
        case: it answers; place: which of the answer's pictures it is.
    """

    picture: Any
    reference: Any
    source: Any
    prompt: str
    around: tuple[str, ...]
    case: Case
    place: int


@dataclass
class Material:
    """The answers to the cases of a task.

    Args:
        task: its name.
        cases: of the task; predictions: their answers, in the same order.
        tools: that metrics need.
        said: what models said of each case, by what they were asked (``likelihood``, ``views``, ``judge``)
            and the case's number.
    """

    task: str
    cases: Sequence[Case]
    predictions: Sequence[Prediction]
    tools: Tools
    said: Mapping[str, Mapping[int, Opinion]] = field(default_factory=dict)
    _features: dict[str, Features] = field(default_factory=dict, init=False, repr=False)

    @property
    def draws(self) -> bool:
        """Do the records ask for pictures?"""
        return any(IMAGE in case.outputs for case in self.cases)

    @property
    def edits(self) -> bool:
        return self.task == EDIT

    @cached_property
    def texts(self) -> tuple[list[str], list[list[str]]]:
        """The texts that were written where records have some, and what is right; one that is missing is
        empty."""
        made: list[str] = []
        wanted: list[list[str]] = []
        for case, found in zip(self.cases, self.predictions):
            written = [piece for piece in found.pieces if isinstance(piece, str)]
            # a thought comes before what was asked for
            written = written[-len(case.texts) :] if case.texts else []
            made += written + [""] * (len(case.texts) - len(written))
            wanted += [list(right) for right in case.texts]
        return made, wanted

    @cached_property
    def drawn(self) -> list[Drawn]:
        """The pictures that were drawn where records have some; one that is missing is left out."""
        found = []
        for case, prediction in zip(self.cases, self.predictions):
            for number, (place, reference) in enumerate(drawn_beside(case, prediction)):
                around = _around(case, prediction.pieces, place)
                picture = prediction.pieces[place]
                found.append(Drawn(picture, reference, case.source, case.said_last, around, case, number))
        return found

    def column(self, name: str) -> list[Any]:
        """A field of :class:`Drawn` of all pictures."""
        return [getattr(one, name) for one in self.drawn]

    def features(self, which: str) -> Features:
        """Of the pictures (``picture``), or the ``reference`` or ``source`` of each; computed once.

        Raises:
            CannotRun: the network cannot.
            PictureError: a picture cannot be read.
        """
        assert self.tools.extractor is not None
        if which not in self._features:
            self._features[which] = self.tools.extractor(self.column(which), self.tools.cache)
        return self._features[which]

    def of_drawn(self, kind: str) -> list[Any]:
        """What was said of each drawn picture; None where nothing was."""
        rows = self.said.get(kind, {})
        return [
            next(iter(rows.get(one.case.number, {}).get("pictures", [])[one.place :]), None)
            for one in self.drawn
        ]


def paired(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """The fields of a result that say which picture to which prompt each sample is: only those to the same
    prompts, one by one, are pairs."""
    pairs = tuple((one.case.number, one.place, one.prompt) for one in drawn)
    return {"pairs": pairs, "data": digest_of(pairs)}


def _around(case: Case, pieces: Sequence[Any], place: int) -> tuple[str, ...]:
    before = next((piece for piece in reversed(pieces[:place]) if isinstance(piece, str)), case.said_last)
    after = pieces[place + 1] if place + 1 < len(pieces) else ""
    return tuple(text for text in (before, after) if isinstance(text, str) and text.strip())
