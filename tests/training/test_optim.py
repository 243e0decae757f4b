"""Groups, moments, learning rate, clipping, and the scale of float16 losses."""

from __future__ import annotations

import math

import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from unigen.config import Config, ConfigError
from unigen.training.optim import (
    SCHEDULES,
    LossScale,
    build_optimizer,
    clipping,
    learning_rate_at,
    moments_of,
    parameter_groups,
    rates,
    scale_gradients,
    set_learning_rate,
    set_moments_of,
    squared_norm,
)


class Model(nn.Module):
    """A little of everything: embeddings, norms, matrices, a convolution, a branch not every step uses."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.latent_pos_embed = nn.Parameter(torch.randn(4, 6))
        self.position_embedding = nn.Embedding(4, 6)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.conv = nn.Conv1d(1, 2, 3)
        self.rare = nn.Linear(6, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids: torch.Tensor, rare: bool) -> torch.Tensor:
        x = self.embed_tokens(ids) + self.latent_pos_embed + self.position_embedding.weight
        y = self.up(self.norm(self.frozen(x))) * self.scale
        if rare:
            y = y + self.rare(x)
        return self.conv(y.reshape(-1, 1, 8)).square().mean()


def optimizer_of(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """As a process that holds every parameter whole builds it."""
    optimizer = build_optimizer(model, dict(model.named_parameters()), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    return optimizer


def clip(parameters: list[nn.Parameter], max_norm: float) -> float:
    """As a step of one process does it; the norm before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = float(squared_norm(grads)) ** 0.5
    scale_gradients(grads, clipping(norm, max_norm))
    return norm


def train(
    model: Model, optimizer: torch.optim.AdamW, config: Config, steps: range, rare_from: int = 10**9
) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        set_learning_rate(optimizer, learning_rate_at(step, 10, config))
        loss = model(torch.randint(11, (3, 4)).to(model.scale.device), rare=step >= rare_from)
        loss.backward()
        clip(list(model.parameters()), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_only_trainable_matrices_that_are_no_embeddings_decay():
    model = Model()
    decayed, plain = parameter_groups(model, Config(weight_decay=0.1))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {n for n, _ in decayed["params"]} == {"up.weight", "conv.weight", "rare.weight"}
    assert {n for n, _ in plain["params"]} == {
        "embed_tokens.weight", "latent_pos_embed", "position_embedding.weight", "norm.weight", "norm.bias",
        "up.bias", "conv.bias",
        "rare.bias", "scale",
    }  # fmt: skip


def test_the_optimiser_remembers_names_and_options():
    optimizer = optimizer_of(
        Model(),
        Config(learning_rate=3e-4, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6),
    )
    group = optimizer.param_groups[0]
    assert group["param_names"] == ["up.weight", "conv.weight", "rare.weight"]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"], group["foreach"]) == (
        3e-4,
        (0.8, 0.9),
        1e-6,
        0.2,
        True,
    )
    assert not group["fused"]


def test_parts_have_rates_and_decays_of_their_own():
    config = Config(
        learning_rate=1e-4,
        weight_decay=0.1,
        learning_rate_gen=3e-4,
        weight_decay_vit=0.0,
        learning_rate_vit=0.0,
    )
    model = tiny_model.build()
    optimizer = build_optimizer(model, dict(model.named_parameters()), config)
    set_learning_rate(optimizer, 5e-5)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    layer = "language_model.model.layers.0.self_attn.q_proj"
    assert found[f"{layer}.weight"] == (5e-5, 0.1) and found[f"{layer}.bias"] == (5e-5, 0.0)
    assert found[f"{layer}_moe_gen.weight"] == pytest.approx((1.5e-4, 0.1))
    assert found["vae2llm.weight"] == found["llm2vae.weight"] == found[f"{layer}_moe_gen.weight"]
    assert found["connector.fc1.weight"] == (5e-5, 0.1)
    assert {found[name] for name in found if name.startswith("vit_model.")} == {(0.0, 0.0)}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert rates(config, 5e-5) == pytest.approx({"learning_rate_gen": 1.5e-4, "learning_rate_vit": 0.0})
    plain = build_optimizer(model, dict(model.named_parameters()), Config(weight_decay=0.1))
    assert len(plain.param_groups) == 2


def test_a_head_tied_to_the_embedding_does_not_decay_whichever_comes_first():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(4, 9, bias=False)
            self.embed_tokens = nn.Embedding(9, 4)
            self.embed_tokens.weight = self.lm_head.weight

    (group,) = parameter_groups(Tied(), Config(weight_decay=0.1))
    assert group["weight_decay"] == 0.0
    assert [n for n, _ in group["params"]] == ["lm_head.weight"]


def test_nothing_to_train_is_the_users_error():
    with pytest.raises(ConfigError, match="unfreeze"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), Config())


def test_the_optimiser_works_on_what_a_process_holds_and_the_model_decides_the_groups():
    """Some rows of a matrix, flattened or not, decay as the matrix does: their own shape says nothing."""
    model = Model()
    held = {
        name: nn.Parameter(p.detach().reshape(-1)[:3].clone())
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    optimizer = build_optimizer(model, held, Config(weight_decay=0.2))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    assert [id(p) for p in decayed["params"]] == [
        id(held[name]) for name in ("up.weight", "conv.weight", "rare.weight")
    ]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in held.values()
    }


# ---- moments

Saved = dict[str, "tuple[float, Tensor, Tensor] | None"]


def saved_moments(optimizer: torch.optim.AdamW, model: nn.Module) -> Saved:
    """Of every trainable parameter, in memory of their own."""
    found: Saved = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            moments = moments_of(optimizer, p)
            found[name] = moments and (moments[0], moments[1].clone(), moments[2].clone())
    return found


def load_moments(optimizer: torch.optim.AdamW, model: nn.Module, saved: Saved) -> None:
    for name, p in model.named_parameters():
        if p.requires_grad:
            set_moments_of(
                optimizer, p, *(saved[name] or (0.0, torch.zeros(p.numel()), torch.zeros(p.numel())))
            )


def assert_equal(found: Saved, wanted: Saved) -> None:
    assert found.keys() == wanted.keys()
    for name, moments in wanted.items():
        other = found[name]
        assert (moments is None) == (other is None), name
        if moments is not None and other is not None:
            assert moments[0] == other[0] and all(
                torch.equal(a, b) for a, b in zip(moments[1:], other[1:], strict=True)
            ), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rare_from", [0, 7, 10**9], ids=["always", "first used after the resume", "never used"]
)
def test_five_steps_saved_loaded_and_five_more_equal_ten_bit_for_bit(
    dtype: torch.dtype, rare_from: int, device: str
):
    config = Config(
        learning_rate=0.05, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=3, max_grad_norm=0.5
    )
    torch.manual_seed(0)
    straight = Model(dtype).to(device)
    initial = {k: v.clone() for k, v in straight.state_dict().items()}
    optimizer = optimizer_of(straight, config)
    assert bool(optimizer.defaults["fused"]) == (device == "cuda")
    expected = train(straight, optimizer, config, range(10), rare_from)

    first = Model(dtype).to(device)
    first.load_state_dict(initial)
    optimizer_1 = optimizer_of(first, config)
    losses = train(first, optimizer_1, config, range(5), rare_from)
    saved = saved_moments(optimizer_1, first)
    # a file lies on the host
    saved = {name: m and (m[0], m[1].cpu(), m[2].cpu()) for name, m in saved.items()}

    second = Model(dtype).to(device)
    second.load_state_dict(first.state_dict())
    optimizer_2 = optimizer_of(second, config)
    load_moments(optimizer_2, second, saved)
    losses += train(second, optimizer_2, config, range(5, 10), rare_from)

    assert losses == expected
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    wanted = saved_moments(optimizer, straight)
    assert_equal(saved_moments(optimizer_2, second), wanted)
    assert "frozen.weight" not in wanted and (wanted["rare.weight"] is not None) == (rare_from < 10)


def test_moments_are_flat_and_live_and_none_before_the_first_update():
    model, config = Model(), Config(learning_rate=0.1)
    optimizer = optimizer_of(model, config)
    assert set(saved_moments(optimizer, model).values()) == {None}
    train(model, optimizer, config, range(3))
    moments = moments_of(optimizer, model.up.weight)
    assert moments is not None and moments[0] == 3.0 and [m.shape for m in moments[1:]] == [(48,), (48,)]
    before = moments[1].clone()
    train(model, optimizer, config, range(3, 4))
    assert not torch.equal(moments[1], before), "a view of what the optimiser holds"


def test_what_is_put_back_is_a_copy_and_replaces_what_was_there():
    model, config = Model(), Config(learning_rate=0.1)
    optimizer = optimizer_of(model, config)
    fresh = saved_moments(optimizer, model)
    train(model, optimizer, config, range(2), rare_from=0)
    mine = torch.ones(48)
    set_moments_of(optimizer, model.up.weight, 7.0, mine, mine)
    mine.zero_()
    moments = moments_of(optimizer, model.up.weight)
    assert (
        moments is not None
        and moments[0] == 7.0
        and moments[1].tolist() == [1.0] * 48
        and moments[2].tolist() == [1.0] * 48
    )
    load_moments(optimizer, model, fresh)
    assert not optimizer.state, "a step count of 0 is no state at all"


# ---- the learning rate


def test_learning_rates_by_hand():
    at = lambda step, **options: learning_rate_at(step, 10, Config(learning_rate=1.0, **options))  # noqa: E731
    assert [at(s, warmup_steps=4, lr_scheduler_type="constant") for s in range(6)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]
    assert [at(s, lr_scheduler_type="linear") for s in (0, 5, 9, 10, 99)] == pytest.approx(
        [1.0, 0.5, 0.1, 0.0, 0.0]
    )
    assert [at(s, lr_scheduler_type="cosine") for s in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    # Warm-up 2 of 10: the decay runs over the eight steps that are left.
    assert at(2, warmup_steps=2, lr_scheduler_type="cosine") == 1.0
    assert at(4, warmup_steps=2, lr_scheduler_type="cosine") == pytest.approx(
        0.5 * (1 + math.cos(math.pi / 4))
    )


def test_warmup_steps_win_over_the_ratio_and_zero_counts():
    assert learning_rate_at(0, 100, Config(learning_rate=1.0, warmup_ratio=0.1)) == pytest.approx(0.1)
    assert learning_rate_at(
        0, 100, Config(learning_rate=1.0, warmup_ratio=0.1, warmup_steps=2)
    ) == pytest.approx(0.5)
    assert learning_rate_at(0, 100, Config(learning_rate=1.0, warmup_ratio=0.1, warmup_steps=0)) == 1.0


def test_a_ratio_is_not_rounded_up_by_floating_point():
    assert 0.07 * 100 > 7
    assert learning_rate_at(6, 100, Config(learning_rate=1.0, warmup_ratio=0.07)) == 1.0


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    total=st.integers(1, 300),
    warmup=st.one_of(st.none(), st.integers(0, 400)),
    ratio=st.floats(0, 1),
)
def test_every_schedule_rises_then_falls_and_every_step_learns(
    name: str, total: int, warmup: int | None, ratio: float
):
    config = Config(learning_rate=2e-5, lr_scheduler_type=name, warmup_steps=warmup, warmup_ratio=ratio)
    rates = [learning_rate_at(step, total, config) for step in range(total)]
    assert all(0 < rate <= 2e-5 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_schedules_agree_with_pytorchs_own():
    parameter = nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=20)
    for step in range(20):
        assert learning_rate_at(step, 20, Config(learning_rate=1.0)) == pytest.approx(
            reference.param_groups[0]["lr"], abs=1e-9
        )
        reference.step()
        scheduler.step()


# ---- gradients


def parameters(*grads: torch.Tensor | None) -> list[nn.Parameter]:
    made = []
    for grad in grads:
        p = nn.Parameter(torch.zeros_like(grad) if grad is not None else torch.zeros(3))
        p.grad = None if grad is None else grad.clone()
        made.append(p)
    return made


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_agrees_with_pytorchs_own(max_norm: float):
    grads = [torch.randn(4, 5), torch.randn(()), None, torch.randn(7)]
    ours, theirs = parameters(*grads), parameters(*grads)
    norm = clip(ours, max_norm)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, max_norm)), rel=1e-6)
    for a, b in zip(ours, theirs):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_zero_turns_clipping_off_but_still_measures():
    (p,) = parameters(torch.tensor([3.0, 4.0]))
    assert clip([p], 0.0) == 5.0
    assert p.grad.tolist() == [3.0, 4.0]


def test_small_gradients_keep_their_bits():
    grad = torch.randn(100)
    (p,) = parameters(grad)
    clip([p], 1e3)
    assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_makes_the_norm_bad(bad: float):
    """And only the norm: nothing has touched the gradients, so the step can still be refused."""
    grads = [torch.tensor([30.0, 40.0]), torch.tensor([bad, 1.0])]
    assert not squared_norm(grads).isfinite()
    assert grads[0].tolist() == [30.0, 40.0] and grads[1][1] == 1.0


def test_a_norm_beyond_float32_when_squared_is_still_a_number():
    assert float(squared_norm([torch.tensor([3e30]), torch.tensor([4e30])])) == pytest.approx(25e60, rel=1e-6)
    assert float(squared_norm([torch.tensor([3e-30]), torch.tensor([4e-30])])) == pytest.approx(
        25e-60, rel=1e-6
    )


def test_no_gradient_at_all_has_norm_zero():
    assert float(squared_norm([])) == 0.0 and clip(parameters(None, None), 1.0) == 0.0
    scale_gradients([], 0.5)


def test_norms_of_parts_add_up_to_that_of_the_whole():
    """What processes each hold a piece of."""
    whole = torch.randn(1000)
    parts = [float(squared_norm([part])) for part in whole.split(300)]
    assert sum(parts) == pytest.approx(float(whole.double().square().sum()), rel=1e-6)


def test_the_norm_of_bfloat16_gradients_is_taken_in_float32():
    grads = [torch.full((1000,), 0.01).bfloat16(), torch.full((10,), 0.5)]
    ps = parameters(*grads)
    expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert clip(ps, 0.5) == pytest.approx(expected, rel=1e-5)
    assert [p.grad.dtype for p in ps] == [torch.bfloat16, torch.float32]
    clipped = math.sqrt(sum(p.grad.double().square().sum().item() for p in ps))
    assert clipped == pytest.approx(0.5, rel=5e-3)


# ---- the scale of float16 losses


@pytest.mark.slow
def test_the_scale_follows_pytorchs_rule(monkeypatch: pytest.MonkeyPatch):
    """Step by step the scale of ``torch.amp.GradScaler``, fed with the same overflows."""
    monkeypatch.setattr(LossScale, "INTERVAL", 5)
    ours, theirs = LossScale(True), torch.amp.GradScaler("cpu", growth_interval=5)
    optimizer = torch.optim.SGD([p := nn.Parameter(torch.zeros(1))], lr=0.0)
    bad = {3, 4, 12, 18, 30, 31, 32}
    seen = set()
    for step in range(60):
        theirs.scale(p.sum()).backward()
        if step in bad:
            p.grad.fill_(math.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(step in bad)
        assert ours.scale == theirs.get_scale(), step
        seen.add(ours.scale)
    assert min(seen) < 2.0**16 < max(seen)


def test_the_scale_resumes_in_the_middle_of_its_interval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LossScale, "INTERVAL", 5)
    straight = LossScale(True)
    for _ in range(3):
        straight.update(False)
    second = LossScale(True)
    second.load(straight.state())
    for _ in range(4):
        straight.update(False)
        second.update(False)
    assert second.state() == straight.state() == {"scale": 2.0**17, "good": 2}


def test_without_float16_the_scale_is_one_for_ever():
    scale = LossScale(False)
    for overflow in (True, False) * 2:
        scale.update(overflow)
    scale.load({"scale": 2.0**16, "good": 7})  # a run in float16 goes on in another precision
    assert scale.state() == {"scale": 1.0, "good": 0}
    assert LossScale(True).state() == {"scale": 2.0**16, "good": 0} and LossScale.INTERVAL == 2000
