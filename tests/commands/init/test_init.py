"""``unigen init``: a model in the published layout that reads the user's texts, and never over what is not its
own."""

import json

import pytest
import torch

from unigen import cli
from unigen.files import sha256_of
from unigen.model.weights import load_bagel
from unigen.sequence.tokens import Tokenizer

RECORD = {"text_prompt": "a red circle，红色的圆 (42)", "image_path": "a.png"}


@pytest.fixture
def data(tmp_path):
    from unigen.sequence.images import to_image

    to_image(torch.rand(3, 8, 8) * 2 - 1).save(tmp_path / "a.png")
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(RECORD, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def init(folder, *argv) -> int:
    return cli.main(["init", "--output_dir", str(folder), *map(str, argv)])


def test_a_model_reads_the_texts_of_the_data_and_reconstructs_pictures(tmp_path, data, capsys):
    folder = tmp_path / "models" / "own"
    assert init(folder, "--text_from", data) == 0
    assert f"--model_path {folder}" in capsys.readouterr().out
    tokenizer, model = Tokenizer.load(folder), load_bagel(folder)
    # words and Chinese characters are a token each, digits stand alone, and nothing is lost
    for text, count in (("a red circle", 3), ("红色的圆", 4), ("圆的", 2), (" red", 1), ("24", 2)):
        ids = tokenizer.encode(text)
        assert len(ids) == count and tokenizer.decode(ids) == text, text
    for text in ("unseen words", "没见过的字", "🙂 ñ"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    pixels = torch.rand(2, 3, 16, 12) * 2 - 1
    latents = model.codec.encode(pixels)
    assert torch.allclose(model.codec.decode(latents), pixels, atol=1e-5)
    assert latents.flatten(2).shape[1] == 3 * model.codec.downsample**2  # in colour


def test_without_data_the_tokenizer_has_the_bytes_alone(tmp_path):
    assert init(tmp_path / "own") == 0
    tokenizer = Tokenizer.load(tmp_path / "own")
    assert len(tokenizer.encode("圆")) == 3 and tokenizer.decode(tokenizer.encode("圆")) == "圆"


@pytest.mark.slow
def test_its_own_folder_is_made_anew_and_no_other(tmp_path, data, capsys):
    folder = tmp_path / "own"
    sums = []
    for argv in ([], ["--seed", 7], [], []):
        assert init(folder, "--text_from", data, *argv) == 0
        sums.append(sha256_of(folder / "ema.safetensors"))
        assert ("replaced" in capsys.readouterr().out) == (len(sums) > 1 and sums[-1] != sums[-2])
    assert sums[0] == sums[2] == sums[3] != sums[1]
    left = {path.name: sha256_of(path) for path in folder.iterdir()}

    def refused(name: str) -> None:
        assert init(folder, "--text_from", data) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and name in said and "Fix: " in said

    (folder / "notes.txt").write_text("mine")
    refused("notes.txt")
    (folder / "notes.txt").unlink()
    (folder / "config.json").write_text("{}")  # changed by hand
    refused("config.json")
    left.pop("config.json")
    assert {path.name: sha256_of(path) for path in folder.iterdir() if path.name in left} == left
    (folder / ".hidden").write_text("")
    refused("config.json")  # not the hidden one
    (folder / "train.log").write_text("")
    refused("training run")
    other = tmp_path / "other"
    other.mkdir()
    (other / ".unigen.json").write_text('{"generator": "unigen check", "files": {}}')
    assert init(other) == 2 and [path.name for path in other.iterdir()] == [".unigen.json"]


def test_data_is_read_with_the_options_of_a_training(tmp_path, data, capsys):
    renamed = {"caption_of_mine": "a red circle", "picture": "a.png"}
    (tmp_path / "pictures").mkdir()
    data.with_name("a.png").rename(tmp_path / "pictures" / "a.png")
    data.write_text(json.dumps(renamed) + "\n", encoding="utf-8")
    options = ["--fields", "text=caption_of_mine", "image=picture", "--image_root", tmp_path / "pictures"]
    assert init(tmp_path / "own", "--text_from", data, *options, "--trigger_word", "Zyxwv") == 0
    tokenizer = Tokenizer.load(tmp_path / "own")
    assert [len(tokenizer.encode(text)) for text in ("Zyxwv", " circle")] == [1, 1]
    assert "replaced" not in capsys.readouterr().out
    assert init(tmp_path / "own", "--trigger_word", "Zyxwv") == 2
    said = capsys.readouterr().err
    assert "trigger_word says how text_from is read" in said and "Fix: " in said


def test_data_that_cannot_be_read_leaves_nothing(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"caption": 1}\n')
    assert init(tmp_path / "own", "--text_from", tmp_path / "bad.jsonl") == 2
    assert "bad.jsonl:1" in capsys.readouterr().err and not (tmp_path / "own").exists()
