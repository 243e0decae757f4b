"""A run's tensors, out to a checkpoint and back, on one process and on several that are threads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saves import ALONE, contents, names, together
from torch import Tensor, nn

from unigen.config import Config
from unigen.model.source import Source
from unigen.model.storage import Stored, scan_safetensors
from unigen.runs.channel import Channel
from unigen.runs.checkpoint import CheckpointError, scan_group, scan_weights, verify_checkpoint
from unigen.runs.saver import Contents, Saver
from unigen.training import state
from unigen.training.ema import EMA
from unigen.training.engine import Engine
from unigen.training.shards import Shard
from unigen.training.state import RunState

CONFIG = Config(device="cpu", learning_rate=0.1, weight_decay=0.1)
TRAINED = ["first.weight", "first.bias", "last.weight", "rare"]


class Net(nn.Module):
    """Two layers that train, one that does not, and a weight that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.frozen, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2, bias=False)
        self.rare = nn.Parameter(torch.ones(2, 3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(self.first(x)))).square().mean()


def as_published(value: Tensor) -> Tensor:
    """Frozen weights lie in bfloat16 in the source; here they are numbers that bfloat16 has."""
    return value.detach().bfloat16()


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Stored]:
    """The checkpoint a run begins with: frozen parts in bfloat16, and tensors of a part that is left out."""
    net = Net()
    tensors = {
        name: as_published(p) if name.startswith("frozen") else p.detach().clone()
        for name, p in net.named_parameters()
    }
    tensors |= {"vit.left_out": torch.randn(5).half(), "vit.ids": torch.arange(3)}
    save_file(tensors, tmp_path / "source.safetensors")
    return scan_safetensors(tmp_path / "source.safetensors")


def opened(stored: dict[str, Stored]) -> Source:
    """The files in which these tensors lie, as a run holds them."""
    return Source(Path(), stored)


class Run:
    """A run of one process, or one of several."""

    def __init__(
        self,
        source: dict[str, Stored],
        decay: float | None = 0.9,
        resumed: Path | None = None,
        engine: Engine | None = None,
    ):
        self.engine = engine or Engine(CONFIG)
        net = Net()
        weights = scan_weights(resumed, raw=True) if resumed else source
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(weights[name].read())
        self.net = self.engine.model = net  # type: ignore[assignment]
        self.engine.start()
        self.ema = EMA(self.engine.shards(), decay) if decay else None
        self.state = RunState(self.engine, self.ema, opened(source), resumed=resumed is not None)
        if resumed:
            self.state.restore(resumed)

    def train(self, steps: range) -> Run:
        for step in steps:
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
            self.engine.backward(self.net(x), last=True)
            self.engine.step(0.1, self.engine.grad_norm())
            if self.ema is not None:
                self.ema.update()
        return self

    def contents(self, step: int, weights_only: bool = False) -> Contents:
        return Contents(step, self.state.entries(weights_only), {"trainer": {}}, lambda _: None, {})

    def save(self, output_dir: Path, step: int, weights_only: bool = False) -> Path:
        Saver(output_dir, self.engine.rank, self.engine.channel).save(self.contents(step, weights_only))
        return output_dir / f"step_{step}"

    def held(self) -> dict[str, Tensor]:
        """Weights, average and moments, by name, in memory of their own."""
        found = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        for shard in self.engine.shards():
            if shard.trains and self.ema is not None:
                found[f"average.{shard.name}"] = self.ema.average(shard.name).clone()
            if shard.trains and (moments := self.engine.moments(shard)):
                found |= {f"step.{shard.name}": torch.tensor(moments[0])}
                found |= {
                    f"exp_avg.{shard.name}": moments[1].clone(),
                    f"exp_avg_sq.{shard.name}": moments[2].clone(),
                }
        return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def written(run: Run, weights_only: bool = False) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for entry in run.state.entries(weights_only):
        groups.setdefault(entry.group, []).append(entry.name)
    return groups


# ---- out


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("weights_only", [False, True])
def test_every_tensor_is_written_once_and_the_model_is_whole(
    source: dict[str, Stored], decay: float | None, weights_only: bool
):
    """``ema`` holds all the source does; ``model`` what trains where there is an average; ``optimizer`` two
    moments and a step count."""
    groups = written(Run(source, decay).train(range(2)), weights_only)
    assert groups.keys() == {"ema"} | ({"model"} if decay and not weights_only else set()) | (
        set() if weights_only else {"optimizer"}
    )
    assert sorted(groups["ema"]) == sorted(source)
    if decay and not weights_only:
        assert sorted(groups["model"]) == sorted(TRAINED)
    if not weights_only:
        used = [name for name in TRAINED if name != "rare"]
        wanted = [f"step.{name}" for name in TRAINED] + [
            f"{m}.{name}" for m in ("exp_avg", "exp_avg_sq") for name in used
        ]
        assert sorted(groups["optimizer"]) == sorted(wanted)


def test_copies_keep_the_bytes_of_the_source(source: dict[str, Stored], tmp_path: Path):
    """What does not train, and what was left out of the model: in the source's dtype, though the model holds
    float32."""
    run = Run(source).train(range(2))
    folder = run.save(tmp_path, 2)
    verify_checkpoint(folder)
    saved, before = load_file(folder / "ema.safetensors"), load_file(tmp_path / "source.safetensors")
    for name, value in before.items():
        if name in TRAINED:
            assert saved[name].dtype == torch.float32 and (
                name == "rare" or not torch.equal(saved[name], value)
            )
        else:
            assert saved[name].dtype == value.dtype and torch.equal(saved[name], value), name
    assert torch.equal(saved["first.weight"].view(-1), run.held()["average.first.weight"])
    assert torch.equal(load_file(folder / "model.safetensors")["first.weight"], run.net.first.weight)
    assert load_file(folder / "optimizer.safetensors")["step.first.weight"].tolist() == 2.0
    assert load_file(folder / "optimizer.safetensors")["step.rare"].tolist() == 0.0


def test_a_frozen_table_of_another_size_or_that_the_source_lacks_is_written_from_the_model(
    source: dict[str, Stored], tmp_path: Path
):
    rest = {name: stored for name, stored in source.items() if name != "frozen.bias"}
    save_file({"frozen.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    run = Run(source)
    other = opened(rest | scan_safetensors(tmp_path / "other.safetensors"))
    run.state = RunState(run.engine, run.ema, other, resumed=False)
    saved = load_file(run.save(tmp_path, 1) / "ema.safetensors")
    for name in ("weight", "bias"):
        assert torch.equal(saved[f"frozen.{name}"], getattr(run.net.frozen, name))


def test_a_new_run_does_not_read_the_frozen_weights_again(
    source: dict[str, Stored], monkeypatch: pytest.MonkeyPatch
):
    """They came from the source; comparing would read the whole checkpoint a second time."""
    monkeypatch.setattr(state, "_equal", lambda *_: pytest.fail("compared"))
    assert len(written(Run(source))["ema"]) == len(source)


def test_a_changed_frozen_weight_of_a_resumed_run_is_written_from_the_model(
    source: dict[str, Stored], tmp_path: Path
):
    """As trained by an earlier leg of the run; the others keep the source's bytes."""
    folder = Run(source).train(range(1)).save(tmp_path, 1)
    tensors = load_file(folder / "ema.safetensors")
    tensors["frozen.bias"] = tensors["frozen.bias"].float() + 0.001  # which bfloat16 does not have
    save_file(tensors, folder / "ema.safetensors")
    resumed = Run(source, resumed=folder)
    saved = load_file(resumed.save(tmp_path, 2) / "ema.safetensors")
    assert saved["frozen.bias"].dtype == torch.float32 and torch.equal(
        saved["frozen.bias"], tensors["frozen.bias"]
    )
    assert saved["frozen.weight"].dtype == torch.bfloat16 and saved["vit.left_out"].dtype == torch.float16


def test_frozen_weights_held_in_half_precision_are_compared_in_it(source: dict[str, Stored], tmp_path: Path):
    """The source in float32, the model in bfloat16: equal after rounding is equal, and the source's bytes
    stay."""
    save_file(
        {name: torch.randn(4, 4) if name == "frozen.weight" else s.read() for name, s in source.items()},
        tmp_path / "b.safetensors",
    )
    wide = scan_safetensors(tmp_path / "b.safetensors")
    run = Run(wide)
    run.net.frozen.bfloat16()
    run.state = RunState(run.engine, run.ema, opened(wide), resumed=True)
    saved = load_file(run.save(tmp_path, 1) / "ema.safetensors")
    assert saved["frozen.weight"].dtype == torch.float32 and torch.equal(
        saved["frozen.weight"], wide["frozen.weight"].read()
    )


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("weights_only", [False, True])
def test_the_bytes_foretold_are_those_written_but_for_headers(
    source: dict[str, Stored], tmp_path: Path, decay: float | None, weights_only: bool
):
    """Before the first step, when there are no moments yet; all of them are there in the end, and step counts
    are 4 bytes each."""
    run = Run(source, decay)
    foretold = run.state.nbytes(weights_only)
    run.net.forward = lambda x: Net.forward(run.net, x) + 0 * run.net.rare.sum()  # type: ignore[method-assign]
    folder = run.train(range(2)).save(tmp_path, 2, weights_only)
    stored = [s for group in ("ema", "model", "optimizer") for s in scan_group(folder, group).values()]
    steps = 0 if weights_only else 4 * len(TRAINED)
    assert run.state.nbytes(weights_only) == foretold == sum(s.nbytes for s in stored) - steps
    on_disk = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert foretold <= on_disk <= foretold + 5000


# ---- back


@pytest.mark.parametrize("decay", [None, 0.9])
def test_five_steps_saved_restored_and_five_more_equal_ten_bit_for_bit(
    source: dict[str, Stored], tmp_path: Path, decay: float | None
):
    straight = Run(source, decay).train(range(10))
    first = Run(source, decay).train(range(5))
    folder = first.save(tmp_path, 5)
    second = Run(source, decay, resumed=folder)
    assert_same(second.held(), first.held())
    assert_same(second.train(range(5, 10)).held(), straight.held())
    second.save(tmp_path / "other", 10)
    straight.save(tmp_path, 10)
    for name in names(tmp_path / "step_10"):
        if name != "manifest.json":
            assert (tmp_path / "step_10" / name).read_bytes() == (
                tmp_path / "other" / "step_10" / name
            ).read_bytes(), name


def test_a_run_that_was_saved_before_its_first_step_goes_on(source: dict[str, Stored], tmp_path: Path):
    folder = Run(source).save(tmp_path, 0)
    assert set(scan_group(folder, "optimizer")) == {f"step.{name}" for name in TRAINED}
    assert_same(Run(source, resumed=folder).train(range(3)).held(), Run(source).train(range(3)).held())


def test_an_average_that_begins_or_ends_with_the_resumed_leg(
    source: dict[str, Stored], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Without one in the checkpoint it starts from the weights, with a warning; and a run without goes on
    from the raw weights."""
    plain = Run(source, None).train(range(3))
    with caplog.at_level(logging.WARNING):
        averaged = Run(source, 0.9, resumed=plain.save(tmp_path / "plain", 3))
    assert "has no average; it starts anew" in caplog.text
    assert torch.equal(averaged.held()["average.last.weight"], plain.net.last.weight.view(-1))
    caplog.clear()
    both = Run(source, 0.9).train(range(3))
    without = Run(source, None, resumed=both.save(tmp_path / "both", 3))
    assert torch.equal(without.net.last.weight, both.net.last.weight) and not caplog.text
    saved = load_file(without.save(tmp_path / "without", 3) / "ema.safetensors")
    assert torch.equal(saved["last.weight"], both.net.last.weight)


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no step": (lambda t: t.pop("step.first.weight"), "step.first.weight is missing"),
    "no moment": (lambda t: t.pop("exp_avg.first.weight"), "exp_avg.first.weight is missing"),
    "a stranger": (lambda t: t.update({"exp_avg.other": torch.zeros(1)}), "exp_avg.other is unexpected"),
    "a moment without steps": (
        lambda t: t.update({"exp_avg.rare": torch.zeros(2, 3)}),
        "exp_avg.rare is unexpected",
    ),
    "another shape": (
        lambda t: t.update({"exp_avg.first.weight": torch.zeros(3, 4)}),
        "exp_avg.first.weight is torch.float32 [3, 4] instead",
    ),
    "another dtype": (
        lambda t: t.update({"exp_avg_sq.first.bias": torch.zeros(4).half()}),
        "exp_avg_sq.first.bias is torch.float16 [4]",
    ),
    "two steps": (
        lambda t: t.update({"step.first.bias": torch.zeros(2)}),
        "step.first.bias is torch.float32 [2] instead of torch.float32 []",
    ),
    "nothing at all": (
        lambda t: t.clear(),
        "exp_avg.first.bias is missing; exp_avg.first.weight is missing; exp_avg.last.weight is missing",
    ),
    "very many": (lambda t: t.update({f"x{n}": torch.zeros(1) for n in range(20)}), "; and 12 more"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_state_that_does_not_fit_is_refused_with_a_list_and_changes_nothing(
    source: dict[str, Stored], tmp_path: Path, misfit: str
):
    folder = Run(source).train(range(2)).save(tmp_path, 2)
    tensors = load_file(folder / "optimizer.safetensors")
    damage, says = MISFITS[misfit]
    damage(tensors)
    save_file(tensors, folder / "optimizer.safetensors")
    run = Run(source).train(range(3))
    before = run.held()
    with pytest.raises(CheckpointError) as caught:
        run.state.restore(folder)
    assert (
        says in str(caught.value)
        and str(folder) in str(caught.value)
        and "Fix: resume with the options" in str(caught.value)
    )
    assert_same(run.held(), before)


def test_what_is_frozen_now_and_trained_before_is_named(source: dict[str, Stored], tmp_path: Path):
    folder = Run(source).train(range(1)).save(tmp_path, 1)
    run = Run(source)
    run.net.last.requires_grad_(False)
    run.engine.start()
    with pytest.raises(
        CheckpointError, match=r"exp_avg\.last\.weight is unexpected; .*step\.last\.weight is unexpected"
    ):
        RunState(run.engine, None, opened(source), resumed=True).restore(folder)


# ---- several processes


class Pieces(Engine):
    """A process that holds every third element or so: as sharding engines do, from a whole model."""

    def shards(self) -> list[Shard]:
        found = []
        for s in super().shards():
            a, b = (len(s.value) * r // self.world for r in (self.rank, self.rank + 1))
            found.append(Shard(s.name, s.shape, a if b > a else 0, s.value[a:b], s.trains, owned=b > a))
        return found

    def moments(self, shard: Shard) -> tuple[float, Tensor, Tensor] | None:
        step, *whole = super().moments(shard) or (None,)
        return (
            None
            if step is None
            else (step, *(m[shard.start : shard.start + len(shard.value)] for m in whole))
        )


def seat(kind: type[Engine], rank: int, channel: Channel) -> Engine:
    engine = kind(CONFIG)
    engine.rank, engine.world, engine.main = rank, channel.world, rank == 0
    engine.channel, engine.sum, engine.gather = channel, channel.sum, channel.gather
    return engine


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", [Engine, Pieces])
def test_processes_write_each_element_once_and_one_goes_on_from_it(
    source: dict[str, Stored], tmp_path: Path, kind: type[Engine], world: int
):
    """Whole tensors dealt out, or pieces of each: put together they are what one process would have
    written."""

    def work(rank: int, channel: Channel) -> Any:
        run = Run(source, engine=seat(kind, rank, channel)).train(range(3))
        entries = [(e.group, e.name, e.start, e.value.numel()) for e in run.state.entries()]
        return run.save(tmp_path / "many", 3), entries, run.state.nbytes()

    results = together(world, work)
    for found in results:
        assert not isinstance(found, Exception), found
    one = Run(source).train(range(3))
    alone, folder = one.save(tmp_path / "one", 3), results[0][0]
    verify_checkpoint(folder)
    assert json.loads((folder / "manifest.json").read_text())["world"] == world
    for group in ("ema", "model", "optimizer"):
        found, wanted = scan_group(folder, group), scan_group(alone, group)
        assert found.keys() == wanted.keys()
        for name, stored in wanted.items():
            assert (found[name].dtype, found[name].shape) == (stored.dtype, stored.shape), name
            assert torch.equal(found[name].read(), stored.read()), name
    written = [(entry[:3], entry[3]) for _, entries, _ in results for entry in entries]
    assert len(dict(written)) == len(written), "no element twice"
    assert {nbytes for *_, nbytes in results} == {one.state.nbytes()}
    loads = [sum(count for *_, count in entries) for _, entries, _ in results]
    assert min(loads) > 0, "all of them write"
    assert_same(Run(source, resumed=folder).held(), one.held())


def test_a_frozen_weight_that_changed_on_one_process_is_written_by_all(
    source: dict[str, Stored], tmp_path: Path
):
    """Only the holder of the changed element sees it; every process must write its piece then, and no one a
    copy."""

    def work(rank: int, channel: Channel) -> Any:
        run = Run(source, engine=seat(Pieces, rank, channel))
        if rank == 1:
            with torch.no_grad():
                run.net.frozen.weight.view(-1)[-1] += 1
        run.state = RunState(run.engine, run.ema, opened(source), resumed=True)
        return run.save(tmp_path, 1)

    folder = together(2, work)[0]
    assert not isinstance(folder, Exception), folder
    found, expected = scan_group(folder, "ema")["frozen.weight"], source["frozen.weight"].read().float()
    expected.view(-1)[-1] += 1
    assert found.dtype == torch.float32 and len(found.parts) == 2 and torch.equal(found.read(), expected)
    assert scan_group(folder, "ema")["frozen.bias"].dtype == torch.bfloat16


def test_what_a_checkpoint_of_another_kind_lacks_is_no_state(tmp_path: Path, source: dict[str, Stored]):
    Saver(tmp_path, 0, ALONE).save(contents(1, states={}))
    with pytest.raises(CheckpointError, match=r"exp_avg\.w is unexpected"):
        Run(source).state.restore(tmp_path / "step_1")
