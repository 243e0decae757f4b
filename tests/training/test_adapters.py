"""Runs that train adapters: what moves, what is saved, and that a resume goes on to the bit."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start_command, wait_for
from safetensors.torch import load_file
from tiny import built, metrics, take_warm_up, train, train_on

from unigen.cli import main
from unigen.config import Config, ConfigError, UserError
from unigen.model.adapters import AdapterError, read_adapter
from unigen.model.parts import is_adapter, published_name
from unigen.model.storage import scan_folder
from unigen.model.weights import load_bagel
from unigen.runs.checkpoint import verify_checkpoint
from unigen.training.sample_plan import decides
from unigen.training.trainer import nothing_left

PEFT = ["--format", "peft"]
LORA = {"lora_rank": 3, "lora_targets": ["both", "connector"], "train_also": ["time_embedder"], "ema": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_adapters_move_and_the_base_stays(options: dict[str, Any], variant: str):
    loop = built(options, LORA, lora_variant=variant, learning_rate=1e-3, max_steps=7)
    stored = scan_folder(Path(options["model_path"]))
    before = {name: p.detach().clone() for name, p in loop.run.model.named_parameters()}
    assert all(not float(p.abs().max()) for name, p in before.items() if ".lora_B." in name)
    train_on(loop)
    moved = set()
    for name, p in loop.run.model.named_parameters():
        if not torch.equal(p, before[name]):
            moved.add(name)
        if not is_adapter(name) and not name.startswith("time_embedder"):
            assert torch.equal(p, stored[published_name(name)].read().float()), name
    assert moved == {name for name, p in loop.run.model.named_parameters() if p.requires_grad}
    assert {"lora_A", "lora_B"} <= {name.split(".")[-3] for name in moved if is_adapter(name)}


@pytest.mark.slow
def test_adapters_begin_as_the_base_and_alike_on_every_start(options: dict[str, Any], tmp_path: Path):
    steps = {}
    for rank in (None, 3):
        run = tmp_path / f"{rank}"
        train(options, output_dir=str(run), max_steps=1, lora_rank=rank)
        steps[rank] = metrics(run)[0]["loss"]
    assert steps[None] == steps[3]
    first = dict(built(options, LORA, output_dir=str(tmp_path / "a")).run.model.named_parameters())
    again = dict(built(options, LORA, output_dir=str(tmp_path / "b")).run.model.named_parameters())
    other = built(options, LORA, output_dir=str(tmp_path / "c"), seed=7).run.model.named_parameters()
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert {name for name, p in other if not torch.equal(p, first[name])} == {
        n for n in first if ".lora_A." in n
    }


def test_the_usual_recipe_needs_one_option(options: dict[str, Any], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    del options["learning_rate"]
    loop = built(options, lora_rank=64)
    adapter = loop.run.model.adapters["default"]
    assert (adapter.alpha, adapter.scaling, loop.config.learning_rate) == (128.0, 2.0, 1e-4)
    assert len(adapter.targets) == 7 * 3 and all("_moe_gen" in name for name in adapter.targets)
    assert {p.dtype for p in loop.run.model.parameters() if p.requires_grad} == {torch.float32}
    assert "rank 64, alpha 128, 21 matrices" in caplog.text
    assert Config(**options).resolve().learning_rate == 1e-5


@pytest.mark.slow
def test_a_checkpoint_is_the_adapter_alone_and_a_resume_goes_on_to_the_bit(
    options: dict[str, Any], tmp_path: Path
):
    options |= LORA | {
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    train(options, output_dir=str(tmp_path / "whole"))
    parts = options | {"output_dir": str(tmp_path / "parts")}
    loop = built(parts)
    loop.tracker = None
    take_warm_up(loop)
    object.__setattr__(loop.run, "total_steps", 2)
    train_on(loop)
    loop.run.close()
    train(parts, resume_from_checkpoint="auto")
    folder = tmp_path / "whole" / "step_4"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "model.safetensors", "manifest.json"} <= names
    assert not {"ema.safetensors", "ae.safetensors", "vocab.json"} & names
    for name in ("adapter_model.safetensors", "model.safetensors", "optimizer.safetensors", "trainer.json"):
        assert (folder / name).read_bytes() == (tmp_path / "parts" / "step_4" / name).read_bytes(), name
    verify_checkpoint(folder)
    adapter, _ = read_adapter(folder)
    assert adapter.base == options["model_path"] and adapter.rank == 3


@pytest.mark.slow
def test_the_exports_are_the_model_that_was_trained(options: dict[str, Any], tmp_path: Path, capsys):
    options |= LORA | {"max_steps": 3, "learning_rate": 3e-3, "output_dir": str(tmp_path / "run")}
    loop = built(options)
    train_on(loop)
    loop.run.close()
    step = tmp_path / "run" / "step_3"
    raw = {name: p.detach() for name, p in loop.run.model.named_parameters()}
    assert main(["ckpt", "export", str(step), str(tmp_path / "raw"), "--weights", "raw", *PEFT]) == 0
    found = load_file(tmp_path / "raw" / "adapter_model.safetensors")
    for name, p in raw.items():
        if p.requires_grad or is_adapter(name) or name.startswith("time_embedder"):
            key = "base_model.model." + name.replace(".default.", ".")
            assert torch.equal(found[key], p), name
    for weights in ("ema", "raw"):
        out = tmp_path / f"merged-{weights}"
        assert main(["ckpt", "export", str(step), str(out), "--merge", "--weights", weights]) == 0
        merged, stored = scan_folder(out), scan_folder(Path(options["model_path"]))
        changed = {name for name in stored if not torch.equal(merged[name].read(), stored[name].read())}
        adapter = loop.run.model.adapters["default"]
        assert changed == {f"{target}.weight" for target in adapter.targets} | set(adapter.whole)
        assert not (out / "adapter_config.json").exists() and (out / "vocab.json").exists()
        assert decides(out) and not decides(Path(options["model_path"]))
        load_bagel(out)
    target = adapter.targets[0]
    a, b = (raw[f"{target}.lora_{mark}.default.weight"] for mark in "AB")
    expected = stored[f"{target}.weight"].read() + adapter.scaling * (b @ a)
    torch.testing.assert_close(merged[f"{target}.weight"].read(), expected, atol=1e-6, rtol=1e-6)
    capsys.readouterr()
    assert main(["ckpt", "export", str(tmp_path / "raw"), str(tmp_path / "x"), "--merge"]) == 2
    assert main(["ckpt", "export", str(step), str(tmp_path / "x"), "--base", "y"]) == 2
    assert "--base" in capsys.readouterr().err
    for folder, more in ((step, ["--merge"]), (tmp_path / "merged-ema", [])):
        assert main(["ckpt", "export", str(folder), str(tmp_path / "x"), *PEFT, *more]) == 2
        assert "format peft says nothing here" in capsys.readouterr().err


VLLM = ["--weights", "raw", "--format", "vllm-omni"]


@pytest.mark.slow
def test_vllm_omni_gets_its_own_names_or_is_told_what_it_would_not_bind(
    options: dict[str, Any], tmp_path: Path, capsys
):
    """It leaves out in silence what it does not know."""
    more: dict[str, dict[str, Any]] = {
        "text": {"lora_targets": ["und"]},
        "both": {"lora_targets": ["both"]},
        "seen": {"lora_targets": ["connector"]},
        "whole": {"lora_targets": ["und"], "train_also": ["time_embedder"]},
        "dora": {"lora_targets": ["und"], "lora_variant": "dora"},
    }
    for name, given in more.items():
        train(options, given, lora_rank=2, max_steps=1, output_dir=str(tmp_path / name))
    argv = ["ckpt", "export", str(tmp_path / "text" / "step_1")]
    assert main([*argv, str(tmp_path / "peft"), "--weights", "raw", *PEFT]) == 0
    assert main([*argv, str(tmp_path / "vllm"), *VLLM]) == 0
    peft, vllm = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("peft", "vllm"))
    inside = {name.replace("base_model.model.", "base_model.model.bagel.", 1): t for name, t in peft.items()}
    assert vllm.keys() == inside.keys() and all(torch.equal(vllm[name], t) for name, t in inside.items())
    capsys.readouterr()
    with pytest.raises(AdapterError, match=r"exported for vLLM-Omni.*Fix: give the folder .* step_N"):
        read_adapter(tmp_path / "vllm")
    assert main(["ckpt", "export", str(tmp_path / "vllm"), str(tmp_path / "no"), "--merge"]) == 2
    assert "exported for vLLM-Omni" in capsys.readouterr().err
    lost = {"both": "q_proj_moe_gen", "seen": "connector.fc1", "whole": "time_embedder", "dora": "DoRA"}
    for name, what in lost.items():
        step = tmp_path / name / "step_1"
        assert main(["ckpt", "export", str(step), str(tmp_path / "no"), *VLLM]) == 2
        said = capsys.readouterr().err
        assert what in said and "--merge" in said and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_alpha": 3.0}, "lora_alpha"),
        ({"lora_targets": ["gen"]}, "lora_targets"),
        ({"lora_variant": "dora"}, "lora_variant"),
        ({"train_also": ["norms"]}, "train_also"),
        ({"lora_rank": 2, "lora_alpha": -1.0}, "lora_alpha"),
        ({"lora_rank": 2, "gradient_checkpointing": True, "checkpointing_policy": "selective"}, "selective"),
        ({"lora_rank": 2, "lora_variant": "dora", "compile": "on"}, "compile"),
        ({"lora_rank": 2, "lora_targets": []}, "lora_targets"),
        ({"lora_rank": 2, "freeze_llm": True}, "freeze_llm"),
        ({"lora_rank": 2, "lora_targets": ["und"], "freeze_und": True}, "freeze_und"),
        ({"lora_rank": 2, "engine": "deepspeed"}, "lora_rank"),
        ({"lora_rank": 2, "timestep_shift": 2.0}, "timestep_shift"),
        ({"lora_rank": 2, "visual_gen": False}, "lora_targets"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], given: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        Config(**options | given).resolve()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_targets": ["generation"]}, "lora_targets.*'generation'"),
        ({"train_also": ["time_embeder"]}, "train_also.*time_embedder"),
        (
            {"visual_gen": False, "lora_targets": ["und"], "train_also": ["llm2vae"]},
            "'llm2vae' .*visual_gen=false",
        ),
        ({"visual_gen": False, "lora_targets": ["und", "gen"]}, "'gen' .*visual_gen=false.*Fix: "),
        ({"visual_und": False, "lora_targets": ["vit"]}, "'vit' .*visual_und=false"),
        ({"lora_targets": ["connector"], "train_also": ["connector"]}, "connector.*lora_targets adapts"),
    ],
)
def test_names_that_mean_nothing_are_refused(options: dict[str, Any], given: dict[str, Any], said: str):
    with pytest.raises((AdapterError, ConfigError), match=said):
        built(options, {"lora_rank": 2}, given)


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_same_adapters(options: dict[str, Any], tmp_path: Path):
    train(options, LORA, max_steps=1, save_steps=1)
    plain = {"lora_rank": None, "lora_targets": None, "train_also": None}
    for said, other in {
        "lora_rank 3": {"lora_rank": 4},
        "lora_alpha 6": {"lora_alpha": 1.0},
        "lora_variant lora": {"lora_variant": "dora"},
        "lora_targets": {"lora_targets": ["gen"], "train_also": None},
        "train_also|time_embedder": {"train_also": None},
        "holds an adapter": plain,
    }.items():
        with pytest.raises(ValueError, match=said):
            train(options, LORA, other, max_steps=2, resume_from_checkpoint="auto")
    train(options, plain, max_steps=1, save_steps=1, output_dir=str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="holds no adapter"):
        whole = {"output_dir": str(tmp_path / "plain"), "resume_from_checkpoint": "auto", "max_steps": 2}
        train(options, LORA, whole)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_also": ["*.q_proj_moe_gen.bias"]}, "q_proj_moe_gen.bias"),
        ({"quantize": "int8", "train_also": ["*.down_proj.weight"]}, "quantised"),
        ({"freeze_und": True, "train_also": ["norms"]}, "freeze_und"),
    ],
)
def test_names_that_could_not_do_what_is_asked_are_refused(
    options: dict[str, Any], given: dict[str, Any], said: str
):
    with pytest.raises(ConfigError, match=said):
        built(options, {"lora_rank": 2}, given)


@pytest.mark.slow
def test_another_base_of_bits_is_told_on_a_resume(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train(options, lora_rank=2, max_steps=1, save_steps=1)
    caplog.clear()
    train(options, lora_rank=2, max_steps=2, quantize="int8", resume_from_checkpoint="auto")
    assert "--quantize none" in caplog.text
    small = str(tmp_path / "small")
    assert main(["ckpt", "export", options["model_path"], small, "--quantize", "nf4"]) == 0
    caplog.clear()
    train(options, lora_rank=2, max_steps=3, model_path=small, resume_from_checkpoint="auto")
    (told,) = [line for line in caplog.messages if line.startswith("This run's base")]
    assert f"--model_path {options['model_path']}" in told and "--quantize" not in told, "the folder decides"


@pytest.mark.slow
def test_a_killed_run_goes_on_as_one_nobody_killed(options: dict[str, Any], tmp_path: Path):
    options |= LORA | {"max_steps": 6, "save_steps": 1, "learning_rate": 1e-3, "logging_steps": 1}
    train(options, output_dir=str(tmp_path / "whole"))
    killed = options | {"output_dir": str(tmp_path / "killed"), "resume_from_checkpoint": "auto"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(killed))  # YAML, too
    (child,) = start_command(tmp_path / "log", ["train", "--config", str(tmp_path / "recipe.yaml")])
    wait_for(tmp_path / "killed" / "step_2", child)
    child.kill()
    child.join()
    train(killed)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        a, b = (tmp_path / run / "step_6" / name for run in ("whole", "killed"))
        assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.slow
def test_a_finished_run_says_how_its_adapter_becomes_the_model_of_another(
    options: dict[str, Any], tmp_path: Path
):
    """Passes when what is said can be typed, and the next run begins with what it makes."""
    options |= LORA | {"max_steps": 1}
    train(options)
    said, *_ = nothing_left(built(options, resume_from_checkpoint="auto").run)
    command = re.search(r"--model_path NEW_FOLDER, after unigen (ckpt export .* NEW_FOLDER --merge)", said)
    new = str(tmp_path / "new")
    assert main(shlex.split(command[1].replace("NEW_FOLDER", new))) == 0
    assert built(options, model_path=new, output_dir=str(tmp_path / "next"), seed=3).run.position.step == 0
    with pytest.raises(UserError, match=r"--seed 42, or .* NEW_FOLDER --merge"):
        built(options, resume_from_checkpoint="auto", max_steps=2, seed=3)
