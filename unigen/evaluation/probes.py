"""What a checkpoint says itself: how likely the references are, and what the pictures show that it drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unigen.config import SamplingOptions
from unigen.evaluation.answers import Prediction, drawn_beside, rows_of_pictures
from unigen.evaluation.cases import IMAGE, Case
from unigen.evaluation.results import digest_of
from unigen.evaluation.words import language
from unigen.inference.context import Context
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.sampler import feed_tokens
from unigen.sequence.draw import RandomKey
from unigen.sequence.pack import pack_blocks
from unigen.sequence.types import Image, Origin, Record, Sample, Text

VERIFY = {
    "en": "Does this picture show the following? Answer yes or no.\n{text}",
    "zh": "这张图片是否符合下面的描述？请回答是或否。\n{text}",
}
DESCRIBE = {"en": "Describe this picture in one sentence.", "zh": "用一句话描述这张图片。"}
# How an answer may begin. The languages' own words, since a question is answered in its language.
_YES = {"en": ("Yes", "yes", " Yes", " yes"), "zh": ("是",)}
_NO = {"en": ("No", "no", " No", " no"), "zh": ("否", "不")}


@torch.no_grad()
def likelihood(inferencer: InterleaveInferencer, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For each case: ``nll``, the negative log-likelihood in nats of the texts that are right (of several
    variants the first), given all that precedes them, by the forward of training; over how many ``tokens``,
    each text's closing one included; and a digest of their ``ids``.

    Raises:
        BadRecord: a record is longer than the model's context.
    """
    model, planner, special = inferencer.model, inferencer.builder.planner, inferencer.tokenizer.special
    blocks = []
    for case in cases:
        sample = _with_answer(case)
        lengths = planner.token_lengths(Record(sample, Origin(case.where), "", {}))  # type: ignore[arg-type]
        key = RandomKey(0, 0, case.number, training=False)
        blocks.append(planner.fill(sample, planner.outline(sample, lengths, key), key))
    pack = pack_blocks(blocks, special, model.config.geometry).to(model.device)
    losses = model(pack).ce.double().cpu()
    rows, ids, labels = (part.cpu() for part in (pack.label_rows, pack.ids, pack.label))
    # the labels of closing tokens say what comes next: they are no text
    texts = (ids[rows] != special.text_end) & (ids[rows] != special.image_end)
    found = []
    for number, case in enumerate(cases):
        mine = (pack.sample.cpu()[rows] == number) & texts
        said = {"nll": float(losses[mine].sum()), "tokens": int(mine.sum())}
        found.append({"number": case.number, **said, "ids": digest_of(labels[rows][mine].tolist())})
    return found


def _with_answer(case: Case) -> Sample:
    """The case as a sample of training: its prompt, and the right answer as the target."""
    asked: Sample = [Text(piece) if isinstance(piece, str) else Image(piece) for piece in case.prompt]
    right = [
        Text(given[0], target=True) if kind != IMAGE else Image(given, target=True)
        for kind, given in zip(case.outputs, case.references)
    ]
    return asked + right


@dataclass(frozen=True)
class PictureProbe:
    """The checkpoint's understanding branch, asked about pictures.

    Args:
        verify: the question whether a picture shows ``{text}``; default in the language of the texts.
        describe: the question what a picture shows.
        max_tokens: of a description.
        verifies, describes: which of the two it is asked to do.
    """

    inferencer: InterleaveInferencer
    verify: str | None = None
    describe: str | None = None
    max_tokens: int = 64
    verifies: bool = True
    describes: bool = True

    def about(self) -> dict[str, Any]:
        """How it asks."""
        return {
            "verify": (self.verify or VERIFY) if self.verifies else None,
            "describe": [self.describe or DESCRIBE, self.max_tokens] if self.describes else None,
        }

    def views(
        self, cases: Sequence[Case], predictions: Mapping[int, Prediction], others: Mapping[int, str]
    ) -> list[dict[str, Any]]:
        """For each case and each picture of its answer that the record has, too: the probability of ``yes``
        to the text it was drawn for and, ``yes_of_other``, to that of another case; how it is ``described``,
        and how the reference is, ``described_reference``; ``sure`` is the probability of yes and no together.
        None where there is no text to ask about."""
        shown = [
            (case, found.pieces[place], reference)
            for case, found in ((case, predictions[case.number]) for case in cases)
            for place, reference in drawn_beside(case, found)
        ]
        texts, pictures = [case.said_last for case, _, _ in shown], [picture for _, picture, _ in shown]
        yes = self._yes(pictures, texts)
        of_other = self._yes(pictures, [others.get(case.number, "") for case, _, _ in shown])
        described = self._describe(pictures, texts)
        references = self._describe([reference for _, _, reference in shown], texts)
        said = [
            {
                "yes": yes[place][0], "sure": yes[place][1], "yes_of_other": of_other[place][0],
                "described": described[place], "described_reference": references[place],
                "prompted": bool(text) or None,
            }
            for place, text in enumerate(texts)
        ]  # fmt: skip
        return rows_of_pictures(cases, [case for case, _, _ in shown], said)

    @torch.no_grad()
    def _yes(self, pictures: Sequence[Any], texts: Sequence[str]) -> list[tuple[float | None, float]]:
        """The probability of yes, by the first token of the answer and only yes and no; and that of both."""
        there = [place for place, text in enumerate(texts) if text]
        found: list[tuple[float | None, float]] = [(None, 0.0)] * len(texts)
        if not there or not self.verifies:
            return found
        i, asked = self.inferencer, [self.verify or VERIFY[_spoken(texts[place])] for place in there]
        prompts = [
            [pictures[place], question.replace("{text}", texts[place])]
            for place, question in zip(there, asked)
        ]
        samples, _ = i.requests.prepare(prompts, ["text"], self._quietly(1))
        contexts = [Context(i.model.config.llm.num_hidden_layers, sample) for sample in samples]
        i.builder.replay(contexts, drawing=False)
        opening = [i.tokenizer.special.text_start] * len(contexts)
        hidden = feed_tokens(i.model, [context.full for context in contexts], opening)
        logits = i.model.logits(hidden).double()
        for row, place, question in zip(logits.softmax(-1), there, asked):
            tongue = _spoken(question)
            yes, no = (float(row[self._first(words[tongue])].sum()) for words in (_YES, _NO))
            found[place] = yes / (yes + no) if yes + no else 0.5, yes + no
        return found

    def _quietly(self, max_new_tokens: int) -> SamplingOptions:
        """How it writes; nobody asked for it, so that nobody is told which settings have no effect."""
        plain = SamplingOptions(max_new_tokens=max_new_tokens, allow_control_tokens=True)  # of what is there
        self.inferencer.requests.usual = plain
        return self.inferencer.requests.usual

    def _first(self, words: Sequence[str]) -> list[int]:
        """The tokens that the words begin with."""
        return sorted({self.inferencer.tokenizer.encode(word)[0] for word in words})

    def _describe(self, pictures: Sequence[Any], texts: Sequence[str]) -> list[str | None]:
        if not self.describes or not texts:
            return [None] * len(texts)
        asked = [[p, self.describe or DESCRIBE[_spoken(text)]] for p, text in zip(pictures, texts)]
        options = self._quietly(self.max_tokens)
        answers = self.inferencer.unified_generate_batch(asked, outputs=["text"], options=options)
        return [answer[0] for answer in answers]


def _spoken(text: str) -> str:
    return "zh" if language([text]) == "zh" else "en"


def other_texts(cases: Sequence[Case]) -> dict[int, str]:
    """For each case that draws the text of the next one that says something else, in a circle; empty where
    all say the same."""
    drawing = [case for case in cases if IMAGE in case.outputs and case.said_last]
    found = {}
    for place, case in enumerate(drawing):
        round_ = [*drawing[place + 1 :], *drawing[:place]]
        found[case.number] = next((c.said_last for c in round_ if c.said_last != case.said_last), "")
    return found
