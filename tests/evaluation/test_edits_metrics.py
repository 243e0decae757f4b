"""Did what should change, and did what should stay: hand-made pictures, computed by hand."""

import numpy as np
import pytest
from PIL import Image as Pillow

from unigen.evaluation.edits import edit_changed, edit_stayed


def picture(left: int, right: int):
    """The left half of one level, the right half of another."""
    levels = np.full((8, 8, 3), left, np.uint8)
    levels[:, 4:] = right
    return Pillow.fromarray(levels)


SOURCE, REFERENCE = picture(100, 0), picture(100, 200)  # the right half changes


@pytest.mark.parametrize(
    ("made", "changed", "stayed"),
    [
        (REFERENCE, 1, 1),
        (SOURCE, 0, 1),
        (picture(100, 150), 0.75, 1),
        (picture(151, 200), 1, 0.8),  # 51 of 255 levels beside it
        (picture(100, 255), 1 - 55 / 200, 1),
    ],
)
def test_the_two_halves_are_told_apart(made, changed, stayed):
    assert edit_changed([made], [SOURCE], [REFERENCE]).value == pytest.approx(changed)
    assert edit_stayed([made], [SOURCE], [REFERENCE]).value == pytest.approx(stayed)


def test_edits_that_leave_nothing_count_for_what_changed_alone():
    whole = picture(0, 255)
    inverted = picture(255, 0)
    made, sources, references = [REFERENCE, inverted], [SOURCE, whole], [REFERENCE, inverted]
    assert edit_changed(made, sources, references).value == 1
    stayed = edit_stayed(made, sources, references)
    assert stayed.value == 1 and stayed.notes == ("1 of 2 edits count",)
    none = edit_stayed([inverted], [whole], [inverted])
    assert none.value is None and none.lacks == "samples"


def test_pictures_of_another_size_are_resized():
    assert edit_changed([REFERENCE.resize((16, 16))], [SOURCE], [REFERENCE]).value > 0.9
