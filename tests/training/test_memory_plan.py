"""What is planned is what is taken: bytes counted on real steps, and the published numbers of the 7B."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plan as on_cpu
import pytest
import torch
from counting import Alive, share
from gpu_setup import published
from tiny import train
from torch._subclasses.fake_tensor import FakeTensorMode

from unigen.config import Config, ConfigError
from unigen.model import mot
from unigen.model.config import BagelConfig
from unigen.model.sizes import Half, Load, Widths
from unigen.sequence.types import Pack
from unigen.training.census import census
from unigen.training.memory_plan import Machine, MemoryPlan, compared, plan_memory
from unigen.training.preserve import Teacher
from unigen.training.step import Counts, forward_backward

SINGLE = Machine()
ALL = Half(frozenset(mot_name for mot_name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                               "down_proj")), norms=True, head_norms=True)  # fmt: skip


# ---- published and counted numbers of BAGEL-7B-MoT


def numbers(**options: Any) -> dict[str, int]:
    """Parameters of the 7B by part, those that train apart."""
    found: dict[str, int] = {}
    for entry in census(published(), Config(**options), torch.bfloat16):
        word = "gen" if "_moe_gen" in entry.name else entry.name.split(".")[0]
        for key in (word, "trained" if entry.trains else "frozen", "all"):
            found[key] = found.get(key, 0) + entry.numel
    return found


def test_parameters_of_the_7b_are_the_published_ones():
    found = numbers()
    assert found["all"] == 14_607_260_128
    assert found["vit_model"] == 402_552_736 and found["connector"] == 16_980_992
    assert found["time_embedder"] == 13_769_728 and found["vae2llm"] + found["llm2vae"] == 462_400
    assert found["gen"] == 6_525_628_928
    assert numbers(lora_rank=32)["trained"] == 80_740_352  # one expert, peft's shapes
    assert numbers(lora_rank=32, lora_targets=["both"])["trained"] == 2 * 80_740_352
    assert 6.53e9 < numbers(freeze_und=True, freeze_vit=True)["trained"] < 6.55e9


def held(**options: Any) -> float:
    return sum(entry.nbytes for entry in census(published(), Config(**options), torch.bfloat16))


def test_the_7b_in_bytes():
    """Counted before with the model itself: everything 58.4 GB, drawing only 43.5 GB with embeddings in
    float32, which are 1.1 GB less where they stay; a base of adapters in NF4 10.5 GB, with double quantisation
    9.9."""
    assert held() == pytest.approx(58.4e9, rel=0.01)
    assert held(freeze_und=True, freeze_vit=True) == pytest.approx(42.4e9, rel=0.01)
    lora = {"lora_rank": 32, "lora_targets": ["both"]}
    assert held(**lora) == pytest.approx(29.2e9 + 0.65e9, rel=0.01)
    assert held(**lora, quantize="nf4") == pytest.approx(10.5e9 + 0.65e9, rel=0.01)
    assert held(**lora, quantize="nf4", double_quant=True) == pytest.approx(9.9e9 + 0.65e9, rel=0.01)
    assert held(**lora, quantize="int8") == pytest.approx(13.05e9 + 3.18e9 + 0.65e9, rel=0.01)


def test_an_embedding_that_is_stored_in_float32_and_stays_as_it_is_is_held_so():
    config, bf16 = Config(freeze_und=True), torch.bfloat16
    low, high = (
        sum(entry.nbytes for entry in census(published(), config, bf16, words))
        for words in (bf16, torch.float32)
    )
    assert low == held(freeze_und=True) and high - low == 2 * 152_064 * 3584


def test_activations_of_the_7b_a_token_and_layer():
    """The figures that a count with fake tensors of full size gave: 280.2, 81 and 14 KiB."""
    w = Widths.of(published().llm, 2)
    for policy, kib in {"none": 280.2, "selective": 81, "full": 14}.items():
        assert w.kept(ALL, policy) / 1024 == pytest.approx(kib, rel=0.04), policy


class _Attended(torch.autograd.Function):
    """Keeps what a fused attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_of_full_width_keeps_what_the_formula_says(dtype: torch.dtype):
    """The project's own layer, on tensors that lie nowhere."""
    llm, tokens = published(1).llm, 2048
    kept: dict[int, int] = {}

    def attention(q: Any, k: Any, v: Any, layer: int) -> Any:
        return _Attended.apply(*(torch.cat(x) for x in (q, k, v))).split([len(half) for half in q])

    with FakeTensorMode():
        layer = mot.Layer(llm, True)
        own = {p.untyped_storage()._cdata for p in layer.parameters()}
        sides = {tuple(p.shape) for p in layer.parameters()} | {
            tuple(p.shape[::-1]) for p in layer.parameters()
        }

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in own and tuple(tensor.shape) not in sides:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        angles = [(torch.empty(tokens, 1, 128), torch.empty(tokens, 1, 128))] * 2
        x = [torch.empty(tokens, llm.hidden_size, requires_grad=True) * 1.0 for _ in range(2)]
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            out = layer(tuple(x), angles, attention, 0)
        assert len(out) == 2
    planned = 2 * tokens * Widths.of(llm, dtype.itemsize).kept(ALL)
    assert share(planned, sum(kept.values())) < 0.02


# ---- steps on this CPU, counted


def small(**parts: bool) -> BagelConfig:
    return on_cpu.model_config(on_cpu.TINY, **parts)


def packed(config: BagelConfig, **size: int) -> Pack:
    return on_cpu.packed(config, replace(on_cpu.TINY, **size))


def above(plan: MemoryPlan, *points: str) -> float:
    """Most bytes at these points of a step, but for weights and program."""
    names = ("moments", "gradients", "activations", "work")
    return max(sum(plan.moments[point][name] for name in names) for point in points)


AGAIN = {"gradient_checkpointing": True}
SELECTIVE = {**AGAIN, "checkpointing_policy": "selective"}
DRAWS = {"freeze_und": True, "freeze_vit": True}
CASES: dict[str, dict[str, Any]] = {
    "everything": {},
    "everything, recomputed": AGAIN,
    "everything, selective": SELECTIVE,
    "two micro-batches": {"gradient_accumulation_steps": 2},
    "two micro-batches, recomputed": {"gradient_accumulation_steps": 2, **AGAIN},
    "drawing": DRAWS,
    "drawing, recomputed": {**DRAWS, **AGAIN},
    "drawing, selective": {**DRAWS, **SELECTIVE},
    "reading": {"visual_gen": False},
    "seeing": {"freeze_llm": True},
    "adapters": {"lora_rank": 16},
    "adapters of both, recomputed": {"lora_rank": 16, "lora_targets": ["both"], **AGAIN},
    "adapters over nf4": {"lora_rank": 16, "quantize": "nf4"},
    "adapters over int8": {"lora_rank": 16, "quantize": "int8"},
    "weights in bfloat16": {"weights": "bf16"},
    "dora": {"lora_rank": 16, "lora_variant": "dora"},
}


LONGER: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "drawing, longer": (DRAWS, {"side": 32}),
    "reading, longer": ({"visual_gen": False}, {"text": 600}),
    "adapters over nf4, longer": ({"lora_rank": 16, "quantize": "nf4"}, {"side": 32}),
    "adapters of both over nf4, recomputed": (
        {"lora_rank": 16, "quantize": "nf4", "double_quant": True, "lora_targets": ["both"], **AGAIN},
        {"side": 24},
    ),
    "adapters of both over int8, recomputed": (
        {"lora_rank": 16, "quantize": "int8", "lora_targets": ["both"], **AGAIN},
        {"side": 24},
    ),
}
QUICK = ("everything", "drawing, recomputed", "adapters")


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        pytest.param(name, precision, marks=[] if name in QUICK and precision == "fp32" else pytest.mark.slow)
        for name in (*CASES, *LONGER)
        for precision in (("fp32", "bf16") if name in CASES else ("bf16",))
    ],
)
def test_a_step_takes_the_bytes_that_were_planned(case: str, precision: str):
    given, size = LONGER.get(case, (CASES.get(case, {}), {}))
    config = Config(device="cpu", precision=precision, **given)
    if config.quantize:
        pytest.importorskip("bitsandbytes")
    if config.lora_rank:
        pytest.importorskip("peft")
    model = small(visual_gen=config.visual_gen)
    plan_of, step = counted(config, model, packed(model, **size))
    assert share(above(plan_of, "forward", "logits", "backward", "first layer", "embeddings"), step[0]) < 0.1
    assert share(above(plan_of, "update"), step[1]) < 0.1


def counted(config: Config, model: BagelConfig, pack: Pack) -> tuple[MemoryPlan, tuple[int, int]]:
    """A plan, and the bytes that a second step took: until its backward pass ended, and in its update."""
    engine = on_cpu.engine_of(config, model)
    if config.preserve_weight is not None:  # beside adapters it reads nothing of the weights of before
        folder: Any = SimpleNamespace(folder=Path(config.model_path or ""), stored={})
        engine.teacher = Teacher(engine, folder, None)
    packs = [pack] * config.gradient_accumulation_steps
    with Alive(engine.model.parameters()) as alive:
        for _ in range(2):
            alive.peak = alive.now
            for _ in forward_backward(engine, packs, Counts.of(packs), config):
                pass
            first, alive.peak = alive.peak, alive.now
            engine.step(1e-4, 1.0)
    return plan_memory(model, config, Load.of(pack), Machine.of(config, "cpu", 1, engine.dtype)), (
        first, alive.peak,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("learnt", [True, False])
def test_targets_that_are_kept_are_counted_beside_those_that_are_learnt(learnt: bool):
    pytest.importorskip("peft")
    config = Config(model_path="m", device="cpu", lora_rank=16, preserve_weight=1.0, precision="fp32")
    model = small()
    pack = packed(model, side=32, text=400)
    kept = replace(pack, kept_label_rows=pack.label_rows, kept_noised_rows=pack.noised_rows)
    if not learnt:
        kept = replace(kept, label_rows=pack.label_rows[:0], noised_rows=pack.noised_rows[:0])
    load = Load.of(kept)
    assert load == Load.of(pack).keeping(learnt) and load.kept == (load.labels // (1 + learnt), 1024)
    plan_of, step = counted(config, model, kept)
    assert share(above(plan_of, "forward", "logits", "backward", "first layer", "embeddings"), step[0]) < 0.1
    alone = plan_memory(model, Config(model_path="m", device="cpu", lora_rank=16), Load.of(pack), SINGLE)
    assert plan_of.flop > 1.2 * alone.flop


@pytest.mark.slow
def test_several_samples_in_a_sequence_and_their_mask():
    model, config = small(), Config(device="cpu")
    plan_of, step = counted(config, model, packed(model, samples=3))
    assert share(above(plan_of, "forward", "backward"), step[0]) < 0.1


# ---- other machines


def peak(world: int = 1, **options: Any) -> float:
    config = Config(gradient_checkpointing=True, **options)
    machine = Machine.of(config, "cuda", world, torch.bfloat16)
    return plan_memory(published(), config, Load.filled(16_384, published(), 4096), machine).peak


def test_engines_over_several_gpus():
    draw: dict[str, Any] = {"freeze_und": True, "freeze_vit": True}
    one = peak(**draw)
    assert peak(world=8, engine="ddp", **draw) >= one
    eighth, quarter = (
        peak(world=8, engine="fsdp2", **draw),
        peak(world=8, engine="fsdp2", shard_size=4, **draw),
    )
    assert eighth < quarter < one
    assert peak(world=8, engine="fsdp2", cpu_offload=True, **draw) < eighth
    # counted by hand: 29 of shards, 2 x 4.4 of the root, 1.9 of layers, 13 of activations
    assert peak(world=8, engine="fsdp2") == pytest.approx(53e9, rel=0.15)


def test_what_does_not_go_together_is_told():
    with pytest.raises(ConfigError, match="deepspeed is not planned"):
        peak(world=2, engine="deepspeed")
    with pytest.raises(ConfigError, match=r"engine is single.*Fix: "):
        peak(world=2, engine="single")
    with pytest.raises(ConfigError, match="shard_size is 3"):
        peak(world=8, engine="fsdp2", shard_size=3)


def test_offloading_takes_pinned_memory_of_the_host_and_a_save_takes_a_copy():
    config = Config(engine="fsdp2", cpu_offload=True, gradient_checkpointing=True)
    load = Load.filled(4096, published(), 4096)
    offloaded = plan_memory(published(), config, load, Machine.of(config, "cuda", 2, torch.bfloat16))
    there = plan_memory(published(), Config(), load, SINGLE)
    trained = 14_607_260_128 - 32_241_664
    assert offloaded.host["train"][0] > 16 * trained / 2 > there.host["train"][0] * 1000
    assert there.host["save"][1] - there.host["train"][1] == pytest.approx(12 * trained, rel=0.01)
    silent = plan_memory(published(), Config(async_save=False), load, SINGLE)
    assert silent.host["save"][1] == silent.host["train"][1]
    assert there.host["load"][1] < 8e9, "the 7B is loaded within 8 GB of the host's memory"


def test_inputs_of_layers_that_wait_in_host_memory_are_not_the_gpu_s():
    load, found = Load.filled(16_384, published(), 4096), {}
    for policy in ("full", "offload"):
        config = Config(gradient_checkpointing=True, checkpointing_policy=policy, lora_rank=64)
        found[policy] = plan_memory(published(), config, load, SINGLE)
    layer = 4 * 3584 * 16_384
    saved = [p.moments["forward"]["activations"] for p in found.values()]
    assert saved[0] == 28 * layer and saved[1] == layer
    pinned = found["offload"].host["train"][0] - found["full"].host["train"][0]
    assert 28 * layer < pinned < 2 * 28 * layer, "powers of two"


@pytest.mark.slow
def test_the_memory_of_a_process_is_what_was_planned():
    """One of the configurations of benchmarks/plan.py, in a process of its own."""
    plan_of, _, most = on_cpu.row("everything")
    assert share(sum(plan_of.values()), most) < 0.1


def test_moments_of_an_earlier_run_count_once_in_what_a_resumed_one_says():
    config, load = Config(lora_rank=64), Load.filled(4096, published(), 4096)
    entries = census(published(), config, torch.bfloat16)
    moments = int(sum(entry.moments("adamw") for entry in entries))
    base, found = 40 * 10**9, []
    for there, resumed in ((0, False), (moments, True)):
        told = compared(published(), config, ("cpu", 1, torch.bfloat16), load, 0, base + there, None, resumed)
        found.append(float(re.findall(r"planned ([\d.]+) GB", told)[0]))
    assert moments > 1e9 and found[0] == found[1]


@pytest.mark.slow
def test_a_run_says_what_it_took_and_what_was_planned(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO"):
        train(options)
    (told,) = [line for line in caplog.messages if line.startswith("Memory of the process")]
    taken, planned = map(float, re.findall(r"([\d.]+) GB", told))
    assert 0.3 < planned < taken + 0.1 and taken > 0.3  # a process of many tests has had larger ones
