"""Compiled layers: the same numbers, few versions, and what happens where nothing can be compiled."""

from __future__ import annotations

import random
from functools import partial

import pytest
import tiny_model as tiny
import torch

from unigen.model import compiling
from unigen.model.compiling import CompiledLayers, CompileError
from unigen.sequence.types import Kind
from unigen.training.prepare import hold_understanding
from unigen.training.recompute import recompute_layers


def learn(model, pack):
    """The loss, and the gradients of all that learns."""
    model.zero_grad(set_to_none=True)
    out = model(pack)
    loss = out.ce.sum() + out.mse.sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rows(model):
    r = random.Random(2)
    yield tiny.row([tiny.sample(r) for _ in range(4)], model)
    yield tiny.row([[tiny.text(r, 9, loss=True)]], model)  # the generation expert has nothing to do
    yield tiny.row(
        [[tiny.image(r, Kind.NOISED, 0, (3, 3))], [tiny.image(r, Kind.VIT), tiny.text(r, 5, loss=True)]],
        model,
    )
    yield tiny.row([], model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "freeze_und", "onednn"), [("full", False, False), ("none", True, False), ("none", False, True)]
)
def test_compiled_layers_give_the_same_numbers_and_few_versions(policy, freeze_und, onednn, request):
    if onednn:
        request.getfixturevalue("by_onednn")
    torch._dynamo.reset()
    model = tiny.build().train()
    tiny.wrap(model, policy, freeze_und)
    packs = [pack for pack in rows(model) if not freeze_und or pack.n_image_targets]
    wanted = [learn(model, pack) for pack in packs]
    tiny.wrap(model)
    compiled = CompiledLayers(model, strict=True)
    if policy != "none":
        recompute_layers(model, policy)
    if freeze_und:
        hold_understanding(model)
    torch._dynamo.utils.counters.clear()
    for pack, (loss, gradients) in zip(packs, wanted, strict=True):
        found, mine = learn(model, pack)
        assert torch.allclose(found, loss, rtol=1e-6)
        whole = sum(float((g.double() ** 2).sum()) for g in gradients.values()) ** 0.5
        apart = sum(float(((mine[name] - g).double() ** 2).sum()) for name, g in gradients.items()) ** 0.5
        assert mine.keys() == gradients.keys() and apart <= 1e-6 * whole
    # parts x experts, and recomputing
    assert compiled.on and torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * 2 + 2


@pytest.mark.slow
def test_halves_of_any_length_share_a_version(monkeypatch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    torch._dynamo.reset()
    model = tiny.build().train()
    layer = model.language_model.model.layers[0]
    CompiledLayers(model, strict=True)
    attention = layer.self_attn
    for n in (7, 63, 64, 65, 300):  # few rows are special to `Linear`, but not while they are traced
        angles = torch.zeros(n, 1, attention.head_width)
        layer.before(torch.zeros(n, 32), angles, angles, "")
        layer.after(torch.zeros(n, 32), torch.zeros(n, attention.heads, attention.head_width), "")
    assert len(graphs) == 2


def test_outside_of_training_nothing_is_compiled(monkeypatch):
    def refuse(part, **options):
        def never(*args):
            raise AssertionError("compiled")

        return never

    monkeypatch.setattr(torch, "compile", refuse)
    model = tiny.build()
    pack = next(rows(model))
    wanted = tiny.states(model, pack)
    CompiledLayers(model)
    assert torch.equal(tiny.states(model.eval(), pack), wanted)
    with pytest.raises(AssertionError, match="compiled"):
        model.train()(pack)


def broken(part, **options):
    def compiled(*args):
        raise torch._dynamo.exc.BackendCompilerFailed(compiled, RuntimeError("no compiler here"), None)

    return compiled


def test_without_a_compiler_the_layers_go_on_as_they_are_and_say_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", broken)
    model = tiny.build().train()
    pack = next(rows(model))
    loss, gradients = learn(model, pack)
    compiled = CompiledLayers(model)
    found, mine = learn(model, pack)
    assert torch.equal(found, loss) and all(torch.equal(mine[name], g) for name, g in gradients.items())
    assert not compiled.on and len(caplog.records) == 1 and "no compiler here" in caplog.text


def test_where_compiling_was_asked_for_its_failure_is_an_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", broken)
    model = tiny.build().train()
    CompiledLayers(model, strict=True)
    with pytest.raises(CompileError, match=r"no compiler here.*--compile off"):
        model(next(rows(model)))


@pytest.mark.parametrize(
    "error",
    [torch._dynamo.exc.FailOnRecompileLimitHit("limit"), torch.OutOfMemoryError("full"), ValueError("x")],
)
def test_other_failures_are_passed_on(error, monkeypatch):
    def compile(part, **options):
        def run(*args):
            raise error

        return run

    monkeypatch.setattr(torch, "compile", compile)
    model = tiny.build().train()
    CompiledLayers(model)
    with pytest.raises(type(error)):
        model(next(rows(model)))
    assert not isinstance(error, compiling.CompileError)
