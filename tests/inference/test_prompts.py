"""Prompts that are answered while training: read from texts and files, and every mistake named with file and
line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import draw_picture

from unigen.inference.options import sampling_options
from unigen.inference.prompts import SAMPLES, PromptError, read_prompts


def test_prompts_come_as_texts_as_lines_and_as_json_lines(tmp_path: Path):
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\r\n  two words \n\xe7\x8c\xab")
    draw_picture(tmp_path / "b.png", 2)
    (tmp_path / "more.jsonl").write_text(
        '{"prompt": "x", "image": "b.png", "seed": 5, "cfg_interval": [0, 1]}\n{"image": "b.png"}\n'
    )
    found = read_prompts(["a red house.", str(tmp_path / "lines.txt"), str(tmp_path / "more.jsonl")], 10)
    assert [p.text for p in found] == ["a red house.", "a cat", "two words", "猫", "x", ""]
    assert [p.seed for p in found] == [10, 11, 12, 13, 5, 15]
    assert [p.where for p in found][3:] == [
        f"{tmp_path / 'lines.txt'}:4",
        f"{tmp_path / 'more.jsonl'}:1",
        f"{tmp_path / 'more.jsonl'}:2",
    ]
    assert found[4].images == (str(tmp_path / "b.png"),) and found[4].options == {"cfg_interval": [0, 1]}
    assert found[4].sampling == sampling_options(SAMPLES, seed=5, cfg_interval=(0, 1)) and found[
        3
    ].sampling == replace(SAMPLES, seed=13)
    assert read_prompts("x" * 5000, 0)[0].kind == "auto"  # longer than any name of a file


BAD_LINES: dict[str, tuple[str, str]] = {
    "not JSON": ("{'prompt': 1}", "Fix:"),
    "cut": ('{"prompt": "a"', "Fix:"),
    "not finite": ('{"prompt": "a", "cfg_text_scale": NaN}', "NaN"),
    "twice": ('{"prompt": "a", "prompt": "b"}', "prompt"),
    "a list": ('["a"]', "no JSON object"),
    "unknown key": ('{"prompt": "a", "heigth": 32}', "did you mean height?"),
    "no text": ('{"prompt": 3}', "prompt is 3"),
    "nothing": ('{"prompt": " "}', "neither prompt nor image"),
    "kind": ('{"prompt": "a", "kind": "paint"}', "kind is 'paint'"),
    "seed": ('{"prompt": "a", "seed": -1}', "seed is -1"),
    "true is no number": ('{"prompt": "a", "num_timesteps": true}', "num_timesteps is True"),
    "one step": ('{"prompt": "a", "num_timesteps": 1}', "at least 2"),
    "interval": ('{"prompt": "a", "cfg_interval": [0.4]}', "list of two numbers"),
    "half a size": ('{"prompt": "a", "height": 32}', "go together"),
    "a size to answer": ('{"prompt": "a", "kind": "answer", "height": 32, "width": 32}', "kind is answer"),
    "half a character": ('{"prompt": "a \\ud800"}', ""),
    "null": ('{"prompt": "a", "height": null}', "leave it out"),
    "no type of renormalisation": (
        '{"prompt": "a", "cfg_renorm_type": "local"}',
        "cfg_renorm_type is 'local'",
    ),
    "temperature": ('{"prompt": "a", "temperature": 0, "do_sample": true}', "temperature is 0"),
    "no picture": ('{"prompt": "a", "image": "gone.png"}', "gone.png"),
    "an address": (
        '{"prompt": "a", "image": "http://127.0.0.1/a.png"}',
        " http://127.0.0.1/a.png: an address",
    ),
    "a broken picture": ('{"prompt": "a", "image": "prompts.jsonl"}', "prompts.jsonl"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case: str, tmp_path: Path):
    """Passes when the error names the file and line 2, and what is wrong there."""
    line, words = BAD_LINES[case]
    path = tmp_path / "prompts.jsonl"
    draw_picture(tmp_path / "a.png", 1)
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(PromptError) as error:
        read_prompts(str(path), 0)
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value), str(error.value)


def test_a_bad_file_is_named(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "list.json").write_text("[]")
    cases = [
        (str(tmp_path / "gone.txt"), "no file"),
        (str(tmp_path / "empty.txt"), "holds no prompt"),
        ([], "is empty"),
        (["a", " "], "text 2"),
    ]
    cases += [
        (str(tmp_path / "latin.txt"), "latin.txt:2: the line is not UTF-8"),
        (str(tmp_path / "list.json"), "call it .jsonl"),
    ]
    for given, words in cases:
        with pytest.raises(PromptError, match=words.replace(".", r"\.")):
            read_prompts(given, 0)
