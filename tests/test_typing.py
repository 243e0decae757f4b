"""The keywords of the Python surface are typed: an editor completes them, a type checker finds a slip."""

import inspect
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from unigen.config import SamplingOptions
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.options import ReferenceSettings, Settings

PROGRAM = """
from unigen import Config, InterleaveInferencer, UnifiedGenerationDataset, UnifiedTrainer, load_planner

inferencer = InterleaveInferencer.from_pretrained("m", device="auto")
inferencer.unified_generate("a cat", seed=1, cfg_text_scale=2.0)
inferencer.unified_generate_batch([["a cat"], ["a dog"]], max_new_tokens=5)
inferencer(image="a.png", text="what is it?", understanding_output=True)
UnifiedTrainer(Config(model_path="m", train_data_path="d", learning_rate=1e-4)).train()
UnifiedGenerationDataset("d.jsonl", planner=load_planner("m"))
"""
SLIPS = {
    'device="auto"': 'devise="auto"',
    "seed=1": "sead=1",
    "cfg_text_scale=2.0": 'cfg_text_scale="high"',
    "understanding_output=True": "understand=True",
    "learning_rate=1e-4": "lerning_rate=1e-4",
    "planner=load": "plan=load",
}
CONFIG = "[mypy]\n[mypy-torch.*,transformers.*,numpy.*,PIL.*,yaml.*]\nfollow_imports = skip\nignore_missing_imports = True\n"


@pytest.mark.slow
def test_a_type_checker_knows_every_keyword_and_finds_a_slip(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(PROGRAM)
    wrong = PROGRAM
    for right, slip in SLIPS.items():
        assert right in wrong
        wrong = wrong.replace(right, slip)
    (tmp_path / "wrong.py").write_text(wrong)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    argv = [
        "-m",
        "mypy",
        "--cache-dir",
        os.devnull,
        "--config-file",
        "mypy.ini",
        "--follow-imports",
        "silent",
        "right.py",
        "wrong.py",
    ]
    found = subprocess.run([sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True)
    lines = {line.split(": ")[0] for line in found.stdout.splitlines() if ": error: " in line}
    numbers = [
        n for n, line in enumerate(wrong.splitlines(), 1) if any(slip in line for slip in SLIPS.values())
    ]
    assert lines == {f"wrong.py:{n}" for n in numbers}, found.stdout + found.stderr
    assert sum(": error: " in line for line in found.stdout.splitlines()) >= len(SLIPS)


def test_the_typed_keywords_are_those_that_there_are():
    assert set(Settings.__annotations__) >= {field.name for field in fields(SamplingOptions)} - {
        "max_new_tokens", "temperature", "height", "width", "allow_control_tokens",
    }  # fmt: skip
    taken = inspect.signature(InterleaveInferencer.interleave_inference).parameters
    renamed = {"max_new_tokens", "temperature", "height", "width", "allow_control_tokens"}
    assert set(ReferenceSettings.__annotations__) - renamed == set(taken) - {
        "self",
        "input_lists",
        "settings",
    }
