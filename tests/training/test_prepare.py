"""What is done to a model before it trains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file

from unigen.config import Config, ConfigError
from unigen.model.bagel import Bagel
from unigen.model.parts import WORDS, dtype_of
from unigen.model.weights import load_bagel, save_bagel, scan_safetensors
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Block, Kind
from unigen.training.changes import tell_computing
from unigen.training.optim import rates
from unigen.training.precision import Precision
from unigen.training.prepare import compiles, prepare


def a_row(model, folder: Path):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("A red circle")
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(16, 4, 4, generator=generator)
    noise = torch.randn(4, 64, generator=generator)
    blocks = [
        Block(Kind.TEXT, len(ids), 0, ids=ids),
        Block(Kind.NOISED, 4, 1, (2, 2), loss=True, latent=latent, noise=noise, u=0.3),
    ]
    return pack_blocks([blocks], tokenizer.special, model.config.geometry)


@pytest.mark.slow
def test_frozen_matrices_in_bfloat16_change_no_number_and_keep_their_stored_bytes(
    golden: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(golden / "model", folder)
    tensors = load_file(folder / "ema.safetensors")
    tensors[WORDS] = tensors[WORDS].bfloat16()  # as published
    save_file(tensors, folder / "ema.safetensors")
    config = Config(model_path=str(folder), train_data_path="x", freeze_und=True, bf16=True)
    plain = load_bagel(folder, dtype=torch.float32).train()
    halved = load_bagel(folder, dtype=lambda name: dtype_of(name, config, torch.bfloat16)).train()
    for model in (plain, halved):
        prepare(model, config, "cpu", "single", torch.bfloat16)
    assert halved.language_model.model.layers[0].mlp.gate_proj.weight.dtype == torch.bfloat16
    assert halved.language_model.model.layers[0].mlp_moe_gen.gate_proj.weight.dtype == torch.float32
    assert halved.get_parameter(WORDS).dtype == torch.bfloat16 != plain.get_parameter(WORDS).dtype

    gradients = []
    for model in (plain, halved):
        with torch.autocast("cpu", torch.bfloat16):
            model(a_row(model, folder)).mse.mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name

    save_bagel(halved, tmp_path / "saved")
    before, after = (
        scan_safetensors(folder / "ema.safetensors"),
        scan_safetensors(tmp_path / "saved" / "ema.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(entry.read(), after[name].read()) for name, entry in before.items())


@pytest.mark.parametrize(
    ("options", "option", "why"),
    [
        ({"lora_rank": 4}, "learning_rate_vit", {"lora_targets": ["gen", "vit"]}),
        ({"lora_rank": 4}, "weight_decay_connector", {"train_also": ["connector"]}),
        ({"freeze_und": True}, "learning_rate_und", {"freeze_und": False}),
        ({"freeze_vit": True}, "learning_rate_vit", {"freeze_vit": False}),
        ({"visual_gen": False}, "learning_rate_gen", {"visual_gen": True}),
        ({"visual_und": False}, "weight_decay_vit", {"visual_und": True}),
    ],
)
def test_a_rate_of_a_part_that_does_not_train_is_refused_and_of_one_that_does_is_not(options, option, why):
    def prepared(**more):
        config = Config(model_path="m", train_data_path="d", **options | {option: 1e-5} | more).resolve()
        with torch.device("meta"):
            parts = {name: getattr(config, name) for name in ("visual_gen", "visual_und")}
            prepare(Bagel(tiny_model.config(**parts)), config, "cpu", "single", torch.float32)
        return rates(config, config.learning_rate)

    with pytest.raises(ConfigError, match=rf"{option} .*Fix: "):
        prepared()
    assert set(prepared(**why)) == {option} - {"weight_decay_connector", "weight_decay_vit"}


SELECTIVE = {"gradient_checkpointing": True, "checkpointing_policy": "selective"}


@pytest.mark.parametrize(
    ("options", "device", "engine", "compiled"),
    [
        ({}, "cuda", "single", True),
        ({}, "cuda", "fsdp2", True),
        ({}, "cuda", "deepspeed", False),
        ({}, "cpu", "single", False),
        (SELECTIVE, "cuda", "single", False),
        ({"checkpointing_policy": "selective"}, "cuda", "single", True),  # nothing is recomputed
        ({"compile": "on"}, "cpu", "single", True),
        ({"compile": "off"}, "cuda", "single", False),
    ],
)
def test_layers_are_compiled_where_it_pays(options, device, engine, compiled):
    on, why = compiles(Config(**options), device, engine)
    assert on == compiled and why


@pytest.mark.parametrize("options", [SELECTIVE, {"engine": "deepspeed"}], ids=["selective", "deepspeed"])
def test_what_cannot_be_compiled_is_refused_where_it_was_asked_for(options):
    with pytest.raises(ConfigError, match="compile"):
        Config(model_path="m", train_data_path="d", compile="on", **options).resolve()


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (None, False, False),
        ("off", False, False),
        ("on", True, False),
        (None, True, True),
        ("on", False, True),
    ],
)
def test_a_resumed_run_says_where_its_layers_are_compiled_otherwise(before, now, told, caplog):
    tell_computing({} if before is None else {"compile": before}, Config(), Precision("fp32", ""), now)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * told
    assert not told or f"--compile {before or 'off'}" in caplog.text
