"""The formats: what each becomes, and every way a record can be wrong."""

import copy
import datetime
import decimal
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unigen.data.formats import FORMATS, parse_raw, parse_record, parse_with_fields
from unigen.data.keys import Unlearnt
from unigen.data.mapping import ReadOptions
from unigen.sequence.images import Confined, open_image
from unigen.sequence.types import BadRecord, Image, Origin, Text

ORIGIN = Origin(Path("/data/set/train.jsonl"), line=7)
EXAMPLE = Path(__file__).parents[2] / "examples" / "sample_data_format.json"


def shape(value) -> list[str]:
    """The sample in short: ``hello`` for a text (``hello|hi`` with another wording), ``[a.png]`` for an image
    (relative to the file), ``*`` behind a target."""
    pieces = []
    for piece in parse_record(value, ORIGIN).sample:
        if isinstance(piece, Text):
            body = "|".join((piece.text, *piece.others))
        else:
            body = (
                f"[{piece.source!r}]"
                if isinstance(piece.source, bytes)
                else f"[{piece.source.relative_to('/data/set')}]"
            )
        pieces.append(body + "*" * piece.target)
    return pieces


def bad(value) -> BadRecord:
    with pytest.raises(BadRecord) as caught:
        parse_record(value, ORIGIN)
    error = caught.value
    assert error.origin == ORIGIN and str(error).startswith("/data/set/train.jsonl:7: ")
    assert error.found and error.expected and error.fix
    str(error).encode()
    return error


def turn(role, text=None, image=None, **more):
    piece = {"role": role, **more}
    return piece | ({"type": "image", "image_path": image} if image else {"type": "text", "content": text})


def text(content, **more):
    return {"type": "text", "content": content, **more}


def image(path, **more):
    return {"type": "image", "image_path": path, **more}


# ---- 1 conversation


def test_conversation_keeps_order_and_trains_the_assistant() -> None:
    turns = [
        turn("system", "S"),
        turn("user", "a"),
        turn("user", image="x.png"),
        turn("assistant", "b"),
        turn("assistant", image="y.png"),
    ]
    assert shape({"conversations": [*turns, turn("user", "c"), turn("assistant", "d")]}) == [
        "S",
        "a",
        "[x.png]",
        "b*",
        "[y.png]*",
        "c",
        "d*",
    ]


def test_type_defaults_to_text_and_texts_stay_apart_and_unstripped() -> None:
    turns = [
        {"role": "user", "content": " a\n"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": " c "},
    ]
    assert shape({"conversations": turns}) == [" a\n", "b", " c *"]


EVERY_TURN = [  # one record of every format with turns or segments, whose last target is `last`
    lambda **last: {
        "conversations": [turn("user", "q"), turn("assistant", "a"), turn("assistant", "b", **last)]
    },
    lambda **last: {"input_sequence": [text("q")], "target_sequence": [text("a"), text("b", **last)]},
    lambda **last: {"sequence": [image("x"), text("a"), text("b", **last)]},
    lambda **last: {
        "messages": [message("user", "q"), message("assistant", "a"), message("assistant", "b") | last]
    },
    lambda **last: {
        "conversations": [*said(("human", "q"), ("gpt", "a")), {"from": "gpt", "value": "b", **last}]
    },
    lambda **last: {
        "input_image": "x",
        "editing_steps": [
            {"instruction": "a", "result_image": "y"},
            {"instruction": "b", "result_image": "z", **last},
        ],
    },
    lambda **last: {
        "messages": [
            message("user", "q"),
            message("assistant", [{"type": "text", "text": "a"}, {"type": "text", "text": "b", **last}]),
        ]
    },
]


@pytest.mark.parametrize("made", EVERY_TURN)
def test_what_a_turn_says_of_its_learning_holds_in_every_format(made) -> None:
    def last(**said):
        *_, segment = parse_record(made(**said), ORIGIN).sample
        assert parse_record(made(**said), ORIGIN).sample[:-1] == parse_record(made(), ORIGIN).sample[:-1]
        return segment.target, segment.weight

    assert last() == last(target=True) == last(loss=True) == last(weight=1) == last(has_loss=1) == (True, 1.0)
    for key in ("loss", "weight", "loss_weight", "loss_scale", "has_loss"):
        assert last(**{key: 0}) == last(**{key: False}) == (False, 1.0)
    assert last(target=False) == (False, 1.0)
    assert last(weight=0.25) == last(weight=0.25, target=True) == last(loss=0.25) == (True, 0.25)
    assert last(weight=None, metadata={"id": 1}) == (True, 1.0)


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [turn("user", "q")], "stats": {"loss": 0}},
        {"conversations": [turn("user", "q", weight=0)]},
    ],
)
def test_a_record_without_an_answer_is_bad_whatever_is_not_learnt(record) -> None:
    assert type(bad(record)) is BadRecord
    answered = {"conversations": [turn("user", "q"), turn("assistant", "a", weight=0)]}
    assert type(bad(answered)) is Unlearnt


@pytest.mark.parametrize("names", [("query", "response"), ("instruction", "output")])
def test_a_thinking_text_stands_before_the_answer_it_leads_to(names) -> None:
    record = dict(zip(names, ("q", "a")), history=[["q0", "a0"]], reasoning_content="hm")
    assert shape(record) == ["q0", "a0*", "q", "<think>hm</think>*", "a*"]


def test_a_user_turn_may_be_learnt() -> None:
    turns = [message("user", "q") | {"weight": 0.5}, message("assistant", "a")]
    assert shape({"messages": turns}) == ["q*", "a*"]


def test_a_system_field_comes_first_in_every_format() -> None:
    for made in EVERY_TURN:
        sample = parse_record(made() | {"system": "Be brief."}, ORIGIN).sample
        assert sample == [Text("Be brief."), *parse_record(made(), ORIGIN).sample]
    assert shape({"text_prompt": "a", "image_path": "x", "system": ""}) == ["a", "[x]*"]


def test_thoughts_come_before_their_turn_and_are_learnt_with_it() -> None:
    record = {"messages": [message("user", "q"), message("assistant", "a") | {"reasoning_content": "hm"}]}
    assert shape(record) == ["q", "<think>hm</think>*", "a*"]
    assert parse_with_fields(record, ORIGIN)[1][1] == "messages[1].reasoning_content"
    record["messages"][1]["loss"] = False
    record["messages"].append(message("assistant", "b"))
    assert shape(record) == ["q", "<think>hm</think>", "a", "b*"]
    step = {"instruction": "a", "result_image": "y", "reasoning_content": "<think>so</think>"}
    assert shape({"input_image": "x", "editing_steps": [step]}) == ["[x]", "a", "<think>so</think>*", "[y]*"]
    drawn = {"text_prompt": "a", "image_path": "x", "reasoning_content": "hm"}
    assert shape(drawn) == ["a", "<think>hm</think>*", "[x]*"]


def test_a_weight_of_the_record_holds_for_all_its_targets() -> None:
    turns = [message("user", "q"), message("assistant", "a") | {"weight": 0.5}, message("assistant", "b")]
    sample = parse_record({"messages": turns, "loss_weight": 0.5}, ORIGIN).sample
    assert [(s.target, s.weight) for s in sample] == [(False, 0.5), (True, 0.25), (True, 0.5)]


def test_an_image_tag_is_ordinary_text_outside_messages() -> None:
    assert shape({"conversations": [turn("user", "a <image> b"), turn("assistant", "c")]}) == [
        "a <image> b",
        "c*",
    ]


def test_target_of_a_piece_wins_over_its_role() -> None:
    turns = [
        turn("user", "a", target=True),
        turn("assistant", image="x.png", target=False),
        turn("assistant", "b", target=None),
    ]
    assert shape({"conversations": turns}) == ["a*", "[x.png]", "b*"]


# ---- 2 direct


def test_direct() -> None:
    record = {"input_sequence": [text("a"), image("x.png")], "target_sequence": [text("b"), image("y.png")]}
    assert shape(record) == ["a", "[x.png]", "b*", "[y.png]*"]
    record = {"input_sequence": [text("a", target=True)], "target_sequence": [image("y.png", target=False)]}
    assert shape(record) == ["a*", "[y.png]"]
    assert shape({"input_sequence": [], "target_sequence": [text("b")]}) == ["b*"]


# ---- 3, 4 pairs


def test_pairs() -> None:
    assert shape({"text_prompt": "a", "image_path": "x.png"}) == ["a", "[x.png]*"]
    assert shape({"image_path": "x.png", "caption": "a"}) == ["[x.png]", "a*"]
    # null is as absent
    assert shape({"image_path": "x.png", "caption": "a", "text_prompt": None}) == ["[x.png]", "a*"]


# ---- 5 editing


def steps(*numbers):
    made = [{"instruction": f"do {i}", "result_image": f"{i}.png"} for i in range(len(numbers))]
    return {
        "input_image": "in.png",
        "editing_steps": [s | ({} if n is None else {"step": n}) for s, n in zip(made, numbers)],
    }


def test_editing() -> None:
    assert shape(steps(1, 2)) == ["[in.png]", "do 0", "[0.png]*", "do 1", "[1.png]*"]


@pytest.mark.parametrize("numbers", [(None, None), (1, None, 3), (None, 2, 3), (0, 1), (1,)])
def test_steps_that_count_up(numbers) -> None:
    assert len(shape(steps(*numbers))) == 1 + 2 * len(numbers)


@pytest.mark.parametrize(
    ("numbers", "at"), [((1, 3), 1), ((1, 1), 1), ((2, 1), 1), ((1, None, 2), 2), ((1, 2, 4), 2)]
)
def test_steps_that_do_not(numbers, at: int) -> None:
    error = bad(steps(*numbers))
    assert (error.code, error.field) == ("bad_step_number", f"editing_steps[{at}].step")


# ---- 6 interleaved


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([text("a"), image("x")], ["a", "[x]*"]),
        # an image anywhere after it
        ([text("a"), text("b"), image("x"), text("c")], ["a", "b*", "[x]*", "c*"]),
        ([text("a"), text("b")], ["a*", "b*"]),
        ([text("a")], ["a*"]),
        ([image("x"), text("a")], ["[x]", "a*"]),
        ([image("x"), image("y")], ["[x]", "[y]*"]),
        ([text("a", target=True), image("x")], ["a*", "[x]*"]),
        ([image("x", target=True)], ["[x]*"]),
        ([text("a", target=False), text("b")], ["a", "b*"]),
        ([text("a"), image("x", target=False), text("b")], ["a", "[x]", "b*"]),
    ],
)
def test_interleaved(pieces, expected) -> None:
    assert shape({"sequence": pieces}) == expected


# ---- 7 messages


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("user", "assistant", "images", "expected"),
    [
        ("q", "a", [], ["q", "a*"]),
        ("<image>\nq", "a", ["x"], ["[x]", "q", "a*"]),
        ("q", "a <image> b\n<image>", ["x", "y"], ["q", "a*", "[x]*", "b*", "[y]*"]),
        (" q <image> r ", " a ", ["x"], [" q", "[x]", "r ", " a *"]),  # stripped around the tag alone
        ("q", "<image>", ["x"], ["q", "[x]*"]),
        ("q", "<image> \n <image>", ["x", "y"], ["q", "[x]*", "[y]*"]),
        ("q", "a<image>", ["x", "y", "z"], ["[x]", "[y]", "q", "a*", "[z]*"]),  # surplus first
        ("<image>q", "a", ["x", "y"], ["[x]", "[y]", "q", "a*"]),
    ],
)
def test_messages(user, assistant, images, expected) -> None:
    assert (
        shape({"messages": [message("user", user), message("assistant", assistant)], "images": images})
        == expected
    )


def test_messages_without_images_field() -> None:
    assert shape({"messages": [message("user", "q"), message("assistant", "a")]}) == ["q", "a*"]


def test_surplus_images_stand_before_the_first_user_text_but_after_the_system_prompt() -> None:
    record = {
        "messages": [message("system", "S"), message("user", "q"), message("assistant", "<image>")],
        "images": ["x", "y"],
    }
    assert shape(record) == ["S", "[x]", "q", "[y]*"]
    assert shape({"messages": [message("assistant", "a")], "images": ["x"]}) == ["[x]", "a*"]


def test_messages_with_list_content() -> None:
    parts = [
        {"type": "text", "text": "look "},
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "image_url", "image_url": "y.png"},
        {"type": "text", "text": " <image> there"},
    ]
    record = {
        "messages": [
            message("user", parts),
            message("assistant", [{"type": "image_url", "image_url": "z.png"}]),
        ],
        "images": ["t.png"],
    }
    assert shape(record) == ["look ", "[x.png]", "[y.png]", "[t.png]", "there", "[z.png]*"]


# ---- 8 ShareGPT, LLaVA


def said(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.mark.parametrize(
    ("turns", "pictures", "expected"),
    [
        ([("human", "q"), ("gpt", "a")], {}, ["q", "a*"]),
        ([("human", "<image>\nq"), ("gpt", "a")], {"image": "x"}, ["[x]", "q", "a*"]),
        ([("human", "q\n<image>"), ("gpt", "a")], {"image": "x"}, ["q", "[x]", "a*"]),
        ([("human", "q"), ("gpt", "a")], {"image": "x"}, ["[x]", "q", "a*"]),  # LLaVA files without the tag
        ([("human", "<image><image> q"), ("gpt", "a")], {"image": ["x", "y"]}, ["[x]", "[y]", "q", "a*"]),
        (
            [("system", "S"), ("user", "q"), ("gpt", "<image>")],
            {"images": ["x", "y"]},
            ["S", "[x]", "q", "[y]*"],
        ),
        (
            [("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b")],
            {"images": None, "image": None},
            ["q", "a*", "r", "b*"],
        ),
        ([("human", "<image>q"), ("gpt", "a")], {"image": b"png"}, ["[b'png']", "q", "a*"]),
    ],
)
def test_sharegpt(turns, pictures, expected) -> None:
    record = {"id": 7, "conversations": said(*turns), **pictures}
    assert shape(record) == expected and parse_record(record, ORIGIN).format == "sharegpt"


@pytest.mark.parametrize("speaker", ["gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"])
def test_names_of_the_assistant(speaker: str) -> None:
    assert shape({"conversations": said(("human", "q"), (speaker, "a"))}) == ["q", "a*"]


def test_pictures_of_sharegpt_know_their_field() -> None:
    record = {"conversations": said(("human", "<image>q"), ("gpt", "a"))}
    assert parse_with_fields(record | {"image": "x"}, ORIGIN)[1] == [
        "image",
        "conversations[0].value",
        "conversations[1].value",
    ]
    assert parse_with_fields(record | {"image": ["x"]}, ORIGIN)[1][0] == "image[0]"
    assert parse_with_fields(record | {"images": ["x"]}, ORIGIN)[1][0] == "images[0]"


# ---- 9 captioned, 10 edit list


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ("a cat", "a cat"),
        ('{"short": "a", "long": "b", "none": null}', "a|b"),
        ('["a", "b"]', "a|b"),
        (' { "x": "a"}', "a"),
        ({"short": "a", "long": None, "long2": "b"}, "a|b"),
        (["a", "b", "a"], "a|b|a"),
        ("[photo] of a cat", "[photo] of a cat"),
        ("{curly}", "{curly}"),
        ("12", "12"),
    ],
)
def test_captioned(captions, expected: str) -> None:
    assert shape({"image": "x", "captions": captions}) == [expected, "[x]*"]
    assert (
        parse_record({"image": {"bytes": b"png", "path": None}, "captions": captions}, ORIGIN).format
        == "captioned"
    )


def test_edit_list() -> None:
    record = {"image_list": [b"0", {"bytes": b"1", "path": "x"}, "y"], "instruction_list": [["a", "b"], "c"]}
    assert shape(record) == ["[b'0']", "a|b", "[b'1']*", "c", "[y]*"]
    assert parse_with_fields(record, ORIGIN)[1] == [
        "image_list[0]", "instruction_list[0][0]", "image_list[1]", "instruction_list[1]", "image_list[2]",
    ]  # fmt: skip


# ---- pictures in tables


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"png", b"png"),
        ({"bytes": b"png", "path": "x"}, b"png"),
        ({"bytes": None, "path": "x"}, Path("/data/set/x")),
        ({"path": "x"}, Path("/data/set/x")),
        ({"bytes": b"png"}, b"png"),
    ],
)
def test_a_picture_may_be_bytes_in_every_format(value, expected) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": value}}]}
    for record in (
        {"conversations": [{"role": "assistant", "type": "image", "image_path": value}]},
        {"input_sequence": [], "target_sequence": [{"type": "image", "image_path": value}]},
        {"text_prompt": "a", "image_path": value},
        {"image_path": value, "caption": "a"},
        {"input_image": value, "editing_steps": [{"instruction": "a", "result_image": value}]},
        {"sequence": [{"type": "image", "image_path": value}, text("a")]},
        {"messages": [message, {"role": "assistant", "content": "<image>"}], "images": [value]},
        {"conversations": said(("human", "<image>"), ("gpt", "a")), "images": [value]},
        {"image": value, "captions": "a"},
        {"image_list": [value, value], "instruction_list": ["a"]},
    ):
        record, _ = parse_with_fields(record, ORIGIN)
        sources = [piece.source for piece in record.sample if isinstance(piece, Image)]
        assert sources and all(source == expected for source in sources), record.format


def test_an_empty_cell_is_an_absent_field() -> None:
    row = {
        "text_prompt": "a",
        "image_path": b"png",
        "caption": None,
        "captions": float("nan"),
        "conversations": None,
        "score": 0.5,
    }
    record, _ = parse_raw(row, 0, ORIGIN)
    assert record.format == "text_to_image" and record.sample[1].source == b"png"


def test_cells_of_any_kind_can_be_shown() -> None:
    for value in (b"\xff", [b"x"] * 3, datetime.datetime(2020, 1, 1), decimal.Decimal("1.5"), {"a": b"x"}):
        error = bad({"text_prompt": value, "image_path": "x"})
        assert error.code == "wrong_type" and len(error.found) < 100
    assert bad({"text_prompt": b"abc", "image_path": "x"}).found == '"<3 bytes>"'


def test_paths_are_confined_and_bytes_need_not_be() -> None:
    record, _ = parse_with_fields(
        {"image_list": ["x", b"1"], "instruction_list": ["a"]}, ORIGIN, ReadOptions(Path("/data"))
    )
    assert [piece.source for piece in record.sample if isinstance(piece, Image)] == [
        Confined(Path("/data/set/x"), Path("/data")),
        b"1",
    ]


# ---- paths, metadata, fields


def test_paths_are_relative_to_the_file_or_absolute() -> None:
    sample = parse_record(
        {"sequence": [image("/abs/x.png"), image("../y.png"), image("./z.png")]}, ORIGIN
    ).sample
    assert [piece.source for piece in sample] == [
        Path("/abs/x.png"),
        Path("/data/set/../y.png"),
        Path("/data/set/z.png"),
    ]


def test_metadata_and_unknown_fields() -> None:
    record = parse_record(
        {"text_prompt": "a", "image_path": "x", "metadata": {"id": 3}, "source": "web"}, ORIGIN
    )
    assert (record.metadata, record.format, record.origin) == ({"id": 3}, "text_to_image", ORIGIN)
    assert parse_record({"text_prompt": "a", "image_path": "x", "metadata": None}, ORIGIN).metadata == {}


def test_fields_that_nothing_reads_are_noted() -> None:
    record = {"text_prompt": "a", "image_path": "x", "metadata": {}, "source": "web", "label": 3, "id": None}
    assert parse_record(record, ORIGIN).notes == (("unread", "source"), ("unread", "label"))
    for made in EVERY_TURN:
        assert parse_record(made(), ORIGIN).notes == ()


NO_PATH = {"bytes": None, "path": ""}


@pytest.mark.parametrize(
    "value", ["", "None", " ", [""], ["None"], {"bytes": None, "path": None}, NO_PATH, [NO_PATH]]
)
def test_an_empty_picture_field_is_no_picture_and_noted(value) -> None:
    record = {"image": value, "conversations": said(("human", "q"), ("gpt", "a"))}
    assert shape(record) == ["q", "a*"]
    assert parse_record(record, ORIGIN).notes == (("no_picture", "image"),)
    assert bad({"text_prompt": "a", "image_path": value}).code == "missing_field"


def test_questions_with_interleaved_answers() -> None:
    record = {
        "image_list": ["x", "y"],
        "instruction_list": [["q", "Q"]],
        "output_text_list": ["<think>t</think><image_start>", "<image_end>a"],
    }
    assert shape(record) == ["[x]", "q|Q", "<think>t</think>*", "[y]*", "a*"]
    assert shape(record | {"image_list": ["y"]}) == ["q|Q", "<think>t</think>*", "[y]*", "a*"]


def test_every_piece_knows_its_field() -> None:
    record = {"messages": [message("user", "q"), message("assistant", "a<image>")], "images": ["x", "y"]}
    assert parse_with_fields(record, ORIGIN)[1] == [
        "images[0]",
        "messages[0].content",
        "messages[1].content",
        "images[1]",
    ]
    fields = parse_with_fields(steps(1), ORIGIN)[1]
    assert fields == ["input_image", "editing_steps[0].instruction", "editing_steps[0].result_image"]


# ---- what is wrong, and where

OK_TURN = {"role": "assistant", "content": "a"}
WRONG = [
    (None, "not_an_object", "(record)"),
    ([{"text_prompt": "a", "image_path": "x"}], "not_an_object", "(record)"),
    ({}, "no_format", "(record)"),
    ({"image_path": "x"}, "no_format", "(record)"),
    ({"conversation": []}, "no_format", "(record)"),
    ({"text_prompt": "a", "image_path": "x", "caption": "b"}, "ambiguous_format", "(record)"),
    ({"messages": [OK_TURN], "conversations": [OK_TURN]}, "ambiguous_format", "(record)"),
    ({"conversations": [OK_TURN | {"type": "text"}], "images": ["x"]}, "ambiguous_format", "(record)"),
    ({"conversations": [OK_TURN], "image_path": "x"}, "ambiguous_format", "image_path"),
    ({"text_prompt": "a"}, "missing_field", "image_path"),
    ({"caption": "a"}, "missing_field", "image_path"),
    ({"input_sequence": [text("a")]}, "missing_field", "target_sequence"),
    ({"target_sequence": [text("a")]}, "missing_field", "input_sequence"),
    ({"input_image": "x"}, "missing_field", "editing_steps"),
    ({"editing_steps": [{"instruction": "a", "result_image": "x"}]}, "missing_field", "input_image"),
    (
        {"input_image": "x", "editing_steps": [{"result_image": "x"}]},
        "missing_field",
        "editing_steps[0].instruction",
    ),
    (
        {"input_image": "x", "editing_steps": [{"instruction": "a"}]},
        "missing_field",
        "editing_steps[0].result_image",
    ),
    ({"images": ["x"]}, "missing_field", "messages"),
    ({"conversations": [{"content": "a"}]}, "missing_field", "conversations[0].role"),
    ({"conversations": [OK_TURN, {"role": "user"}]}, "missing_field", "conversations[1].content"),
    (
        {"conversations": [OK_TURN, {"role": "user", "type": "image"}]},
        "missing_field",
        "conversations[1].image_path",
    ),
    (
        {"conversations": [OK_TURN, {"role": "user", "image_path": "x"}]},
        "missing_field",
        "conversations[1].content",
    ),
    ({"sequence": [text("a"), {"type": "image", "content": "x"}]}, "missing_field", "sequence[1].image_path"),
    ({"messages": [{"role": "user"}]}, "missing_field", "messages[0].content"),
    ({"messages": [message("user", [{"text": "a"}])]}, "no_target", "messages"),
    (
        {"messages": [message("user", [{"type": "image_url"}])]},
        "missing_field",
        "messages[0].content[0].image_url",
    ),
    (
        {"messages": [message("user", [{"type": "image_url", "image_url": {}}])]},
        "missing_field",
        "messages[0].content[0].image_url.url",
    ),
    ({"text_prompt": 3, "image_path": "x"}, "wrong_type", "text_prompt"),
    ({"text_prompt": "a", "image_path": ["x"]}, "wrong_type", "image_path"),
    ({"conversations": OK_TURN}, "wrong_type", "conversations"),
    ({"conversations": ["a"]}, "wrong_type", "conversations[0]"),
    ({"conversations": [OK_TURN | {"target": "yes"}]}, "wrong_type", "conversations[0].target"),
    ({"conversations": [OK_TURN | {"target": 1}]}, "wrong_type", "conversations[0].target"),
    ({"messages": [OK_TURN], "images": 3}, "wrong_type", "images"),
    ({"messages": [OK_TURN], "images": [3]}, "wrong_type", "images[0]"),
    (
        {"messages": [message("user", [{"type": "image_url", "image_url": 3}])]},
        "wrong_type",
        "messages[0].content[0].image_url",
    ),
    ({"conversations": [OK_TURN | {"loss": "no"}]}, "wrong_type", "conversations[0].loss"),
    ({"messages": [OK_TURN | {"weight": 1.5}]}, "wrong_type", "messages[0].weight"),
    ({"messages": [OK_TURN | {"weight": float("nan")}]}, "wrong_type", "messages[0].weight"),
    ({"messages": [OK_TURN], "system": ["a"]}, "wrong_type", "system"),
    ({"messages": [OK_TURN], "weight": "70 kg"}, "wrong_type", "weight"),
    ({"messages": [OK_TURN | {"target": True, "loss": False}]}, "ambiguous_piece", "messages[0].target"),
    ({"messages": [OK_TURN | {"weight": 0.5, "loss_weight": 1}]}, "ambiguous_piece", "messages[0].weight"),
    ({"sequence": [text("a"), image("x", traget=False)]}, "unknown_key", "sequence[1].traget"),
    ({"messages": [OK_TURN | {"name": "Ann"}]}, "unknown_key", "messages[0].name"),
    ({"conversations": said(("gpt", "a")), "video": "a.mp4"}, "unsupported_key", "video"),
    ({"messages": [OK_TURN], "audios": ["a.wav"]}, "unsupported_key", "audios"),
    ({"messages": [OK_TURN], "tools": [{"name": "f"}]}, "unsupported_key", "tools"),
    ({"messages": [OK_TURN | {"tool_calls": [{}]}]}, "unsupported_key", "messages[0].tool_calls"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "unsupported_key", "chosen"),
    ({"messages": [OK_TURN], "label": False}, "unsupported_key", "label"),
    (
        {"image_list": ["a"], "instruction_list": ["q"], "output_text_list": ["b", "c", "d"]},
        "unequal_image_count",
        "image_list",
    ),
    (steps("1"), "wrong_type", "editing_steps[0].step"),
    (steps(True), "wrong_type", "editing_steps[0].step"),
    (steps(1.0), "wrong_type", "editing_steps[0].step"),
    ({"sequence": [text("a"), {"type": "video", "content": "b"}]}, "unknown_type", "sequence[1].type"),
    ({"messages": [message("user", [{"type": "audio"}])]}, "unsupported_key", "messages[0].content[0].audio"),
    ({"conversations": [{"role": "narrator", "content": "a"}]}, "unknown_role", "conversations[0].role"),
    ({"messages": [OK_TURN, message("tool", "a")]}, "unknown_role", "messages[1].role"),
    ({"sequence": [text("a", role="user"), text("b")]}, "unexpected_field", "sequence[0].role"),
    ({"sequence": [text("a", image_path="x"), text("b")]}, "ambiguous_piece", "sequence[0].image_path"),
    ({"sequence": [text("a"), image("x", content="b")]}, "ambiguous_piece", "sequence[1].content"),
    ({"image_path": "x", "caption": ""}, "empty_text", "caption"),
    ({"messages": [message("user", "q"), message("assistant", "")]}, "empty_text", "messages[1].content"),
    ({"image_path": "x", "caption": "a\ud83d"}, "bad_text", "caption"),
    ({"image_path": "", "caption": "a"}, "missing_field", "image_path"),
    ({"image_path": "a\0b", "caption": "a"}, "bad_path", "image_path"),
    ({"image_path": "a\udc00b", "caption": "a"}, "bad_path", "image_path"),
    ({"image_path": "https://example.org/a.png", "caption": "a"}, "bad_path", "image_path"),
    (
        {"messages": [message("assistant", "<image>")], "images": ["data:image/png,AAAA"]},
        "broken_picture",
        "images[0]",
    ),
    ({"messages": [message("assistant", "<image>")]}, "unequal_image_count", "images"),
    (
        {"messages": [message("user", "<image>"), message("assistant", "<image>")], "images": ["x"]},
        "unequal_image_count",
        "images",
    ),
    (steps(1, 3), "bad_step_number", "editing_steps[1].step"),
    (steps(), "no_target", "editing_steps"),
    ({"conversations": []}, "no_target", "conversations"),
    ({"conversations": [turn("user", "a")]}, "no_target", "conversations"),
    ({"conversations": [OK_TURN | {"target": False}]}, "no_target", "conversations"),
    ({"input_sequence": [text("a")], "target_sequence": []}, "no_target", "target_sequence"),
    ({"sequence": []}, "no_target", "sequence"),
    ({"sequence": [image("x")]}, "no_target", "sequence"),
    ({"messages": [message("user", "q")]}, "no_target", "messages"),
    ({"messages": [OK_TURN], "weight": 0}, "no_target", "weight"),
    ({"messages": [OK_TURN], "loss": False}, "no_target", "loss"),
    ({"conversations": [OK_TURN, {"from": "gpt", "value": "a"}]}, "ambiguous_format", "(record)"),
    ({"conversations": [{"from": "gpt", "content": "a"}]}, "ambiguous_format", "(record)"),
    ({"conversations": said(("gpt", "a")), "messages": [OK_TURN]}, "ambiguous_format", "(record)"),
    ({"conversations": said(("gpt", "a")), "image_path": "x"}, "ambiguous_format", "image_path"),
    ({"conversations": [OK_TURN | {"type": "text"}], "image": "x"}, "ambiguous_format", "image"),
    ({"text_prompt": "a", "image_path": "x", "image": "y"}, "ambiguous_format", "image"),
    ({"caption": "a", "captions": "b", "image": "y"}, "ambiguous_format", "(record)"),
    ({"conversations": said(("gpt", "a")), "image": "x", "images": ["y"]}, "ambiguous_piece", "image"),
    ({"conversations": [{"from": "gpt"}]}, "missing_field", "conversations[0].value"),
    ({"conversations": [{"value": "a"}]}, "missing_field", "conversations[0].from"),
    ({"conversations": said(("gpt", 3))}, "wrong_type", "conversations[0].value"),
    ({"conversations": said(("tool", "a"))}, "unknown_role", "conversations[0].from"),
    ({"conversations": said(("gpt", "<image>"))}, "unequal_image_count", "images"),
    ({"conversations": said(("gpt", "<image><image>")), "image": "x"}, "unequal_image_count", "image"),
    ({"conversations": said(("human", "a"))}, "no_target", "conversations"),
    ({"conversations": said(("gpt", ""))}, "empty_text", "conversations[0].value"),
    ({"conversations": said(("gpt", "a")), "image": 3}, "wrong_type", "image"),
    ({"image": "x"}, "no_format", "(record)"),
    ({"captions": "a"}, "missing_field", "image"),
    ({"image": "x", "captions": []}, "missing_field", "captions"),
    ({"image": "x", "captions": "{}"}, "missing_field", "captions"),
    ({"image": "x", "captions": {"a": None}}, "missing_field", "captions"),
    ({"image": "x", "captions": ""}, "empty_text", "captions"),
    ({"image": "x", "captions": ["a", ""]}, "empty_text", "captions[1]"),
    ({"image": "x", "captions": {"short": "a", "long": 3}}, "wrong_type", "captions.long"),
    ({"image": "x", "captions": ["a", None]}, "wrong_type", "captions[1]"),
    ({"image": "x", "captions": {"\udc80": 3}}, "wrong_type", "captions.\\udc80"),
    ({"image": "x", "captions": 3}, "wrong_type", "captions"),
    ({"image": "x", "captions": '{"a": "b"'}, "bad_json", "captions"),
    ({"image": "x", "captions": '{"a": "b", "a": "c"}'}, "duplicate_key", "captions"),
    ({"image": "x", "captions": ["a", "b\ud800"]}, "bad_text", "captions[1]"),
    ({"image": {"bytes": None, "path": None}, "captions": "a"}, "missing_field", "image"),
    ({"image": {"bytes": b"", "path": "x"}, "captions": "a"}, "missing_field", "image.bytes"),
    ({"image": {"bytes": "Q!"}, "captions": "a"}, "broken_picture", "image.bytes"),
    ({"image": {"bytes": 3}, "captions": "a"}, "wrong_type", "image.bytes"),
    ({"image": {"url": "http://a/b.png"}, "captions": "a"}, "bad_path", "image"),
    ({"image": b"", "captions": "a"}, "missing_field", "image"),
    ({"image_list": ["x", "y"]}, "missing_field", "instruction_list"),
    ({"instruction_list": ["a"]}, "missing_field", "image_list"),
    ({"image_list": ["x", "y"], "instruction_list": ["a", "b"]}, "unequal_image_count", "image_list"),
    ({"image_list": ["x", "y", "z"], "instruction_list": ["a"]}, "unequal_image_count", "image_list"),
    ({"image_list": [], "instruction_list": []}, "unequal_image_count", "image_list"),
    ({"image_list": ["x"], "instruction_list": []}, "no_target", "image_list"),
    ({"image_list": ["x", 3], "instruction_list": ["a"]}, "wrong_type", "image_list[1]"),
    ({"image_list": ["x", "y"], "instruction_list": [["a", ""]]}, "empty_text", "instruction_list[0][1]"),
    ({"image_list": ["x", "y"], "instruction_list": [None]}, "wrong_type", "instruction_list[0]"),
]


@pytest.mark.parametrize(
    ("value", "code", "field"), WRONG, ids=[f"{c}-{f}-{i}" for i, (_, c, f) in enumerate(WRONG)]
)
def test_bad_records_name_code_and_field(value, code: str, field: str) -> None:
    error = bad(value)
    assert (error.code, error.field) == (code, field), str(error)


def test_every_documented_code_has_a_case() -> None:
    documented = set(parse_record.__doc__.partition("codes are")[2].split("``")[1::2])
    assert documented == {code for _, code, _ in WRONG}


def test_messages_help() -> None:
    assert "did you mean conversations" in bad({"conversation": []}).fix
    assert "did you mean text_prompt" in bad({"text_promt": "x", "image_path": "a.png"}).fix
    assert "text_prompt" in bad({"image_path": "x"}).fix
    error = bad({"messages": [message("assistant", "<image><image>")], "images": ["x"]})
    assert "1 images" in error.found and "2 <image> tags" in error.expected
    assert "猫" in bad({"text_prompt": ["猫"], "image_path": "x"}).found
    assert "\\ud800" in str(bad({"\ud800": 1}))
    assert len(bad({"text_prompt": ["long"] * 1000, "image_path": "x"}).found) < 100


# ---- any value at all

FIELDS = [
    "conversations",
    "input_sequence",
    "target_sequence",
    "text_prompt",
    "image_path",
    "caption",
    "input_image",
    "editing_steps",
]
FIELDS += [
    "sequence",
    "messages",
    "images",
    "role",
    "type",
    "content",
    "text",
    "image_url",
    "url",
    "step",
    "instruction",
    "result_image",
]
FIELDS += [
    "target",
    "metadata",
    "other",
    "from",
    "value",
    "image",
    "captions",
    "image_list",
    "instruction_list",
    "bytes",
    "path",
]
STRINGS = st.sampled_from(
    ["text", "image", "image_url", "user", "assistant", "a.png", "a <image> b", "<image>", ""]
) | st.text(max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | STRINGS | st.characters(categories=["Cs"])
KEYS = st.sampled_from(FIELDS) | st.text(max_size=3) | st.characters(categories=["Cs"])
VALUES = st.recursive(
    SCALARS | st.binary(max_size=2),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=5),
    max_leaves=20,
)


ROWS = [
    {"conversations": said(("human", "<image>q"), ("gpt", "a")), "image": "a.png"},
    {"image": {"bytes": b"png", "path": "a.png"}, "captions": '{"a": "b"}'},
    {"image_list": [b"0", b"1"], "instruction_list": [["a", "b"]]},
]


@st.composite
def nearly_right(draw):
    """A right record in which one value, anywhere, is something else."""
    record = copy.deepcopy(draw(st.sampled_from(json.loads(EXAMPLE.read_text("utf-8")) + ROWS)))
    holders = []

    def visit(node) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            holders.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(record)
    node, key = draw(st.sampled_from(holders))
    node[key] = draw(VALUES)
    return record


@pytest.mark.slow
@settings(deadline=None)
@given(VALUES | nearly_right())
def test_any_value_is_a_sample_with_a_target_or_a_bad_record(value) -> None:
    try:
        record, fields = parse_with_fields(value, ORIGIN)
    except BadRecord as error:
        assert error.origin == ORIGIN
        json.dumps(error.to_dict())
        str(error).encode()
        return
    assert record.format in FORMATS and len(fields) == len(record.sample)
    assert any(piece.target for piece in record.sample)
    for piece in record.sample:
        if isinstance(piece, Text):
            assert all(isinstance(wording, str) for wording in (piece.text, *piece.others)) and all(
                piece.others
            )
        else:
            assert isinstance(piece.source, Path | bytes)


# ---- the example


def test_the_example_holds_the_seven_formats_of_the_guide_with_pictures_that_exist() -> None:
    records = json.loads(EXAMPLE.read_text("utf-8"))
    parsed = [parse_record(value, Origin(EXAMPLE, index=i)) for i, value in enumerate(records)]
    assert (
        [record.format for record in parsed]
        == list(FORMATS)[:7]
        == [record.metadata["format"] for record in parsed]
    )
    for record in parsed:
        for piece in record.sample:
            if isinstance(piece, Image):
                assert open_image(piece.source).size == (128, 128)
                assert piece.source.stat().st_size < 8192


# ---- the documentation


@pytest.mark.parametrize("name", ["data_formats.md", "data_formats.zh-CN.md"])
def test_the_documentation_is_true(name: str) -> None:
    text = (EXAMPLE.parents[1] / "docs" / name).read_text("utf-8")
    shown = [json.loads(block.partition("```")[0]) for block in text.split("```json\n")[1:]]
    records = [parse_record(value, Origin(EXAMPLE, index=i)) for i, value in enumerate(shown)]
    assert {record.format for record in records} == set(FORMATS)
    assert all(
        piece.source.exists() for record in records for piece in record.sample if isinstance(piece, Image)
    )
    assert all(f"`{code}`" in text for _, code, _ in WRONG)


@pytest.mark.parametrize("name", ["data_formats.md", "data_formats.zh-CN.md"])
def test_the_worked_example_of_a_new_format_works(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (EXAMPLE.parents[1] / "docs" / name).read_text("utf-8")
    (code,) = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    for format in FORMATS:
        monkeypatch.setitem(FORMATS, format, FORMATS[format])  # put back as it was
    monkeypatch.setitem(FORMATS, "quiz", None)
    exec(code, {})
    record = {"photo": "x.png", "question": "What is it?", "answer": "A house."}
    assert shape(record) == ["[x.png]", "What is it?", "A house.*"]
    assert (bad({"photo": "x.png", "answer": "A house."}).code, bad({"question": "a"}).field) == (
        "missing_field",
        "photo",
    )
    assert bad(record | {"caption": "b"}).code == "ambiguous_format"
    assert parse_record(record, ORIGIN).format == "quiz"
