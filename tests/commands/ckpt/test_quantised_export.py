"""A folder of 4 or 8 bits: what stands in it, and that it is the model that quantising while loading gives."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch_of, built, train_on

from unigen import cli, load_bagel
from unigen.commands.ckpt.command import run
from unigen.commands.ckpt.options import CkptOptions
from unigen.config import Config, ConfigError, UserError
from unigen.inference.inferencer import InterleaveInferencer
from unigen.model import quantise, weights
from unigen.model.bagel import Bagel, StateReader
from unigen.model.storage import NF4, CheckpointFolderError, Quantised, scan_folder
from unigen.training import engine
from unigen.training.trainer import UnifiedTrainer

bnb = pytest.importorskip("bitsandbytes")

KINDS = [("nf4", False), ("nf4", True), ("int8", False)]
LAYER = "language_model.model.layers.1.self_attn.q_proj_moe_gen"


def ckpt(*words: object) -> int:
    return cli.main(["ckpt", *map(str, words)])


def asked(kind: str, double: bool) -> list[str]:
    return ["--quantize", kind, *(["--double_quant"] if double else [])]


@pytest.fixture(scope="module")
def folders(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """The small model in each kind; not to be changed."""
    place = tmp_path_factory.mktemp("bits")
    found = {}
    for kind, double in KINDS:
        found[kind, double] = place / f"{kind}{'-double' * double}"
        assert ckpt("export", small_model, found[kind, double], *asked(kind, double)) == 0
    return found


def state_of(model: Bagel) -> dict[str, torch.Tensor]:
    """Every number of a model, those of its quantised matrices by bitsandbytes' own names."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        if name.endswith(NF4):  # filled up with spaces on disk, parsed again in memory
            assert bytes(value.numpy()).strip() == bytes(wanted[name].numpy()).strip(), name
        else:
            assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_a_loaded_export_is_the_model_that_loading_quantises(
    folders, small_model: Path, kind: str, double: bool
):
    folder = folders[kind, double]
    loaded, wanted = load_bagel(folder), load_bagel(small_model, quantize=kind, double_quant=double)
    assert_same(state_of(loaded), state_of(wanted))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for name in (LAYER, LAYER.replace("_moe_gen", "")):
        assert torch.equal(loaded.get_submodule(name)(x), wanted.get_submodule(name)(x))
    assert (
        load_bagel(folder, quantize=kind, double_quant=double).get_submodule(LAYER).weight.shape is not None
    )
    full = (small_model / "ema.safetensors").stat().st_size
    assert (folder / "ema.safetensors").stat().st_size < 0.7 * full


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "double"), KINDS[1:])
def test_logits_and_velocities_are_those_of_quantising_while_loading_to_the_bit(
    folders, options: dict[str, Any], tmp_path: Path, kind: str, double: bool
):
    given = options | {"lora_rank": 2}
    whole = {"quantize": kind, "double_quant": double}
    outs = []
    for name, more in (("a", {"model_path": str(folders[kind, double])}), ("b", whole)):
        loop = built(**given | more | {"output_dir": str(tmp_path / name)})
        with torch.no_grad():
            pack = batch_of(loop, [0, 2, 3, 4]).pack
            hidden = loop.engine.forward(pack, reader=StateReader.of_all(pack)).read
            outs.append((hidden, loop.run.model.language_model.lm_head(hidden)))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_it_is_laid_out_as_bitsandbytes_and_transformers_write_it(
    folders, small_model: Path, kind: str, double: bool
):
    """bitsandbytes' own class reads a layer of it, and its config is one that transformers reads."""
    from transformers import BitsAndBytesConfig

    tensors, value = load_file(folders[kind, double] / "ema.safetensors"), scan_folder(small_model)
    own = {n.removeprefix(f"{LAYER}."): tensors[n] for n in tensors if n.startswith(f"{LAYER}.")}
    assert torch.equal(own.pop("bias"), value[f"{LAYER}.bias"].read())
    weight = value[f"{LAYER}.weight"].read().float()
    if kind == "nf4":
        stats = {key: own[f"weight.{key}"] for key in ("absmax", "quant_map", NF4.removeprefix("weight."))}
        if double:
            stats |= {k: own[f"weight.{k}"] for k in ("nested_absmax", "nested_quant_map")}
        assert len(own) == len(stats) + 1
        theirs = bnb.nn.Params4bit.from_prequantized(own["weight"], stats, device="cpu")
        near = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    else:
        assert own.keys() == {"weight", "SCB", "weight_format"}
        near = own["weight"].float() * own["SCB"][:, None] / 127
    assert (
        near.shape == weight.shape and float((near - weight).norm() / weight.norm()) < quantise.ROUNDS[kind]
    )
    said = json.loads((folders[kind, double] / "config.json").read_text())
    assert said["model_type"] == "bagel" and said["quantization_config"]["quant_method"] == "bitsandbytes"
    read = BitsAndBytesConfig.from_dict(said["quantization_config"])
    assert read.load_in_4bit == (kind == "nf4") and read.bnb_4bit_use_double_quant == double
    assert {"vit_model", "connector", "language_model.lm_head"} <= set(read.llm_int8_skip_modules)


@pytest.mark.slow
def test_files_with_an_index_load_the_same_and_a_run_s_weights_can_be_exported(
    folders, options: dict[str, Any], small_model: Path, tmp_path: Path, capsys
):
    out = tmp_path / "cut"
    assert ckpt("export", small_model, out, "--quantize", "nf4", "--max_shard_gb", 1e-4) == 0
    assert len(list(out.glob("ema-*.safetensors"))) > 3
    assert_same(state_of(load_bagel(out)), state_of(load_bagel(folders["nf4", False])))
    train_on(built(**options | {"output_dir": str(tmp_path / "run"), "max_steps": 1, "learning_rate": 1e-2}))
    step = tmp_path / "run" / "step_1"
    assert ckpt("export", step, tmp_path / "bits", "--quantize", "int8") == 0
    assert "Exported step 1 (int8, weights" in capsys.readouterr().out
    assert_same(state_of(load_bagel(tmp_path / "bits")), state_of(load_bagel(step, quantize="int8")))


@pytest.mark.slow
def test_adapters_train_over_it_go_on_and_fit_the_full_weights(
    folders, options: dict[str, Any], tmp_path: Path
):
    """A run over the folder is that over the full weights with --quantize, to the bit; it resumes; its
    adapter fits both bases, and that of the full weights this one."""
    given = options | {"lora_rank": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    small = {"model_path": str(folders["nf4", False])}
    runs = {"full": ({"quantize": "nf4"}, [2]), "small": (small, [2]), "parts": (small, [1, 2])}
    for name, (more, stops) in runs.items():
        for stop in stops:
            place = {"output_dir": str(tmp_path / name), "max_steps": stop, "resume_from_checkpoint": "auto"}
            UnifiedTrainer(Config(**given | more | place)).train()
    full, step = (tmp_path / name / "step_2" for name in ("full", "small"))
    bits = [(tmp_path / name / "step_2" / "adapter_model.safetensors").read_bytes() for name in runs]
    assert bits[0] == bits[1] == bits[2]
    assert load_bagel(small["model_path"], adapters=[full]).adapters
    assert load_bagel(options["model_path"], adapters=[step]).adapters
    said = ckpt_error("export", step, tmp_path / "out", "--merge")
    assert "quantised base" in said and "0.1" in said and "--base" in said
    assert ckpt("export", step, tmp_path / "out", "--merge", "--base", options["model_path"]) == 0


def ckpt_error(*words: object) -> str:
    with pytest.raises(UserError) as told:
        flags = {word[2:]: True for word in map(str, words) if word.startswith("--")}
        run(CkptOptions(paths=[str(word) for word in words if not str(word).startswith("--")], **flags))
    return str(told.value)


@pytest.mark.slow
def test_other_programs_know_it(folders, small_model: Path, tmp_path: Path, capsys):
    """generate, plan and ckpt need no flag for it; a flag that contradicts it is refused."""
    folder = str(folders["nf4", True])
    words = ["generate", "--model_path", folder, "--prompt", "hi", "--mode", "text", "--max_new_tokens", "2"]
    for given in ([], ["--double_quant"]):  # a folder that is so agrees with the flag
        assert cli.main([*words, "--output_dir", str(tmp_path / "out"), *given]) == 0
        page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
        assert "nf4 with double_quant" in page
    assert cli.main([*words, "--output_dir", str(tmp_path / "out"), "--quantize", "int8"]) == 2
    assert "holds nf4 with double_quant, and quantize int8 is asked for" in capsys.readouterr().err
    plans = []
    for given in (["--model_path", folder], ["--model_path", str(small_model), *asked("nf4", True)]):
        assert cli.main(["plan", *given, "--lora_rank", "8", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1]
    assert cli.main(["plan", "--model_path", folder, "--lora_rank", "8", "--double_quant"]) == 0
    assert cli.main(["plan", "--model_path", folder]) == 2
    said = capsys.readouterr().err
    assert f"model_path is {folder}" in said and "Fix: --lora_rank 64, or give the folder" in said
    assert ckpt("ls", folder) == 0 and "export nf4" in capsys.readouterr().out
    assert ckpt("verify", folder) == 0 and "OK" in capsys.readouterr().out
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "ema.safetensors").write_bytes((copied / "ema.safetensors").read_bytes()[:-1] + b"!")
    (copied / "vit_config.json").unlink()
    assert ckpt("verify", copied) == 1
    said = capsys.readouterr().out
    assert "ema.safetensors has changed" in said and "vit_config.json is missing" in said


@pytest.mark.slow
def test_without_bitsandbytes_every_command_says_so_before_weights_are_read(
    folders, options: dict[str, Any], small_model: Path, tmp_path: Path, capsys, monkeypatch
):
    folder, data, recipe = folders["nf4", True], tmp_path / "val.jsonl", tmp_path / "recipe.yaml"
    data.write_text(json.dumps({"messages": [
        {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "yes"}
    ]}))  # fmt: skip
    recipe.write_text(json.dumps(options | {"lora_rank": 2, "quantize": "nf4"}))
    asks = ["--prompt", "hi", "--mode", "text", "--output_dir", tmp_path / "out"]
    commands = [
        ["generate", "--model_path", small_model, "--quantize", "nf4", *asks],
        ["generate", "--model_path", folder, *asks],
        ["evaluate", "--model_path", small_model, "--compare", folder, "--data_path", data],
        ["train", "--config", recipe],
        ["train", "--config", recipe, "--quantize", "none", "--model_load_mode", "3"],
        ["ckpt", "export", small_model, tmp_path / "bits", "--quantize", "int8"],
    ]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for module in (weights, engine):
        monkeypatch.setattr(module, "place_parameters", lambda *_, **__: pytest.fail("weights are read"))
    for words in commands:
        assert cli.main([str(word) for word in words]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "needs bitsandbytes" in said and "Fix: pip install 'bitsandbytes" in said, words
    with pytest.raises(quantise.QuantiseError, match="needs bitsandbytes"):
        InterleaveInferencer.from_pretrained(folder)
    assert not (tmp_path / "out").exists() and not (tmp_path / "bits").exists()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_device_that_cannot_compute_it_is_named(kind: str):
    """As a GPU whose library is missing, a device without memory fails at the first matrix."""
    with pytest.raises(quantise.QuantiseError, match=rf"{kind} cannot be computed on meta.*Fix: install"):
        quantise.need_backend(kind, "meta")
    quantise.need_backend(kind, "cpu")


def test_what_does_not_fit_together_is_one_line(
    folders, options: dict[str, Any], small_model: Path, tmp_path: Path
):
    folder, out = folders["int8", False], tmp_path / "out"
    for given, named in (
        ({"quantize": "nf4", "lora_rank": 2}, "holds int8"),
        ({"model_load_mode": 1, "lora_rank": 2}, f"model_load_mode is 1, bfloat16, and {folder} holds int8"),
        ({"lora_rank": 2, "engine": "fsdp2"}, "fsdp2"),
        ({}, f"model_path is {folder}, which holds int8"),
        ({"quantize": "int8"}, "quantize needs lora_rank"),
    ):
        with pytest.raises((ConfigError, quantise.QuantiseError), match=named):
            UnifiedTrainer(Config(**options | {"model_path": str(folder)} | given))
    agreed = {"model_path": str(folders["nf4", True]), "double_quant": True, "lora_rank": 2}
    assert UnifiedTrainer(Config(**options | agreed).resolve()).config.quantize == "nf4"
    said = ckpt_error("export", folder, out)
    assert "quantised already" in said
    assert "double_quant needs" in ckpt_error("export", small_model, out, "--double_quant")
    assert not out.exists() and list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("what", ["config", "scales", "other", "gptq", "lost", "state"])
def test_a_folder_whose_parts_do_not_fit_is_refused(folders, tmp_path: Path, what: str):
    kind = ("int8", False) if what == "scales" else ("nf4", True)
    folder = tmp_path / "model"
    shutil.copytree(folders[kind], folder)
    config, weights = folder / "config.json", folder / "ema.safetensors"
    said, tensors = json.loads(config.read_text()), load_file(weights)
    named = LAYER
    if what == "config":
        said.pop("quantization_config")
        named = "nothing of quantised matrices"
    elif what == "other":
        said = json.loads((folders["int8", False] / "config.json").read_text())
        named = "says int8"
    elif what == "gptq":
        said["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        named = "gptq"
    elif what == "scales":
        tensors[f"{LAYER}.SCB"][3] = float("nan")
        named = "NaN"
    elif what == "lost":
        tensors.pop(f"{LAYER}.weight.absmax")
    elif what == "state":
        tensors[f"{LAYER}.{NF4}"] = torch.frombuffer(bytearray(b'{"shape": [64, -2]}'), dtype=torch.uint8)
    config.write_text(json.dumps(said))
    save_file(tensors, weights)
    with pytest.raises((CheckpointFolderError, quantise.QuantiseError), match=named):
        load_bagel(folder)


def test_a_matrix_that_is_not_finite_leaves_no_folder(small_model: Path, tmp_path: Path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    tensors = load_file(folder / "ema.safetensors")
    tensors[f"{LAYER}.weight"][1, 2] = float("inf")
    save_file(tensors, folder / "ema.safetensors")
    assert ckpt("export", folder, tmp_path / "out", "--quantize", "nf4") == 2
    assert f"{LAYER}.weight holds NaN or infinity" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_matrix_keeps_the_shape_that_it_had(folders, small_model: Path):
    plain = {name: entry.shape for name, entry in scan_folder(small_model).items()}
    for folder in folders.values():
        found = scan_folder(folder)
        assert {name: entry.shape for name, entry in found.items()} == plain
        small = [name for name, entry in found.items() if isinstance(entry, Quantised)]
        assert len(small) in (36, 42) and f"{LAYER}.weight" in small


@pytest.mark.slow
def test_answers_of_other_bits_are_others(folders, tmp_path: Path, capsys):
    """The codes of NF4 with and without double_quant are equal, and so are those of INT8 whose scales
    changed."""
    scaled = tmp_path / "scaled"
    shutil.copytree(folders["int8", False], scaled)
    tensors = load_file(scaled / "ema.safetensors")
    tensors[f"{LAYER}.SCB"] *= 2
    save_file(tensors, scaled / "ema.safetensors")
    data = tmp_path / "val.jsonl"
    data.write_text(json.dumps({"messages": [
        {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "yes"}
    ]}))  # fmt: skip
    for first, other in ((folders["nf4", False], folders["nf4", True]), (folders["int8", False], scaled)):
        out = tmp_path / f"{first.name}-out"
        words = [
            "--data_path",
            str(data),
            "--output_dir",
            str(out),
            "--device",
            "cpu",
            "--max_new_tokens",
            "2",
        ]
        for folder, code in ((first, 0), (first, 0), (other, 2)):
            assert cli.main(["evaluate", "--model_path", str(folder), *words]) == code
        assert "--model_path" in capsys.readouterr().err.partition("another ")[2]
        about = json.loads((out / "answers.json").read_text(encoding="utf-8"))
        assert about["quantize"] == first.name
