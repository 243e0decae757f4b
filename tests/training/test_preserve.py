"""Keeping what a model could: the distance to it, its gradient, what is counted, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    assert_close,
    batch_of,
    built,
    gradients,
    metrics,
    resumed_to_the_bit,
    step_of,
    take_warm_up,
    text,
    train_on,
    write_jsonl,
)

from unigen.config import Config, ConfigError, UserError
from unigen.model import flow
from unigen.model.weights import load_bagel
from unigen.sequence.types import Aim, Pack
from unigen.training import preserve
from unigen.training.run import Run

KEPT = {"preserve_weight": 2.0, "preserve_share": 1.0, "max_grad_norm": 0.0}
DORA = {
    "lora_rank": 3, "lora_variant": "dora", "lora_targets": ["both", "connector"],
    "train_also": ["llm2vae", "norms", "language_model.lm_head.weight"],
}  # fmt: skip
WAYS = {
    "whole": {}, "held": {"freeze_und": True}, "dora": DORA, "recomputed": {"gradient_checkpointing": True},
    "lora over nf4": {"lora_rank": 4, "quantize": "nf4", "lora_targets": ["both"]}, "reads only": {"visual_gen": False},
}  # fmt: skip


def shake(run: Run, size: float = 0.02) -> None:
    """Moves everything that trains."""
    draw = torch.Generator().manual_seed(1)
    for shard in run.engine.shards():
        if shard.trains:
            with torch.no_grad():
                shard.value.add_(size * torch.randn(shard.value.shape, generator=draw))


def predicted(model: Any, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every label and velocities of every noised token, by the parts of the model."""
    x0 = model.clean_tokens(pack, model.latents_of(pack))
    t = flow.training_time(pack.u, model.config.timestep_shift)
    und, *gen = model.hidden_states(pack, flow.mix(x0, pack.noise, t), t)
    logits = model.logits(und[pack.label >= 0 if len(und) == len(pack) else (pack.label >= 0)[: len(und)]])
    drawn = pack.noised[pack.n_und :]
    return logits, model.velocities(gen[0][drawn]) if gen else torch.zeros(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_both_distances(way: str, options: dict[str, Any], records: Path):
    """Against definitions, without the labels' own losses: sum p (log p - log q) / labels, and the squared
    error."""
    given = options | KEPT | WAYS[way] | {"text_loss_weight": 0.0, "image_loss_weight": 0.0}
    numbers = list(range(7))
    if way == "reads only":
        lines = [text("What is two and two?", "Four."), text("Say it twice.", "It. It.")]
        given |= {"train_data_path": str(write_jsonl(Path(options["output_dir"]).parent / "t.jsonl", lines))}
        numbers = [0, 1]
    # no loss of its own would be refused as nothing to learn
    loop = built(given, text_loss_weight=1e-30)
    run = loop.run
    pack = batch_of(loop, numbers).pack
    parts = {
        "visual_gen": loop.config.visual_gen, "quantize": loop.config.quantize,
    }  # fmt: skip
    with torch.no_grad():
        before, wanted = predicted(load_bagel(options["model_path"], dtype=torch.float32, **parts), pack)
    shake(run)
    now, moved = predicted(run.model, pack)
    p, log_q = before.softmax(-1), now.log_softmax(-1)
    texts = (p * (p.log() - log_q)).sum() / len(now)
    images = ((moved - wanted) ** 2).mean()
    images = images if len(moved) else torch.zeros(())
    trained = {name: q for name, q in run.model.named_parameters() if q.requires_grad}
    found = torch.autograd.grad(2.0 * (texts + images), list(trained.values()), allow_unused=True)
    held = {name: q.detach().clone() for name, q in run.model.named_parameters()}
    result = step_of(loop, [batch_of(loop, numbers)], 0.0)
    assert all(torch.equal(q, held[name]) for name, q in run.model.named_parameters())
    assert result.kept == pytest.approx((texts.item(), images.item()), rel=2e-4)
    assert float(texts) > 1e-3 and (float(images) > 1e-3 or way == "reads only")
    assert (result.counts.kept_text, result.counts.kept_image) == (len(now), len(moved))
    expected = {n: torch.zeros_like(q) if g is None else g for (n, q), g in zip(trained.items(), found)}
    assert_close(
        {n: gradients(loop)[n] for n in expected}, expected, 2e-3 if way == "lora over nf4" else 2e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "dora"])
def test_the_model_itself_is_at_no_distance(way: str, options: dict[str, Any]):
    steps = {}
    for weight in (None, 3.0):
        kept = {} if weight is None else {"preserve_weight": weight, "preserve_share": 1.0}
        loop = built(options, WAYS[way], kept, output_dir=f"{options['output_dir']}{weight}")
        steps[weight] = (
            step_of(loop, [batch_of(loop, [0, 2]), batch_of(loop, [1, 3, 4])], 0.0),
            gradients(loop),
        )
    result, found = steps[3.0]
    assert result.kept == (0.0, 0.0) and result.counts.kept_text > 20 and result.counts.kept_image > 20
    assert result.text_loss == steps[None][0].text_loss
    assert_close(found, steps[None][1], 1e-6)


def test_pieces_of_the_labels_are_all_of_them(monkeypatch: pytest.MonkeyPatch):
    head = torch.nn.Linear(6, 50)
    hidden = torch.randn(21, 6, requires_grad=True)
    before = torch.randn(21, 50)
    found = []
    for size in (1024, 4):
        monkeypatch.setattr(preserve, "CHUNK", size)
        total = preserve.divergence(head, hidden, before)
        found.append((total.detach(), *torch.autograd.grad(total, [hidden, head.weight])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_share_of_the_samples_is_kept_and_those_of_other_data_alone(
    options: dict[str, Any], tmp_path: Path
):
    stream = built(options, preserve_weight=1.0).run.stream
    aims = [stream.aim(stream.mixture.key(record, number)) for record in range(7) for number in range(300)]
    assert 0.2 < aims.count(Aim.LEARN | Aim.KEEP) / len(aims) < 0.3 and Aim.KEEP not in aims
    assert aims == [
        stream.aim(stream.mixture.key(record, number)) for record in range(7) for number in range(300)
    ]
    other = write_jsonl(tmp_path / "other.jsonl", [text("Say it.", "It."), text("And twice?", "It. It.")])
    loop = built(options, output_dir=str(tmp_path / "b"), preserve_weight=1.0, preserve_data_path=str(other), preserve_share=0.5)  # fmt: skip
    stream = loop.run.stream
    order = stream.mixture.order(0)
    kept = [stream.aim(stream.mixture.key(r, n)) == Aim.KEEP for r, n in zip(order.records, order.passes)]
    assert kept == [record >= 7 for record in order.records] and sum(kept) == 7 and len(kept) == 14
    own, both = batch_of(loop, [0]).pack, batch_of(loop, [0, 7]).pack
    assert (both.n_text_labels, both.n_kept_labels) == (
        own.n_text_labels,
        batch_of(loop, [7]).pack.n_kept_labels,
    )
    assert own.n_kept_labels == 0 and both.n_kept_labels > 0
    assert loop.run.val_stream is None


@pytest.mark.slow
def test_the_log_holds_the_distances_apart(options: dict[str, Any], tmp_path: Path):
    loop = built(options, KEPT, max_steps=3, learning_rate=3e-3, batch_size=7)
    take_warm_up(loop)
    train_on(loop)
    rows = metrics(options["output_dir"])
    assert rows[0]["preserve_loss"] == 0 < rows[2]["preserve_loss"]
    for row in rows:
        found = row["preserve_text_loss"] + row["preserve_image_loss"]
        assert row["preserve_loss"] == pytest.approx(found)
        assert row["preserve_text_tokens"] == row["text_tokens"] > 0
        assert row["preserve_image_tokens"] == row["image_tokens"] > 0
        assert row["loss"] == pytest.approx(row["text_loss"] + row["image_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "dora"])
def test_a_resume_goes_on_to_the_bit(way: str, options: dict[str, Any], tmp_path: Path):
    other = write_jsonl(tmp_path / "other.jsonl", [text("Say it.", "It."), text("And twice?", "It. It.")])
    options |= WAYS[way] | {
        "preserve_weight": 2.0, "preserve_data_path": str(other), "ema": 0.5, "batch_size": 3,
    }  # fmt: skip
    last = resumed_to_the_bit(options, tmp_path)
    assert (last / "model.safetensors").exists()
    gone = options | {"max_steps": 4, "output_dir": str(last.parent), "resume_from_checkpoint": "auto"}
    gone |= {"model_path": str(tmp_path / "whole" / "step_2")}
    if way == "whole":  # adapters tell of another base by themselves
        with pytest.raises(
            UserError, match=r"not what this run began with and stays near.*Fix: --model_path"
        ):
            built(gone)


BAD = {
    "engine": ({"engine": "deepspeed", "preserve_weight": 1.0}, "preserve_weight", "fsdp2"),
    "data alone": ({"preserve_data_path": "x.jsonl"}, "preserve_data_path", "--preserve_weight 1"),
    "share alone": ({"preserve_share": 0.5}, "preserve_share", "--preserve_weight 1"),
    "no share": ({"preserve_weight": 1.0, "preserve_share": 0.0}, "preserve_share", "above 0"),
    "all of it": (
        {"preserve_weight": 1.0, "preserve_share": 1.0, "preserve_data_path": "x"}, "preserve_share", "below 1"
    ),
    "marked without": (
        {"train_data_path": None, "train_sources": [{"path": "a"}, {"path": "b", "preserve": True}]},
        "train_sources", "--preserve_weight 1",
    ),
    "share of marked": (
        {
            "train_data_path": None, "preserve_weight": 1.0, "preserve_share": 0.5,
            "train_sources": [{"path": "a"}, {"path": "b", "preserve": True}],
        },
        "preserve_share", "leave it out",
    ),
    "nothing": ({"preserve_weight": 0.0}, "preserve_weight", "above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case: str, options: dict[str, Any]):
    given, name, fix = BAD[case]
    with pytest.raises(ConfigError) as caught:
        Config(**options | given).resolve()
    assert str(caught.value).startswith(name) and fix in str(caught.value)
