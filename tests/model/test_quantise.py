"""Matrices of 4 and 8 bits: how near they are, what stays as it is, and adapters over them."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch_of, built, metrics, train, train_on
from torch import nn

from unigen.cli import main
from unigen.config import Config, ConfigError
from unigen.model import quantise
from unigen.model.adapters import AdapterError
from unigen.model.bagel import Bagel, StateReader
from unigen.model.storage import CheckpointFolderError, scan_folder
from unigen.model.weights import load_bagel
from unigen.training import engine
from unigen.training.loop import TrainingLoop
from unigen.training.prepare import prepare

KINDS = [("nf4", False), ("nf4", True), ("int8", False)]


def hidden(loop: TrainingLoop) -> torch.Tensor:
    with torch.no_grad():
        pack = batch_of(loop, [0, 2, 3, 4]).pack
        return loop.engine.forward(pack, reader=StateReader.of_all(pack)).read


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_hidden_states_are_those_of_the_rounded_matrices(
    options: dict[str, Any], tmp_path: Path, kind: str, double: bool
):
    given = options | {"lora_rank": 2, "output_dir": str(tmp_path / "a")}
    whole, small = (
        built(**given | more | {"output_dir": str(tmp_path / name)})
        for name, more in (("whole", {}), ("small", {"quantize": kind, "double_quant": double}))
    )
    full, near = hidden(whole), hidden(small)
    # The golden model's weights are random: 9 % error in each matrix of NF4 adds up over its layers.
    cosine = nn.functional.cosine_similarity(full.flatten(), near.flatten(), dim=0)
    assert (0.99 if kind == "int8" else 0.95) <= float(cosine) < 1 - 1e-9
    with torch.no_grad():
        for name, module in small.run.model.named_modules():
            if quantise.holds_quantised(module):
                whole.run.model.get_submodule(name).weight.copy_(quantise.dequantised(module))
    # INT8 rounds the other factor of a product, too
    error = (hidden(whole) - near).norm() / near.norm()
    assert error < (0.02 if kind == "int8" else 1e-5)


def expected_matrices(kind: str) -> set[str]:
    """The decoder's; rows of 160 numbers are no multiple of NF4's 64."""
    mlp = ("gate", "up") if kind == "nf4" else ("gate", "up", "down")
    parts = [(e, part) for e in ("", "_moe_gen") for part in (*(f"self_attn.{m}_proj" for m in "qkvo"), *mlp)]
    return {
        f"language_model.model.layers.{layer}.{part}{e}" if "." in part
        else f"language_model.model.layers.{layer}.mlp{e}.{part}_proj"
        for layer in range(3)
        for e, part in parts
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_the_decoders_matrices_are_quantised_and_nothing_else(
    golden: Path, kind: str, double: bool, caplog: pytest.LogCaptureFixture
):
    model = load_bagel(golden / "model", quantize=kind, double_quant=double)
    plain = load_bagel(golden / "model")
    assert ("6 of 42 matrices stay" in caplog.text) == (kind == "nf4")
    small = {name for name, module in model.named_modules() if quantise.holds_quantised(module)}
    assert small == expected_matrices(kind)
    for name, p in model.named_parameters():
        whole, module = plain.get_parameter(name).float(), name.removesuffix(".weight")
        if module in small:
            assert p.dtype == (torch.uint8 if kind == "nf4" else torch.int8)
            assert quantise.count(p) == whole.numel()
            error = (quantise.dequantised(model.get_submodule(module)) - whole).norm() / whole.norm()
            assert 1e-4 < error < (0.11 if kind == "nf4" else 0.02), name
        else:
            assert torch.equal(p, plain.get_parameter(name)), name


def held(model: Bagel) -> int:
    total = 0
    for p in model.parameters():
        total += p.numel() * p.element_size()
        if state := getattr(p, "quant_state", None):
            total += sum(
                t.numel() * t.element_size() for t in state.as_dict(packed=True).values() if t.numel() > 64
            )
    return total


def test_memory_is_what_the_bits_say(golden: Path):
    whole, stored = held(load_bagel(golden / "model")), scan_folder(golden / "model")
    for kind, bytes_of_one in {"nf4": 0.5 + 4 / 64, "int8": 1.0}.items():  # a float32 scale for 64 numbers
        matrices = sum(stored[f"{name}.weight"].numel for name in expected_matrices(kind))
        saved = (whole - held(load_bagel(golden / "model", quantize=kind))) / matrices
        assert saved == pytest.approx(4 - bytes_of_one, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_under_autocast_products_give_the_dtype_that_plain_ones_give(
    options: dict[str, Any], tmp_path: Path, kind: str
):
    loop = built(**options | {"lora_rank": 2, "quantize": kind, "precision": "bf16"})
    layer, given = loop.run.model.language_model.model.layers[0], torch.randn(5, 64)
    with loop.engine.autocast(), torch.no_grad():
        for expert in ("", "_moe_gen"):
            assert getattr(layer.self_attn, f"q_proj{expert}")(given).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_product_is_bitsandbytes_own_and_keeps_nothing_of_its_input(golden: Path, dtype: torch.dtype):
    """bitsandbytes keeps the input of each product where recomputing cannot reach it."""
    name = "language_model.model.layers.0.self_attn.k_proj"
    layer = load_bagel(golden / "model", quantize="int8").get_submodule(name).train()
    outs = []
    for product in (layer, type(layer).forward.__get__(layer)):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(7, 64, generator=draw).to(dtype).requires_grad_()
        inner = x * 1.0
        kept = weakref.ref(inner)
        out = product(inner)
        del inner
        gone = kept() is None
        out.backward(torch.randn(out.shape, generator=draw).to(dtype))
        outs.append((out, x.grad, gone))
    (own, gradient, gone), (theirs, wanted, held) = outs
    assert torch.equal(own, theirs) and torch.equal(gradient, wanted)
    assert gone and not held, "without this the override is no longer needed"


def test_weights_that_are_not_finite_are_refused_before_they_are_quantised(golden: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(golden / "model", folder)
    tensors = load_file(folder / "ema.safetensors")
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "ema.safetensors")
    for kind in ("nf4", "int8"):
        with pytest.raises(CheckpointFolderError, match=name):
            load_bagel(folder, quantize=kind)
    with pytest.raises(quantise.QuantiseError, match="NF4"):
        load_bagel(golden / "model", quantize="NF4")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "double"), KINDS)
def test_adapters_over_it_learn_as_over_the_whole(
    options: dict[str, Any], tmp_path: Path, kind: str, double: bool
):
    given = options | {"lora_rank": 8, "lora_targets": ["both"], "learning_rate": 3e-3, "max_steps": 20}
    losses = {}
    for name, more in {"whole": {}, "small": {"quantize": kind, "double_quant": double}}.items():
        run = tmp_path / name
        train_on(built(**given | more | {"output_dir": str(run), "num_epochs": 20}))
        losses[name] = [row["text_loss"] for row in metrics(run) if row.get("text_loss")]
    assert losses["small"][-1] < losses["small"][0] - 0.5
    assert losses["small"][-1] == pytest.approx(losses["whole"][-1], rel=0.1)


@pytest.mark.slow
def test_a_quantised_run_goes_on_to_the_bit(options: dict[str, Any], tmp_path: Path):
    from unigen.training.trainer import UnifiedTrainer

    given = options | {
        "lora_rank": 4,
        "quantize": "nf4",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    for run, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            more = {"output_dir": str(tmp_path / run), "max_steps": stop, "resume_from_checkpoint": "auto"}
            UnifiedTrainer(Config(**given | more)).train()
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        a, b = (tmp_path / run / "step_4" / name for run in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes(), name


@pytest.mark.slow
def test_dora_over_nf4_begins_as_the_quantised_base(options: dict[str, Any], tmp_path: Path):
    given = options | {"lora_rank": 4, "quantize": "nf4", "lora_targets": ["both"]}
    plain = hidden(built(**given | {"output_dir": str(tmp_path / "a")}))
    dora = hidden(built(**given | {"lora_variant": "dora", "output_dir": str(tmp_path / "b")}))
    torch.testing.assert_close(dora, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"quantize": "nf4"}, "lora_rank"),
        ({"quantize": "int8", "lora_rank": 2, "double_quant": True}, "double_quant"),
        ({"double_quant": True}, "double_quant"),
        ({"quantize": "int8", "lora_rank": 2, "model_load_mode": 2}, "model_load_mode"),
        ({"quantize": "nf4", "lora_rank": 2, "engine": "fsdp2"}, "fsdp2"),
        ({"quantize": "int8", "lora_rank": 2, "lora_variant": "dora"}, "dora"),
        ({"quantize": "nf4", "lora_rank": 2, "compile": "on"}, "compile"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], given: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        quantise.adopt_bits(Config(**options | given)).resolve()


def test_a_rank_above_the_sides_of_a_matrix_is_refused_before_memory_is_asked_for(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"lora_rank is 100000000, and .*Fix: --lora_rank"):
        built(**options, lora_rank=100_000_000)


@pytest.mark.slow
def test_a_run_of_such_a_rank_goes_on(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    given = options | {"lora_rank": 65, "save_steps": 1}
    with monkeypatch.context() as earlier:  # a program that did not refuse it
        earlier.setattr(engine, "prepare", lambda *words, fresh: prepare(*words, fresh=False))
        train(**given | {"max_steps": 1})
    assert train(**given | {"max_steps": 2, "resume_from_checkpoint": "auto"}) is not None
    assert (Path(given["output_dir"]) / "step_2").is_dir()


def test_modes_by_number(options: dict[str, Any]):
    asked = {m: Config(**options, lora_rank=2, model_load_mode=m).resolve().quantize for m in (None, 1, 2, 3)}
    assert asked == {None: None, 1: None, 2: "nf4", 3: "int8"}


@pytest.mark.slow
def test_adapters_load_over_a_quantised_base(options: dict[str, Any], tmp_path: Path):
    train_on(built(**options | {"lora_rank": 4, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run")}))
    for kind in ("nf4", "int8"):
        model = load_bagel(options["model_path"], quantize=kind, adapters=[tmp_path / "run" / "step_2"])
        small = [name for name, module in model.named_modules() if quantise.holds_quantised(module)]
        names = {name.removesuffix(".base_layer") for name in small}
        assert len(names) == len(small) and names == expected_matrices(kind)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_dora_over_int8_is_refused_and_over_nf4_it_binds(
    golden: Path, options: dict[str, Any], tmp_path: Path, stored: bool
):
    given = options | {"lora_rank": 2, "lora_variant": "dora", "max_steps": 1}
    train(**given | {"output_dir": str(tmp_path / "run")})
    folders = dict.fromkeys(("nf4", "int8"), golden / "model")
    if stored:
        for kind in folders:
            folders[kind] = tmp_path / kind
            argv = ["ckpt", "export", str(golden / "model"), str(folders[kind]), "--quantize", kind]
            assert main(argv) == 0
    asked = {kind: {} if stored else {"quantize": kind} for kind in folders}
    adapter = [tmp_path / "run" / "step_1"]
    with pytest.raises(AdapterError, match=r"DoRA.*int8.*Fix: .*nf4"):
        load_bagel(folders["int8"], adapters=adapter, **asked["int8"])
    assert load_bagel(folders["nf4"], adapters=adapter, **asked["nf4"]).adapters


def test_generate_answers_with_a_quantised_model(golden: Path, tmp_path: Path, capsys):
    asked = [
        "--model_path",
        str(golden / "model"),
        "--prompt",
        "hi",
        "--mode",
        "text",
        "--max_new_tokens",
        "3",
    ]
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["generate", *asked, "--double_quant", *out]) == 2
    assert "double_quant needs quantize nf4" in capsys.readouterr().err
    assert main(["generate", *asked, "--quantize", "nf4", "--double_quant", *out]) == 0
    assert (tmp_path / "out" / "index.html").exists()
