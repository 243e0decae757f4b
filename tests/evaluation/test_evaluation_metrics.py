"""The import of the user guide, and what importing costs."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluation_metrics
from unigen.evaluation.results import CannotRun, Result, digest_of_numbers, identity, libraries, metric

ROOT = Path(__file__).parents[2]
FUNCTIONS = [
    getattr(evaluation_metrics, name)
    for name in evaluation_metrics.__all__
    if getattr(getattr(evaluation_metrics, name), "__wrapped__", None)
]


def test_the_metrics_of_the_guide_are_there():
    names = {function.__name__ for function in FUNCTIONS}
    assert {"bleu", "rouge", "meteor", "bertscore", "frechet_distance", "clip_score"} <= names
    assert len(names) == 25


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_metric_says_what_it_measures(function):
    assert inspect.getdoc(function) and "seed" in inspect.signature(function).parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("unigen.evaluation.text", ["torch", "transformers", "sacrebleu", "nltk", "rouge_score"]),
        (
            "evaluation_metrics",
            ["transformers", "sacrebleu", "nltk", "rouge_score", "torchvision", "diffusers"],
        ),
    ],
)
def test_importing_brings_no_heavy_library(module, absent):
    code = f"import {module}, sys; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_the_extra_brings_no_torchvision():
    code = (
        "import sacrebleu, nltk.translate.meteor_score, rouge_score.rouge_scorer, sys;"
        "print('torchvision' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr


def test_a_result_without_a_value_is_null_in_json():
    @metric("sum", "here")
    def cannot() -> Result:
        raise CannotRun("no file", "place it")

    shown = json.loads(json.dumps(cannot().as_json(), allow_nan=False))
    assert shown["value"] is None and shown["reason"] == "no file" and shown["fix"] == "place it"
    assert shown["source"] == "here" and shown["interval"] is None


def test_a_number_that_is_none_is_a_programmers_error():
    @metric("sum", "here")
    def broken() -> Result:
        return Result("sum", float("nan"))

    with pytest.raises(AssertionError, match="sum is nan"):
        broken()


def test_lengths_that_differ_are_a_programmers_error():
    with pytest.raises(AssertionError, match="one for each"):
        evaluation_metrics.bleu(["a"], ["a", "b"])


def test_identities():
    assert identity("fd", "net@1", "pil", n=3, lib=None) == "fd[net@1|pil|n=3]"
    assert Result("fd[net|n=3]", 1.0).kind == "fd"
    assert libraries("numpy") == f"numpy-{np.__version__}"
    with pytest.raises(CannotRun, match="no-such-library is not installed"):
        libraries("no-such-library")
    a = np.arange(6.0)
    assert len({digest_of_numbers(x) for x in (a, a.reshape(2, 3), a.astype(np.float32), a + 1)}) == 4
