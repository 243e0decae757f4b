"""Every row of the table of public layouts in docs/data_formats.md: the layout as it is published (wording and
pictures our own), what it is read as, and the flag that the row names."""

import base64
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unigen.cli import parse_options
from unigen.commands.check.command import CheckOptions
from unigen.data.containers import parts as parts_of
from unigen.data.containers import read_part
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.examine import PictureHeaders, examine, locate
from unigen.data.finding import find_files
from unigen.data.formats import FORMATS, parse_raw, parse_with_fields, record_value
from unigen.data.hints import HINTS
from unigen.data.mapping import ReadOptions
from unigen.model.weights import load_planner
from unigen.sequence.types import BadRecord, Image, Origin, Text

DOCS = Path(__file__).parents[2] / "docs"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
CELL = {"bytes": PNG, "path": "0.png"}
TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A disc."}]


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]


def asked(part) -> dict:
    content = [part, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A disc."}]}


def sequence(*segments) -> dict:
    return {
        "sequence": [
            {"type": "image", "image_path": s} if s.endswith(".png") else {"content": s} for s in segments
        ]
    }


# What stands in a file of the name: records, a text, or members of a tar; one record where no name is given.
PUBLIC = {
    "BAGEL's VLM example (`llava_ov_si.jsonl`, pictures in a folder)": {"id": 9, "image": "3337.png", "conversations": TALK},
    "LLaVA, ShareGPT4V": {"id": "7", "image": "coco/1.png", "conversations": TALK, "model": ""},
    "LLaVA-OneVision, M4-Instruct, InternVL": {
        "sample_id": 0, "conversations": TALK, "image": ["1.png"], "metadata": {"dataset": "x"}, "choice_list": None,
    },
    "UniWorld (edits as conversations)": {
        "image": ["1.png", "2.png"],
        "conversations": [{"from": "human", "value": "<image>\nmake it blue"}, {"from": "gpt", "value": "<image>"}],
    },
    "LLaVA's pre-training captions": {"id": "1", "image": "1.png", "caption": "a disc", "url": "http://a/1.png"},
    "the same, to learn the caption": {"id": "1", "image": "1.png", "caption": "a disc", "url": "http://a/1.png"},
    "MiniCPM-V": {
        "id": "0", "image": "1.png",
        "conversations": [{"role": "user", "content": "<image>\nq"}, {"role": "assistant", "content": "r"}],
    },
    "The Cauldron, FineVision": {
        "images": [CELL], "texts": [{"user": "q", "assistant": "r", "source": "x"}, {"user": "s", "assistant": "t"}],
    },
    "chats of transformers, TRL, Qwen-VL": asked({"type": "image", "image": "file:///data/1.png"}),
    "TRL (`llava-instruct-mix-vsft`: parts with `index`)": {
        "messages": [
            {"role": "user", "content": [{"index": None, "text": "q", "type": "text"}, {"index": 0, "text": None, "type": "image"}]},
            {"role": "assistant", "content": [{"index": None, "text": "r", "type": "text"}]},
        ],
        "images": [CELL],
    },
    "Nexus-Gen (ms-swift's `messages`, edits)": {
        "messages": [{"role": "user", "content": "<image>i"}, {"role": "assistant", "content": "Here: <image>"}],
        "images": ["1.png", "2.png"],
    },
    "Mantis": {"id": "0", "images": [CELL], "conversation": TURNS, "source": "x"},
    "chats of OpenAI with `data:` URIs": asked({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}),
    "messages of Anthropic": asked(
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": URI.partition(",")[2]}}
    ),
    "ms-swift (`query`, `response`)": {"query": "<image>q", "response": "r", "images": ["1.png"], "history": [["p", "o"]]},
    "VQAv2, GQA, GSM8K (`question`, `answer`)": {"image": CELL, "question_id": 3, "question": "q", "answer": "r"},
    "VQAv2 (Hugging Face)": {
        "image": CELL, "question": "q", "multiple_choice_answer": "net", "answers": [{"answer": "net", "answer_id": 1}],
    },
    "DocVQA, TextVQA": {"questionId": "1", "image": CELL, "question": "q", "answers": ["1998", "in 1998"]},
    "VizWiz": {"image": "1.png", "question": "q", "answers": [{"answer": "r", "answer_confidence": "yes"}], "answerable": 1},
    "A-OKVQA": {
        "image": CELL, "question": "q", "choices": ["a", "b"], "correct_choice_idx": 1, "direct_answers": ["b", "c"],
    },
    "ChartQA": {"imgname": "1.png", "query": "q", "label": "3"},
    "PixMo-AskModelAnything": {"image_url": "http://a/1.png", "question": "q", "answer": "r", "image_sha256": "x"},
    "OpenOrca": {"id": "x", "system_prompt": "s", "question": "q", "response": "r"},
    "OpenR1-Math, NuminaMath": {"problem": "q", "solution": "r", "uuid": "x"},
    "Alpaca, LLaMA-Factory": {"instruction": "do", "input": "x", "output": "y"},
    "Dolly": {"instruction": "do", "context": "x", "response": "y", "category": "z"},
    "diffusers, pokemon-blip-captions (Parquet)": ("train.parquet", [{"image": CELL, "text": "a disc"}]),
    "imagefolder with `metadata.jsonl`": ("train/metadata.jsonl", [{"file_name": "1.png", "text": "a disc"}]),
    "imagefolder with `metadata.csv`": ("train/metadata.csv", "file_name,text\n1.png,a disc\n"),
    "kohya, ai-toolkit, SimpleTuner (`a.png`, `a.txt`)": ("a.txt", "a disc\n"),
    "img2dataset, BLIP3o (WebDataset tars)": (
        "00000.tar", [("0.jpg", PNG), ("0.json", b'{"caption": "a disc", "url": "x"}'), ("0.txt", b"a disc")],
    ),
    "img2dataset's folders (`00000/0.jpg`, `.txt`, `.json`; `00000.parquet`)": (
        "00000/a.txt", "a disc", {"00000/a.json": "{}", "00000.parquet": "", "00000_stats.json": "{}"},
    ),
    "img2dataset's Parquet files": {"url": "http://a/1.jpg", "caption": "a disc", "key": "0", "jpg": PNG},
    "Text-to-image-2M (tars with `.json`)": ("0.tar", [("0.jpg", PNG), ("0.json", b'{"prompt": "a disc"}')]),
    "LAION, COYO, CC12M (`url`, `caption`)": {"url": "http://a/1.png", "caption": "a disc", "width": 3},
    "LAION-COCO": {"URL": "http://a/1.png", "TEXT": "t", "top_caption": "a disc", "all_captions": ["a disc"], "WIDTH": 3},
    "Flickr30k (`flickr_annotations_30k.csv`)": (
        "f.csv", 'raw,sentids,split,filename,img_id\n"[""A disc."", ""Red.""]","[0, 1]",train,a.png,0\n',
    ),
    "Flickr30k (`results.csv`)": ("results.csv", "image_name| comment_number| comment\na.png| 0| A disc .\n"),
    "COCO captions (`sentences`)": {"filename": "1.png", "sentences": ["a disc", "b"], "cocoid": 1, "url": "http://a/1.png"},
    "TextCaps": {"image": CELL, "question": "q", "caption_str": ["a disc"], "reference_strs": ["a disc"]},
    "DreamBooth: pictures without texts": ("README.md", ""),
    "JourneyDB": {"img_path": "1.png", "prompt": "a disc", "Task1": {"Caption": "x"}},
    "DOCCI, ImageInWords": {"image": CELL, "example_id": "x", "description": "a disc"},
    "DiffSynth-Studio, text to image": {"image": "1.png", "prompt": "a disc"},
    "DiffSynth-Studio, edits": {"image": "2.png", "prompt": "make it blue", "edit_image": ["1.png"]},
    "OmniGen2, X2I2": {"task_type": "edit", "instruction": "i", "input_images": ["1.png"], "output_image": "2.png"},
    "InstructPix2Pix": (
        "train.parquet",
        [{"original_prompt": "o", "original_image": CELL, "edit_prompt": "i", "edited_prompt": "p", "edited_image": CELL}],
    ),
    "UltraEdit": {
        "clip_sim_source": 0.2, "source_caption": "s", "target_caption": "t", "edit_prompt": "i",
        "source_image": CELL, "edited_image": CELL, "mask_image": CELL,
    },
    "OmniEdit": {"omni_edit_id": "x", "task": "t", "src_img": CELL, "edited_img": CELL, "edited_prompt_list": ["i", "j"]},
    "MagicBrush, SEED-Data-Edit": {
        "img_id": "1", "turn_index": 1, "source_img": CELL, "mask_img": CELL, "instruction": "i", "target_img": CELL,
    },
    "HQ-Edit": {
        "input_image": CELL, "output_image": CELL, "edit": "i", "inverse_edit": "j", "input": "a", "output": "b",
    },
    "ShareGPT-4o-Image": {"input_prompt": "i", "input_image": ["1.png"], "output_image": "2.png"},
    "OpenGPT-4o-Image, Echo-4o": {
        "task_type": "multi", "instruction": "i", "input_images": ["1.png", "2.png"], "output_image": "3.png",
    },
    "ImgEdit": {"edit_type": "add", "prompt": "i", "input_images": ["1.png"], "output_images": ["2.png"]},
    "Pico-Banana-400K": {
        "open_image_input_url": "http://a/1.png", "text": "i", "output_image": "2.png", "edit_type": "x",
        "summarized_text": "s",
    },
    "Pico-Banana-400K, several turns": {
        "files": [
            {"id": "original_input_image", "url": "http://a/1.png"}, {"id": "edit_turn1", "url": "2.png"},
            {"id": "final_image", "url": "3.png"},
        ],
        "metadata_edit_turn_prompts": ["i", "j"],
    },
    "AnyEdit": {"edit": "i", "input": "a", "output": "b", "image_file": CELL, "edited_file": CELL, "edit_type": "x"},
    "AnyEdit (Hugging Face)": {
        "edit_instruction": "i", "edit_type": "x", "image_file": CELL, "edited_file": CELL, "input": "a", "output": "b",
    },
    "GPT-Image-Edit": {"id": "1", "input": "1.png", "output": "2.png", "instruction": "i"},
    "musubi-tuner, edits": {"image_path": "2.png", "control_path": "1.png", "caption": "i"},
    "ControlNet pairs (fill50k)": {"source": "1.png", "target": "2.png", "prompt": "i"},
    "BAGEL's edits (Parquet)": ("e.parquet", [{"image_list": [PNG, PNG], "instruction_list": [["i", "j"]]}]),
    "ThinkMorph": {
        "image_list": [PNG, PNG], "instruction_list": ["q"],
        "output_text_list": ["<think>t</think><image_start>", "<image_end><answer>B</answer>"],
    },
    "Zebra-CoT": {
        "Question": "q <image_start>[problem_image_1]<image_end>", "problem_image_1": CELL, "problem_image_2": None,
        "Text Reasoning Trace": "THOUGHT 0: t <image_start>[reasoning_image_1]<image_end>", "Final Answer": "1",
        "reasoning_image_1": CELL,
    },
    "OBELICS": {"images": ["1.png", None], "texts": [None, "a disc"], "metadata": "[]", "general_metadata": "{}"},
    "MMC4": {
        "text_list": ["a disc"], "url": "http://a", "similarity_matrix": [[0.3]],
        "image_info": [{"image_name": "1.png", "raw_url": "http://a/1.png", "matched_text_index": 0, "matched_sim": 0.3}],
    },
    "reflection: draw, criticise, draw again": sequence("A blue house", "1.png", "The walls are white.", "2.png"),
}  # fmt: skip


def rows(page: str) -> list[tuple[str, str, str]]:
    """The cells of the table of public layouts."""
    text = (DOCS / page).read_text("utf-8")
    block = re.split(r"\n## ", text[re.search(r"\n## (Public layouts|公开的数据布局)\n", text).end() :])[0]
    cells = [
        tuple(c.strip() for c in line.strip("|").split("|"))
        for line in block.splitlines()
        if line.startswith("|")
    ]
    return cells[2:]  # type: ignore[return-value]


ROWS = rows("data_formats.md")


def write(folder: Path, alone: bool, name: str, content, beside: dict | None = None) -> list[Path]:
    for other, text in (beside or {}).items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_text(text)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "a.png").write_bytes(PNG)
    if name.endswith(".tar"):
        with tarfile.open(path, "w") as tar:
            for member, data in content:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text(
            content if isinstance(content, str) else "".join(map(json.dumps, content)), encoding="utf-8"
        )
    return [found for found, _ in find_files([folder], alone=alone)]


@pytest.mark.parametrize("row", ROWS, ids=[name for name, _, _ in ROWS])
def test_a_public_layout_is_read_as_its_row_says(row: tuple[str, str, str], tmp_path: Path) -> None:
    name, number, given = row
    words = given.strip("`").split()
    fetched = words[:2] == ["unigen", "fetch"]
    options = parse_options(CheckOptions, ["x", *words[3 * fetched :]], "paths")
    read = ReadOptions.of(options)
    content = PUBLIC[name]
    if isinstance(content, dict):
        content = "d.jsonl", content
        record, fields = parse_with_fields(content[1], Origin(tmp_path / "d.jsonl"), read, addresses=fetched)
        assert read.image_root is None or record.sample[0].source.parent == read.image_root
        if words and read.fields and not set(read.fields) & {"image_path"}:  # what is told without the flag
            with pytest.raises(BadRecord) as caught:
                parse_with_fields(content[1], Origin(tmp_path / "d.jsonl"))
            assert given.strip("`").partition("--")[2] in caught.value.fix
    else:
        (path,) = write(tmp_path, bool(read.trigger_word), *content)
        (found,) = [(s, raw) for part in parts_of(path, 0) for s, raw in read_part(part)]
        record, fields = parse_raw(found[1], found[0].line, Origin(path), read)
    assert record.format == list(FORMATS)[int(number) - 1] and len(fields) == len(record.sample)
    assert any(isinstance(segment, Image) for segment in record.sample) or number in ("13", "14")


def test_both_pages_and_the_test_have_the_same_rows() -> None:
    chinese = rows("data_formats.zh-CN.md")
    assert [name for name, _, _ in ROWS] == list(PUBLIC)
    assert [row[1:] for row in chinese] == [row[1:] for row in ROWS]


@pytest.mark.parametrize("hint", HINTS, ids=[hint.name for hint in HINTS])
def test_a_known_data_set_is_answered_with_a_line_that_works(hint, tmp_path: Path) -> None:
    record: dict = {"id": 3}
    for new, place in (*hint.fields.items(), *((name, name) for name in hint.also)):
        picture = "http://a/1.png" if hint.web else "1.png"
        value = picture if "image" in new or "picture" in new else TURNS if new == "messages" else "words"
        head, *rest = place.split(".")
        for step in reversed(rest):
            value = [value] if step == "0" else {step: value}
        record[head] = value
    if "input_file_name" in record:
        record["instruction"] = "words"
    with pytest.raises(BadRecord) as caught:
        parse_with_fields(record, Origin(tmp_path / "my data.jsonl"))
    fix = caught.value.fix
    assert hint.name.split(",")[0] in fix
    assert ("unigen fetch '" in fix) == hint.web
    flags = fix.partition("--fields ")[2].split()
    options = parse_options(CheckOptions, ["x", "--fields", *flags], "paths")
    assert parse_with_fields(record, Origin(tmp_path / "d.jsonl"), ReadOptions.of(options), addresses=True)


def test_a_guess_that_meets_another_kind_of_value_is_no_error(tmp_path: Path) -> None:
    for record, line in (
        ({"question": "q", "answers": "red"}, "--fields query=question response=answers"),
        ({"image": "a.png", "sentences": "A cat."}, "--fields text=sentences"),
    ):
        with pytest.raises(BadRecord) as caught:
            parse_with_fields(record, Origin(tmp_path / "d.jsonl"))
        assert caught.value.code == "no_format" and line in caught.value.fix
        options = parse_options(CheckOptions, ["x", *line.split()], "paths")
        assert parse_with_fields(record, Origin(tmp_path / "d.jsonl"), ReadOptions.of(options))


def test_a_text_alone_is_told_its_format() -> None:
    with pytest.raises(BadRecord) as caught:
        parse_with_fields({"text": "a"}, Origin(Path("d.jsonl")))
    assert "sequence: " in caught.value.fix and "did you mean" not in caught.value.fix


@pytest.mark.parametrize(
    "record", [{"colour": "a", "shape": "b"}, {"question": "a"}, {"image": "a.png", "label": 3}]
)
def test_of_others_nothing_is_guessed(record) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_with_fields(record, Origin(Path("d.jsonl")))
    assert (
        caught.value.code == "no_format"
        and "--fields" not in caught.value.fix
        and "did you mean" not in caught.value.fix
    )
    assert record_value(json.dumps(record).encode(), 1) == record


@pytest.mark.parametrize(
    ("value", "found", "fix"),
    [
        ({"data": [{"image": "a.png", "text": "t"}]}, "a list of records under data", "jq .data OLD"),
        ({"a/1.png": "a disc", "a/2.png": "t"}, "under the paths of their pictures", "{image: .key, text: (.value)}"),
        (
            {"/d/1": {"tags": "a, b"}, "/d/2": {"caption": "a disc", "train_resolution": [512, 512]}},
            "under the paths of their pictures", '{image: (.key + ".jpg"), text: (.value | .caption // .tags)}',
        ),
        ({"7": {"image": "a.png", "text": "t"}, "8": {"image": "b.png", "text": "u"}}, "keys of their own", "jq '[.[]]'"),
        (
            {"info": {}, "images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "t"}]},
            "as COCO has them", ".annotations[] | {image:",
        ),
    ],
)  # fmt: skip
def test_an_object_that_holds_many_records_is_told_what_makes_a_list_of_it(
    value, found: str, fix: str
) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_with_fields(value, Origin(Path("d.json")))
    assert caught.value.code == "no_format" and found in caught.value.found and fix in caught.value.fix


@pytest.mark.parametrize(
    ("record", "name", "segments"),
    [
        ({"conversation": [{"system": "s", "input": "q", "output": "r"}]}, "XTuner", ["s", "q", "r*"]),
        ({"conversation": [{"human": "q", "assistant": "r"}], "num_turns": 1}, "Firefly, MOSS", ["q", "r*"]),
        ({"prompt": TURNS, "completion": TURNS[1:]}, "TRL", ["q", "r", "r*"]),
        (
            {
                "systemInstruction": {"parts": [{"text": "s"}]},
                "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "r"}]}],
            },
            "Gemini", ["s", "q", "r*"],
        ),
        ({"text": "t", "meta": {}}, "texts alone", ["t*"]),
        ({"text": "Draw it.\n<image>", "images": ["1.png"]}, "CoMM", ["Draw it.*", "1.png*"]),
        (
            {"conversations": [{"from": "user", "value": "1: <img>1.png</img>\nq"}, {"from": "assistant", "value": "r"}]},
            "<image> there", ["1:", "1.png", "q", "r*"],
        ),
        (
            {"instruction": "<img><|image_1|></img> i", "input_images": ["1.png"], "output_image": "2.png"},
            "<image> there", ["1.png", "i", "2.png*"],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_layouts_that_no_mapping_reads_are_rewritten_by_the_line_that_is_told(
    record: dict, name: str, segments: list[str], suffix: str, tmp_path: Path
) -> None:
    old, new = tmp_path / f"OLD{suffix}", tmp_path / "NEW.jsonl"
    old.write_text(json.dumps([record] if suffix == ".json" else record))
    for picture in ("1.png", "2.png"):
        (tmp_path / picture).write_bytes(PNG)
    ((part),) = parts_of(old, 0)
    ((span, raw),) = read_part(part)
    planner = load_planner(None)
    with pytest.raises(BadRecord) as caught:
        examine(raw, span, old, PictureHeaders(), planner.token_lengths)
    assert name in caught.value.fix
    line = (
        caught.value.fix[caught.value.fix.index("jq ") :]
        .replace("OLD", str(old))
        .replace("NEW.jsonl", str(new))
    )
    subprocess.run(line, shell=True, check=True)
    (found,) = UnifiedGenerationDataset(new, token_lengths=planner.token_lengths)
    shown = [s.text if isinstance(s, Text) else s.source.name for s in found.sample]
    assert [one + "*" * s.target for one, s in zip(shown, found.sample)] == segments


@pytest.mark.parametrize(
    "record",
    [
        {"caption": "a disc", "jpg_0": PNG, "jpg_1": PNG, "best_image_uid": "x"},  # Pick-a-Pic
        {"prompt": "a disc", "image_path": ["1.png", "2.png"], "human_preference": [1, 0]},  # HPDv2
        {"image": CELL, "image_path": "x.png", "text": json.dumps({"question": "q", "chosen": "a", "rejected": "b"})},
        {"image": CELL, "prompt": "q", "completions": [{"response": "a"}]},  # VLFeedback
        {"question": "q", "response_j": "a", "response_k": "b"},  # StackExchange in pairs
    ],
)  # fmt: skip
def test_preferences_are_refused_by_whatever_name(record) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_with_fields(record, Origin(Path("d.jsonl")))
    assert caught.value.code == "unsupported_key" and "no preference training" in caught.value.expected


@pytest.mark.parametrize(
    ("record", "code", "line"),
    [
        ({"system_prompt": "s", "conversations": TALK[1:]}, "unknown_key", "--fields system=system_prompt"),
        ({"image": CELL, "question": "q", "choices": ["a"], "answer": 0}, "no_format", "query, response"),
        ({"images": [{"filename": "1.png", "sentences": []}], "dataset": "coco"}, "no_format", "jq .images OLD"),
        (
            {"image_file": CELL, "edited_file": CELL, "visual_input": CELL, "edit_instruction": "i", "input": "a", "output": "b"},
            "no_format", "--fields input_image=image_file output_image=edited_file",
        ),
        (
            {"input_image": CELL, "output_image": CELL, "visual_input": CELL, "edit_instruction": "i"},
            "unexpected_field", "metadata=visual_input",
        ),
        (
            {"original_image_file_name": "1.png", "edited_image_file_name": "2.png", "edit_prompt": "i"},
            "no_format", "--fields original_image=original_image_file_name edited_image=edited_image_file_name",
        ),
        ({"image": "1.png", "conversations": TALK, "caption": "c"}, "ambiguous_format", "metadata=caption to read it as sharegpt"),
        ({"image_path": "1.png", "caption": "c", "mask_path": "2.png"}, "unexpected_field", "--fields metadata=mask_path"),
        ({"file_name": "1.png", "instruction": "i"}, "no_format", "--fields text=instruction"),
        ({"text": "t", "url": "http://a/page", "language": "en"}, "no_format", "jq -c '{sequence: [{content: .text}]}'"),
        ({"input": ["1.png"], "output": "2.png", "instruction": "i"}, "unexpected_field", "input_images=input"),
        (
            {"images": ["1.png"], "messages": [{"role": "user", "content": [{"type": "image", "index": 1}]}, TURNS[1]]},
            "ambiguous_piece", "as the parts show them",
        ),
    ],
)  # fmt: skip
def test_what_would_be_left_out_or_misread_is_told_with_the_line(record, code: str, line: str) -> None:
    with pytest.raises(BadRecord) as caught:
        parse_with_fields(record, Origin(Path("d.jsonl")))
    assert caught.value.code == code and line in caught.value.fix


def test_a_tag_in_capitals_is_told_its_letters() -> None:
    error = BadRecord(
        "tag_without_picture", "messages[0].content", "the tag <Image> at character 1", "a", "b"
    )
    locate(error, Origin(Path("d.jsonl")), [])
    assert error.fix.startswith("write <image> there")


def test_bytes_that_are_no_picture_are_none() -> None:
    record = {"input_image": CELL, "output_image": CELL, "instruction": "i", "embedding": b"123"}
    found, _ = parse_with_fields(record, Origin(Path("d.parquet")))
    assert found.notes == (("unread", "embedding"),)


def test_variants_of_a_caption_may_be_the_json_text_of_a_list() -> None:
    """As tables hold them; what only looks like one is no caption either."""
    record, _ = parse_with_fields({"image": "1.png", "text": '["A disc.", "Red."]'}, Origin(Path("d.csv")))
    assert record.sample[0].variants == ("A disc.", "Red.")
    assert parse_with_fields({"image": "1.png", "text": "['tis red"}, Origin(Path("d.csv")))
    with pytest.raises(BadRecord) as caught:
        parse_with_fields({"image": "1.png", "text": "['A disc.', 'Red.']"}, Origin(Path("d.csv")))
    assert (caught.value.code, caught.value.field) == ("bad_json", "text")


@pytest.mark.parametrize("names", ["developer Human AI", "System USER Model"])
def test_who_speaks_has_many_names(names: str) -> None:
    turns = [{"role": role, "content": role} for role in names.split()]
    record, _ = parse_with_fields({"messages": turns}, Origin(Path("d.jsonl")))
    assert [segment.target for segment in record.sample] == [False, False, True]
    turns = [{"from": role, "value": role} for role in names.split()]
    record, _ = parse_with_fields({"conversations": turns}, Origin(Path("d.jsonl")))
    assert [segment.target for segment in record.sample] == [False, False, True]
