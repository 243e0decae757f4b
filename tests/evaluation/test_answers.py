"""Records become questions; answers are kept, and a killed run ends like one that was not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pictures import noise

from unigen.evaluation.answers import Answer, AnswersError, BatchesOfProcess, Prediction, answer_all
from unigen.evaluation.cases import batches, case_of, cases_of
from unigen.sequence.types import Image, Origin, Record, Text


def record(*segments) -> Record:
    return Record(list(segments), Origin(Path("val.jsonl"), 7), "test")


A, B = Image("a.png"), Image("b.png", target=True)
ASKED, SAID = Text("What?"), Text("a cat", True, ("a tabby",))


PIC, DRAWN, RIGHT = Path("a.png"), Path("b.png"), ("a cat", "a tabby")


@pytest.mark.parametrize(
    ("segments", "task", "prompt", "outputs", "references"),
    [
        ((ASKED, SAID), "text", ("What?",), ("text",), (RIGHT,)),
        ((A, ASKED, SAID), "understand", (PIC, "What?"), ("text",), (RIGHT,)),
        ((ASKED, B), "generate", ("What?",), ("image",), (DRAWN,)),
        ((A, ASKED, B), "edit", (PIC, "What?"), ("image",), (DRAWN,)),
        ((ASKED, SAID, B), "interleaved", ("What?",), ("text", "image"), (RIGHT, DRAWN)),
        # a conversation: its last answer; the first one is given
        ((ASKED, SAID, Text("And?"), B), "generate", ("What?", "a cat", "And?"), ("image",), (DRAWN,)),
        ((ASKED, B, Text("And?"), SAID), "understand", ("What?", DRAWN, "And?"), ("text",), (RIGHT,)),
        # what stands behind it asks nothing
        ((ASKED, SAID, Text("Thanks.")), "text", ("What?",), ("text",), (RIGHT,)),
    ],
)
def test_the_last_answer_of_a_record_is_asked_for(segments, task, prompt, outputs, references):
    case = case_of(record(*segments), 3)
    assert (case.task, case.prompt, case.outputs, case.references) == (task, prompt, outputs, references)
    assert case.number == 3 and case.where == "val.jsonl:7"
    assert case.source == next((piece for piece in prompt if isinstance(piece, Path)), None)
    assert case.texts == [given for given in references if isinstance(given, tuple)]


def test_a_further_step_of_an_edit_starts_from_the_picture_of_the_last():
    further = case_of(record(A, ASKED, B, Text("And?"), B), 0)
    assert further.prompt == (PIC, "What?", DRAWN, "And?") and further.source == DRAWN
    # a picture that was given for the next one is no answer
    assert case_of(record(A, ASKED, SAID, A, Text("And?"), B), 0).source == PIC


@pytest.mark.parametrize("segments", [(SAID,), (ASKED, A), ()])
def test_a_record_that_asks_nothing_is_no_case(segments):
    assert case_of(record(*segments), 0) is None


RECORDS = [
    record(ASKED, SAID),
    record(SAID),
    record(ASKED, B),
    record(A, ASKED, SAID),
    record(Text("Draw."), B),
]


def test_cases_keep_the_order_and_batches_ask_for_the_same():
    cases, silent = cases_of(RECORDS)
    assert [case.number for case in cases] == [0, 2, 3, 4] and silent == 1
    assert [[case.number for case in batch] for batch in batches(cases, 2)] == [[2, 4], [0, 3]]
    assert [case.number for case in cases_of(RECORDS, limit=2)[0]] == [0, 2]


ODD = "\u2028\x85\x0c\r"  # other line ends than JSONL's


class Model:
    """Answers from the seed alone, and may be killed before a batch."""

    def __init__(self, dies_before: int | None = None):
        self.asked: list[int] = []
        self.dies_before = dies_before

    def __call__(self, prompts, outputs, seed):
        if len(self.asked) == self.dies_before:
            raise KeyboardInterrupt
        self.asked.append(seed)
        return [
            Answer(
                [
                    f"{prompt[-1]} 猫{ODD} {seed + i}" if kind == "text" else noise(8, 8, seed + i)
                    for kind in outputs
                ],
                True,
            )
            for i, prompt in enumerate(prompts)
        ]


CASES = cases_of(RECORDS * 3)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dies_before", range(6))
def test_a_killed_run_ends_with_the_same_answers(dies_before, tmp_path):
    whole, model = tmp_path / "whole", Model()
    expected = answer_all(CASES, model, whole, {"digest": "x"}, batch_size=2, seed=5)
    killed, first, second = tmp_path / "killed", Model(dies_before), Model()
    with pytest.raises(KeyboardInterrupt):
        answer_all(CASES, first, killed, {"digest": "x"}, batch_size=2, seed=5)
    assert not (killed / "predictions.jsonl").exists()
    found = answer_all(CASES, second, killed, {"digest": "x"}, batch_size=2, seed=5)
    assert contents(killed) == contents(whole)
    assert first.asked + second.asked == model.asked  # nothing twice
    assert [p.number for p in found] == [p.number for p in expected] == [case.number for case in CASES]


def test_predictions_say_what_was_answered(tmp_path):
    seen: list[int] = []
    found = answer_all(CASES[:2], Model(), tmp_path, {}, seed=5, tick=seen.append)
    assert seen == [1, 2]
    lines = (tmp_path / "predictions.jsonl").read_bytes().decode().split("\n")[:-1]
    assert json.loads(lines[0]) == {
        "number": 0, "where": "val.jsonl:7", "task": "text", "seed": 6, "stopped": True,
        "pieces": [{"text": f"What? 猫{ODD} 6"}],
    }  # fmt: skip
    assert [Prediction.of(json.loads(line), tmp_path) for line in lines] == found
    from unigen.sequence.images import open_image

    assert (np.asarray(open_image(found[1].pieces[0])) == np.asarray(noise(8, 8, 5))).all()


@pytest.mark.parametrize("worlds", [(2,), (3, 2), (2, 1)])
def test_however_many_processes_share_the_batches_the_answers_are_the_same(worlds, tmp_path):
    """Each in turn stands for processes side by side, that were killed where they would have met."""
    answer_all(CASES, Model(), tmp_path / "one", {}, batch_size=2, seed=5)
    asked = []

    def gone():
        raise KeyboardInterrupt

    for world in worlds:
        for rank in reversed(range(world)):
            model = Model(None if world == worlds[-1] else 1)
            with pytest.raises(KeyboardInterrupt):
                answer_all(
                    CASES,
                    model,
                    tmp_path / "many",
                    {},
                    batch_size=2,
                    seed=5,
                    part=BatchesOfProcess(rank, world, gone),
                )
            asked += model.asked
    assert sorted(asked) == sorted(set(asked)) and len(asked) == 6  # each batch by one of them
    found = answer_all(CASES, Model(0), tmp_path / "many", {}, batch_size=2, seed=5)
    assert [p.number for p in found] == [case.number for case in CASES]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize("lost", ["pictures/000002_0.png", "batches/00000.jsonl"])
def test_what_is_lost_is_asked_for_again(lost, tmp_path):
    answer_all(CASES, Model(), tmp_path, {}, batch_size=2)
    before, model = contents(tmp_path), Model()
    (tmp_path / lost).unlink()
    answer_all(CASES, model, tmp_path, {}, batch_size=2)
    assert model.asked == [0] and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"about": {"checkpoint": "y", "sampling": {"a": 1, "b": 2}}}, "another --model_path, --b (1 -> 2)."),
        (  # other data have another number of records: no --samples was given
            {"about": {"checkpoint": "x", "sampling": {"a": 1, "b": 1}, "data": "z"}, "cases": CASES[:3]},
            "another --data_path.",
        ),
        # the digest of the checkpoint follows from these, and all that is sampled from who answers
        (
            {"about": {"checkpoint": "y", "sampling": {"a": 1, "b": 1}, "quantize": "nf4", "adapter": [0.5]}},
            'another --adapter (null -> [0.5]), --quantize, or bits of --model_path (null -> "nf4").',
        ),
        ({"about": {"predictions": "z", "sampling": {}}}, "another --predictions."),
        (
            {"about": {"checkpoint": "x", "sampling": {"a": 1, "b": 1}, "images": "z"}},
            "another content of the pictures given.",
        ),
        ({"seed": 1}, "--seed (0 -> 1)."), ({"batch_size": 3}, "--batch_size (2 -> 3)."),
        ({"cases": CASES[:3]}, f"another --samples ({len(CASES)} -> 3)."),
    ],
)  # fmt: skip
def test_a_folder_of_other_answers_is_left_alone(other, told, tmp_path):
    about = {"checkpoint": "x", "sampling": {"a": 1, "b": 1}}
    given = {"cases": CASES, "about": about, "seed": 0, "batch_size": 2}
    answer_all(given["cases"], Model(), tmp_path, given["about"], batch_size=2, seed=0)
    before, changed = contents(tmp_path), {**given, **other}
    with pytest.raises(AnswersError, match=re.escape(told) + " Fix: give another folder"):
        answer_all(
            changed["cases"], Model(), tmp_path, changed["about"],
            batch_size=changed["batch_size"], seed=changed["seed"],
        )  # fmt: skip
    assert contents(tmp_path) == before


def test_a_damaged_description_is_an_error(tmp_path):
    (tmp_path / "answers.json").write_text("{")
    with pytest.raises(AnswersError, match="damaged"):
        answer_all(CASES, Model(), tmp_path, {})
