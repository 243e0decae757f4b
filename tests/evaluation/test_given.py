"""Answers from a file: our own and simple ones, and a line for every mistake."""

import json
from pathlib import Path

import pytest
from pictures import noise

from unigen.evaluation.answers import Answer, answer_all
from unigen.evaluation.cases import cases_of
from unigen.evaluation.given import PredictionsError, read_predictions
from unigen.sequence.types import Image, Origin, Record, Text

WHERE = Origin(Path("val.jsonl"), 1)
CASES = cases_of(
    Record([Text("What?"), Text("a cat", True)], WHERE, "test", {"id": name}) for name in ("a", "b", 3)
)[0]


def write(path: Path, *lines) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_records_are_named_by_index_by_id_or_as_we_write_them(tmp_path):
    noise(8, 8, 1).save(tmp_path / "x.png")
    lines = [
        {"id": "b", "text": "two", "image": "x.png"}, {"index": 0, "text": "one"}, {"index": 7, "text": "no case"},
        {"number": 2, "pieces": [{"image": str(tmp_path / "x.png")}, {"text": "three"}], "stopped": False},
    ]  # fmt: skip
    found = read_predictions(write(tmp_path / "p.jsonl", *lines), CASES)
    picture = tmp_path / "x.png"
    assert [one.pieces for one in found] == [("one",), ("two", picture), (picture, "three")]
    assert [one.number for one in found] == [0, 1, 2] and [one.stopped for one in found] == [
        None,
        None,
        False,
    ]


def test_our_own_predictions_are_read_as_they_were_written(tmp_path):
    def ask(prompts, outputs, seed):
        return [Answer([f"said\u2028{seed + i}"], True) for i in range(len(prompts))]

    made = answer_all(CASES, ask, tmp_path, {}, seed=5)
    found = read_predictions(tmp_path / "predictions.jsonl", CASES)
    assert [(one.pieces, one.stopped) for one in found] == [(one.pieces, one.stopped) for one in made]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{"], ":1: is no JSON"),
        (["[]"], ":1: is no object"),
        ([{"text": "a"}], ":1: names no record"),
        ([{"index": -1, "text": "a"}], ":1: index is -1"),
        ([{"index": "0", "text": "a"}], ':1: index is "0".'),
        ([{"index": 0}], ":1: holds no answer"),
        ([{"index": 0, "text": 3}], "no text"),
        ([{"index": 0, "image": "none.png"}], "no picture"),
        ([{"index": 0, "image": "http://127.0.0.1/a.png"}], "no picture http://127.0.0.1/a.png. Fix: a path"),
        ([{"index": 0, "text": "a"}, {"id": "a", "text": "b"}], ":2: answers record 0 again, as line 1"),
        ([{"index": 0, "text": "a"}], "2 of 3 records have no answer, the first is record 1"),
    ],
)
def test_a_mistake_names_its_line(lines, words, tmp_path):
    with pytest.raises(PredictionsError) as error:
        read_predictions(write(tmp_path / "p.jsonl", *lines), CASES)
    assert words in str(error.value) and "Fix:" in str(error.value)


def test_a_picture_outside_of_the_given_folder_is_not_read(tmp_path):
    from unigen.sequence.images import PictureError, open_image

    (tmp_path / "inside").mkdir()
    noise(8, 8, 1).save(tmp_path / "x.png")
    record = Record([Text("Draw."), Image("b.png", True)], WHERE, "test")
    path = write(tmp_path / "p.jsonl", {"index": 0, "image": "x.png"})
    found = read_predictions(path, cases_of([record])[0], tmp_path / "inside")
    with pytest.raises(PictureError):
        open_image(found[0].pieces[0])


def test_an_id_where_records_have_none_is_told(tmp_path):
    record = Record([Text("What?"), Text("a", True)], WHERE, "test")
    with pytest.raises(PredictionsError, match="no record has one"):
        read_predictions(write(tmp_path / "p.jsonl", {"id": "a", "text": "b"}), cases_of([record])[0])
