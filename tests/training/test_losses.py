"""The joint loss: the split of a step into rows changes no gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import assert_close, batch_of, built, gradients, step_of

from unigen.model.bagel import Output
from unigen.training.loop import TrainingLoop
from unigen.training.step import Counts, joint_loss, loss_sums


def step(trainer: TrainingLoop, split: list[list[int]]) -> tuple[Any, dict[str, torch.Tensor]]:
    """One step over these records, a list a row; its result and the gradients. A learning rate of zero moves
    nothing."""
    result = step_of(trainer, [batch_of(trainer, records) for records in split], 0.0)
    return result, gradients(trainer)


@pytest.fixture
def trainer(options: dict[str, Any]) -> TrainingLoop:
    # Clipping divides by the norm and would hide a factor.
    return built(options, max_grad_norm=0.0, text_loss_weight=0.7, image_loss_weight=1.3)


SPLITS = {
    "two rows": [[0, 1, 2], [3, 4, 5, 6]],
    "four rows of unequal size": [[0], [1, 6], [2, 3, 4], [5]],
    "text and images apart": [[0, 2, 5], [1, 3, 6], [4], []],
    "one each, and empty ones": [[], [0], [1], [2], [], [3], [4], [5], [6], []],
}


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_micro_batches_give_the_gradient_of_one_row(trainer: TrainingLoop, split: list[list[int]]):
    whole, wanted = step(trainer, [list(range(7))])
    result, found = step(trainer, split)
    assert_close(found, wanted)
    assert result.counts == whole.counts and result.counts.text > 50 and result.counts.image > 20
    assert result.text_loss == pytest.approx(whole.text_loss, rel=1e-6)
    assert result.image_loss == pytest.approx(whole.image_loss, rel=1e-6)


def test_the_loss_is_the_mean_over_all_targets(trainer: TrainingLoop):
    """Against the definition: cross-entropy over label tokens, squared error over channels and noised
    tokens."""
    pack = batch_of(trainer, list(range(7))).pack
    with torch.no_grad():
        output = trainer.run.model(pack)
    result, _ = step(trainer, [[0, 1, 2], [3, 4, 5, 6]])
    assert output.ce.numel() == pack.n_text_labels and output.mse.shape[0] == pack.n_image_targets
    assert result.text_loss == pytest.approx(float(output.ce.mean()), rel=1e-6)
    assert result.image_loss == pytest.approx(float(output.mse.mean()), rel=1e-6)


def test_the_gradient_is_that_of_the_weighted_sum(trainer: TrainingLoop):
    pack = batch_of(trainer, list(range(7))).pack
    output = trainer.run.model(pack)
    trainer.engine.optimizer.zero_grad()
    (0.7 * output.ce.mean() + 1.3 * output.mse.mean()).backward()
    wanted = {name: p.grad.clone() for name, p in trainer.run.model.named_parameters() if p.grad is not None}
    assert_close(step(trainer, [list(range(7))])[1], wanted)


def test_a_target_counts_with_its_weight(trainer: TrainingLoop):
    """Against the definition: the mean over all targets, weighted; also where the weights add up to less than
    one."""
    plain = batch_of(trainer, list(range(7)))
    with torch.no_grad():
        output = trainer.run.model(plain.pack)
    text = torch.linspace(0.001, 0.003, plain.pack.n_text_labels)
    image = torch.linspace(0.002, 0.02, plain.pack.n_image_targets)
    sums = float(text.double().sum()), float(image.double().sum())
    assert max(sums) < 1
    pack = replace(plain.pack, label_weight=text, noised_weight=image, weight_sums=sums)
    result = step_of(trainer, [replace(plain, pack=pack)], 0.0)
    assert result.counts.text == pytest.approx(sums[0]) and result.counts.image == pytest.approx(sums[1])
    assert result.text_loss == pytest.approx(float((output.ce * text).sum()) / sums[0], rel=1e-5)
    expected = float((output.mse.mean(-1) * image).sum()) / sums[1]
    assert result.image_loss == pytest.approx(expected, rel=1e-5)


def test_a_row_without_anything_gives_zero_gradients_and_not_none(trainer: TrainingLoop):
    result, found = step(trainer, [[]])
    assert result.text_loss == result.image_loss == 0.0 and not result.refused
    trained = {name for name, p in trainer.run.model.named_parameters() if p.requires_grad}
    assert found.keys() == trained
    assert all(not g.any() for g in found.values())


@pytest.mark.parametrize("row", [[0], [1], [2]], ids=["text", "drawn", "described"])
def test_every_trained_parameter_gets_a_gradient_from_any_row(trainer: TrainingLoop, row: list[int]):
    """Data parallel waits for all of them."""
    _, found = step(trainer, [row])
    assert found.keys() == {name for name, p in trainer.run.model.named_parameters() if p.requires_grad}
    assert any(g.any() for g in found.values())


def test_sums_and_weights_by_hand():
    output = Output(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([[1.0, 3.0], [5.0, 7.0]]))
    text, image = loss_sums(output)
    assert (float(text), float(image)) == (9.0, 8.0)
    assert float(joint_loss(text, image, Counts(18, 4), 2.0, 0.5)) == 2.0 * 9 / 18 + 0.5 * 8 / 4
    assert float(joint_loss(text * 0, image * 0, Counts(0, 0), 1.0, 1.0)) == 0.0
