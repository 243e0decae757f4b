"""``benchmarks/train_step.py``, ``inference.py``: they compare equals, notice what is not equal, and run."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import adapters
import in_turn
import inference
import plain
import pytest
import small_bagel
import start
import torch
import train_step
from small_bagel import FULL, SMALL

from unigen.data import kept
from unigen.inference.inferencer import InterleaveInferencer
from unigen.model.mask import Tokens, allowed
from unigen.sequence.pack import pack_blocks
from unigen.sequence.types import Block, Kind

GOLDEN = Path(__file__).parent / "golden" / "model"


def test_the_start_is_measured_on_the_same_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNIGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "LEAST", 0)
    start.write(tmp_path / "a.jsonl", 50)
    for _ in range(2):
        start.build(tmp_path / "a.jsonl", str(GOLDEN))
    first, again = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["records"] == 50 and first["fingerprint"] == again["fingerprint"]
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 1


BENCHMARKS = [train_step, inference]
REQUESTS = list(inference.requests(SMALL))


@pytest.fixture(scope="module")
def model():
    return small_bagel.build_model(SMALL)


@pytest.fixture(scope="module")
def pack(model):
    return small_bagel.training_pack(model.config, SMALL)


@pytest.fixture(scope="module")
def inferencer(model):
    return InterleaveInferencer(model, tokenizer=small_bagel.WordIds())


# ---- training


def test_the_full_row_is_the_one_that_is_written_down():
    config = small_bagel.model_config(FULL)
    pack = small_bagel.training_pack(config, FULL)
    count = torch.bincount(pack.kind).tolist()
    assert (len(pack), pack.n_samples, pack.n_text_labels) == (2872, 6, 2 * 81)
    assert count[Kind.NOISED] == 4 * 256 and count[Kind.CLEAN] == 2 * 256 and count[Kind.VIT] == 4 * 256
    assert (config.llm.hidden_size, config.llm.num_hidden_layers, config.patch_dim) == (512, 8, 64)


def test_the_plain_step_gives_the_project_s_losses_and_gradients(model, pack):
    errors = train_step.check(train_step.plain_step(model, pack), train_step.project_step(model, pack))
    assert errors.keys() == {"losses", "gradient norms", "gradients"}
    assert max(errors.values()) <= in_turn.TOLERANCE


@pytest.mark.parametrize("seed", range(8))
def test_plain_losses_are_the_project_s_on_any_row(model, seed):
    """Samples of any blocks in any order, text alone and pictures alone among them."""
    r = random.Random(seed)
    ready = small_bagel.training_samples(model.config, SMALL, seed)
    blocks = [block for sample in ready for block in sample]
    samples = [r.choices(blocks, k=r.randint(1, 5)) for _ in range(r.randint(1, 3))]
    pack = pack_blocks(samples, small_bagel.SPECIAL, model.config.geometry)
    with torch.no_grad():
        want = torch.tensor([float(x) for x in train_step.project_step(model, pack).losses()])
        got = torch.tensor([float(x) for x in train_step.plain_step(model, pack).losses()])
    assert torch.allclose(got, want, rtol=1e-5)


def test_the_dense_mask_is_the_project_s_rule(model, pack):
    row, order = plain.Row.of(pack, model.config.latent_patch_size), pack.index.argsort()
    tokens = Tokens.of(pack).at(order)
    rule = allowed(tokens.unsqueeze(1), tokens.unsqueeze(0))
    assert torch.equal(rule, torch.block_diag(*(mask == 0 for mask in row.masks)).bool())


def more_of(name: str, factor: float = 1.01) -> Callable[..., torch.Tensor]:
    whole = getattr(plain, name)
    return lambda *args, **options: whole(*args, **options) * factor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "attention", "see", "time_features"])
def test_a_step_that_differs_is_noticed_and_not_timed(model, pack, monkeypatch, name):
    monkeypatch.setattr(plain, name, more_of(name))
    with pytest.raises(in_turn.Disagreement):
        train_step.check(train_step.plain_step(model, pack), train_step.project_step(model, pack))
    with pytest.raises(SystemExit) as stopped:
        train_step.main(["--small", "--repeats", "1"])
    assert stopped.value.code not in (0, None)


def test_a_gradient_that_differs_is_noticed_where_losses_are_equal(model, pack):
    wanted = train_step.project_step(model, pack)

    def half_trained():
        text, image = wanted.losses()
        return text, image.detach() + 0.5 * (image - image.detach())

    with pytest.raises(in_turn.Disagreement, match="gradient"):
        train_step.check(wanted, train_step.Step(model, half_trained, wanted.counts))


def test_operations_are_those_of_each_token_s_own_expert(model):
    n, c = 11, model.config.llm
    text = Block(Kind.TEXT, n - 2, ids=[7] * (n - 2), loss=True)
    pack = pack_blocks([[text]], small_bagel.SPECIAL, model.config.geometry)
    layer = c.hidden_size * (3 * c.intermediate_size + 2 * c.hidden_size) + 2 * c.hidden_size * 2 * 16
    products, attention = train_step.step_flops(model, pack)
    unread = c.hidden_size * (3 * c.intermediate_size + c.hidden_size)  # the closing token, in the last layer
    labels = (n - 1) * c.vocab_size * c.hidden_size
    assert products == 6 * (n * c.num_hidden_layers * layer - unread + labels)
    assert attention == 12 * c.num_hidden_layers * c.hidden_size * n * (n + 1) / 2


# ---- inference


@pytest.mark.parametrize("name", REQUESTS)
def test_plain_answers_are_the_inferencer_s(model, inferencer, name):
    request = inference.requests(SMALL)[name]
    assert inference.check(name, request.plain(model), request.unigen(inferencer), SMALL) <= in_turn.TOLERANCE


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_an_answer_that_differs_is_noticed(model, inferencer, monkeypatch, name, part):
    request = inference.requests(SMALL)[name]
    answer = request.unigen(inferencer)
    monkeypatch.setattr(plain, part, more_of(part, 3.0))
    with pytest.raises(in_turn.Disagreement, match=name):
        inference.check(name, request.plain(model), answer, SMALL)


@pytest.mark.parametrize("option", ["cfg_text_scale", "cfg_img_scale", "timestep_shift"])
def test_a_picture_depends_on_its_guidance(model, inferencer, monkeypatch, option):
    edit = inference.picture_request(SMALL, edit=True).unigen(inferencer)
    monkeypatch.setitem(inference.GUIDANCE, option, inference.GUIDANCE[option] + 0.2)
    with pytest.raises(in_turn.Disagreement):
        inference.check("edit", inference.picture_request(SMALL, edit=True).plain(model), edit, SMALL)


def test_a_text_that_ends_early_is_not_timed():
    tokens = [[5] * (SMALL.new_tokens - 2)]
    with pytest.raises(in_turn.Disagreement):
        inference.check("text", tokens, tokens, SMALL)


# ---- timing


def options(**values) -> argparse.Namespace:
    return argparse.Namespace(**{"small": True, "repeats": 3, "seconds": 60.0, **values})


def test_variants_run_in_turn_after_a_round_that_is_not_counted():
    ran: list[str] = []
    names = [in_turn.PLAIN, "own"]
    times = in_turn.time_in_turn({name: lambda n=name: ran.append(n) for name in names}, options())
    assert ran == names * 4
    assert [len(seconds) for seconds in times.seconds.values()] == [3, 3] and len(times.rates) == 3
    assert len(in_turn.time_in_turn({in_turn.PLAIN: lambda: None}, options(seconds=0.0)).rates) == 1


def test_ratios_are_of_neighbours():
    times = in_turn.Times({in_turn.PLAIN: [2.0, 8.0, 3.0], "own": [1.0, 2.0, 3.0]}, [1.0])
    assert times.ratios("own") == [2.0, 4.0, 1.0]
    assert times.to_dict()["own"]["faster"] == {"median": 2.0, "min": 1.0, "max": 4.0}


def test_kernels_are_counted_without_views():
    a = torch.ones(4, 4)
    product_copy_and_sum = in_turn.kernels(lambda: (a @ a).t().reshape(16)[2:] + 1)
    assert product_copy_and_sum == 3
    assert in_turn.kernels(lambda: torch.empty_like(a).view(16)) == 0


@pytest.mark.parametrize("tokens", [(2, 4), (3, 7)])
def test_kernels_of_a_token_do_not_depend_on_the_tokens_counted(model, tokens):
    one = inference.token_kernels(lambda r: r.plain(model), SMALL)
    assert one == inference.token_kernels(lambda r: r.plain(model), SMALL, *tokens) > SMALL.layers


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_results_are_one_line_of_json(benchmark, capsys):
    benchmark.main(["--small", "--repeats", "2", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    results = json.loads(line)
    assert results["small"] and results["machine"]["torch"] == torch.__version__
    times = {"step": results["times"]} if benchmark is train_step else results["times"]
    assert list(times) == (["step"] if benchmark is train_step else REQUESTS)
    for variants in times.values():
        assert {in_turn.PLAIN, "unigen"} <= variants.keys()
        for spread in variants.values():
            assert spread["rounds"] == 2
            assert 0 < spread["seconds"]["min"] <= spread["seconds"]["median"] <= spread["seconds"]["max"]


@pytest.mark.slow
def test_adapters_start_and_step_beside_all_weights(capsys):
    pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    adapters.main(["--small", "--repeats", "1", "--json"])
    results = json.loads(capsys.readouterr().out)
    assert results["times"].keys() == {"start", "step"}
    for found in results["times"].values():
        assert found.keys() == adapters.VARIANTS.keys()
        assert all(variant["seconds"]["median"] > 0 for variant in found.values())
    one, both = (
        results["trained"]["LoRA of the generation expert"],
        results["trained"]["LoRA of both experts"],
    )
    assert both == 2 * one == results["trained"]["LoRA of both over NF4"] < results["trained"]["plain"]


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_table_has_a_line_for_every_variant(benchmark, capsys):
    benchmark.main(["--small", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    for name in ["step"] if benchmark is train_step else REQUESTS:
        for variant in (in_turn.PLAIN, "unigen"):
            (line,) = [line for line in lines if line.startswith(f"{name}: {variant} ")]
            assert ("x" in line.split(f"{name}: {variant} ")[1]) == (variant != in_turn.PLAIN)
    assert "--small" in lines[0]
