"""The stream of rows: one order whatever the workers and ranks, and a place to go on from."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unigen.config import Config
from unigen.data.dataset import UnifiedGenerationDataset
from unigen.data.loader import LoaderState, MicroBatch, PackStream, RankSlice, load_batches
from unigen.data.mixing import DataSource, Mixture
from unigen.data.packing import LOOK_AHEAD
from unigen.model.config import read_config
from unigen.model.weights import scan_folder
from unigen.sequence.images import to_image
from unigen.sequence.pack import with_mask
from unigen.sequence.tokens import Tokenizer

N = 11
START = LoaderState()


def write_data(folder: Path, n: int = N, longest: int = 1000) -> Path:
    """Records of text, drawing, and editing in turn, of different lengths."""
    for i in range(3):
        pixels = torch.rand(3, 32, 32 + 16 * i, generator=torch.Generator().manual_seed(i)) * 2 - 1
        to_image(pixels).save(folder / f"{i}.png")
    records: list[dict[str, Any]] = []
    for i in range(n):
        if i % 3 == 0:
            words = i % longest + 1
            roles = [
                {"role": "user", "content": "Say" * words},
                {"role": "assistant", "content": "yes " * words},
            ]
            records.append({"messages": roles})
        elif i % 3 == 1:
            records.append({"text_prompt": f"picture {i}", "image_path": f"{i % 2}.png"})
        else:
            records.append(
                {
                    "input_image": "2.png",
                    "editing_steps": [{"instruction": "turn it", "result_image": f"{i % 3}.png"}],
                }
            )
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def make_stream(golden: Path, data: Path, training: bool = True, **options: Any) -> PackStream:
    folder = golden / "model"
    small = {"max_size": 42, "min_size": 28}
    model = read_config(
        folder,
        {name: entry.shape for name, entry in scan_folder(folder).items()},
        vae_transform={"max_size": 64, "min_size": 32},
        vit_transform=small,
        vit_edit_transform=small,
    )
    config = Config(max_image_tokens=64, **options)
    planner = model.planner(Tokenizer.load(folder), config)
    part = DataSource("data", UnifiedGenerationDataset(data, token_lengths=planner.token_lengths), planner)
    return PackStream(Mixture([part], seed=7, training=training), config.batch_size, config.max_num_tokens)


def take(
    stream: PackStream,
    steps: int,
    place: LoaderState = START,
    *,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    rows: int = 1,
):
    share = RankSlice(rank, world, world * rows)
    return list(load_batches(stream, share, place, num_workers=workers, limit=steps))


def bits(row: MicroBatch) -> list[Any]:
    """Everything in a row, comparable bit by bit."""
    values: list[Any] = [row.records, row.after]
    for f in fields(row.pack):
        value = getattr(row.pack, f.name)
        values.append([raw(v) for v in value] if isinstance(value, list) else raw(value))
    return values


def raw(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (
        value.dtype,
        tuple(value.shape),
        value.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes(),
    )


def test_every_record_is_met_once_an_epoch_in_another_order_each_time(golden: Path, data: Path):
    stream = make_stream(golden, data, batch_size=2)
    steps = [step for step, after in zip_steps(stream, 12)]
    epochs = [
        [records_at(stream, epoch, row) for step in steps[n : n + 6] for row in step]
        for epoch, n in enumerate((0, 6))
    ]
    epochs = [[i for row in rows for i in row] for rows in epochs]
    for epoch, order in enumerate(epochs):
        assert sorted(order) == list(range(N)) and order == stream.mixture.order(epoch).records.tolist()
    assert epochs[0] != epochs[1] and epochs[0] != list(range(N))
    assert stream.steps_in(0, 1) == 6 and stream.steps_in(0, 4) == 2


def records_at(stream: PackStream, epoch: int, places: list[int]) -> list[int]:
    return stream.mixture.order(epoch).records[places].tolist()


def zip_steps(stream: PackStream, n: int, global_batch: int = 1):
    """The first ``n`` steps of the stream, which has no end."""
    steps = stream.steps(LoaderState(), global_batch)
    return [next(steps) for _ in range(n)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_read_the_one_global_order(golden: Path, data: Path, world: int):
    """Six rows a step, dealt in turn: whatever the ranks, the same records belong to the same step."""
    stream = make_stream(golden, data)
    wanted = zip_steps(stream, 4, 6)  # two epochs of two steps: 6 + 5, 6 + 5
    ranks = [take(stream, 4, rank=rank, world=world, rows=6 // world) for rank in range(world)]
    for n, (step, after) in enumerate(wanted):
        dealt = [ranks[i % world][n][i // world] for i in range(6)]
        assert [row.records for row in dealt] == [records_at(stream, after.epoch, row) for row in step] + [
            []
        ] * (6 - len(step))
        assert {row.after for row in dealt} == {after}
    assert [after for _, after in wanted] == [
        LoaderState(0, 6),
        LoaderState(0, N),
        LoaderState(1, 6),
        LoaderState(1, N),
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(golden: Path, data: Path, workers: int):
    stream = make_stream(golden, data, batch_size=2)
    alone = take(stream, 5, rows=3)
    with_workers = take(stream, 5, rows=3, workers=workers)
    assert [[bits(row) for row in step] for step in with_workers] == [
        [bits(row) for row in step] for step in alone
    ]


def test_workers_bring_the_mask_where_it_is_asked_for(golden: Path, data: Path):
    stream = make_stream(golden, data, batch_size=2)
    assert take(stream, 1)[0][0].pack.mask_rule is None
    stream.masks = True
    for (row,) in take(stream, 2, workers=1):
        wanted = with_mask(replace(row.pack, mask_rule=None, mask_blocks=None))
        assert torch.equal(row.pack.mask_rule, wanted.mask_rule) and torch.equal(
            row.pack.mask_blocks, wanted.mask_blocks
        )


def test_the_last_step_of_an_epoch_has_empty_rows(golden: Path, data: Path):
    stream = make_stream(golden, data)
    last = take(stream, 3, rows=4)[2]
    assert [len(row.records) for row in last] == [1, 1, 1, 0]
    empty = last[3].pack
    assert (
        len(empty) == 0 and empty.n_samples == 0 and empty.n_text_labels == 0 and empty.n_image_targets == 0
    )
    assert last[3].after == LoaderState(0, N)


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"max_num_tokens": 160}])
def test_going_on_from_any_place_gives_the_same_rows(golden: Path, data: Path, options: dict[str, Any]):
    """Bit for bit, noise and times too, in the middle of an epoch, with samples that wait, and across the
    border of two epochs."""
    stream = make_stream(golden, data, **options)
    count = stream.steps_in(0, 2) + 3
    whole = [[bits(row) for row in step] for step in take(stream, count, rows=2)]
    places = [step[-1][1] for step in whole]
    assert places[0].epoch < places[-1].epoch
    assert any(place.buffer for place in places) == ("max_num_tokens" in options)
    for done, place in enumerate(places[:-1], 1):
        again = make_stream(golden, data, **options)
        assert [[bits(row) for row in step] for step in take(again, count - done, place, rows=2)] == whole[
            done:
        ]


@pytest.mark.slow
def test_going_on_with_a_full_buffer_whatever_the_workers_and_ranks(golden: Path, tmp_path: Path):
    """Three times as many records as the look-ahead, so that the buffer is full in the middle of the epoch;
    the place after step 5 goes to runs of other workers, and to two ranks of half the rows each."""
    n = 3 * LOOK_AHEAD
    stream = make_stream(golden, write_data(tmp_path, n, longest=12), max_num_tokens=300)
    whole = take(stream, 9, rows=4)
    place = whole[4][-1].after
    assert len(place.buffer) >= LOOK_AHEAD // 2 and 0 < place.position < n
    assert place.done == sum(len(row.records) for step in whole[:5] for row in step)
    wanted = [[bits(row) for row in step] for step in whole[5:]]
    for workers in (0, 2):
        again = take(stream, 4, place, rows=4, workers=workers)
        assert [[bits(row) for row in step] for step in again] == wanted
    ranks = [take(stream, 4, place, rank=rank, world=2, rows=2) for rank in range(2)]
    dealt = [[ranks[i % 2][step][i // 2] for i in range(4)] for step in range(4)]
    assert [[bits(row) for row in step] for step in dealt] == wanted


def test_every_record_once_over_three_epochs_of_full_rows(golden: Path, tmp_path: Path):
    stream = make_stream(golden, write_data(tmp_path, 400, longest=12), max_num_tokens=600)
    for epoch in range(3):
        rows = [row for row, _ in stream.sequences(LoaderState(epoch))]
        assert Counter(at for row in rows for at in row) == Counter(range(400))
        lengths = [stream._lengths(epoch, torch.tensor(row).numpy()).sum() for row in rows]
        assert max(lengths) <= 600 and sum(lengths) > 0.97 * 600 * len(lengths)


@pytest.mark.slow
def test_resuming_costs_the_same_wherever_it_stands(golden: Path, tmp_path: Path):
    """The first row of a place needs the lengths of what waits and of one chunk, not of all that came
    before."""
    stream = make_stream(golden, write_data(tmp_path, 9000, longest=3), max_num_tokens=600)
    asked = []
    lengths = stream._lengths
    stream._lengths = lambda epoch, places: (asked.append(len(places)), lengths(epoch, places))[1]
    next(stream.sequences(LoaderState(0, 8000, tuple(range(7000, 7100)))))
    assert sum(asked) <= 100 + 4096


def test_a_token_budget_holds_what_fits_and_never_drops(golden: Path, data: Path):
    stream = make_stream(golden, data, max_num_tokens=160, batch_size=1)
    rows = [row for step in take(stream, stream.steps_in(0, 1)) for row in step]
    assert Counter(i for row in rows for i in row.records) == Counter(range(N))
    assert any(len(row.records) > 1 for row in rows)
    length = {i: sum(map(len, stream.mixture.outline(i, stream.mixture.key(i, 0))[1])) for i in range(N)}
    for at, row in enumerate(rows):
        assert len(row.pack) == sum(length[i] for i in row.records)
        assert len(row.pack) <= 160 or len(row.records) == 1
        later = [i for other in rows[at + 1 :] for i in other.records]
        assert all(len(row.pack) + length[i] > 160 for i in later), "nothing that waited would have fitted"


def test_the_largest_row_is_as_long_as_any_and_a_full_one_near_the_budget(golden: Path, data: Path):
    for options in ({"batch_size": 2}, {"max_num_tokens": 160}):
        stream = make_stream(golden, data, **options)
        largest = len(stream.build_largest().pack)
        rows = [row for step in take(stream, 2 * stream.steps_in(0, 1)) for row in step]
        assert largest >= (0.95 if "max_num_tokens" in options else 1) * max(len(row.pack) for row in rows)


def test_a_batch_takes_up_what_waited_under_a_token_budget(golden: Path, data: Path):
    """Going on with other options than before loses nothing."""
    stream = make_stream(golden, data, batch_size=3)
    rows = list(stream.sequences(LoaderState(0, 8, (1, 4, 5, 7))))
    assert (
        [row for row, _ in rows] == [[1, 4, 5], [7, 8, 9], [10]]
        and rows[0][1] == LoaderState(0, 8, (7,))
        and rows[-1][1] == LoaderState(0, N)
    )


def test_a_record_has_other_noise_in_another_epoch_and_the_same_in_validation(golden: Path, data: Path):
    stream, held_out = make_stream(golden, data), make_stream(golden, data, training=False)
    epochs = [
        stream.build_samples([stream.mixture.key(1, epoch)], LoaderState()).pack.noise for epoch in (0, 1)
    ]
    assert not torch.equal(*epochs)
    fixed = [held_out.build([1], LoaderState(epoch)).pack for epoch in (0, 1)]
    assert torch.equal(fixed[0].noise, fixed[1].noise) and torch.equal(fixed[0].u, fixed[1].u)


def test_the_random_numbers_of_the_program_are_left_alone(golden: Path, data: Path):
    stream = make_stream(golden, data)
    state = torch.get_rng_state()
    take(stream, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_broke_after_the_check_is_told(golden: Path, data: Path, workers: int):
    stream = make_stream(golden, data, batch_size=N)
    (data.parent / "1.png").write_bytes((data.parent / "1.png").read_bytes()[:60])
    ((row,),) = take(stream, 1, workers=workers)
    broken = {i for i in range(N) if i % 3 == 1 and i % 2 == 1}
    assert sorted(row.records) == sorted(set(range(N)) - broken)
    assert {(bad.origin.file, bad.origin.line) for bad in row.bad} == {(data, i + 1) for i in broken}
    assert all(bad.code == "broken_picture" and "1.png" in str(bad) and "Fix:" in str(bad) for bad in row.bad)
    assert row.pack.n_samples == N - len(broken) == len(row.pack.origins)
    assert row.after == LoaderState(0, N)


def test_a_picture_that_changed_its_size_is_a_bad_picture(golden: Path, data: Path):
    stream, again = (make_stream(golden, data, batch_size=1) for _ in range(2))
    whole = take(stream, len(stream.mixture))
    to_image(torch.zeros(3, 32, 32)).save(data.parent / "2.png")  # was 32 x 64
    (data.parent / "0.png").write_bytes((data.parent / "1.png").read_bytes())  # and 0 as 1
    changed = take(again, len(again.mixture))
    bad = [entry for (row,) in changed for entry in row.bad]
    assert {entry.code for entry in bad} == {"changed_picture"} and len({str(e.origin) for e in bad}) == len(
        bad
    )
    assert any("2.png" in entry.found for entry in bad) and any("0.png" in entry.found for entry in bad)
    for (before,), (after,) in zip(whole, changed, strict=True):
        assert after.bad or bits(before)[2:4] == bits(after)[2:4], "no position moves"
