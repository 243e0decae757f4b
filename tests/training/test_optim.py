import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from unigen.config import Config, ConfigError
from unigen.training.checkpoint import CheckpointError
from unigen.training.optim import (
    SCHEDULES,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    load_optimizer_tensors,
    optimizer_tensors,
    parameter_groups,
    set_learning_rate,
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


def train(model: Model, optimizer: torch.optim.AdamW, config: Config, steps: range, rare_from: int = 10**9) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        set_learning_rate(optimizer, learning_rate_at(step, 10, config))
        loss = model(torch.randint(11, (3, 4)), rare=step >= rare_from)
        loss.backward()
        clip_gradients(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def test_only_trainable_matrices_that_are_no_embeddings_decay():
    model = Model()
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {n for n, _ in decayed["params"]} == {"up.weight", "conv.weight", "rare.weight"}
    assert {n for n, _ in plain["params"]} == {
        "embed_tokens.weight", "latent_pos_embed", "position_embedding.weight", "norm.weight", "norm.bias", "up.bias", "conv.bias",
        "rare.bias", "scale",
    }  # fmt: skip


def test_the_optimiser_remembers_names_and_options():
    optimizer = build_optimizer(Model(), Config(learning_rate=3e-4, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6))
    group = optimizer.param_groups[0]
    assert group["param_names"] == ["up.weight", "conv.weight", "rare.weight"]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"], group["foreach"]) == (3e-4, (0.8, 0.9), 1e-6, 0.2, True)
    assert not group["fused"]


def test_a_head_tied_to_the_embedding_does_not_decay_whichever_comes_first():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(4, 9, bias=False)
            self.embed_tokens = nn.Embedding(9, 4)
            self.embed_tokens.weight = self.lm_head.weight

    (group,) = parameter_groups(Tied(), 0.1)
    assert group["weight_decay"] == 0.0
    assert [n for n, _ in group["params"]] == ["lm_head.weight"]


def test_nothing_to_train_is_the_users_error():
    with pytest.raises(ConfigError, match="unfreeze"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rare_from", [0, 7, 10**9], ids=["always", "first used after the resume", "never used"])
def test_five_steps_saved_loaded_and_five_more_equal_ten_bit_for_bit(dtype: torch.dtype, rare_from: int):
    config = Config(learning_rate=0.05, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=3, max_grad_norm=0.5)
    torch.manual_seed(0)
    straight = Model(dtype)
    initial = {k: v.clone() for k, v in straight.state_dict().items()}
    optimizer = build_optimizer(straight, config)
    expected = train(straight, optimizer, config, range(10), rare_from)

    first = Model(dtype)
    first.load_state_dict(initial)
    optimizer_1 = build_optimizer(first, config)
    losses = train(first, optimizer_1, config, range(5), rare_from)
    file = save({k: v.contiguous() for k, v in optimizer_tensors(optimizer_1, first).items()})

    second = Model(dtype)
    second.load_state_dict(first.state_dict())
    optimizer_2 = build_optimizer(second, config)
    load_optimizer_tensors(optimizer_2, second, load(file))
    losses += train(second, optimizer_2, config, range(5, 10), rare_from)

    assert losses == expected
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    expected_state, state = optimizer_tensors(optimizer, straight), optimizer_tensors(optimizer_2, second)
    assert expected_state.keys() == state.keys()
    assert all(torch.equal(expected_state[k], state[k]) for k in state)
    assert "frozen.weight" not in "".join(state)
    assert ("exp_avg.rare.weight" in state) == (rare_from < 10)


def test_loading_replaces_what_the_optimiser_had():
    config = Config(learning_rate=0.1)
    model = Model()
    optimizer = build_optimizer(model, config)
    fresh = {k: v.clone() for k, v in optimizer_tensors(optimizer, model).items()}
    train(model, optimizer, config, range(2), rare_from=0)
    load_optimizer_tensors(optimizer, model, fresh)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.pop("step.up.weight"), "step.up.weight is missing"),
        (lambda t: t.pop("exp_avg.up.weight"), "exp_avg.up.weight is missing"),
        (lambda t: t.update({"exp_avg.other": torch.zeros(1)}), "exp_avg.other is unexpected"),
        (lambda t: t.update({"exp_avg.up.weight": torch.zeros(6, 8)}), r"exp_avg.up.weight is torch.float32 \[6, 8\] instead of"),
        (lambda t: t.update({"exp_avg_sq.up.bias": torch.zeros(8).bfloat16()}), "exp_avg_sq.up.bias is torch.bfloat16"),
        (lambda t: t.update({"step.up.bias": torch.zeros(2)}), r"step.up.bias is torch.float32 \[2\]"),
        (lambda t: t.update({"exp_avg.rare.weight": torch.zeros(8, 6)}), "exp_avg.rare.weight is unexpected"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage, says: str):
    config = Config(learning_rate=0.1)
    model = Model()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, config, range(2))
    tensors = {k: v.clone() for k, v in optimizer_tensors(optimizer, model).items()}
    damage(tensors)
    train(model, optimizer, config, range(2, 3))
    before = {k: v.clone() for k, v in optimizer_tensors(optimizer, model).items()}
    with pytest.raises(CheckpointError, match=says):
        load_optimizer_tensors(optimizer, model, tensors)
    after = optimizer_tensors(optimizer, model)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in after)


# ---- the learning rate


def test_learning_rates_by_hand():
    at = lambda step, **options: learning_rate_at(step, 10, Config(learning_rate=1.0, **options))  # noqa: E731
    assert [at(s, warmup_steps=4, lr_scheduler_type="constant") for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [at(s, lr_scheduler_type="linear") for s in (0, 5, 9, 10, 99)] == pytest.approx([1.0, 0.5, 0.1, 0.0, 0.0])
    assert [at(s, lr_scheduler_type="cosine") for s in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    # Warm-up 2 of 10: the decay runs over the eight steps that are left.
    assert at(2, warmup_steps=2, lr_scheduler_type="cosine") == 1.0
    assert at(4, warmup_steps=2, lr_scheduler_type="cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_warmup_steps_win_over_the_ratio_and_zero_counts():
    assert learning_rate_at(0, 100, Config(learning_rate=1.0, warmup_ratio=0.1)) == pytest.approx(0.1)
    assert learning_rate_at(0, 100, Config(learning_rate=1.0, warmup_ratio=0.1, warmup_steps=2)) == pytest.approx(0.5)
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
def test_every_schedule_rises_then_falls_and_every_step_learns(name: str, total: int, warmup: int | None, ratio: float):
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
        assert learning_rate_at(step, 20, Config(learning_rate=1.0)) == pytest.approx(reference.param_groups[0]["lr"], abs=1e-9)
        reference.step()
        scheduler.step()


# ---- clipping


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
    norm = clip_gradients(iter(ours), max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.shape == () and norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_zero_turns_clipping_off_but_still_measures():
    (p,) = parameters(torch.tensor([3.0, 4.0]))
    assert clip_gradients([p], 0.0).item() == 5.0
    assert p.grad.tolist() == [3.0, 4.0]


def test_small_gradients_keep_their_bits():
    grad = torch.randn(100)
    (p,) = parameters(grad)
    clip_gradients([p], 1e3)
    assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_leaves_the_gradients_alone(bad: float):
    a, b = parameters(torch.tensor([30.0, 40.0]), torch.tensor([bad, 1.0]))
    assert not clip_gradients([a, b], 1.0).isfinite()
    assert a.grad.tolist() == [30.0, 40.0]
    assert b.grad[1].item() == 1.0


def test_no_gradient_at_all_has_norm_zero():
    assert clip_gradients(parameters(None, None), 1.0).item() == 0.0
    assert clip_gradients([], 1.0).item() == 0.0


def test_the_norm_of_bfloat16_gradients_is_taken_in_float32():
    grads = [torch.full((1000,), 0.01).bfloat16(), torch.full((10,), 0.5)]
    ps = parameters(*grads)
    expected = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    assert clip_gradients(ps, 0.5).item() == pytest.approx(expected, rel=1e-5)
    assert [p.grad.dtype for p in ps] == [torch.bfloat16, torch.float32]
    clipped = math.sqrt(sum(p.grad.double().square().sum().item() for p in ps))
    assert clipped == pytest.approx(0.5, rel=5e-3)


@pytest.mark.gpu
def test_a_fused_state_moves_between_devices_exactly():
    config = Config(learning_rate=0.05, max_grad_norm=0.5)
    device = torch.device("cuda")
    straight = Model().to(device)
    optimizer = build_optimizer(straight, config)
    assert optimizer.param_groups[0]["fused"]

    def step(model: Model, optimizer: torch.optim.AdamW, number: int) -> None:
        torch.manual_seed(number)
        model(torch.randint(11, (3, 4)).to(device), rare=False).backward()
        clip_gradients(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for number in range(3):
        step(straight, optimizer, number)
    buffer = io.BytesIO(save({k: v.cpu() for k, v in optimizer_tensors(optimizer, straight).items()}))
    other = Model().to(device)
    other.load_state_dict(straight.state_dict())
    optimizer_2 = build_optimizer(other, config)
    load_optimizer_tensors(optimizer_2, other, load(buffer.getvalue()))
    for number in range(3, 6):
        step(straight, optimizer, number)
        step(other, optimizer_2, number)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), other.parameters()))
