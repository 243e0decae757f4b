"""A run that the code of commit a0b180c left after 2 of its 4 steps (see ``stored_run/README.md``): users
have such runs, and go on with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import metrics, read_jsonl, train

from unigen import cli, load_bagel
from unigen.commands.watch.health import diagnose
from unigen.model.storage import scan_folder, scan_safetensors
from unigen.runs.checkpoint import scan_weights, verify_checkpoint
from unigen.runs.reader import RunFolder

STORED = Path(__file__).parent / "stored_run"


def rebuild(stored: Path, model: Path) -> None:
    """Puts back what the README says is left out."""
    step = stored / "step_2"
    short = step / "ema.safetensors.trained"
    data, trained = short.read_bytes(), scan_safetensors(step / "model.safetensors")
    at = 8 + int.from_bytes(data[:8], "little")
    header, frozen = json.loads(data[8:at]), scan_safetensors(model / "ema.safetensors")
    del header["__metadata__"]
    parts = [data[:at]]
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        if name in trained:
            parts.append(data[at : at + size])
            at += size
        else:
            parts.append(frozen[name].read().numpy().tobytes())
    (step / "ema.safetensors").write_bytes(b"".join(parts))
    short.unlink()
    for folder, source in ((step, model), (stored / "best", step)):
        for name in json.loads((folder / "manifest.json").read_text("utf-8"))["files"]:
            if not (folder / name).exists():
                shutil.copyfile(source / name, folder / name)


@pytest.fixture
def run(golden: Path, tmp_path: Path) -> Path:
    shutil.copytree(STORED, tmp_path / "stored")
    rebuild(tmp_path / "stored" / "run", golden / "model")
    return tmp_path / "stored" / "run"


def test_it_is_listed_and_every_byte_is_what_was_written(run: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["ckpt", "ls", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["step"], row["state"], row["resumable"]) for row in rows] == [
        ("step_2", 2, "whole", True),
        ("best", 2, "whole", False),
    ]
    assert [row["holds"] for row in rows] == [["ema", "model", "optimizer"], ["ema"]]
    assert {row["val_loss"] for row in rows} == {metrics(run)[-1]["val_loss"]}
    assert cli.main(["ckpt", "verify", str(run)]) == 0


def test_it_is_watched(run: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["watch", str(run), "--once"]) == 0 and "2" in capsys.readouterr().out
    seen = RunFolder(run)
    seen.update()
    assert diagnose(seen).name == "stopped"
    assert (seen.step, seen.total_steps, [c.name for c in seen.checkpoints]) == (2, 4, ["best", "step_2"])
    assert [p.mean for p in seen.metrics.log.points("loss")] == [
        line["loss"] for line in metrics(run) if "loss" in line
    ]
    (answer,) = seen.answers(2)
    assert answer.prompt == "Two and three?" and answer.pieces[0]["text"]


def test_its_checkpoints_load_as_models(run: Path, golden: Path):
    model, trained = load_bagel(run / "step_2"), scan_safetensors(run / "step_2" / "model.safetensors")
    before = scan_folder(golden / "model")
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n].read())}
    assert changed and changed <= trained.keys()
    raw = scan_weights(run / "step_2", raw=True)
    assert all(torch.equal(raw[name].read(), entry.read()) for name, entry in trained.items())
    best = dict(load_bagel(run / "best").named_parameters())
    assert all(torch.equal(best[name], p) for name, p in model.named_parameters())


@pytest.mark.slow
def test_it_goes_on_to_the_numbers_that_the_old_code_had(run: Path, golden: Path):
    """Losses, gradient norms, learning rates, places in the data and validation of steps 3 and 4, within
    1e-5."""
    before = metrics(run)
    options = {
        "model_path": golden / "model", "output_dir": run, "resume_from_checkpoint": "auto",
        "train_data_path": run.parent / "train.jsonl", "val_data_path": run.parent / "val.jsonl",
        "max_steps": 4, "save_steps": 2, "eval_steps": 2, "learning_rate": 1e-3, "warmup_steps": 1, "ema": 0.5,
        "freeze_llm": True, "freeze_vit": True, "max_image_tokens": 16, "max_num_tokens": 90, "num_workers": 0,
        "sample_prompts": run.parent / "prompts.jsonl", "sample_steps": 2, "device": "cpu",
    }  # fmt: skip
    train({n: str(v) if isinstance(v, Path) else v for n, v in options.items()})
    wanted = read_jsonl(STORED / "steps_3_and_4.jsonl")
    clock = {"time", "tokens_per_second", "data_wait"}
    found = metrics(run)
    assert found[: len(before)] == before
    assert [line["step"] for line in wanted] == [3, 4, 4]
    for line, old in zip(found[len(before) :], wanted, strict=True):
        assert {n: v for n, v in line.items() if n not in clock and "/" not in n} == pytest.approx(
            {n: v for n, v in old.items() if n not in clock}, rel=1e-5, abs=1e-9
        )
    verify_checkpoint(run / "step_4")
