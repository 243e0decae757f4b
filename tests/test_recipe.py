"""Recipes within bounds: what is no plain list of options is one line that names file and line, at once."""

import os
import time
from pathlib import Path

import pytest

from unigen.cli import UsageError, parse_config
from unigen.config import Config
from unigen.recipe import MAX_BYTES


def read(path: Path, content: str | bytes | None = None) -> Config:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return parse_config(["--config", str(path)])


def refusal(path: Path, content: str | bytes | None = None) -> str:
    """The one line that refuses a recipe, given at once."""
    began = time.monotonic()
    with pytest.raises(UsageError) as caught:
        read(path, content)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and "Fix: " in message and len(message) < 2000
    assert time.monotonic() - began < 30
    return message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("seed: 1\nlearning_rate:\n", ":2: learning_rate is None; it has no value"),
        ("learning_rate: null\n", ":1: learning_rate is None; it has no value"),
        ("output_dir: ~\n", ":1: output_dir is None"),
        ("train_data_path: [a, ~]\n", ":1: train_data_path"),
        ("num_epochs: 010\n", "octal"),
        ("max_steps: 1:30\n", ":1: max_steps is '1:30'"),
        ("bf16: yes\n", ":1: bf16 is 'yes'. Fix: give true or false"),
        ("bf16: on\n", ":1: bf16 is 'on'"),
        ("seed: 1e3\n", ":1: seed is '1e3'"),
        ("learning_rate: 1e20\n", ":1: learning_rate is 1e+20; it is out of range"),
        ("learning_rate: .nan\n", ":1: learning_rate is '.nan'"),
        ("model_path: ''\n", ":1: model_path is ''; it is empty"),
        ("train_data_path: []\n", ":1: train_data_path is []; it is empty"),
        ("? [a]\n: 1\n", ":1: a key is no text"),
        ("{a: 1}: 1\n", ":1: a key is no text"),
        (": 1\n", ":1: not valid YAML"),
        ("1: 1\n", ":1: unknown option '1'. Fix: "),
        ("quick: true\n", ":1: unknown option 'quick'; it is an option of unigen demo. Fix: leave it out"),
        ("seed: 1\n---\nseed: 2\n", ":2: not valid YAML"),
        ("seed:\t1\n\tbf16: true\n", "not valid YAML"),
        ("base: &b {seed: 1}\n", "unknown option 'base'"),
        ("<<: {seed: 1}\n", "merge keys"),
        ("train_sources:\n  - {<<: {path: a}, weight: 1}\n", "merge keys"),
        ("train_sources:\n  - {path: a, path: b}\n", "the key 'path' is there twice"),
        (
            "train_sources:\n  - path: a\n    wieght: 2\n",
            ":3: train_sources[0]: unknown key 'wieght'; did you mean weight?",
        ),
        ("train_sources:\n  - path: a\n    weight: x\n", ":3: train_sources[0]: weight is 'x'"),
        ("train_sources: [{path: a, min_image_size: 9, max_image_size: 8}]\n", "min_image_size is 9, above"),
        ("learning-rate: 1e-5\nlearning_rate: 1e-5\n", "already given in line 1"),
        ("seed: !!binary aGk=\n", "the tag"),
        ("seed: !unknown 1\n", "the tag"),
        ("seed: *a\n", "not valid YAML"),
        ("seed: &a [*a]\n", ": too deep"),
        ("train_data_path: " + "[" * 3000 + "\n", "nested too deeply"),
        ("train_data_path: " + "[" * 20 + "]" * 20 + "\n", ": too deep"),
        ("[]\n", "a recipe is a list"),
        ("just text\n", "a recipe is a list"),
        (b"\xff\xfes\x00e\x00", "no UTF-8 text"),
        (b"seed: 1\x00\n", "not valid YAML"),
        (b"\x89PNG\r\n\x1a\n", "no UTF-8 text"),
        (b"#" * (MAX_BYTES + 1), "more than 1,048,576 bytes"),
    ],
)
def test_a_recipe_that_says_something_else_is_one_line(content, words, tmp_path):
    assert words in refusal(tmp_path / "r.yaml", content)


def test_aliases_are_read_within_bounds(tmp_path):
    config = read(tmp_path / "r.yaml", "train_data_path: &d [a, b]\nval_data_path: *d\n")
    assert config.val_data_path == ["a", "b"]
    levels = "".join(f"- &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdef", "bcdefg"))
    bomb = f"train_data_path:\n- &a [x, x, x, x, x, x, x, x, x, x]\n{levels}"
    assert "with its aliases written out, too large" in refusal(tmp_path / "r.yaml", bomb)


def test_marks_and_line_ends_of_windows_do_not_matter(tmp_path):
    assert read(tmp_path / "r.yaml", b"\xef\xbb\xbfseed: 7\r\nbf16: true\r\n").seed == 7


def test_only_a_regular_file_is_a_recipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")  # opening it would wait for a writer for ever
    assert "no regular file" in refusal(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in refusal(tmp_path / "folder.yaml")
    assert "No such file" in refusal(tmp_path / "absent.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    assert "loop.yaml" in refusal(tmp_path / "loop.yaml")
    assert "no regular file" in refusal(Path("/dev/zero"))
    (tmp_path / "r.yaml").write_text("seed: 7\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "r.yaml")
    assert read(tmp_path / "link.yaml").seed == 7
