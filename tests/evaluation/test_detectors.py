"""Detectors find what transformers' own processing finds with the same weights."""

import numpy as np
import pytest
import tiny_towers
import torch
from pictures import noise
from transformers import (
    DetrForObjectDetection,
    DetrImageProcessorPil,
    Mask2FormerForUniversalSegmentation,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    PreTrainedTokenizerFast,
)

from unigen.evaluation.detectors import Detector
from unigen.evaluation.results import CannotRun

PICTURE = noise(60, 40, 3)
THINGS = ["cat", "dog", "computer mouse", "bench"]


def assert_alike(found, result, names):
    """Against what ``post_process_object_detection`` gives of one picture."""
    rows = sorted((names.index(thing), *one.box, one.score) for thing, ones in found.items() for one in ones)
    expected = torch.cat([result["labels"][:, None], result["boxes"], result["scores"][:, None]], 1)
    assert len(rows) == len(expected) > 0
    np.testing.assert_allclose(rows, sorted(map(tuple, expected.tolist())), atol=0.05)
    scores = [one.score for one in found[names[0]]]
    assert scores == sorted(scores, reverse=True)


@torch.no_grad()
def test_a_detr_finds_what_transformers_finds(tmp_path):
    folder = tiny_towers.write_detr(tmp_path)
    detector = Detector.load(folder)
    processor = DetrImageProcessorPil.from_pretrained(folder)
    output = DetrForObjectDetection.from_pretrained(folder).eval()(
        **processor(PICTURE, return_tensors="pt", do_pad=False)
    )
    sizes = torch.tensor([[40, 60]])
    result = processor.post_process_object_detection(output, threshold=0, target_sizes=sizes)[0]
    assert_alike(detector.find(PICTURE, THINGS), result, THINGS)
    assert detector.name.startswith(f"{tmp_path.name}@") and "transformers-" in detector.libraries


@torch.no_grad()
def test_an_owlvit_finds_what_transformers_finds(tmp_path):
    folder = tiny_towers.write_owlvit(tmp_path)
    detector = Detector.load(folder)
    names = ["cat", "house"]
    words = PreTrainedTokenizerFast.from_pretrained(folder)(
        [f"a photo of a {name}" for name in names], padding="max_length", max_length=12, return_tensors="pt"
    )
    pixels = detector._prepared(PICTURE)
    output = OwlViTForObjectDetection.from_pretrained(folder).eval()(
        words["input_ids"], pixels, words["attention_mask"]
    )
    processor = OwlViTImageProcessorPil()
    result = processor.post_process_object_detection(output, 0.0, torch.tensor([[40, 60]]))[0]
    assert_alike(detector.find(PICTURE, names), result, names)


@pytest.mark.slow
@torch.no_grad()
def test_a_mask2former_finds_classes_times_masks(tmp_path):
    folder = tiny_towers.write_mask2former(tmp_path)
    found = Detector.load(folder).find(PICTURE, THINGS)
    detector = Detector.load(folder)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    output = model(detector._prepared(PICTURE))
    assert detector._prepared(PICTURE).shape[-2:] == (64, 96)  # multiples of 32
    masks = torch.nn.functional.interpolate(output.masks_queries_logits, (40, 60), mode="bilinear")[0]
    classes = output.class_queries_logits[0].softmax(-1)
    expected = {
        (number, round(float(classes[query, number] * masks[query].sigmoid()[masks[query] > 0].mean()), 4))
        for query in range(5)
        for number in range(4)
        if (masks[query] > 0).any()
    }
    assert {(THINGS.index(t), round(o.score, 4)) for t, ones in found.items() for o in ones} == expected
    for one in (one for ones in found.values() for one in ones):
        left, top, right, bottom = one.box
        assert one.mask.shape == (40, 60) and one.mask.sum() == one.mask[top:bottom, left:right].sum() > 0


def test_what_is_no_detector_and_what_it_does_not_know_are_said(tmp_path):
    detector = Detector.load(tiny_towers.write_detr(tmp_path / "detr", always=1))
    assert detector.labels["computer mouse"] == detector.labels["mouse"] == 2
    with pytest.raises(CannotRun, match="does not know zebra") as refused:
        detector.find(PICTURE, ["cat", "zebra"])
    assert "OWL-ViT" in refused.value.fix
    with pytest.raises(CannotRun, match="cannot be loaded"):
        Detector.load(tiny_towers.write_dinov2(tmp_path / "dinov2"))
    (tmp_path / "detr" / "preprocessor_config.json").unlink()
    with pytest.raises(CannotRun, match="does not say the size"):
        Detector.load(tmp_path / "detr")
