"""Metrics of pictures: names, notes, intervals, and numbers computed another way."""

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from unigen.evaluation import images as metrics
from unigen.evaluation.distances import Frechet, Kid
from unigen.evaluation.features import Features, load_extractor
from unigen.evaluation.statistics import compare
from unigen.evaluation.towers import PictureTower


def features(
    n: int, d: int = 8, shift: float = 0.0, seed: int = 0, identity: str = "net@1|pil-bicubic-8|mean"
) -> Features:
    values = np.random.default_rng(seed).normal(shift, 1, (n, d)).astype(np.float32)
    return Features(values, identity, "torch-1,pillow-2")


DISTANCES = [metrics.frechet_distance, metrics.frechet_distance_infinity, metrics.kid, metrics.cmmd]


@pytest.mark.parametrize("metric", DISTANCES)
def test_a_distance_is_named_and_grows_with_the_distance(metric):
    references = features(160, seed=9)
    near, far = metric(features(150, shift=0.3), references), metric(features(150, shift=1), references)
    assert near.value < far.value and near.interval[0] <= near.value <= near.interval[1] < far.interval[0]
    kind = near.kind
    assert near.name.startswith(f"{kind}[net@1|pil-bicubic-8|mean|")
    assert near.name.endswith("n=150|references=160|lib=torch-1,pillow-2]")
    assert near.n == 150 and near.source and near.higher_is_better is False
    if metric is not metrics.frechet_distance_infinity:  # whose test takes seconds
        assert compare(far, near, seed=1).verdict == "better"
    assert metric(features(150, shift=0.3), references, draws=0).value == near.value


def test_the_values_are_those_of_the_mathematics():
    x, y = features(30, shift=0.5), features(40, seed=1)
    assert metrics.frechet_distance(x, y).value == Frechet(y.values)(x.values)
    assert metrics.kid(x, y).value == Kid(y.values)(x.values)


@pytest.mark.parametrize(("n", "biased"), [(1999, True), (2000, False)])
def test_few_pictures_are_told_to_bias_a_frechet_distance(n, biased):
    result = metrics.frechet_distance(features(n, 2), features(2500, 2), draws=0)
    assert bool(result.notes) == biased and result.interval is None
    assert not biased or "biased upwards" in result.notes[0]


@pytest.mark.parametrize("kind", ["precision", "recall", "density", "coverage"])
def test_neighbours_have_names_of_their_own(kind):
    result = metrics.neighbours(features(60), features(70, seed=1), kind=kind)
    k = 3 if kind in ("precision", "recall") else 5
    assert result.name.startswith(f"{kind}[") and f"|k={k}|" in result.name and result.value > 0.5
    assert result.interval[0] >= 0 and (kind == "density" or result.interval[1] <= 1)
    assert metrics.neighbours(features(k), features(70), kind=kind).value is None


@pytest.mark.parametrize("metric", DISTANCES)
def test_features_of_two_kinds_have_no_distance(metric):
    result = metric(features(150), features(150, identity="net@2|pil-bicubic-8|mean"))
    assert result.value is None and "differ" in result.reason and "one extractor" in result.fix
    assert metric(features(1), features(150)).value is None


def test_too_few_to_extrapolate_from():
    assert metrics.frechet_distance_infinity(features(99), features(500)).value is None
    assert (
        "rough" in metrics.frechet_distance_infinity(features(120, 200), features(120, 200), draws=0).notes[0]
    )


def test_other_references_are_other_data():
    made = features(50)
    a, b = (metrics.kid(made, features(50, seed=seed)) for seed in (1, 2))
    assert a.name == b.name and compare(a, b).verdict == "not compared"


def test_similarity_by_hand():
    a = Features(np.array([[1.0, 0], [1, 1]], np.float32), "net", "lib")
    b = Features(np.array([[0.0, 1], [2, 2]], np.float32), "net", "lib")
    result = metrics.similarity(a, b, to="source")
    assert result.samples == pytest.approx([0, 1]) and "to=source" in result.name


# ---- with texts


PICTURES = [noise(40, 60, seed) for seed in range(4)]
TEXTS = ["the cat sat on the mat", "a red square", "猫", "dog"]


@pytest.mark.parametrize(("name", "padding"), [("clip", True), ("siglip", "max_length")])
def test_clip_score_is_that_of_transformers(towers, name, padding):
    from transformers import AutoModel, AutoTokenizer

    result = metrics.clip_score(PICTURES, TEXTS, model=towers[name])
    model, tokenizer = (
        AutoModel.from_pretrained(towers[name]).eval(),
        AutoTokenizer.from_pretrained(towers[name]),
    )
    tower = PictureTower.load(towers[name])
    expected = []
    for picture, text in zip(PICTURES, TEXTS):
        short = picture.resize((32, 48), Image.Resampling.BICUBIC).crop((0, 8, 32, 40))
        levels = torch.tensor(np.asarray(short) / np.float32(255)).permute(2, 0, 1)
        given = tokenizer([text], padding=padding, truncation=True, max_length=12, return_tensors="pt")
        given = dict(given) if name == "clip" else {"input_ids": given["input_ids"]}
        given.pop("token_type_ids", None)
        with torch.no_grad():
            out = model(pixel_values=((levels - tower.mean) / tower.std)[None], **given)
        expected.append(max(0.0, 100 * float(torch.cosine_similarity(out.image_embeds, out.text_embeds))))
    assert result.samples == pytest.approx(expected, abs=1e-3)
    assert max(expected) > 0 and "|pil-bicubic-32-centre|projected|x100|n=4|" in result.name


def test_a_long_text_is_cut_and_that_is_said(towers):
    assert (
        metrics.clip_score(PICTURES[:1], ["cat " * 40], model=towers["clip"]).notes[0].startswith("1 texts")
    )
    assert metrics.clip_score(PICTURES[:1], ["cat"], model=towers["clip"]).notes == ()


def test_a_model_without_texts_scores_nothing(towers, tmp_path):
    for model in (towers["dinov2"], str(tmp_path)):
        result = metrics.clip_score(PICTURES, TEXTS, model=model)
        assert result.value is None and result.reason and result.fix
    assert metrics.clip_score(PICTURES, TEXTS, model=PictureTower.load(towers["clip"])).value is None


def test_clip_direction_is_its_definition(towers):
    tower = PictureTower.load(towers["clip"], texts=True)
    result = metrics.clip_direction(PICTURES[2:], PICTURES[:2], TEXTS[2:], TEXTS[:2], model=tower)
    square = [picture.resize((32, 48), Image.Resampling.BICUBIC).crop((0, 8, 32, 40)) for picture in PICTURES]
    seen = load_extractor(towers["clip"])(square).values
    said = tower.texts(TEXTS).numpy()
    seen, said = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (seen, said))
    u, v = seen[2:] - seen[:2], said[2:] - said[:2]
    expected = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    assert result.samples == pytest.approx(expected, abs=1e-4)
    same = metrics.clip_direction(PICTURES[:2], PICTURES[:2], TEXTS[2:], TEXTS[:2], model=tower)
    assert same.value == 0
