"""What a checkpoint says of references and of pictures, beside the same computed token by token."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import noise

from unigen.evaluation.answers import Prediction
from unigen.evaluation.cases import cases_of
from unigen.evaluation.material import Material, Tools
from unigen.evaluation.probes import PictureProbe, likelihood, other_texts
from unigen.evaluation.score import score
from unigen.evaluation.views import cycle_rouge, described_as_real, perplexity, verify, verify_margin
from unigen.inference.context import Context
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.sampler import feed_tokens
from unigen.sequence.types import Image, Origin, Record, Text

WHERE = Origin(Path("val.jsonl"), 1)


@pytest.fixture(scope="module")
def inferencer(golden):
    return InterleaveInferencer.from_pretrained(str(golden / "model"), "cpu")


@pytest.fixture
def cases(tmp_path):
    noise(32, 32, 1).save(tmp_path / "a.png")
    picture = Image(tmp_path / "a.png")
    return cases_of(
        Record(sample, WHERE, "test")
        for sample in (
            [Text("a cat"), Text("yes, 一只猫", True, ("no",))],
            [picture, Text("a cat"), Text("never", True), Image(tmp_path / "a.png", True)],
            [Text("draw"), Image(tmp_path / "a.png", True)],
        )
    )[0]


def token_by_token(inferencer, sample, text: str) -> tuple[float, int]:
    """Negative log-likelihood of a text and its closing token as a writer meets them, and their number."""
    context = Context(inferencer.model.config.llm.num_hidden_layers, sample)
    inferencer.builder.replay([context], drawing=any(isinstance(s, Image) and s.target for s in sample))
    special, total = inferencer.tokenizer.special, 0.0
    ids = [*inferencer.tokenizer.encode(text), special.text_end]
    for given, expected in zip([special.text_start, *ids], ids):
        logits = inferencer.model.logits(feed_tokens(inferencer.model, [context.full], [given]))[0]
        total -= float(logits.double().log_softmax(-1)[expected])
    return total, len(ids)


@pytest.mark.slow
@torch.no_grad()
def test_the_likelihood_of_references_is_that_of_writing_them(inferencer, cases):
    rows = likelihood(inferencer, cases)
    expected, tokens = token_by_token(inferencer, [Text("a cat")], "yes, 一只猫")
    assert rows[0]["nll"] == pytest.approx(expected, rel=1e-4) and rows[0]["tokens"] == tokens
    # with a picture to draw behind it the text is still one text and its end
    assert rows[1]["tokens"] == len(inferencer.tokenizer.encode("never")) + 1
    assert rows[2] == {**rows[2], "nll": 0.0, "tokens": 0}
    # the others of its batch change nothing but the last digits
    alone = likelihood(inferencer, cases[:1])[0]
    assert alone["nll"] == pytest.approx(rows[0]["nll"], rel=1e-5) and alone["ids"] == rows[0]["ids"]
    shown = perplexity(Material("text", cases[:1], [], Tools(), {"likelihood": {0: rows[0]}}))
    assert shown.value == pytest.approx(math.exp(expected / tokens), rel=1e-4) and not shown.higher_is_better


def answer(case, *pieces) -> Prediction:
    return Prediction(case.number, case.where, case.task, 0, pieces, True)


def test_a_picture_is_verified_by_yes_and_no_and_described(inferencer, cases, tmp_path):
    noise(32, 32, 2).save(tmp_path / "drawn.png")
    drawn = tmp_path / "drawn.png"
    answers = {1: answer(cases[1], "never", drawn), 2: answer(cases[2], drawn), 0: answer(cases[0], "x")}
    viewer = PictureProbe(inferencer, verify="{text}?", describe="what", max_tokens=4)
    texts = other_texts(cases)
    assert texts == {1: "draw", 2: "a cat"}
    rows = viewer.views(cases, answers, texts)
    assert [len(row["pictures"]) for row in rows] == [0, 1, 1]
    first = rows[1]["pictures"][0]
    context = Context(inferencer.model.config.llm.num_hidden_layers, [Image(drawn), Text("a cat?")])
    inferencer.builder.replay([context], drawing=False)
    start = inferencer.tokenizer.special.text_start
    with torch.no_grad():
        chance = (
            inferencer.model.logits(feed_tokens(inferencer.model, [context.full], [start]))[0]
            .double()
            .softmax(-1)
        )
    yes, no = (
        sum(float(chance[token]) for token in {inferencer.tokenizer.encode(word)[0] for word in words})
        for words in (("Yes", "yes", " Yes", " yes"), ("No", "no", " No", " no"))
    )
    assert first["yes"] == pytest.approx(yes / (yes + no), rel=1e-4)
    assert first["yes_of_other"] != first["yes"]
    said = inferencer.unified_generate([drawn, "what"], outputs=["text"], max_new_tokens=4)[0]
    real = inferencer.unified_generate([tmp_path / "a.png", "what"], outputs=["text"], max_new_tokens=4)[0]
    assert (first["described"], first["described_reference"]) == (said, real)


def views(cases, pictures) -> Material:
    rows = {case.number: {"pictures": [picture]} for case, picture in zip(cases, pictures)}
    answers = [answer(case, noise(8, 8, 1)) for case in cases]
    return Material(
        "generate", cases, answers, Tools(), {"views": {-1: {"verify": "v", "describe": "d"}, **rows}}
    )


def test_what_the_checkpoint_sees_becomes_numbers():
    record = Record([Text("a red cat"), Image("a.png", True)], WHERE, "test")
    base = cases_of([record] * 4)[0]
    pictures = [
        {
            "yes": 0.9 - n / 10, "sure": 0.9, "yes_of_other": 0.5, "prompted": True,
            "described": ["a red cat", "a cat", "a dog", "A red cat."][n], "described_reference": "a red cat",
        }
        for n in range(4)
    ]  # fmt: skip
    material = views(base, pictures)
    assert verify(material).value == pytest.approx(0.75)
    assert verify_margin(material).samples.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert described_as_real(material).value == 0.5
    assert cycle_rouge(material).samples.tolist() == pytest.approx([1, 0.8, 0.4, 1])
    assert verify(material).interval[0] < 0.75 < verify(material).interval[1]
    unsure = views(base, [{**picture, "sure": 0.01} for picture in pictures])
    assert not verify(material).notes and "0.01" in verify(unsure).notes[0]
    # other questions, another metric
    other = replace(
        material, said={"views": {**material.said["views"], -1: {"verify": "w", "describe": "d"}}}
    )
    assert (
        verify(other).name != verify(material).name and cycle_rouge(other).name == cycle_rouge(material).name
    )


def test_without_what_they_need_metrics_have_no_value_and_say_so(cases):
    answers = [answer(case, "text", noise(32, 32, 3)) for case in cases]
    results = {one.kind: one for ones in score(cases, answers, Tools()).values() for one in ones}
    lacking = {kind for kind, one in results.items() if one.was_not_given}
    assert {"perplexity", "verify", "judge", "clip_score", "fd", "bertscore"} <= lacking
    assert all(results[kind].value is None and results[kind].reason and results[kind].fix for kind in lacking)
    # asked for by name, and nothing else
    assert {
        one.kind for ones in score(cases, answers, Tools(), kinds=["rougeL"]).values() for one in ones
    } == {"rougeL"}
