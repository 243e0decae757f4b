"""Adapters in a model: the same numbers through peft, through the merged checkpoint, and by hand."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unigen.cli import main
from unigen.model import adapters as disk
from unigen.model import lora
from unigen.model.adapters import Adapter, AdapterError
from unigen.model.bagel import StateReader
from unigen.model.parts import ADAPTER_MARKS, is_adapter
from unigen.model.storage import CheckpointFolderError, scan_folder
from unigen.model.weights import load_bagel, save_bagel
from unigen.sequence.types import Kind

GEN = "language_model.model.layers.0.self_attn.q_proj_moe_gen"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> Path:
    """A small base in the published layout."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save_bagel(tiny_model.build(1), folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(golden / "model" / name, folder)
    return folder


def made(base: Path, folder: Path, seed: int = 0, **about: object) -> Path:
    """The folder of an adapter with random numbers, as a run would write it."""
    model = load_bagel(base)
    wanted = about.pop("wanted", ("gen", "und", "connector", "vit"))
    targets, linear = lora.targets_of(model, wanted), lora.linear_modules(model)  # type: ignore[arg-type]
    whole = lora.whole_of(model, about.pop("also", ()))  # type: ignore[arg-type]
    adapter = Adapter(3, 5.0, targets, whole=whole, base=str(base), **about)  # type: ignore[arg-type]
    adapter = replace(adapter, digest=lora.base_digest(scan_folder(base)))
    folder.mkdir()
    (folder / disk.ADAPTER).write_text(json.dumps(disk.config_of(adapter, linear)))
    generator = torch.Generator().manual_seed(seed)
    stored, tensors = scan_folder(base), {}
    for name in adapter.names():
        if name in whole:
            shape = stored[name].shape
        else:
            out, inputs = stored[f"{name.partition('.lora_')[0]}.weight"].shape
            shape = {"lora_A": (3, inputs), "lora_B": (out, 3)}.get(name.split(".")[-3], (out,))
        value = torch.randn(shape, generator=generator) * 0.3
        tensors[disk.disk_name(name)] = value.abs() + 0.5 if "magnitude" in name else value
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@torch.no_grad()
def answers(model: torch.nn.Module) -> list[Tensor]:
    """Losses of texts and pictures of a fixed pack, which every part of the model takes part in."""
    r = random.Random(0)
    kinds = [Kind.TEXT, Kind.VIT, Kind.CLEAN, Kind.NOISED]
    samples = [
        [
            tiny_model.text(r, 4, loss=True),
            *(tiny_model.image(r, kind, n) for n, kind in enumerate(kinds[1:])),
        ]
    ]
    samples += [tiny_model.sample(r) for _ in range(3)]
    pack = tiny_model.row(samples, model)
    output = model(pack, reader=StateReader.of_all(pack))
    return [output.read, output.ce, output.mse]


def assert_equal(a: list[Tensor], b: list[Tensor], limit: float = 1e-5) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= limit * max(1.0, float(y.abs().max()))


def differs(a: list[Tensor], b: list[Tensor]) -> bool:
    return all((x - y).abs().max() > 1e-3 for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_base_and_adapter_are_the_merged_checkpoint(base: Path, tmp_path: Path, variant: str):
    folder = made(base, tmp_path / "adapter", variant=variant, also=("time_embedder", "norms"))
    adapted = answers(load_bagel(base, adapters=[folder]))
    made_of = lora.merges(folder, scan_folder(base))
    model = load_bagel(base)
    plain = answers(model)
    with torch.no_grad():
        for name, make in made_of.items():
            model.get_parameter(name).copy_(make())
    assert differs(adapted, plain)
    assert_equal(answers(model), adapted)
    assert_equal(answers(load_bagel(folder)), adapted, 0)  # the folder names its base


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "also"),
    [("lora", ()), ("rslora", ("time_embedder",)), ("dora", ()), ("lora", ("norms", "llm2vae"))],
)
def test_plain_peft_loads_it_onto_the_model(base: Path, tmp_path: Path, variant: str, also: tuple[str, ...]):
    from peft import PeftModel

    folder = made(base, tmp_path / "adapter", variant=variant, also=also)
    expected = answers(load_bagel(base, adapters=[folder]))
    loaded = PeftModel.from_pretrained(load_bagel(base), str(folder))
    bound = [name for name, _ in loaded.named_parameters() if ".lora_A." in name]
    assert len(bound) == len(disk.read_adapter(folder)[0].targets)
    assert_equal(answers(loaded.base_model.model.eval()), expected)


@pytest.mark.slow
def test_adapters_add_up_by_their_factors_and_can_be_switched(base: Path, tmp_path: Path):
    a, b = (
        made(base, tmp_path / "a", 1, wanted=("both",)),
        made(base, tmp_path / "b", 2, wanted=("gen", "vit")),
    )
    model = load_bagel(base, adapters=[a, f"{b}:-0.5"])
    plain = load_bagel(base)
    stored = scan_folder(base)
    with torch.no_grad():
        for folder, factor in ((a, 1.0), (b, -0.5)):
            for name, make in lora.merges(folder, stored).items():
                plain.get_parameter(name).add_(make() - stored[name].read(), alpha=factor)
    assert_equal(answers(model), answers(plain))
    lora.activate(model, {"adapter_0": 0.0, "adapter_1": 0.0})
    assert_equal(answers(model), answers(load_bagel(base)), 0)
    lora.activate(model, {"adapter_0": 1.0, "adapter_1": -0.5})
    assert_equal(answers(model), answers(plain))


@pytest.mark.slow
def test_an_evaluation_mixes_adapters_as_the_model_they_add_up_to(small_model: Path, tmp_path: Path, capsys):
    base = small_model
    a, b = (made(base, tmp_path / name, seed, wanted=("both",)) for seed, name in ((1, "a"), (2, "b")))
    model, stored, whole = load_bagel(base), scan_folder(base), tmp_path / "whole"
    with torch.no_grad():
        for folder, factor in ((a, 1.0), (b, 0.5)):
            for name, make in lora.merges(folder, stored).items():
                model.get_parameter(name).add_(make() - stored[name].read(), alpha=factor)
    save_bagel(model, whole)
    for path in base.glob("*token*"):
        shutil.copy(path, whole)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(base / name, whole)
    data, out = tmp_path / "val.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"messages": [
        {"role": "user", "content": "Question?"}, {"role": "assistant", "content": "yes, it is"}
    ]}))  # fmt: skip
    words = ["evaluate", "--model_path", base, "--adapter", a, "--compare", whole, base, "--data_path", data]
    words += ["--output_dir", out, "--device", "cpu", "--max_new_tokens", "2"]
    assert main([*map(str, words), "--adapter", f"{b}:0.5"]) == 0

    def perplexity(folder: Path) -> float:
        tasks = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["tasks"]
        return next(one["value"] for one in tasks["text"] if one["name"].startswith("perplexity["))

    mixed, merged, plain = (perplexity(next(out.glob(f"{number}-*"))) for number in (1, 2, 3))
    assert mixed == pytest.approx(merged, rel=1e-4) and abs(mixed / plain - 1) > 0.01
    capsys.readouterr()
    assert main([*map(str, words), "--adapter", f"{b}:0.7"]) == 2
    assert "another --adapter ([1.0, 0.5] -> [1.0, 0.7])" in capsys.readouterr().err
    assert main(["evaluate", "--run", str(base), "--data_path", str(data), "--adapter", str(a)]) == 2
    assert "adapter is given without model_path" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures_of_many_prompts_keep_the_factors_that_they_began_with(
    small_model: Path, tmp_path: Path, capsys
):
    adapter = made(small_model, tmp_path / "a", wanted=("gen",))
    prompts = tmp_path / "asked.json"
    prompts.write_text(json.dumps([{"Prompt": "a cat", "prompt_id": 1}]))
    words = ["generate", "--model_path", small_model, "--prompts_file", prompts, "--layout", "wise"]
    words += ["--output_dir", tmp_path / "out", "--device", "cpu", "--num_timesteps", 2, "--height", 32]
    words += ["--width", 32, "--adapter"]
    assert main([*map(str, words), f"{adapter}:0.5"]) == 0
    assert main([*map(str, words), f"{adapter}:1.0"]) == 2
    assert "another --adapter ([0.5] -> [1.0])." in capsys.readouterr().err


@pytest.mark.slow
def test_parts_trained_whole_add_up_too_and_dora_takes_part_whole_or_not(base: Path, tmp_path: Path):
    a, b = (
        made(base, tmp_path / name, seed, wanted=("gen",), also=("llm2vae",))
        for seed, name in ((1, "a"), (2, "b"))
    )
    before = scan_folder(base)["llm2vae.weight"].read()
    ends = [
        load_file(folder / "adapter_model.safetensors")["base_model.model.llm2vae.weight"]
        for folder in (a, b)
    ]
    for order in ([a, b], [b, a]):
        torch.testing.assert_close(
            load_bagel(base, adapters=order).llm2vae.weight, ends[0] + ends[1] - before
        )
    dora = made(base, tmp_path / "dora", variant="dora")
    with pytest.raises(AdapterError, match="DoRA"):
        load_bagel(base, adapters=[f"{dora}:0.5"])
    model = load_bagel(base, adapters=[dora])
    with pytest.raises(AdapterError, match="DoRA"):
        lora.activate(model, {"adapter_0": 0.5})


@pytest.mark.slow
def test_a_model_with_adapters_is_not_saved_as_one(base: Path, tmp_path: Path):
    model = load_bagel(base, adapters=[made(base, tmp_path / "a")])
    with pytest.raises(AdapterError, match="--merge"):
        save_bagel(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_is_an_error(base: Path, tmp_path: Path):
    folder = made(base, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {n: t * (".lora_B." not in n) for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="changes nothing"):
        load_bagel(base, adapters=[folder])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["language_model.model.embed_tokens.weight", "vit_model.vision_model.post_layernorm.bias"]
)
def test_another_base_is_known_by_any_of_its_tensors(base: Path, tmp_path: Path, name: str):
    folder = made(base, tmp_path / "a", wanted=("gen",))
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(base / "ema.safetensors")
    weights[name] = weights[name] + 0.5
    save_file(weights, tmp_path / "other" / "ema.safetensors")
    with pytest.raises(AdapterError, match="other weights"):
        load_bagel(tmp_path / "other", adapters=[folder])
    save_file(
        {n: t.bfloat16() for n, t in load_file(base / "ema.safetensors").items()},
        tmp_path / "other" / "ema.safetensors",
    )
    load_bagel(tmp_path / "other", adapters=[folder])  # a copy of half the size is the same base


def test_what_was_trained_whole_moves_by_the_factor(base: Path, tmp_path: Path):
    folder = made(base, tmp_path / "a", also=("llm2vae",))
    model, stored = load_bagel(base, adapters=[f"{folder}:0.25"]), scan_folder(base)
    trained = load_file(folder / "adapter_model.safetensors")["base_model.model.llm2vae.weight"]
    before = stored["llm2vae.weight"].read()
    torch.testing.assert_close(model.llm2vae.weight, before + 0.25 * (trained - before))


@pytest.mark.slow
def test_the_binding_is_the_size_of_each_change(base: Path, tmp_path: Path):
    folder = made(base, tmp_path / "a")
    model = load_bagel(base, adapters=[folder])
    stored, changes = scan_folder(base), []
    for name, make in lora.merges(folder, stored).items():
        changes.append(float((make() - stored[name].read()).norm()))
    binding = lora.binding_of(model, "adapter_0")
    assert binding.bound == binding.wanted == len(changes)
    assert math.isclose(binding.low, min(changes), rel_tol=1e-4)
    assert math.isclose(binding.high, max(changes), rel_tol=1e-4)
    del model.get_submodule(GEN).lora_A["adapter_0"]
    with pytest.raises(AdapterError, match=rf"only {len(changes) - 1} of {len(changes)}.*q_proj_moe_gen"):
        lora.binding_of(model, "adapter_0")


def test_targets_are_the_seven_matrices_of_an_expert(base: Path):
    model = load_bagel(base)
    gen, und = lora.targets_of(model, ["gen"]), lora.targets_of(model, ["und"])
    layers = model.config.llm.num_hidden_layers
    assert len(gen) == len(und) == 7 * layers
    assert {name.replace("_moe_gen", "") for name in gen} == set(und)
    assert set(lora.targets_of(model, ["both"])) == {*gen, *und}
    assert lora.targets_of(model, ["*.q_proj_moe_gen"]) == tuple(name for name in gen if "q_proj" in name)
    assert all(name.startswith("vit_model.") for name in lora.targets_of(model, ["vit"]))
    assert lora.whole_of(model, ["llm2vae"]) == ("llm2vae.weight", "llm2vae.bias")
    assert not any("norm" not in name for name in lora.whole_of(model, ["norms"]))
    with pytest.raises(AdapterError, match=r"q_proj_moe_genn.*did you mean q_proj_moe_gen"):
        lora.targets_of(model, ["gen", "q_proj_moe_genn"])


@pytest.mark.slow
def test_short_targets_mean_the_same_to_peft(base: Path):
    linear = lora.linear_modules(load_bagel(base))
    for wanted in (["gen"], ["und"], ["both"], ["vit"], ["connector"], ["language_model.model.layers.1.*"]):
        targets = set(lora.targets_of(load_bagel(base), wanted))
        short = disk.short_targets(targets, linear)
        assert {n for n in linear if any(n == s or n.endswith(f".{s}") for s in short)} == targets
    assert disk.short_targets(lora.targets_of(load_bagel(base), ["gen"]), linear)[-1] == "v_proj_moe_gen"


def test_names_go_to_disk_and_back(base: Path, tmp_path: Path):
    adapter, named = disk.read_adapter(made(base, tmp_path / "a", variant="dora", also=("norms",)))
    assert sorted(named) == sorted(adapter.names())
    assert {disk.own_name(disk.disk_name(name)) for name in named} == set(named)
    assert disk.disk_name(f"{GEN}.lora_A.default.weight") == f"base_model.model.{GEN}.lora_A.weight"
    assert not any("default" in disk.disk_name(name) for name in named)
    assert sum(map(is_adapter, named)) == len(ADAPTER_MARKS) * len(adapter.targets)


def edited(folder: Path, key: str, change: object) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    full = f"base_model.model.{GEN}.{key}.weight"
    tensors.pop(full)
    if change is not None:
        tensors[full] = change  # type: ignore[assignment]
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_is_refused(base: Path, tmp_path: Path):
    cases = {
        "lacks": lambda folder: edited(folder, "lora_B", None),
        "another model": lambda folder: edited(folder, "lora_B", torch.zeros(7, 3)),
        "trained on other weights": lambda folder: None,
    }
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "ema.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, other / "ema.safetensors")
    for number, (said, spoil) in enumerate(cases.items()):
        folder = made(base, tmp_path / f"a{number}")
        spoil(folder)
        with pytest.raises(AdapterError, match=said) as error:
            load_bagel(other if "trained" in said else base, adapters=[folder])
        assert str(folder) in str(error.value) and "Fix:" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", "x"),
        ("peft_type", "IA3"),
        ("lora_alpha", None),
        ("bias", "all"),
        ("rank_pattern", {"a": 1}),
    ],
)
def test_a_config_that_is_no_plain_lora_is_refused(base: Path, tmp_path: Path, key: str, value: object):
    folder = made(base, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_bagel(base, adapters=[folder])


def test_an_adapter_is_no_model(base: Path, tmp_path: Path):
    folder = made(base, tmp_path / "a")
    from unigen.model.weights import build_bagel

    with pytest.raises(CheckpointFolderError, match="holds an adapter"):
        build_bagel(folder)
    shutil.move(str(base), str(tmp_path / "moved"))
    try:
        with pytest.raises(AdapterError, match=str(base)):
            load_bagel(folder)
    finally:
        shutil.move(str(tmp_path / "moved"), str(base))
    assert main(["generate", "--model_path", str(base), "--prompt", "x", "--adapter", str(tmp_path)]) == 2


def test_folder_and_factor(base: Path, tmp_path: Path):
    folder = made(base, tmp_path / "a:1")
    assert disk.parse_adapter(folder) == (folder, 1.0)
    assert disk.parse_adapter(f"{folder}:0.5") == (folder, 0.5)
    for odd in (f"{folder}:nan", f"{folder}:inf", f"{folder}:x", "", str(base)):
        with pytest.raises(AdapterError):
            disk.parse_adapter(odd)
