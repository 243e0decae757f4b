"""The table of keys: every kind has its row, notes are bounded."""

import json
from pathlib import Path

import pytest
from checking import check

from unigen.commands.preview.command import preview
from unigen.commands.preview.pick import PreviewOptions
from unigen.config import DataOptions
from unigen.data import keys
from unigen.data.containers import BadData
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.formats import parse_record, parse_with_fields
from unigen.data.mapping import ReadOptions
from unigen.model.weights import load_planner
from unigen.sequence.types import BadRecord, Origin

TURNS = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "qrst")]
WHERE = Origin(Path("a.jsonl"), 1)


def learnt(record: dict) -> list[tuple[str, float]]:
    """The targets of a record, and how much each counts."""
    return [
        (segment.text, segment.weight) for segment in parse_record(record, WHERE).sample if segment.target
    ]


def refused(record: dict) -> tuple[str, str]:
    with pytest.raises(BadRecord) as caught:
        parse_record(record, WHERE)
    return caught.value.code, caught.value.field


def test_a_slip_of_the_pen_is_named() -> None:
    with pytest.raises(BadRecord) as caught:
        keys.check_keys({"content": "a", "traget": False}, "sequence[1]", "segment")
    assert (caught.value.code, caught.value.field) == ("unknown_key", "sequence[1].traget")
    assert "did you mean target?" in caught.value.fix and "metadata" in caught.value.fix


@pytest.mark.parametrize(
    ("key", "kind", "meant"),
    [
        ("thinking", "message", "reasoning_content"),
        ("mask", "speaker", "loss"),
        ("train", "turn", "target"),
    ],
)
def test_keys_of_other_trainers_are_answered_with_ours(key: str, kind: str, meant: str) -> None:
    with pytest.raises(BadRecord, match=f"did you mean {meant}"):
        keys.check_keys({key: 1}, "x", kind)


def test_what_holds_nothing_is_absent() -> None:
    keys.refuse({"tools": "[]"})
    assert keys.unread({"videos": [], "audios": None, "note": "", "other": 0}, ()) == ["other"]
    keys.check_keys({"content": "a", "id": None, "tool_calls": [], "audio": ""}, "x", "segment")
    keys.refuse({"videos": [], "chosen": None, "label": 3})


def test_no_key_is_both_known_and_refused() -> None:
    known = {*keys.RECORD, *keys.LEARNING, *(name for row in keys.ITEMS.values() for name in row)}
    assert not known & keys.REFUSED.keys()


def test_notes_of_any_number_of_fields_stay_few() -> None:
    notes = keys.Notes()
    for i in range(5000):
        notes.add([("unread", "id"), ("unread", f"field {i}")])
    assert len(notes) < 600 and notes.of("unread")["id"] == 5000
    assert sum(notes.of("unread").values()) == 10_000 and notes.of("no_picture") == {}
    told = keys.counts_of(notes.of("unread"), 5000, most=2)
    assert told.startswith("id 5,000 of 5,000, (others)") and told.endswith("more")


def test_records_that_say_no_are_left_out_and_counted_by_all(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    silent = [{"messages": turns, "weight": 0}, {"messages": [turns[0], turns[1] | {"loss": False}]}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*silent, {"messages": turns}]))
    dataset = UnifiedGenerationDataset(path)
    assert len(dataset) == 1 and dataset[0].origin.line == 3 and not dataset.bad
    assert dataset.statistics()["unlearnt"] == {"weight": 1, "messages": 1}
    assert "weight 1 of 3, messages 1 of 3" in dataset.describe()
    found = check(path, load_planner(None, DataOptions()), num_workers=0)
    assert not len(found.problems) and found.summary()["unlearnt"] == dataset.statistics()["unlearnt"]
    assert preview(PreviewOptions(paths=[str(path)], output=None)) == 0
    path.write_text("".join(json.dumps(record) + "\n" for record in silent))
    with pytest.raises(BadData, match="weight of 0 in all 2 records"):
        UnifiedGenerationDataset(path)
    assert dict(check(path, load_planner(None, DataOptions()), num_workers=0).problems.counts) == {
        "no_target": 1
    }


def test_a_record_says_with_target_too_that_it_is_not_learnt(tmp_path: Path) -> None:
    asked = [{"query": f"q{i}", "response": "a", "keep": i > 0} for i in range(2)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"target": row.pop("keep"), **row}) + "\n" for row in asked))
    table, named = tmp_path / "a.csv", tmp_path / "b.csv"
    table.write_text("query,response,target\nq0,a,false\nq1,a,true\n")
    named.write_text("query,response,keep\nq0,a,false\nq1,a,true\n")
    for path, fields in ((lines, {}), (table, {}), (named, {"target": "keep"})):
        dataset = UnifiedGenerationDataset(path, read=ReadOptions(fields=fields))
        assert [record.sample[0].text for record in dataset] == ["q1"]
        assert dataset.statistics()["unlearnt"] == {"target": 1} and not dataset.statistics()["unread"]


def test_a_mask_of_a_talk_says_which_turns_are_learnt() -> None:
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]
    pairs = {"images": [], "texts": [{"user": "q", "assistant": "r"}, {"user": "s", "assistant": "t"}]}
    for record, targets in (
        ({"messages": TURNS, "loss_mask": [0, 0, 0, 1]}, [("t", 1)]),
        ({"messages": TURNS, "loss_mask": [True, 0.5, False, None]}, [("q", 1), ("r", 0.5), ("t", 1)]),
        ({"messages": [*TURNS[:3], TURNS[3] | {"weight": 0.5}], "loss_mask": [0, 1, 0, 1]}, [("r", 1), ("t", 0.5)]),
        ({"conversations": said, "loss_mask": [0, 1], "weight": 0.5}, [("r", 0.5)]),
        ({"sequence": [{"content": "a"}, {"content": "b"}], "loss_mask": [0, 1]}, [("b", 1)]),
        (pairs | {"loss_mask": [0, 1]}, [("t", 1)]),
        ({"query": "q", "response": "r", "loss_mask": True}, [("r", 1)]),
        ({"messages": [*TURNS[:3], TURNS[3] | {"loss_mask": 0}]}, [("r", 1)]),
    ):  # fmt: skip
        assert learnt(record) == targets, record
        assert not parse_record(record, WHERE).notes


def test_a_mask_that_may_mean_another_thing_is_refused() -> None:
    assert refused({"messages": TURNS, "loss_mask": [0, 1]}) == ("wrong_type", "loss_mask")
    assert refused({"query": "q", "response": "r", "loss_mask": [0, 1]}) == ("wrong_type", "loss_mask")
    shown = [{"path": "a.png"}, {"path": "b.png"}]
    edits = {"image_list": shown, "instruction_list": ["red"], "loss_mask": [0, 1]}
    assert refused(edits) == ("wrong_type", "loss_mask")
    assert refused({"messages": TURNS, "loss_mask": [0, 2, 0, 1]}) == ("wrong_type", "messages[1].loss_mask")
    contrary = {"messages": [TURNS[0], TURNS[1] | {"loss": False}], "loss_mask": [0, 1]}
    assert refused(contrary) == ("ambiguous_piece", "messages[1].loss")
    for mask in ([0, 0, 0, 0], False):
        with pytest.raises(keys.Unlearnt):
            parse_record({"messages": TURNS, "loss_mask": mask}, WHERE)
    masked = {"messages": TURNS, "loss_mask": [0, 0, 0, 0]}
    assert [text for text, _ in learnt(keys.all_learnt(masked))] == ["r", "t"]


def test_training_on_inputs_is_done_where_it_can_mean_one_thing() -> None:
    talk = {"messages": TURNS, "system": "be brief"}
    assert [text for text, _ in learnt(talk | {"train_on_inputs": True})] == ["be brief", *"qrst"]
    assert [text for text, _ in learnt(talk | {"train_on_inputs": False})] == ["r", "t"]
    assert keys.in_text("train_on_inputs", "True") is True and keys.in_text("train_on_inputs", "1") == "1"
    asked = {"instruction": "q", "output": "r", "train_on_inputs": True}
    assert [text for text, _ in learnt(asked)] == ["q", "r"]
    told = {"text_prompt": "red", "image_path": "a.png"}
    assert parse_record(told | {"train_on_inputs": False}, WHERE).sample[1].target
    document = {"sequence": [{"content": "a"}]}
    for record in (
        told | {"train_on_inputs": True},
        document | {"train_on_inputs": False},
        talk | {"train_on_inputs": True, "loss_mask": [0, 1, 0, 1]},
    ):
        assert refused(record) == ("unsupported_key", "train_on_inputs")
    assert refused(talk | {"train_on_inputs": "yes"}) == ("wrong_type", "train_on_inputs")


def test_numbers_that_say_how_good_something_is_are_refused_and_classes_counted() -> None:
    drawn = {"image": "a.png", "prompt": "red"}
    assert refused({"messages": TURNS[:2], "label": 1}) == ("unsupported_key", "label")
    assert refused({"prompt": "q", "completion": "r", "label": 0}) == ("unsupported_key", "label")
    assert refused(drawn | {"rank": 3, "overall_rating": 2}) == ("unsupported_key", "rank")
    assert refused(drawn | {"ranking": [2, 1]}) == ("unsupported_key", "ranking")
    for record in (drawn | {"label": 1}, drawn | {"rank": 3}, {"messages": TURNS[:2], "label": 7}):
        assert [field for _, field in parse_record(record, WHERE).notes] == [[*record][-1]]
    given = ReadOptions(fields={"metadata": "label"})
    assert parse_with_fields({"messages": TURNS[:2], "label": 1}, WHERE, given)[0].sample[1].target
