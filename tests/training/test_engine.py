"""Processes: what two of them say to each other, over gloo and for real; and the step of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kills import become_rank
from processes import run_ranks
from torch import Tensor, nn

from unigen.config import Config, ConfigError, UserError
from unigen.runs.channel import Channel
from unigen.training.engine import ENGINES, DataParallel, Engine, open_engine

# ---- which one


@pytest.mark.parametrize(
    ("asked", "world", "name"),
    [("auto", 1, "single"), ("single", 1, "single"), ("ddp", 1, "single"), ("fsdp2", 1, "fsdp2")],
)
def test_the_engine_is_the_one_asked_for(asked: str, world: int, name: str):
    with open_engine(Config(device="cpu", engine=asked)) as engine:
        assert (engine.name, engine.world, engine.main, engine.sharded) == (
            name,
            world,
            True,
            name == "fsdp2",
        )
    assert not torch.distributed.is_initialized()


def test_every_engine_of_the_options_is_in_the_table():
    from typing import get_args, get_type_hints

    assert set(get_args(get_type_hints(Config)["engine"])) - {"auto"} == set(ENGINES)


def test_single_with_several_processes_is_the_users_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"engine is single, but 2 processes were started.*--engine ddp"):
        open_engine(Config(device="cpu", engine="single"))
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_told_with_its_cure():
    with pytest.raises(ConfigError, match=r"no GPU is visible.*--device cpu"):
        Engine(Config(device="cuda"))


@pytest.mark.parametrize(
    ("option", "dtype"),
    [({}, torch.float32), ({"bf16": True}, torch.bfloat16), ({"fp16": True}, torch.float16)],
)
def test_what_a_matrix_product_is_computed_in(option: dict[str, bool], dtype: torch.dtype):
    engine = Engine(Config(device="cpu", **option))
    with engine.autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == dtype


# ---- one process


def started(engine: Engine, model: nn.Module) -> nn.Module:
    """The engine with a model of any kind, ready to train."""
    engine.model = model  # type: ignore[assignment]
    engine.start()
    return model


def regression() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    return model


def test_one_process_needs_no_group():
    with Engine(Config(device="cpu")) as engine:
        assert (engine.rank, engine.world, engine.main) == (0, 1, True)
        assert engine.sum([1, 2.5]) == [1.0, 2.5]
        assert engine.gather("零 one") == ["零 one"]
        model = nn.Linear(2, 2)
        assert engine.wrap(model) is model
        assert engine.background().gather("") == [""]
        assert not torch.distributed.is_initialized()
        with pytest.raises(ZeroDivisionError):
            engine.on_main(lambda: 1 / 0)


def test_words_of_one_process_are_numbers_of_their_own():
    """A caller may change what it was given, and integers come back as floats."""
    given = [1, 2]
    (one, _) = found = Channel(1, torch.device("cpu")).sum(given)
    assert isinstance(one, float) and found is not given


@pytest.mark.parametrize("max_norm", [0.0, 0.05, 1e6])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_is_adamw_on_the_clipped_sum_of_the_micro_batches(max_norm: float, fp16: bool):
    """Whatever the scale of the loss: the norm and the weights are those of PyTorch's own parts put together
    by hand."""
    config = Config(device="cpu", learning_rate=0.1, weight_decay=0.1, max_grad_norm=max_norm, fp16=fp16)
    engine = Engine(config)
    ours, theirs = started(engine, regression()), regression()
    weights = [p for p in theirs.parameters() if p.requires_grad]
    matrices, others = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(
        groups, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
    )
    for step in range(4):
        rows = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(step))
        for micro, x in enumerate(rows):
            with engine.accumulate(last=micro == 1):
                engine.backward(ours(x).square().sum(), last=micro == 1)
            theirs(x).square().sum().backward()
        norm, wanted = engine.grad_norm(), float(nn.utils.get_total_norm([p.grad for p in weights]))
        assert norm == pytest.approx(wanted, rel=1e-5)
        if max_norm:
            nn.utils.clip_grad_norm_(weights, max_norm)
        for group in reference.param_groups:
            group["lr"] = 0.1 / (step + 1)
        reference.step()
        reference.zero_grad()
        engine.step(0.1 / (step + 1), norm)
        assert all(p.grad is None for p in ours.parameters()), "the gradient is gone"
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_forgotten_gradient_changes_nothing_and_does_not_come_back():
    engine = Engine(Config(device="cpu"))
    model = started(engine, regression())
    before = {name: p.clone() for name, p in model.named_parameters()}
    engine.backward(model(torch.ones(1, 3)).sum(), last=True)
    assert engine.grad_norm() > 0
    engine.discard()
    assert engine.grad_norm() == 0.0
    assert (
        all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        and not engine.optimizer.state
    )


def test_shards_and_moments_are_those_of_the_parameters():
    engine = Engine(Config(device="cpu", learning_rate=0.1))
    model = started(engine, regression())
    shards = engine.shards()
    assert [s.name for s in shards] == [name for name, _ in model.named_parameters()]
    assert [s.trains for s in shards] == [True, False, True, True] and all(
        s.owned and s.whole for s in shards
    )
    assert all(engine.moments(s) is None for s in shards if s.trains)
    engine.backward(model(torch.ones(1, 3)).sum(), last=True)
    engine.step(0.1, engine.grad_norm())
    taken = {s.name: engine.moments(s) for s in shards if s.trains}
    other = Engine(Config(device="cpu", learning_rate=0.1))
    started(other, regression())
    for shard in other.shards():
        if shard.trains and (moments := taken[shard.name]):
            other.set_moments(shard, *moments)
            found = other.moments(shard)
            assert found is not None and found[0] == moments[0] == 1.0
            assert all(torch.equal(a, b) for a, b in zip(found[1:], moments[1:], strict=True))


# ---- two processes


# What each says: nothing, something short, something long, in several scripts.
TEXTS = (("", "b"), ("", ""), ("ein längerer Text 图", "x" * 10_000), ("\\ud800 \n\0", "🌲"))


def _talk(rank: int, world: int, port: int, folder: str) -> None:
    become_rank(rank, world, port)
    said: dict[str, Any] = {}
    try:
        open_engine(Config(device="cpu", engine="single"))
    except ConfigError as error:
        said["single"] = str(error)
    with open_engine(Config(device="cpu", learning_rate=0.1, weight_decay=0.0)) as engine:
        said["engine"] = engine.name
        said["sum"] = engine.sum([rank + 1, 0.1 * rank, 2.0**40 + rank])
        said["sum of bad numbers"] = engine.sum(
            [float("nan") if rank else 1.0, float("inf") if rank else -1.0]
        )
        said["gather"] = [engine.gather(texts[rank]) for texts in TEXTS]
        beside = engine.background()
        said["beside"] = (beside.gather(f"{rank}"), beside.sum([rank, 1]))
        ran: list[int] = []
        engine.on_main(lambda: ran.append(rank))
        said["ran"] = ran

        def fail() -> None:
            raise OSError("disk full")

        try:
            engine.on_main(fail)
        except (OSError, UserError) as error:
            said["error"] = f"{type(error).__name__}: {error}"
        said |= _train(engine, rank)
    said["ended"] = not torch.distributed.is_initialized()
    torch.save(said, Path(folder) / f"{rank}.pt")


def _train(engine: Engine, rank: int) -> dict[str, Any]:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, float(rank + 1))  # rank 0's weights go to everyone
    assert isinstance(engine, DataParallel)
    started(engine, model)
    said: dict[str, Any] = {"weight": model.weight.tolist(), "owned": [s.owned for s in engine.shards()]}
    for micro in range(2):
        with engine.accumulate(last=micro == 1):
            engine.backward(engine.wrapped(torch.tensor([[rank + 1.0, micro]])).sum(), last=micro == 1)
        if micro == 0:
            said["held back"] = model.weight.grad.tolist()
    said["grad"], said["norm"] = model.weight.grad.tolist(), engine.grad_norm()
    engine.step(0.1, said["norm"])
    said["after"] = model.weight.tolist()
    return said


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    run_ranks(_talk, 2, str(tmp_path))
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for said in (zero, one):
        assert "2 processes were started" in said["single"] and said["engine"] == "ddp"
        assert said["sum"] == [3.0, 0.1, 2.0**41 + 1]  # exact: sums travel in double precision
        nan, infinite = said["sum of bad numbers"]
        assert nan != nan and infinite == float("inf"), "a bad number on one process is bad everywhere"
        assert said["gather"] == [list(texts) for texts in TEXTS]
        assert said["beside"] == (["0", "1"], [1.0, 2.0])
        assert said["weight"] == [[1.0, 1.0]]
        assert said["grad"] == [[6.0, 2.0]]  # the sum over processes and rows: (1 + 1) + (2 + 2), and 1 + 1
        assert said["norm"] == pytest.approx(40**0.5)
        assert said["after"] == zero["after"] and Tensor([said["after"]]).lt(0.95).all()
        assert said["ended"]
    assert (zero["held back"], one["held back"]) == ([[2.0, 0.0]], [[4.0, 0.0]]), (
        "nothing travels before the last row; times two processes"
    )
    assert (zero["ran"], one["ran"]) == ([0], []) and (zero["owned"], one["owned"]) == ([True], [False])
    assert zero["error"] == "OSError: disk full"
    assert one["error"] == "UserError: rank 0 stopped: OSError: disk full"
