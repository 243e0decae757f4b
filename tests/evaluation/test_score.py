"""From records to metrics.json with a real model, and what missing pieces mean."""

import json
from pathlib import Path

import pytest
import torch
from pictures import noise

from unigen.evaluation.answers import Answer, Prediction, answer_all
from unigen.evaluation.cases import Case, cases_of
from unigen.evaluation.features import module_extractor
from unigen.evaluation.score import Tools, as_json, good_end, score
from unigen.evaluation.statistics import compare
from unigen.sequence.types import Image, Origin, Record, Text


def case(
    number: int, task: str, outputs: tuple[str, ...], references: tuple, prompt: tuple = ("What?",)
) -> Case:
    return Case(number, "val.jsonl:1", task, prompt, outputs, references)


def prediction(number: int, *pieces) -> Prediction:
    return Prediction(number, "val.jsonl:1", "text", 0, pieces)


def by_kind(results) -> dict:
    return {result.kind: result for result in results}


def test_texts_are_scored_by_task():
    cases = [case(0, "text", ("text",), (("red",),)), case(1, "understand", ("text",), (("一只猫", "猫"),))]
    scores = score(cases, [prediction(0, "blue"), prediction(1, "猫")], Tools())
    assert list(scores) == ["text", "understand"]
    assert by_kind(scores["understand"])["exact_match"].value == 1
    assert (
        by_kind(scores["text"])["exact_match"].value == 0 and by_kind(scores["text"])["structure"].value == 1
    )
    assert {"bleu", "chrf2", "rouge1", "rouge2", "rougeL", "rougeLsum", "meteor", "anls"} <= set(
        by_kind(scores["text"])
    )


def test_a_missing_text_is_an_empty_answer_and_a_thought_is_none():
    cases = [case(n, "text", ("text",), (("red",),)) for n in range(3)]
    results = by_kind(
        score(cases, [prediction(0), prediction(1, "hm, perhaps", "red"), prediction(2, "red")], Tools())[
            "text"
        ]
    )
    assert results["exact_match"].samples.tolist() == [0, 1, 1]
    assert results["structure"].samples.tolist() == [0, 0, 1]


def test_pictures_to_other_records_are_no_pairs(extractor):
    """Neither where their references are equal."""
    cases = [case(n, "generate", ("image",), (noise(8, 8, 9),)) for n in range(3)]

    def similarity(*answered: int):
        found = [prediction(n, *([noise(8, 8, n)] if n in answered else [])) for n in range(3)]
        return by_kind(score(cases, found, Tools(extractor=extractor))["generate"])["similarity"]

    assert compare(similarity(0, 1), similarity(0, 1)).n == 2
    assert compare(similarity(0, 1), similarity(0, 2)).verdict == "not compared"


@pytest.fixture
def extractor():
    return module_extractor(
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()), "means", 16
    )


def test_edits_are_held_against_source_and_reference(extractor):
    pictures = [noise(24, 24, seed) for seed in range(12)]
    cases = [case(n, "edit", ("image",), (pictures[n],), (pictures[n - 1], "Redraw it.")) for n in range(12)]
    results = score(cases, [prediction(n, pictures[n]) for n in range(12)], Tools(extractor=extractor))[
        "edit"
    ]
    named = {(r.kind, "source" if "to=source" in r.name else "reference"): r for r in results}
    assert named["psnr", "reference"].value == 100 > named["psnr", "source"].value
    assert named["similarity", "reference"].value == pytest.approx(1) and named["ssim", "source"].value < 1
    assert named["fd", "reference"].value == pytest.approx(0, abs=1e-9)
    # too few to extrapolate from: null with the reason, never 0
    shown = json.loads(json.dumps(as_json({"edit": results}), allow_nan=False))["edit"]
    infinite = next(entry for entry in shown if entry["name"] == "fd_infinity")
    assert infinite["value"] is None and infinite["reason"] and infinite["fix"]


def test_which_end_is_good_is_said_as_the_results_say_it(extractor):
    """A run asks before there is a result."""
    pictures = [noise(24, 24, seed) for seed in range(24)]
    cases = [case(n, "edit", ("image",), (pictures[n],), (pictures[n - 1], "Redraw it.")) for n in range(24)]
    cases += [case(24, "text", ("text",), (("a red car drives by",),))]
    found = [prediction(n, pictures[n - 2]) for n in range(24)] + [prediction(24, "a blue car drives by")]
    results = [r for some in score(cases, found, Tools(extractor=extractor)).values() for r in some]
    said = {r.kind: r.higher_is_better for r in results if r.value is not None and "to=source" not in r.name}
    assert {"fd", "kid", "cmmd", "length_ratio", "ssim", "anls"} <= said.keys()
    assert said == {kind: good_end(kind) for kind in said}
    assert good_end("ssim_to_source") is None and good_end("a_plugins") is None


def test_a_picture_that_was_not_drawn_is_left_out(extractor):
    pictures = [noise(24, 24, seed) for seed in range(8)]
    cases = [case(n, "generate", ("image",), (pictures[n],)) for n in range(8)]
    found = [prediction(n, pictures[n]) if n else prediction(n) for n in range(8)]
    results = by_kind(score(cases, found, Tools(extractor=extractor))["generate"])
    assert results["fd"].n == 7 and results["structure"].value == 7 / 8


def test_answers_to_other_cases_are_a_programmers_error():
    with pytest.raises(AssertionError, match="other cases"):
        score([case(0, "text", ("text",), (("red",),))], [prediction(1, "red")], Tools())


@pytest.mark.slow
def test_a_model_is_asked_and_scored_and_a_killed_run_gives_the_same_numbers(golden, tmp_path, extractor):
    from unigen.inference.inferencer import InterleaveInferencer

    noise(32, 32, 1).save(tmp_path / "a.png")
    where, picture = Origin(Path("val.jsonl"), 1), Image(tmp_path / "a.png")
    ask, draw = Text("a cat"), Text("a red square")
    records = [
        Record([ask, Text("yes", True)], where, "test"),
        Record([draw, Image(tmp_path / "a.png", True)], where, "test"),
        Record([picture, draw, Image(tmp_path / "a.png", True)], where, "test"),
        Record([picture, ask, Text("no", True)], where, "test"),
        Record([ask, Text("never", True)], where, "test"),
    ]
    cases, silent = cases_of(records)
    inferencer = InterleaveInferencer.from_pretrained(str(golden / "model"), "cpu")

    def answer(prompts, outputs, seed):
        found = inferencer.unified_generate_batch(
            prompts, outputs=list(outputs), seed=seed, do_sample=True, max_new_tokens=4, num_timesteps=3,
            height=32, width=32,
        )  # fmt: skip
        return [Answer(pieces, True) for pieces in found]

    def killed(prompts, outputs, seed):
        if seed > 1:
            raise KeyboardInterrupt
        return answer(prompts, outputs, seed)

    whole = answer_all(cases, answer, tmp_path / "whole", {}, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        answer_all(cases, killed, tmp_path / "killed", {}, batch_size=2)
    again = answer_all(cases, answer, tmp_path / "killed", {}, batch_size=2)
    tools = Tools(extractor=extractor)
    first, second = (json.dumps(as_json(score(cases, found, tools))) for found in (whole, again))
    assert first == second and silent == 0
    assert list(json.loads(first)) == ["edit", "generate", "text", "understand"]
    assert all(
        entry["value"] == 1
        for results in json.loads(first).values()
        for entry in results
        if "structure" in entry["name"]
    )
