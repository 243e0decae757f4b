"""Presets and layouts of the field's benchmarks: what is read of a prompts file, what is refused, and that the
files stand where the public scorers look for them."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from pictures import noise

from unigen.cli import parse_options
from unigen.commands.generate.options import GenerateOptions
from unigen.config import SamplingOptions
from unigen.evaluation.benchmarks import LAYOUTS, PRESETS, BenchmarkError, beaten
from unigen.evaluation.prompt_files import read_asked
from unigen.sequence.types import BadRecord

GENEVAL = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
# A record of each benchmark as its authors distribute it, without what no scorer's folder depends on.
RECORDS = {
    "geneval": GENEVAL,
    "geneval2": {"prompt": "two metal toys", "atom_count": 3, "vqa_list": [["How many toys?", "two"]]},
    "wise": {"Prompt": "Traditional food of the festival", "Explanation": "mooncakes", "prompt_id": 7},
    "dpg": {"item_id": "partiprompts7", "text": "a long text"},
    "imgedit": {"key": "1082", "id": "cat.png", "prompt": "Make it red", "edit_type": "adjust"},
    "gedit": {
        "task_type": "color_alter", "key": "0f38", "instruction": "把猫变红", "instruction_language": "cn",
        "input_image": "cat.png",
    },
    "kris": {"id": "3", "type": "part_completion", "ori_img": ["cat.png"], "ins_en": "Add the ear"},
    "rise": {"index": "causal_reasoning_1", "category": "causal_reasoning", "instruction": "a year later",
             "image": "cat.png"},
    "lmms-eval": {"task": "gedit_bench", "doc_id": 5, "prompt": "Make it red", "image": "cat.png"},
}  # fmt: skip
PLACES = {
    "geneval": ["00000/samples/00000.png", "00000/samples/00001.png"], "geneval2": ["00000.png"],
    "wise": ["7.png"], "dpg": ["partiprompts7.png"], "imgedit": ["1082.png"],
    "gedit": ["fullset/color_alter/cn/0f38.png"], "kris": ["part_completion/3.png"],
    "rise": ["causal_reasoning/causal_reasoning_1.png"], "lmms-eval": ["gedit_bench_5.png"],
}  # fmt: skip


def write_prompts(folder: Path, layout: str, *records: dict) -> Path:
    """A prompts file as the benchmark has it, and the picture of its edits."""
    pictures = folder / records[0]["type"] if layout == "kris" and "type" in records[0] else folder
    pictures.mkdir(parents=True, exist_ok=True)
    noise(48, 32, 1).save(pictures / "cat.png")
    if layout == "imgedit":
        held = {r.get("key", ""): {k: v for k, v in r.items() if k != "key"} for r in records}
        path, text = folder / "singleturn.json", json.dumps(held)
    elif layout in ("wise", "kris", "rise"):
        path, text = folder / "data.json", json.dumps(list(records), indent=1)
    else:
        path, text = folder / "data.jsonl", "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text, encoding="utf-8")
    return path


def test_every_preset_names_settings_that_there_are_and_a_layout():
    names = {f.name for f in fields(SamplingOptions)}
    for preset in PRESETS.values():
        assert set(preset.settings) <= names and preset.layout in LAYOUTS and preset.source
        SamplingOptions(**preset.settings)
    assert {preset.layout for preset in PRESETS.values()} == set(LAYOUTS) == set(RECORDS)
    assert {name for name, preset in PRESETS.items() if preset.one_seed} == {"gedit"}


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("geneval", (4, 1.0, (0, 1), "global", False, 4)),
        ("wise", (4, 1.0, (0.4, 1), "global", True, 1)),
        ("imgedit", (4, 1.5, (0, 1), "text_channel", False, 1)),
        ("gedit", (4, 1.5, (0.4, 1), "text_channel", False, 1)),
        ("kris", (4, 1.5, (0, 1), "text_channel", True, 1)),
        ("rise", (4, 2.0, (0, 1), "text_channel", True, 1)),
    ],
)
def test_presets_are_those_of_the_published_scripts(preset, settings):
    """The figures of ByteDance-Seed/Bagel, eval/gen, at 056b5fd."""
    o = parse_options(GenerateOptions, ["--model_path", "m", "--preset", preset])
    named = o.cfg_text_scale, o.cfg_img_scale, o.cfg_interval, o.cfg_renorm_type, o.think
    assert (*named, PRESETS[preset].pictures) == settings
    assert (o.num_timesteps, o.timestep_shift, o.cfg_renorm_min, o.seed) == (50, 3, 0, 42)
    assert (o.height is None) == (PRESETS[preset].vit is not None) and beaten(preset, o) == []
    assert not o.think or (o.do_sample, o.temperature, o.max_new_tokens) == (True, 0.3, 2048)


def test_an_option_beats_the_preset_even_with_the_usual_value_and_it_is_said():
    argv = ["--model_path", "m", "--preset", "wise", "--cfg_text_scale", "3.0", "--no_think"]
    o = parse_options(GenerateOptions, argv)
    assert (o.cfg_text_scale, o.think, o.num_timesteps) == (3.0, False, 50)
    told = beaten("wise", o)
    assert len(told) == 2 and any("cfg_text_scale 3.0 wins over 4.0" in sentence for sentence in told)


@pytest.mark.parametrize("layout", RECORDS)
def test_records_stand_where_their_scorer_looks(tmp_path, layout):
    path = write_prompts(tmp_path, layout, RECORDS[layout])
    (asked,) = read_asked(path, LAYOUTS[layout], 2 if LAYOUTS[layout].several else 1)
    assert list(asked.places) == PLACES[layout]
    assert asked.text == RECORDS[layout][LAYOUTS[layout].text]
    assert len(asked.pictures) == bool(LAYOUTS[layout].picture)


@pytest.mark.parametrize("layout", RECORDS)
def test_a_field_that_is_missing_is_named_with_file_and_line(tmp_path, layout):
    for name in LAYOUTS[layout].fields:
        if name == "key" and layout == "imgedit":
            continue  # the file cannot lack it
        good = RECORDS[layout]
        other = {**good, **{key: 999 for key in LAYOUTS[layout].names}}
        other.pop(name, None)
        path = write_prompts(tmp_path / name, layout, good, other)
        with pytest.raises(BenchmarkError) as refused:
            read_asked(path, LAYOUTS[layout], 1)
        told = str(refused.value)
        place = r"key 999" if layout == "imgedit" else r":\d+" if path.suffix == ".json" else ":2"
        assert (
            re.match(rf"{re.escape(str(path))}(, )?{place}: field {name} is missing", told) and "Fix:" in told
        )


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("wise", {"prompt_id": "../up"}, "field prompt_id is ../up"),
        ("gedit", {"task_type": ".hidden"}, "field task_type"),
        ("rise", {"index": "a/b"}, "field index"),
        ("kris", {"ori_img": ["none.png"]}, "field ori_img"),
        ("rise", {"image": "none.png"}, "--image_root"),
        ("rise", {"image": "http://127.0.0.1/a.png"}, "http://127.0.0.1/a.png: an address"),
        ("wise", {"Prompt": "  "}, "field Prompt is"),
        ("dpg", {"text": 5}, "field text is 5"),
    ],
)
def test_values_that_cannot_be_used_are_named(tmp_path, layout, change, words):
    path = write_prompts(tmp_path, layout, {**RECORDS[layout], **change})
    with pytest.raises(BenchmarkError, match=re.escape(words)):
        read_asked(path, LAYOUTS[layout], 1)


def test_two_records_of_one_file_and_files_without_records_are_refused(tmp_path):
    path = write_prompts(tmp_path, "wise", RECORDS["wise"], RECORDS["wise"])
    with pytest.raises(BenchmarkError, match=r"is 7\.png again"):
        read_asked(path, LAYOUTS["wise"], 1)
    path = write_prompts(tmp_path, "geneval2", RECORDS["geneval2"], {**RECORDS["geneval2"], "atom_count": 1})
    with pytest.raises(BenchmarkError, match="prompt two metal toys again"):
        read_asked(path, LAYOUTS["geneval2"], 1)
    path.write_text("not json\n")
    with pytest.raises(BadRecord, match=r"data\.jsonl:1"):
        read_asked(path, LAYOUTS["geneval2"], 1)
    for wrong in (tmp_path / "none.jsonl", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(BenchmarkError, match=r"not there|holds no prompt"):
            read_asked(wrong, LAYOUTS["dpg"], 1)


def test_dpg_prompts_are_a_folder_of_texts_or_the_table_of_questions(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("b2", "a1"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"text {name}\n")
    table = tmp_path / "dpg_bench.csv"
    table.write_text("item_id,text,proposition_id\na1,text a1,1\na1,text a1,2\nb2,text b2,1\n")
    found = [read_asked(path, LAYOUTS["dpg"], 4) for path in (tmp_path / "prompts", table)]
    assert [[(one.text, *one.places) for one in ones] for ones in found] == [
        [("text a1", "a1.png"), ("text b2", "b2.png")]
    ] * 2


def test_a_table_holds_the_pictures_of_edits_itself(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    noise(16, 16, 2).save(tmp_path / "a.png")
    record = {**RECORDS["gedit"], "input_image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}}
    parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "train.parquet")
    (asked,) = read_asked(tmp_path / "train.parquet", LAYOUTS["gedit"], 1)
    assert isinstance(asked.pictures[0], bytes) and asked.places == tuple(PLACES["gedit"])
