"""The checks of GenEval, worked out by hand; and the metric with a detector that finds two dogs everywhere."""

import numpy as np
import pytest
import tiny_towers
from pictures import noise
from PIL import Image

from unigen.evaluation.detectors import DetectedObject, Detector
from unigen.evaluation.objects import _cut, faults, geneval, relations
from unigen.evaluation.towers import PictureTower


def at(x: float, y: float, side: float = 20, score: float = 1.0) -> DetectedObject:
    return DetectedObject(score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (at(10, 50), at(90, 50), {"left of"}),
        (at(90, 52), at(10, 50), {"right of"}),
        (at(50, 10), at(50, 90), {"above"}),
        (at(90, 90), at(10, 10), {"right of", "below"}),
        (at(50, 50), at(53, 50), set()),  # a tenth of both sizes is 4 pixels
        (at(44, 50), at(50, 50), set()),  # 2 of 6 pixels are beyond, which is less than half
        (at(40, 50), at(50, 50), {"left of"}),  # 6 of 10
    ],
)
def test_where_an_object_is(first, second, expected):
    assert relations(first, second) == expected


CAT = {"class": "cat", "count": 1}
TWO = {"class": "cat", "count": 2}


@pytest.mark.parametrize(
    ("found", "wanted", "right"),
    [
        ({"cat": [at(1, 1)]}, {"include": [CAT]}, True),
        ({}, {"include": [CAT]}, False),
        ({"cat": [at(1, 1)]}, {"include": [TWO]}, False),
        ({"cat": [at(1, 1)] * 3}, {"include": [TWO], "exclude": [{"class": "cat", "count": 3}]}, False),
        ({"cat": [at(1, 1)] * 2}, {"include": [TWO], "exclude": [{"class": "cat", "count": 3}]}, True),
        ({"cat": [at(90, 9)], "dog": [at(9, 9)]},
         {"include": [CAT, {"class": "dog", "count": 1, "position": ["left of", 0]}]}, True),
        ({"cat": [at(9, 9)], "dog": [at(90, 9)]},
         {"include": [CAT, {"class": "dog", "count": 1, "position": ["left of", 0]}]}, False),
        ({"dog": [at(90, 9)]}, {"include": [CAT, {"class": "dog", "count": 1, "position": ["above", 0]}]}, False),
        # only the surest cat is looked at
        ({"cat": [at(90, 9), at(9, 9)], "dog": [at(50, 9)]},
         {"include": [CAT, {"class": "dog", "count": 1, "position": ["left of", 0]}]}, True),
        ({"cat": [at(1, 1)]}, {"include": [{**CAT, "color": "red"}]}, True),
        ({"cat": [at(1, 1)]}, {"include": [{**CAT, "color": "blue"}]}, False),
        ({"cat": [at(1, 1)] * 2}, {"include": [{**TWO, "color": "red"}]}, False),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_there(found, wanted, right):
    # one red object, and as many grey ones as there are more
    wrong = faults(found, wanted, lambda ones, thing: ["red", *["black"] * (len(ones) - 1)])
    assert (wrong == []) == right and all("cat" in fault or "dog" in fault for fault in wrong)


@pytest.fixture(scope="module")
def two_dogs(tmp_path_factory):
    return Detector.load(tiny_towers.write_detr(tmp_path_factory.mktemp("detr"), always=1))


def asked(thing: str, count: int, tag: str = "counting", **more) -> dict:
    parts = {"include": [{"class": thing, "count": count, **more}]}
    return {"tag": tag, **parts, "exclude": [{"class": thing, "count": count + 1}], "prompt": thing}


def test_the_metric_is_the_mean_over_prompts_and_says_what_it_depends_on(two_dogs):
    pictures = [[noise(48, 48, n) for n in range(2)]] * 3
    wanted = [asked("dog", 2), asked("dog", 1), asked("cat", 1)]
    result = geneval(pictures, wanted, detector=two_dogs)
    assert result.value == pytest.approx(1 / 3) and result.samples.tolist() == [1, 0, 0] and result.n == 3
    assert two_dogs.name in result.name and "scores=0.3,0.9" in result.name and "pictures=6" in result.name
    assert geneval(pictures, wanted, detector=two_dogs, scores=(0.3, 1.0)).value == 0  # nobody is surer
    lacking = geneval(pictures, [asked("dog", 1, color="red")] * 3, detector=two_dogs)
    assert lacking.value is None and "no CLIP" in lacking.reason and "--clip" in lacking.fix
    unknown = geneval(pictures, [asked("zebra", 1)] * 3, detector=two_dogs)
    assert unknown.value is None and "zebra" in unknown.reason


def test_colours_are_told_by_a_clip(two_dogs, tmp_path):
    clip = PictureTower.load(tiny_towers.write_clip(tmp_path), texts=True)
    values = {
        colour: geneval(
            [[noise(48, 48, 1)]], [asked("dog", 2, "colors", color=colour)], detector=two_dogs, clip=clip
        )
        for colour in ("red", "blue", "green")
    }
    assert all(result.value in (0, 1) and clip.name in result.name for result in values.values())


def test_an_object_is_cut_out_and_what_is_not_its_own_is_grey():
    picture = Image.new("RGB", (30, 20), (255, 0, 0))
    mask = np.zeros((20, 30), bool)
    mask[5:10, 10:15] = True
    cut = np.asarray(_cut(picture, DetectedObject(1.0, (8, 5, 18, 15), mask)))
    assert cut.shape == (10, 10, 3) and (cut[:5, 2:7] == (255, 0, 0)).all() and (cut[5:] == 153).all()
    assert _cut(picture, DetectedObject(1.0, (3.2, 3.2, 3.9, 3.9))).size == (8, 8)
