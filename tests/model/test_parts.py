"""Every parameter of the published checkpoint belongs to one part, and what is asked of names agrees with the
modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from unigen.config import Config
from unigen.model import parts
from unigen.model.bagel import Bagel
from unigen.model.config import read_config


@pytest.fixture(scope="module")
def model(golden: Path) -> Bagel:
    with torch.device("meta"):
        return Bagel(read_config(golden / "model", {}, max_latent_size=8))


def test_linear_layers_norms_and_embeddings_are_told_by_their_names(model):
    kinds = {nn.Linear: parts.is_linear, nn.Embedding: parts.is_embedding}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            whole = f"{path}.{name}"
            for kind, said in kinds.items():
                expected = isinstance(module, kind) or (kind is nn.Embedding and parts.is_table(whole))
                assert said(whole) == expected, whole


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["visual_gen", "visual_und"])
def test_what_is_left_out_is_what_a_smaller_model_has_not(golden, model, left_out):
    with torch.device("meta"):
        smaller = Bagel(read_config(golden / "model", {}, max_latent_size=8, **{left_out: False}))
    both = {"visual_gen": True, "visual_und": True, left_out: False}
    kept = {name for name, _ in model.named_parameters() if not parts.is_left_out(name, **both)}
    assert kept == {name for name, _ in smaller.named_parameters()}


@pytest.mark.parametrize(
    ("options", "learns"),
    [
        ({"freeze_und": True}, {"generation expert", "time_embedder", "vae2llm", "llm2vae"}),
        ({"freeze_llm": True}, {"vit_model", "connector", "time_embedder", "vae2llm", "llm2vae"}),
        (
            {"freeze_vit": True},
            {"language_model", "generation expert", "connector", "time_embedder", "vae2llm", "llm2vae"},
        ),
    ],
)
def test_frozen_parts(model, options, learns):
    names = [name for name, _ in model.named_parameters()]
    assert {parts.title(name) for name in names if not parts.is_frozen(name, Config(**options))} == learns
    assert all(parts.is_frozen(name, Config(**options)) for name in names if parts.is_table(name))


def test_only_matrices_that_do_not_learn_are_held_in_bfloat16(model):
    config = Config(freeze_und=True)
    halved = {
        name
        for name, _ in model.named_parameters()
        if parts.dtype_of(name, config, torch.bfloat16) == torch.bfloat16
    }
    halved.remove(parts.WORDS)  # an embedding that is stored so
    assert halved and all(parts.is_linear(name) and not parts.is_generation_expert(name) for name in halved)
    stored = {parts.dtype_of(parts.WORDS, config, torch.bfloat16, d) for d in (torch.float32, torch.float16)}
    assert stored == {torch.float32}, "its digits stay"
    assert not any(
        parts.dtype_of(name, config, torch.float32) != torch.float32 for name, _ in model.named_parameters()
    )
