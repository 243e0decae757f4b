"""Several sources as one stream: exact counts, rates that hold, orders that follow from (seed, epoch)
alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unigen.config import Config, ConfigError, UserError
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.mixing import DataSource, Mixture
from unigen.model.weights import load_planner
from unigen.sequence.draw import RandomKey


def source(
    folder: Path, name: str, n: int, weight: float | None = None, repeat: bool = False, words: int = 3
) -> DataSource:
    path = folder / f"{name}.jsonl"
    roles = [{"role": "user", "content": "Say something"}]
    lines = [
        {"messages": [*roles, {"role": "assistant", "content": f"{name} " * (words + i % 3)}]}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    planner = load_planner(None, Config())
    return DataSource(
        name, UnifiedGenerationDataset(path, token_lengths=planner.token_lengths), planner, weight, repeat
    )


def names(mixture: Mixture, epoch: int) -> list[str]:
    return [mixture.part(record)[0].name for record in mixture.order(epoch).records.tolist()]


def test_without_weights_every_record_is_met_once_an_epoch_and_sources_are_mixed_evenly(tmp_path: Path):
    mixture = Mixture([source(tmp_path, "a", 300), source(tmp_path, "b", 100)], seed=1)
    assert len(mixture) == mixture.total == 400
    for epoch in range(2):
        order = mixture.order(epoch)
        assert sorted(order.records.tolist()) == list(range(400)) and set(order.passes.tolist()) == {epoch}
        first_half = Counter(names(mixture, epoch)[:200])
        assert 120 < first_half["a"] < 180
    assert mixture.order(0).records.tolist() != mixture.order(1).records.tolist()


def test_one_source_has_the_order_it_has_without_a_mixture(tmp_path: Path):
    """One source is the usual case; nothing about mixing may touch it."""
    one = Mixture([source(tmp_path, "a", 50)], seed=3)
    assert sorted(one.order(2).records.tolist()) == list(range(50))
    assert one.fingerprint == one.parts[0].dataset.fingerprint


def test_a_weight_is_a_rate_that_holds_all_the_epoch_when_the_source_repeats(tmp_path: Path):
    """b is a tenth as large as a, but half of all passes: met ten times over, each pass whole before the next
    begins."""
    mixture = Mixture(
        [source(tmp_path, "a", 500, weight=1), source(tmp_path, "b", 50, weight=1, repeat=True)], seed=1
    )
    assert len(mixture) == 1000
    for epoch in range(2):
        order, met = mixture.order(epoch), names(mixture, epoch)
        counts = Counter(order.records.tolist())
        assert all(counts[i] == 1 for i in range(500)) and all(counts[i] == 10 for i in range(500, 550))
        for start in range(0, 1000, 100):
            assert 45 <= Counter(met[start : start + 100])["a"] <= 55, "evenly from start to end"
        mine = order.records >= 500
        passes = order.passes[mine]
        assert passes.tolist() == sorted(passes.tolist()) and set(passes.tolist()) == set(
            range(10 * epoch, 10 * epoch + 10)
        )
        for number in set(passes.tolist()):
            assert sorted(order.records[mine][passes == number].tolist()) == list(range(500, 550))
    orders = {tuple(order.records[mine][passes == number].tolist()) for number in set(passes.tolist())}
    assert len(orders) == 10, "each pass in an order of its own"


def test_a_pass_that_an_epoch_cuts_goes_on_in_the_next(tmp_path: Path):
    mixture = Mixture(
        [source(tmp_path, "a", 30, weight=3), source(tmp_path, "b", 7, weight=1, repeat=True)], seed=1
    )
    assert mixture.counts == [30, 10]
    met = [r for epoch in range(7) for r in mixture.order(epoch).records.tolist() if r >= 30]
    assert set(Counter(met).values()) == {10}, "70 passes over 7 records, over 7 epochs: all equally often"


def test_a_finite_source_ends_early_and_the_log_says_so(tmp_path: Path):
    mixture = Mixture([source(tmp_path, "a", 100, weight=1), source(tmp_path, "b", 25, weight=1)], seed=1)
    order = names(mixture, 0)
    assert len(order) == 125 and "b" not in order[60:] and 20 <= Counter(order[:50])["b"] <= 30
    assert (
        "b ends after 25% of the epoch; with repeat: true" in mixture.describe()
        and "a ends" not in mixture.describe()
    )


def test_a_source_without_a_weight_beside_weights_is_told(tmp_path: Path):
    given = [
        source(tmp_path, "a", 20, weight=2),
        source(tmp_path, "b", 15),
        source(tmp_path, "c", 20, weight=1),
    ]
    told = Mixture(given, seed=1).describe()
    assert "b has no weight" in told and "b ends after 5%" in told and "c has no weight" not in told
    none = [source(tmp_path, "d", 20), source(tmp_path, "e", 15)]
    assert "weight" not in Mixture(none, seed=1).describe()


def test_where_all_repeat_an_epoch_has_as_many_passes_as_there_are_records(tmp_path: Path):
    mixture = Mixture(
        [source(tmp_path, "a", 90, weight=1, repeat=True), source(tmp_path, "b", 10, weight=3, repeat=True)],
        seed=1,
    )
    assert mixture.counts == [25, 75]
    met = Counter(r for epoch in range(18) for r in mixture.order(epoch).records.tolist() if r < 90)
    assert set(met.values()) == {5}, "also the slow source is gone through whole before anything comes again"
    with pytest.raises(UserError, match="every source repeats and none has a weight"):
        Mixture([source(tmp_path, "a", 3, repeat=True), source(tmp_path, "b", 3, repeat=True)], seed=1)


def test_a_repeated_record_has_random_numbers_of_its_own(tmp_path: Path):
    mixture = Mixture(
        [source(tmp_path, "a", 40, weight=1), source(tmp_path, "b", 4, weight=1, repeat=True)], seed=1
    )
    passes = [
        (r, n)
        for epoch in range(3)
        for r, n in zip(mixture.order(epoch).records.tolist(), mixture.order(epoch).passes.tolist())
    ]
    assert len(set(passes)) == len(passes)


@pytest.mark.parametrize("training", [True, False])
def test_lengths_come_from_each_source_s_own_planner(tmp_path: Path, training: bool):
    parts = [source(tmp_path, "a", 20, weight=1), source(tmp_path, "b", 5, weight=1, repeat=True, words=9)]
    mixture = Mixture(parts, seed=4, training=training)
    order = mixture.order(1)
    lengths = mixture.lengths(order.records, order.passes)
    for record, number, length in zip(order.records.tolist(), order.passes.tolist(), lengths.tolist()):
        found, blocks, planner = mixture.outline(record, RandomKey(4, number, record, training))
        assert length == sum(map(len, blocks))
        assert found.origin == mixture.origin(record) and planner is mixture.part(record)[0].planner
    assert (mixture.full_lengths()[order.records] >= lengths).all()


def test_validation_keeps_the_files_order_and_ignores_weights(tmp_path: Path):
    parts = [source(tmp_path, "a", 4, weight=1), source(tmp_path, "b", 3, weight=9, repeat=True)]
    mixture = Mixture(parts, seed=1, training=False)
    assert len(mixture) == 7 and mixture.order(0).records.tolist() == mixture.order(
        5
    ).records.tolist() == list(range(7))


def test_other_weights_are_other_data_for_a_resume(tmp_path: Path):
    def fingerprint(weight: float, repeat: bool) -> str:
        return Mixture(
            [source(tmp_path, "a", 5, weight=1), source(tmp_path, "b", 5, weight=weight, repeat=repeat)],
            seed=1,
        ).fingerprint

    found = [fingerprint(1, False), fingerprint(2, False), fingerprint(2, True)]
    assert len(set(found)) == 3 and fingerprint(2, True) == found[2]


def test_the_log_counts_passes_and_tokens_of_each_source(tmp_path: Path):
    mixture = Mixture(
        [source(tmp_path, "a", 30, weight=3), source(tmp_path, "b", 5, weight=1, repeat=True)], seed=1
    )
    text = mixture.describe()
    whole = sum(mixture.lengths(np.arange(35), np.zeros(35, np.int64)) * np.array([1] * 30 + [2] * 5))
    share = sum(mixture.lengths(np.arange(30, 35), np.zeros(5, np.int64)) * 2) / whole
    assert "a: 30 passes (75.0%) over 30 records" in text and "b: 10 passes (25.0%) over 5 records" in text
    assert f"{share:.1%} of all tokens" in text and "text 100%" in text


BAD = [
    ({"pat": "a.jsonl"}, "unknown key 'pat'; did you mean path?"),
    ({"weight": 2}, "path is missing"),
    ({"path": "a.jsonl", "weight": -1}, "weight is -1.0; it is out of range. Fix: give a number above 0"),
    ({"path": "a.jsonl", "weight": True}, "weight is True"),
    ({"path": "a.jsonl", "repeat": "yes"}, "repeat is 'yes'. Fix: give true or false"),
    ({"path": []}, "path is []"),
    ({"path": "a.jsonl", "max_image_tokens": 1.5}, "max_image_tokens is 1.5"),
    ("a.jsonl", "write a mapping"),
]


@pytest.mark.parametrize(("entry", "message"), BAD)
def test_a_bad_entry_is_named(entry: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        Config(model_path="m", train_sources=[{"path": "good.jsonl"}, entry]).resolve()
    assert "train_sources[1]" in str(caught.value) and message in str(caught.value)


def test_names_come_from_paths_and_must_differ():
    config = Config(model_path="m", train_sources=[{"path": "x/a.jsonl"}, {"path": ["y/b/"], "weight": 2}])
    assert [s.name for s in config.resolve().sources()] == ["a.jsonl", "b"]
    with pytest.raises(ConfigError, match=r"two sources are called 'a.jsonl'"):
        Config(model_path="m", train_sources=[{"path": "x/a.jsonl"}, {"path": "y/a.jsonl"}]).resolve()
    with pytest.raises(ConfigError, match="exclude each other"):
        Config(model_path="m", train_data_path="a", train_sources=[{"path": "b"}]).resolve()
