"""Layouts of public data sets: what each is read as, how two of them are told apart, mapped names, pictures in the
record."""

import base64
import json
import re
from pathlib import Path

import pytest

from unigen.data.embedded import Address, place_of
from unigen.data.formats import FORMATS, parse_record, parse_with_fields
from unigen.data.mapping import ReadOptions
from unigen.data.recognise import Format
from unigen.messages import in_language
from unigen.sequence.files import PictureError, open_file
from unigen.sequence.types import BadRecord, Image, Origin, Text

ORIGIN = Origin(Path("/data/set/train.jsonl"), line=7)
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def read(value, **options) -> tuple[str, list[str]]:
    """The format of a record and its sample: ``a`` for a text, ``[a.png]`` for a picture, ``*`` behind a
    target."""
    record, fields = parse_with_fields(value, ORIGIN, ReadOptions(**options))
    assert len(fields) == len(record.sample)
    shown = []
    for segment in record.sample:
        if isinstance(segment, Text):
            body = "|".join((segment.text, *segment.others))
        elif isinstance(segment.source, bytes):
            body = "[bytes]" if segment.source == PNG else "[other bytes]"
        else:
            body = f"[{Path(str(segment.source)).relative_to('/data/set')}]"
        shown.append(body + "*" * segment.target)
    return record.format, shown


def refused(value, **options) -> BadRecord:
    with pytest.raises(BadRecord) as caught:
        parse_with_fields(value, ORIGIN, ReadOptions(**options))
    assert caught.value.origin == ORIGIN and caught.value.fix
    return caught.value


# ---- text to image, one edit


@pytest.mark.parametrize("picture", ["image", "file_name", "image_path"])
@pytest.mark.parametrize("text", ["text", "caption", "prompt"])
def test_a_picture_and_its_text_are_text_to_image_but_for_format_4(picture: str, text: str) -> None:
    found = read({picture: "a.png", text: "A", "width": 3})
    if (picture, text) == ("image_path", "caption"):
        assert found == ("image_to_text", ["[a.png]", "A*"])
    else:
        assert found == ("image_and_text", ["A", "[a.png]*"])


def test_captions_may_be_variants_and_not_empty() -> None:
    assert read({"image": ["a.png"], "caption": ["A", "B"]}) == ("image_and_text", ["A|B", "[a.png]*"])
    assert read({"image": "a.png", "caption": '["A", "B"]'})[1][0] == "A|B"
    assert refused({"image": "a.png", "text": ""}).code == "empty_text"
    assert refused({"image": ["a.png", "b.png"], "text": "A"}).field == "image"


@pytest.mark.parametrize(
    ("record", "sample"),
    [
        ({"instruction": "i", "input_images": ["a", "b"], "output_image": "c"}, ["[a]", "[b]", "i", "[c]*"]),
        ({"instruction": "i", "output_image": "c", "task_type": "t2i"}, ["i", "[c]*"]),
        (
            {
                "original_prompt": "o",
                "original_image": "a",
                "edit_prompt": "i",
                "edited_prompt": "p",
                "edited_image": "c",
            },
            ["[a]", "i", "[c]*"],
        ),
        (
            {"source_image": "a", "edited_image": "c", "edit_prompt": "i", "mask_image": "m"},
            ["[a]", "i", "[c]*"],
        ),
        ({"src_img": "a", "edited_img": "c", "edited_prompt_list": ["i", "j"]}, ["[a]", "i|j", "[c]*"]),
        ({"source_img": "a", "mask_img": "m", "instruction": "i", "target_img": "c"}, ["[a]", "i", "[c]*"]),
        (
            {
                "open_image_input_url": "http://a/b",
                "local_input_image": "a",
                "text": "i",
                "output_image": "c",
            },
            ["[a]", "i", "[c]*"],
        ),
        ({"input_prompt": "i", "input_image": ["a"], "output_image": "c"}, ["[a]", "i", "[c]*"]),
        (
            {"input_image": "a", "output_image": "c", "edit": "i", "inverse_edit": "j", "input": "x"},
            ["[a]", "i", "[c]*"],
        ),
        ({"image": "c", "prompt": "i", "edit_image": ["a", "b"]}, ["[a]", "[b]", "i", "[c]*"]),
        ({"image": "a", "prompt": "i", "edited_image": "c"}, ["[a]", "i", "[c]*"]),
        (
            {"instruction": "<image> as <image>", "input_images": ["a", "b"], "output_image": "c"},
            ["[a]", "as", "[b]", "[c]*"],
        ),
    ],
)
def test_an_edit_under_the_names_of_public_sets(record, sample) -> None:
    assert read(record) == ("single_edit", sample)


def test_two_names_of_one_thing_are_refused_with_the_mapping_that_chooses() -> None:
    error = refused({"image": "a", "text": "A", "prompt": "B"})
    assert error.code == "ambiguous_piece" and "--fields text=prompt" in error.fix
    assert read({"image": "a", "text": "A", "prompt": "B"}, fields={"text": "prompt"})[1] == ["B", "[a]*"]
    assert read({"image": "a", "text": "A", "prompt": "B"}, fields={"text": "text"})[1] == ["A", "[a]*"]
    assert (
        refused({"source_image": "a", "input_image": "b", "prompt": "i", "output_image": "c"}).code
        == "ambiguous_piece"
    )


def given(fix: str) -> list[dict[str, str]]:
    """The mappings that a fix advises."""
    lines = re.findall(r"--fields ((?:\w+=[\w.]+ ?)+)", fix)
    return [dict(pair.split("=") for pair in line.split()) for line in lines]


@pytest.mark.parametrize(
    ("record", "field", "read_as"),
    [
        ({"prompt": "q", "answer": "red"}, "answer", ["[a.png]", "q", "red*"]),
        ({"text": "q", "label": "red"}, "label", ["[a.png]", "q", "red*"]),
        ({"text": "q", "answers": ["red", "blue"]}, "answers", ["[a.png]", "q", "red*"]),
        ({"text": "q", "response": "red"}, "response", ["[a.png]", "q", "red*"]),
        ({"caption": "q", "output": "red"}, "output", ["[a.png]", "q", "red*"]),
        *(
            ({"text": "q", name: "red"}, name, ["[a.png]", "q", "red*"])
            for name in ("gt", "ground_truth", "reply")
        ),
        ({"text": "q", "conditioning_image": "b.png"}, "conditioning_image", ["[b.png]", "q", "[a.png]*"]),
        ({"text": "q", "control_img": {"bytes": PNG}}, "control_img", ["[bytes]", "q", "[a.png]*"]),
        ({"text": "q", "mask": {"path": "b.png"}}, "mask", None),
    ],
)
def test_an_answer_or_another_picture_beside_is_not_left_unread(record, field: str, read_as) -> None:
    record = {"image": "a.png"} | record
    error = refused(record)
    assert (error.code, error.field) == ("unexpected_field", field)
    *meant, drawn = given(error.fix)
    assert [read(record, fields=fields)[1] for fields in meant] == ([read_as] if read_as else [])
    assert read(record, fields=drawn) == ("text_to_image", ["q", "[a.png]*"])


@pytest.mark.parametrize(
    "drawn", [{"text_prompt": "q", "image_path": "a.png"}, {"captions": ["q", "r"], "image": "a.png"}]
)
@pytest.mark.parametrize(
    ("name", "value"), [("answer", "red"), ("source_image", "b.png"), ("mask", "m.png"), ("control", "c.png")]
)
def test_formats_3_and_9_leave_no_answer_and_no_other_picture_unread(drawn, name: str, value: str) -> None:
    text = next(iter(drawn))
    error = refused(drawn | {name: value})
    assert (error.code, error.field) == ("unexpected_field", name)
    *meant, way_out = given(error.fix)
    assert read(drawn | {name: value}, fields=way_out) == read(drawn)
    if text == "text_prompt" and meant:
        learnt = {"answer": ["[a.png]", "q", "red*"]}.get(name, [f"[{value}]", "q", "[a.png]*"])
        assert read(drawn | {name: value}, fields=meant[0])[1] == learnt


@pytest.mark.parametrize("name", ["result", "edited", "edited_image2", "target", "result_image", "after"])
def test_an_edit_is_never_advised_backwards(name: str) -> None:
    error = refused({"image": "a.png", "prompt": "i", name: "b.png"})
    edit, _ = given(error.fix)
    assert error.field == name
    assert read({"image": "a.png", "prompt": "i", name: "b.png"}, fields=edit)[1] == [
        "[a.png]",
        "i",
        "[b.png]*",
    ]


def test_the_fix_of_two_pictures_and_a_description() -> None:
    record = {"image_path": "a.png", "caption": "i", "output_image": "b.png"}
    edit, described = given(refused(record).fix)
    assert read(record, fields=edit)[1] == ["[a.png]", "i", "[b.png]*"]
    assert read(record, fields=described) == ("image_to_text", ["[a.png]", "i*"])
    record = {"image": "a.png", "text": "i", "image2": "b.png"}  # says neither: both ways are told
    *ways, _ = given(refused(record).fix)
    found = [read(record, fields=fields)[1] for fields in ways]
    assert found == [["[a.png]", "i", "[b.png]*"], ["[b.png]", "i", "[a.png]*"]]


@pytest.mark.parametrize(
    "name", ["input_images", "input_image", "source_images", "edit_image", "kontext_images"]
)
def test_pictures_in_a_cell_of_a_table_are_a_list(name: str) -> None:
    record = {name: '["a.png", "b.png"]', "instruction": "i", "output_image": '["c.png"]'}
    assert read(record) == ("single_edit", ["[a.png]", "[b.png]", "i", "[c.png]*"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("answer", 3),
        ("answers", [{"answer": "net"}]),
        ("correct_answer", "b"),
        ("choices", ["a", "b"]),
        *((name, "b.png") for name in ("reference", "depth", "source", "control", "ref_images_path")),
        ("depth", {"bytes": b"\x89PNG", "path": None}),
    ],
)
def test_any_answer_and_any_other_picture_is_refused(field: str, value) -> None:
    error = refused({"image": "a.png", "text": "How many?", field: value})
    assert (error.code, error.field) == ("unexpected_field", field)


def test_the_name_and_the_address_of_a_picture_are_no_other_picture() -> None:
    more = {"filename": "b.png", "url": "http://a/b.jpg", "origin": "x/a.png", "cls": b"3", "label": 3}
    assert read({"image": "a.png", "text": "t", **more})[1] == ["t", "[a.png]*"]


@pytest.mark.parametrize("name", ["conversations", "turns"])
def test_a_list_may_be_the_json_text_of_a_column(name: str) -> None:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    record = {name: json.dumps(turns), "images": '["a.png"]'}
    assert read(record, fields={"conversations": name})[1] == ["[a.png]", "q", "a*"]
    error = refused({"conversations": str(turns), "image": "a.png"})
    assert (error.code, error.field) == ("bad_json", "conversations")


def test_a_place_that_is_mapped_is_read() -> None:
    record = {"image": "a.png", "data": {"sample": {"cap": "t"}}, "more": 1}
    options = ReadOptions(fields={"text": "data.sample.cap"})
    assert parse_with_fields(record, ORIGIN, options)[0].notes == (("unread", "more"),)


def test_sizes_that_a_message_asks_for_are_listed_as_unread() -> None:
    parts = [{"type": "image", "image": "a.png", "max_pixels": 9}, {"type": "text", "text": "q"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    assert parse_record({"messages": turns}, ORIGIN).notes == (("unread", "max_pixels"),)


@pytest.mark.parametrize(
    ("record", "words", "never"),
    [
        ({"metadata": {"id": 1}, "foo": 1}, "", "did you mean"),
        ({"target": "x", "text_loss": 1}, "", "did you mean"),
        ({"conversation": "x"}, "did you mean conversations", "jq"),
        ({"version": 1, "data": [{"q": 1}]}, "jq .data", "did you mean"),
        ({"info": {"a": 1}, "license": {}, "questions": [{"q": 1}]}, "jq .questions", "did you mean"),
        ({"id": 1, "turns": [{"q": 1}]}, "", "jq"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "leave these records out", "correct the role"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "leave these", "correct the speaker"),
    ],
)
def test_the_fix_names_the_mistake(record, words: str, never: str) -> None:
    assert words in (fix := refused(record).fix) and never not in fix


def test_a_list_of_a_format_of_a_plugin_is_no_file_of_records(monkeypatch) -> None:
    def dialog(record, folder):
        return [(Text(record["dialog"][0]["a"], target=True), "dialog")]

    monkeypatch.setitem(FORMATS, "dlg", Format(dialog, ("dialog",), "dialog", ()))
    assert read({"dialog": [{"a": "x"}]}) == ("dlg", ["x*"])


def test_what_only_sounds_like_an_answer_or_a_picture_is_left_unread() -> None:
    record = {
        "image": "a.png",
        "text": "A",
        "label": 3,
        "answer": "",
        "type_of_image": "photo",
        "n_images": 2,
    }
    assert read(record) == ("image_and_text", ["A", "[a.png]*"])
    assert read(record | {"label": "3"}) == ("image_and_text", ["A", "[a.png]*"])


@pytest.mark.parametrize(
    ("record", "field", "read_as"),
    [
        ({"instruction": "i", "input": "in.png", "output": "out.png"}, "output", ["[in.png]", "i", "[out.png]*"]),
        ({"instruction": "i", "input": "", "output": "out.JPG"}, "output", ["i", "[out.JPG]*"]),
        ({"instruction": "i", "input": "in.png", "output": "a cat"}, "input", ["[in.png]", "i", "a cat*"]),
        ({"query": "i", "response": "out.png", "images": ["in.png"]}, "response", ["[in.png]", "i", "[out.png]*"]),
        ({"prompt": "i", "completion": "out.png", "image": "in.png"}, "completion", ["[in.png]", "i", "[out.png]*"]),
    ],
)  # fmt: skip
def test_the_name_of_a_picture_is_no_answer(record, field: str, read_as) -> None:
    error = refused(record)
    assert (error.code, error.field) == ("unexpected_field", field)
    (fields,) = given(error.fix)
    assert read(record, fields=fields)[1] == read_as
    for text in ("See out.png", "https://a/b.png", "png"):
        assert read({"instruction": "i", "output": text})[1] == ["i", f"{text}*"]


@pytest.mark.parametrize(
    ("record", "read_as"),
    [
        ({"images": ["a.png"], "text": "A"}, ["A", "[a.png]*"]),
        ({"images": ["a.png"], "caption": "A"}, ["A", "[a.png]*"]),
        ({"file": "a.png", "text": "A"}, ["A", "[a.png]*"]),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, ["q", "r*"]),
    ],
)
def test_no_fix_leads_nowhere_or_loses_the_picture(record, read_as) -> None:
    (fields, *_) = given(refused(record).fix)
    assert read(record, fields=fields)[1] == read_as


@pytest.mark.parametrize(
    "record",
    [{"image1": "a.png", "image2": "b.png", "text": "A"}, {"input": PNG, "output": PNG, "text": "A"}],
)
def test_a_text_beside_pictures_is_not_advised_as_a_text_alone(record) -> None:
    assert "sequence" not in (fix := refused(record).fix) and "input_image" in fix


def test_of_two_captions_each_line_does_what_it_says() -> None:
    record = {"image_path": "a.png", "caption": "A", "prompt": "B"}
    *drawn, learnt = given(refused(record).fix)
    assert [read(record, fields=fields)[1] for fields in drawn] == [["A", "[a.png]*"], ["B", "[a.png]*"]]
    assert read(record, fields=learnt) == ("image_to_text", ["[a.png]", "A*"])
    record = {"instruction": "i", "source_img": "b", "edited_image": "c", "target_img": "d"}
    assert [read(record, fields=fields)[1][-1] for fields in given(refused(record).fix)] == ["[c]*", "[d]*"]


def test_no_english_stands_between_names_in_chinese(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(PictureError) as caught:
        open_file(tmp_path / "A.png")
    errors = [
        caught.value,
        refused({"image": "a.png", "text": "A", "caption": "B"}),
        refused({"image_path": "a.png", "caption": "A", "messages": talk}),
    ]
    for error in errors:
        assert re.findall(r"\b(and|or|exists|disk)\b", in_language(str(error), "zh")) == []


@pytest.mark.parametrize("blank", ["", "   "])
def test_what_a_picture_is_drawn_from_says_something_in_every_format(blank: str) -> None:
    edit = {"input_image": "b.png", "output_image": "a.png"}
    for record, field in (
        ({"text_prompt": blank, "image_path": "a.png"}, "text_prompt"),
        ({"text": blank, "image": "a.png"}, "text"),
        ({"captions": ["A", blank], "image": "a.png"}, "captions[1]"),
        ({"instruction": blank, **edit}, "instruction"),
        ({"input_image": "b.png", "editing_steps": [{"instruction": blank, "result_image": "a.png"}]},
         "editing_steps[0].instruction"),
        ({"image_list": ["a", "b"], "instruction_list": [blank]}, "instruction_list[0]"),
    ):  # fmt: skip
        error = refused(record)
        assert (error.code, error.field) == ("empty_text", field)
    assert read({"text": blank, "image": "a.png"}, trigger_word="sks")[1] == ["sks", "[a.png]*"]


def test_an_empty_text_makes_no_record_ambiguous() -> None:
    drawn = ("image_and_text", ["A", "[a.png]*"])
    assert read({"image": "a.png", "text": "A", "caption": ""}) == drawn
    assert read({"image_path": "a.png", "text_prompt": "A", "caption": ""}) == ("text_to_image", drawn[1])
    assert read({"image_path": "a.png", "caption": "A", "text": ""}) == ("image_to_text", ["[a.png]", "A*"])
    edit = {"input_image": "b.png", "output_image": "a.png", "prompt": "A", "instruction": ""}
    assert read(edit) == ("single_edit", ["[b.png]", "A", "[a.png]*"])
    assert refused({"image": "a.png", "prompt": "A", "response": ""}).code == "empty_text", (
        "no picture to draw"
    )


@pytest.mark.parametrize("beside", ["input_image", "edit_image"])
def test_a_second_picture_to_start_from_is_never_dropped(beside: str) -> None:
    record = {beside: "a", "image": "b", "output_image": "c", "instruction": "x"}
    error = refused(record)
    assert (error.code, error.field) == ("ambiguous_piece", "image")
    assert read(record, fields={"metadata": "image"})[1] == ["[a]", "x", "[c]*"]
    assert read(record | {"image": "a"})[1] == ["[a]", "x", "[c]*"]


# ---- questions, traces, documents


def test_every_list_of_objects_says_what_is_learnt() -> None:
    pairs = [{"user": "q", "assistant": "BAD", "weight": 0}, {"user": "r", "assistant": "a"}]
    assert read({"images": ["a.png"], "texts": pairs})[1] == ["[a.png]", "q", "BAD", "r", "a*"]
    shown = [{"image_name": name, "matched_text_index": i} for i, name in enumerate("ab")]
    record = {"image_info": shown, "text_list": ["x", "y"]}
    assert read(record)[1] == ["[a]", "x*", "[b]*", "y*"]
    shown[1]["loss"] = False
    assert read(record)[1] == ["[a]", "x*", "[b]", "y*"]
    files = [{"id": name, "url": name} for name in ("original_input_image", "edit_turn1", "final_image")]
    record = {"files": files, "metadata_edit_turn_prompts": ["i", "j"]}
    files[1]["target"] = False
    assert read(record)[1] == ["[original_input_image]", "i", "[edit_turn1]", "j", "[final_image]*"]
    for part in (
        {"type": "image_url", "image_url": {"url": "a", "loss": 0}},
        {"type": "image", "source": {"type": "url", "url": "a", "weight": 0}},
    ):
        turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]
        assert refused({"messages": turns}).code == "unknown_key"


@pytest.mark.parametrize("name", ["image_path", "file_name", "img", "photo"])
def test_a_question_about_a_picture_is_never_learnt_without_it(name: str) -> None:
    asked = {name: "a.png", "question": "q", "answer": "r"}
    (fields,) = given(refused(asked).fix)
    assert fields["image"] == name and read(asked, fields=fields)[1] == ["[a.png]", "q", "r*"]
    for record in ({"query": "q", "response": "r"}, {"instruction": "q", "output": "r"}):
        error = refused({name: ["a.png"], **record})
        assert (error.code, error.field) == ("unexpected_field", name)
        assert read({name: "a.png", **record}, fields={"metadata": name})[1] == ["q", "r*"]
    read({"image": "b.png", "image_path": "a.png", "query": "q", "response": "r"})  # a copy, listed as unread
    assert refused({"image_url": "https://a/b", "query": "q", "response": "r"}).field == "image_url"
    read({"source": "https://a/b.png", "query": "q", "response": "r"})


@pytest.mark.parametrize("shown", [{"image_file": "a.png"}, {"img": "a.png"}, {"image_url": "https://a/b"},
                                   {"image_paths": ["a.png"]}, {"photo": {"bytes": PNG}}, {"img0": PNG}])  # fmt: skip
@pytest.mark.parametrize(
    "talk",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "images": []},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        {"texts": [{"user": "q", "assistant": "r"}], "images": []},
        {"query": "q", "response": "r", "images": []},
    ],
)
def test_a_talk_about_a_picture_is_never_learnt_without_it(talk, shown) -> None:
    (name,) = shown
    error = refused({**talk, **shown})
    assert (error.code, error.field) == ("unexpected_field", name)
    assert read({**talk, **shown}, fields={"metadata": name})[1] == ["q", "r*"]
    if name != "image_url":
        (fields,) = given(error.fix)
        assert read({**talk, **shown}, fields=fields)[1][1:] == ["q", "r*"]
    assert "images" in refused({**talk, **shown, "other": "b.png"}).fix


def test_a_talk_that_shows_its_pictures_itself_may_have_copies_beside() -> None:
    part = {"type": "image", "image": "a.png"}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "r"}]
    assert read({"messages": turns, "image_file": "a.png"})[1] == ["[a.png]", "r*"]
    turns = [{"role": "user", "type": "image", "image_path": "a.png"}, {"role": "assistant", "content": "r"}]
    assert read({"conversations": turns, "thumb": "t.png"})[1] == ["[a.png]", "r*"]
    assert read({"id": "0001.jpg", "query": "q", "response": "r"})[1] == ["q", "r*"]


def test_questions_and_instructions() -> None:
    record = {"query": "<image>q", "response": "r", "images": ["a"], "system": "S", "history": [["p", "o"]]}
    assert read(record) == ("query_response", ["S", "p", "o*", "[a]", "q", "r*"])
    assert read({"prompt": "q", "completion": "r"}) == ("query_response", ["q", "r*"])
    assert read({"image": "a", "prompt": "q", "response": "r"}) == ("query_response", ["[a]", "q", "r*"])
    assert read({"instruction": "do", "input": "x", "output": "y"}) == ("instruction", ["do\nx", "y*"])
    assert read({"instruction": "do", "input": "", "output": "y"}) == ("instruction", ["do", "y*"])
    assert refused({"query": "q", "response": "r", "history": ["p"]}).field == "history[0]"
    assert refused({"query": "<image>q", "response": "r"}).code == "unequal_image_count"


def test_a_reasoning_trace_draws_where_its_marks_stand() -> None:
    record = {
        "Question": "q <image_start>[problem_image_1]<image_end>",
        "Text Reasoning Trace": "t <image_start>[reasoning_image_1]<image_end> u",
        "Final Answer": "7",
        "problem_image_1": "p.png",
        "problem_image_2": None,
        "reasoning_image_1": {"bytes": PNG, "path": "r.png"},
    }
    assert read(record) == ("reasoning_trace", ["q", "[p.png]", "t*", "[bytes]*", "u*", "7*"])
    assert parse_record(record, ORIGIN).notes == ()
    assert refused(record | {"reasoning_image_2": "x"}).field == "reasoning_image_2"
    assert refused(record | {"reasoning_image_1": None}).field == "reasoning_image_1"


def test_documents() -> None:
    record = {"texts": ["a", None, "b"], "images": [None, "x", None], "metadata": "[{}]"}
    assert read(record) == ("parallel_lists", ["a", "[x]*", "b*"])
    assert parse_record(record, ORIGIN).metadata == {"metadata": "[{}]"}
    assert read({"texts": [None, "b"], "images": ["x", None]})[1] == ["[x]", "b*"]
    assert refused({"texts": ["a"], "images": ["x"]}).field == "texts[0]"
    assert refused({"texts": ["a"], "images": [None, "x"]}).code == "unequal_image_count"
    info = [
        {"image_name": "y", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "x", "matched_text_index": 0},
    ]
    assert read({"text_list": ["a", "b"], "image_info": info, "similarity_matrix": [[1]]}) == (
        "matched_images",
        ["[x]", "a*", "[y]*", "b*"],
    )
    assert refused({"text_list": ["a"], "image_info": info}).field == "image_info[0].matched_text_index"


def test_a_reflection_is_a_sequence() -> None:
    """Draw, criticise, draw again, as docs/data_formats.md says: a use of format 6."""
    record = {
        "sequence": [
            {"type": "text", "content": "A blue house"},
            {"type": "image", "image_path": "first.png", "target": False},
            {"type": "text", "content": "The walls are white."},
            {"type": "image", "image_path": "second.png"},
        ]
    }
    assert read(record) == (
        "interleaved",
        ["A blue house", "[first.png]", "The walls are white.*", "[second.png]*"],
    )


# ---- chats


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "image": "a.png", "max_pixels": 9, "min_pixels": 4},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "input_image", "image_url": "a.png"},
        {"type": "image", "source": {"type": "url", "url": "a.png"}},
        {"image": "a.png"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}, "text": None},
        {"type": "image", "image": "file:///data/set/a.png"},
    ],
)
def test_parts_of_messages_as_others_write_them(part) -> None:
    turns = [
        {"role": "user", "content": [part, {"type": "input_text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "r"}]},
    ]
    assert read({"messages": turns}) == ("messages", ["[a.png]", "q", "r*"])
    assert read({"conversations": turns}) == ("chat", ["[a.png]", "q", "r*"])


def test_a_bare_image_part_is_the_next_picture() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "q"}, {"type": "image"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "r"}]
    assert read({"messages": turns, "images": ["a", "b"]})[1] == ["[a]", "q", "[b]", "r*"]
    assert refused({"messages": turns, "images": ["a"]}).code == "unequal_image_count"
    assert refused(
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}]}
    ).code == ("ambiguous_piece")


def test_roles_under_conversations_with_a_picture_beside() -> None:
    turns = [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "r"}]
    assert read({"image": "a", "conversations": turns}) == ("chat", ["[a]", "q", "r*"])
    assert read({"images": ["a"], "conversations": turns}) == ("chat", ["[a]", "q", "r*"])


# ---- mapped names


def test_mapped_fields_reach_into_objects_lists_and_json() -> None:
    value = {"file_name": "a", "caption": "A", "more": '{"names": ["x", {"text": "B"}]}'}
    assert read(value, fields={"text_prompt": "caption", "image_path": "file_name"}) == (
        "text_to_image",
        ["A", "[a]*"],
    )
    assert read(value, fields={"text": "more.names.1.text"}) == ("image_and_text", ["B", "[a]*"])
    assert read({"image": "a", "caption": "A"}, fields={"image_path": "image"}) == (
        "image_to_text",
        ["[a]", "A*"],
    )
    assert refused({"image": "a", "more": "{"}, fields={"text": "more.x"}).field == "more"
    record, _ = parse_with_fields(value, ORIGIN, ReadOptions(fields={"text": "more.names.0"}))
    assert ("unread", "caption") in record.notes


def test_a_field_of_the_mapped_name_never_takes_its_place() -> None:
    value = {"instruction": "i", "output": "old", "resp": "new"}
    record, _ = parse_with_fields(value, ORIGIN, ReadOptions(fields={"output": "resp"}))
    assert record.sample[-1].text == "new" and ("unread", "output") in record.notes
    for empty in (value | {"resp": None}, {"instruction": "i", "output": "old"}):
        error = refused(empty, fields={"output": "resp"})
        assert error.code == "no_format" and "resp" in error.fix
    # one that the mapping itself reads is no other one
    value = {"image": "a", "text": {"en": "A"}}
    record, _ = parse_with_fields(value, ORIGIN, ReadOptions(fields={"text": "text.en"}))
    assert record.sample[0].text == "A" and not record.notes
    swapped = {"image": "A", "text": "a"}
    assert read(swapped, fields={"image": "text", "text": "image"})[1] == ["A", "[a]*"]


def test_a_trigger_word_begins_every_text_once() -> None:
    def text(caption):
        return read({"image": "a", "text": caption}, trigger_word="sks")[1][0]

    assert [text("a dog"), text("a sks dog"), text("[trigger] dog"), text("")] == [
        "sks, a dog", "a sks dog", "sks dog", "sks",
    ]  # fmt: skip
    assert read({"text_prompt": "a dog", "image_path": "a"}, trigger_word="sks")[1][0] == "a dog"


# ---- pictures in the record, addresses

BASE64 = base64.b64encode(PNG).decode()


@pytest.mark.parametrize(
    "picture",
    [
        f"data:image/png;base64,{BASE64}", f"DATA:image/PNG;charset=x;base64,{BASE64}", BASE64,
        BASE64[:60] + "\n" + BASE64[60:], BASE64.rstrip("="), {"bytes": BASE64}, {"bytes": PNG},
        {"url": f"data:image/png;base64,{BASE64}"},
    ],
)  # fmt: skip
def test_pictures_in_the_record_are_decoded(picture) -> None:
    assert read({"image": picture, "text": "A"})[1] == ["A", "[bytes]*"]


def test_pictures_of_an_anthropic_message() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": BASE64}
    turns = [
        {"role": "user", "content": [{"type": "image", "source": source}]},
        {"role": "assistant", "content": "r"},
    ]
    assert read({"messages": turns})[1] == ["[bytes]", "r*"]
    assert refused(
        {"messages": [{"role": "user", "content": [{"type": "image", "source": source | {"id": 3}}]}]}
    ).code == ("unknown_key")


@pytest.mark.parametrize(
    ("picture", "code", "words"),
    [
        ("data:image/png,abc", "broken_picture", "base64"),
        (f"data:image/png;base64,{BASE64[:-3]}!", "broken_picture", "base64"),
        ("s3://bucket/a.png", "bad_path", "aws s3 sync s3://bucket DIR"),
        ("gs://bucket/a.png", "bad_path", "gcloud storage rsync -r gs://bucket DIR"),
        (
            "oss://bucket/a.png",
            "bad_path",
            "pip install ossfs, or copy the files once (ossutil cp -r oss://bucket",
        ),
        ("s3://$(reboot)/a.png", "bad_path", "s3://BUCKET DIR"),
        ("ftp://host/a.png", "bad_path", "copy the files"),
        ("file://host/a.png", "bad_path", "path of the file"),
        ("https://host/a.png", "bad_path", "unigen fetch"),
    ],
)
def test_what_is_no_path_names_the_way_out(picture: str, code: str, words: str) -> None:
    error = refused({"image": picture, "text": "A"})
    assert (error.code, error.field) == (code, "image") and words in error.fix


def test_relative_paths_start_from_image_root() -> None:
    record, _ = parse_with_fields(
        {"messages": [{"role": "assistant", "content": "<image><image>"}], "images": ["a.png", "/b.png"]},
        ORIGIN,
        ReadOptions(image_root=Path("/pictures")),
    )
    assert [s.source for s in record.sample if isinstance(s, Image)] == [
        Path("/pictures/a.png"),
        Path("/b.png"),
    ]


def test_addresses_are_told_from_paths() -> None:
    assert place_of("HTTPS://a") == Address("HTTPS://a")
    assert place_of("file:/a%20b.png") == place_of("file:///a b.png") == "/a b.png"
    paths = [
        "a.png",
        "/a/b.png",
        "C:/a.png",
        "c:\\a",
        "http.png",
        "a/http://b",
        "photo: day.png",
        "//a/b.png",
    ]
    assert [place_of(path) for path in paths] == paths
    assert place_of("file:///a%20b.png") == "/a b.png" == place_of("file://localhost/a b.png")


def test_edits_in_several_turns_and_their_pictures() -> None:
    ids = ("edit_turn1", "final_image", "original_input_image")
    record = {
        "files": [{"id": name, "url": f"{name}.png"} for name in ids],
        "metadata_edit_turn_prompts": ["i", "j"],
    }
    found = ["[original_input_image.png]", "i", "[edit_turn1.png]*", "j", "[final_image.png]*"]
    assert read(record) == ("edit_turns", found)
    assert read(record | {"local_input_image": "a.jpg"})[1][0] == "[a.jpg]"
    for prompts in (["i"], ["i", "j", "k"]):
        error = refused(record | {"metadata_edit_turn_prompts": prompts})
        assert (error.code, error.field) == ("unequal_image_count", "files")
