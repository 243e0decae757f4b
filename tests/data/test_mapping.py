"""How a source is read: names of fields, where its pictures lie; in the data set, the check and recipes alike."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checking import check
from PIL import Image

from unigen.cli import main, parse_config
from unigen.config import ConfigError, DataOptions
from unigen.data.dataset import BadData, UnifiedGenerationDataset
from unigen.data.formats import parse_with_fields
from unigen.data.mapping import ReadOptions
from unigen.model.weights import load_planner
from unigen.recipe import UsageError
from unigen.sequence.types import Origin


def picture(path: Path, size: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (9, 8, 7)).save(path)
    return path


def lines(path: Path, *records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_pictures_elsewhere_are_named_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "new pictures" / "sub" / "a.png")
    data = lines(tmp_path / "data" / "d.jsonl", {"text_prompt": "A", "image_path": "sub/a.png"})
    with pytest.raises(BadData, match="give --image_root 'new pictures'\n") as caught:
        UnifiedGenerationDataset(data)
    assert caught.value.records[0].code == "missing_picture"
    found = check(data, load_planner(None, DataOptions()), num_workers=0)
    assert next(iter(found.problems))["cure"].endswith("--image_root 'new pictures'")
    read = ReadOptions(image_root=tmp_path / "new pictures")
    assert len(UnifiedGenerationDataset(data, read=read)) == 1
    assert main(["check", str(data), "--image_root", "new pictures"]) == 0
    # where some are found, the place is right and the picture is missing
    picture(tmp_path / "data" / "sub" / "b.png")
    lines(
        data, {"text_prompt": "A", "image_path": "sub/b.png"}, {"text_prompt": "A", "image_path": "sub/a.png"}
    )
    with pytest.raises(BadData) as caught:
        UnifiedGenerationDataset(data)
    assert "image_root" not in str(caught.value)


def test_data_root_confines_image_root_too(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "a.png")
    data = lines(tmp_path / "data" / "d.jsonl", {"text_prompt": "A", "image_path": "a.png"})
    read = ReadOptions(data_root=tmp_path / "data", image_root=tmp_path / "pictures")
    with pytest.raises(BadData) as caught:
        UnifiedGenerationDataset(data, read=read)
    assert [error.code for error in caught.value.records] == ["outside_root"]
    with pytest.raises(BadData, match="image_root is no folder"):
        UnifiedGenerationDataset(data, read=ReadOptions(image_root=tmp_path / "none"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_fields_are_mapped_in_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    picture(tmp_path / "a.png")
    rows = [{"u": {"file": "a.png"}, "said": '{"en": "A house"}', "n": 3}]
    path = tmp_path / f"d.{kind}"
    if kind == "jsonl":
        lines(path, *rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    read = ReadOptions(fields={"image": "u.file", "text": "said.en"})
    dataset = UnifiedGenerationDataset(path, read=read)
    assert dataset[0].format == "image_and_text" and dataset[0].sample[0].text == "A house"
    other = ReadOptions(fields={"image_path": "u.file", "caption": "said.en"})
    assert UnifiedGenerationDataset(path, read=other).fingerprint != dataset.fingerprint
    assert main(["check", str(path), "--fields", "image=u.file", "text=said.en"]) == 0


def test_a_mapping_that_matches_nothing_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "a.png")
    data = lines(
        tmp_path / "d.jsonl", {"file_name": "a.png", "caption": "A"}, {"file_name": "a.png", "title": "A"}
    )
    read = ReadOptions(fields={"image_path": "file_name", "text_prompt": "captoin"})
    with pytest.raises(BadData, match="fields file_name, caption, title; expected captoin") as caught:
        UnifiedGenerationDataset(data, read=read)
    assert caught.value.records[0].code == "missing_field"
    assert main(["check", str(data), "--fields", "text_prompt=captoin"]) == 2
    assert main(["preview", str(data), "--fields", "text_prompt=captoin", "--output", "none"]) == 2
    assert capsys.readouterr().err.count("captoin") >= 2
    # one that some records have is none: the others are judged by themselves
    with pytest.raises(BadData) as caught:
        UnifiedGenerationDataset(
            data, read=ReadOptions(fields={"image_path": "file_name", "text_prompt": "caption"})
        )
    assert [error.origin.line for error in caught.value.records] == [2]


def test_a_record_with_another_kind_of_value_is_judged_by_itself(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    records = [{"image": "a.png", "meta": meta} for meta in ("plain", {"caption": "A"})]
    with pytest.raises(BadData) as caught:
        UnifiedGenerationDataset(
            lines(tmp_path / "d.jsonl", *records), read=ReadOptions(fields={"text": "meta.caption"})
        )
    assert [(error.code, error.field, error.origin.line) for error in caught.value.records] == [
        ("bad_json", "meta", 1)
    ]


def test_a_trigger_word_for_nothing_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    data = lines(tmp_path / "d.jsonl", {"text_prompt": "A", "image_path": "a.png"})
    with pytest.raises(BadData, match="trigger_word is 'sks'"):
        UnifiedGenerationDataset(data, read=ReadOptions(trigger_word="sks"))


def test_options_of_a_source_win_over_those_of_the_run(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model_path: m\nimage_root: all\nfields: {text: title}\ntrain_sources:\n"
        "  - {path: a.jsonl, image_root: own, fields: {text: caption, image: file}}\n"
        "  - {path: b.jsonl, trigger_word: sks}\n"
    )
    config = parse_config(["--config", str(recipe)])
    first, second = (ReadOptions.of(source, config) for source in config.sources())
    assert first.image_root == Path("own").absolute() and first.fields == {"text": "caption", "image": "file"}
    assert second.image_root == Path("all").absolute() and second.fields == {"text": "title"}
    assert (first.trigger_word, second.trigger_word) == (None, "sks")
    assert parse_config(["--fields", "a=b", "c=d", "--fields", "e=f"]).fields == {
        "a": "b",
        "c": "d",
        "e": "f",
    }
    for wrong in (["a"], ["a="], ["=b"], ["a=b", "a=c"]):
        with pytest.raises(UsageError, match="fields"):
            parse_config(["--fields", *wrong])
    with pytest.raises(ConfigError, match="fields"):
        DataOptions(fields={"a": 3})


def test_a_name_that_nothing_reads_is_no_mapping(tmp_path: Path) -> None:
    data = lines(tmp_path / "d.jsonl", {"query": "q", "response": "r", "image_file": "a.png"})
    with pytest.raises(BadData, match=r"--fields imagse=image_file.*did you mean image"):
        UnifiedGenerationDataset(data, read=ReadOptions(fields={"imagse": "image_file"}))


@pytest.mark.parametrize(
    ("record", "fields", "read_as"),
    [
        ({"images": ["a", "b"], "text": "A"}, {"image": "images.0", "text": "text"}, "image_and_text"),
        (
            {"images": ["a", "b"], "text": "A"},
            {"input_image": "images.0", "output_image": "images.1", "instruction": "text"},
            "single_edit",
        ),
        (
            {"conversations": [{"value": "q"}, {"value": "r"}]},
            {"query": "conversations.0.value", "response": "conversations.1.value"},
            "query_response",
        ),
        (
            {"messages": [{"role": "assistant", "content": "<image>r"}], "meta": {"shown": ["a"]}},
            {"image": "meta.shown"},
            "messages",
        ),
    ],
)
def test_a_list_of_which_places_are_mapped_is_not_read_itself(record, fields, read_as: str) -> None:
    read, _ = parse_with_fields(record, Origin(Path("/d.jsonl")), ReadOptions(fields=fields))
    assert read.format == read_as and read.notes == ()
