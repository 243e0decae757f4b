"""The log is read once, to the digit, whatever is written to it meanwhile."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from recorded import row, validation, write_metrics

from unigen.runs import metrics as module
from unigen.runs.metrics import CURVES, POINTS, Log, LogTail, Metrics, parsed, read_log


def rows(n: int, seed: int = 0) -> list[dict]:
    random_ = random.Random(seed)
    return [row(step, random_, n) for step in range(1, n + 1)]


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def test_curves_of_a_short_log_are_the_log(tmp_path):
    random_ = random.Random(1)
    values = [*rows(300), validation(300, random_)]
    for value in values[:40]:  # of a run that stays near its model, which the recorded one does not
        value["preserve_loss"] = random_.random()
    log = read_log(write_metrics(tmp_path / "metrics.jsonl", values))
    for name in CURVES:
        points = log.points(name)
        wanted = [(v["step"], v[name]) for v in values if name in v]
        assert [(p.step, p.mean) for p in points] == wanted and wanted
        assert all(p.low == p.mean == p.high for p in points)
        assert log.curve(name).T.tolist() == [list(point) for point in wanted]
        assert log.latest[name] == wanted[-1][1]


def test_of_lines_with_the_same_step_the_last_one_counts(tmp_path):
    """Also where it is written after the curve was drawn."""
    path = write_metrics(tmp_path / "metrics.jsonl", [{"step": n, "loss": n / 2} for n in (1, 3, 2, 3, 1)])
    append(path, '{"step": 2, "loss": 9}\n')
    metrics = Metrics(path)
    metrics.update()
    assert metrics.log.curve("loss").tolist() == [[1, 2, 3], [0.5, 9, 1.5]]
    append(path, '{"step": 1, "loss": 7.5}\n')
    metrics.update()
    assert metrics.log.curve("loss").tolist() == [[1, 2, 3], [7.5, 9, 1.5]]


def test_lines_without_the_text_that_is_asked_for_are_passed_over(tmp_path):
    values = [*rows(30), validation(30, random.Random(1))]
    log = read_log(write_metrics(tmp_path / "metrics.jsonl", values), having="val_loss")
    assert log.curve("val_loss").T.tolist() == [[30, values[-1]["val_loss"]]] and log.n_lines == 1
    assert read_log(tmp_path / "nowhere").curve("val_loss").shape == (2, 0)


def test_later_looks_read_only_what_is_new(tmp_path):
    path = write_metrics(tmp_path / "metrics.jsonl", rows(100))
    metrics = Metrics(path)
    metrics.update()
    assert metrics.update() == 0
    line = json.dumps(row(101, random.Random(5))) + "\n"
    append(path, line[:40])
    assert metrics.update() == 0 and metrics.log.last_step == 100, "half a line is not yet one"
    append(path, line[40:])
    assert metrics.update() == len(line) and metrics.log.last_step == 101 and metrics.log.n_unreadable == 0


def test_a_long_curve_keeps_mean_least_and_greatest(tmp_path):
    """9,000 steps in at most 2,048 runs of steps; one spike of one step is still there to the digit."""
    values = rows(9000)
    values[4321]["loss"], values[4322]["loss"] = 1234.5, -7.25
    path = write_metrics(tmp_path / "metrics.jsonl", values)
    metrics = Metrics(path)
    metrics.update()
    points = metrics.log.points("loss")
    assert 9000 / 8 <= len(points) <= POINTS
    assert max(p.high for p in points) == 1234.5 and min(p.low for p in points) == -7.25
    for point in points:
        first = int(point.step) // 8 * 8
        inside = [v["loss"] for v in values[max(0, first - 1) : first + 7]]
        assert point.mean == pytest.approx(sum(inside) / len(inside)) and (point.low, point.high) == (
            min(inside),
            max(inside),
        )
    assert [p.step for p in points] == sorted(p.step for p in points)


def test_growing_in_parts_gives_what_one_reading_gives(tmp_path):
    values = rows(5000)
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    random_ = random.Random(3)
    text = "".join(json.dumps(v) + "\n" for v in values)
    while text:
        n = random_.randrange(1, 200_000)
        append(path, text[:n])
        text = text[n:]
        metrics.update()
    whole = Metrics(path)
    whole.update()
    for name in ("loss", "grad_norm"):
        mine, wanted = metrics.log.points(name), whole.log.points(name)
        assert [p.step for p in mine] == pytest.approx([p.step for p in wanted])
        assert [p.mean for p in mine] == pytest.approx([p.mean for p in wanted])
        assert [(p.low, p.high) for p in mine] == [(p.low, p.high) for p in wanted]
    assert list(metrics.log.recent) == list(whole.log.recent) and metrics.log.latest == whole.log.latest


@pytest.mark.parametrize("kept", [60, 99])
def test_a_log_that_a_resume_rewrote_is_read_anew(kept, tmp_path):
    """A resume drops lines and renames; new lines may make it longer than it was."""
    values = rows(100)
    path = write_metrics(tmp_path / "metrics.jsonl", values)
    metrics = Metrics(path)
    metrics.update()
    new = [row(step, random.Random(step)) for step in range(kept + 1, 140)]
    os.replace(write_metrics(tmp_path / "new", values[:kept] + new), path)
    metrics.update()
    wanted = [v["loss"] for v in values[:kept] + new]
    assert [p.mean for p in metrics.log.points("loss")] == wanted and metrics.log.n_lines == 139


def test_a_copied_log_is_not_read_again(tmp_path):
    """rsync gives the file a new inode each time; what was read is still there."""
    path = write_metrics(tmp_path / "metrics.jsonl", rows(100))
    metrics = Metrics(path)
    metrics.update()
    os.replace(write_metrics(tmp_path / "new", rows(100)), path)
    assert metrics.update() == 0 and metrics.log.last_step == 100


def test_a_log_that_is_not_there_yet_and_one_that_went_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    assert metrics.update() == 0 and metrics.log.last_step is None
    write_metrics(path, rows(3))
    metrics.update()
    assert metrics.log.last_step == 3
    path.unlink()
    metrics.update()
    assert metrics.log.last_step is None


BAD = [
    "not json",
    "[1, 2]",
    '{"loss": 1.0}',
    '{"step": "7"}',
    '{"step": -1}',
    '{"step": 1e300}',
    '{"step": true}',
    "[" * 100_000,
    '{"step": 5, "loss": 1',
    "\x00\x00",
]


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
def test_a_line_that_is_none_is_counted_and_costs_nothing_else(bad, tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(r) for r in rows(4)]
    path.write_text("\n".join([*good[:2], bad, *good[2:]]) + "\n")
    metrics = Metrics(path)
    metrics.update()
    assert (metrics.log.n_unreadable, metrics.log.n_lines, metrics.log.last_step) == (1, 4, 4)


def test_values_that_are_no_numbers_are_left_out():
    log = Log()
    strange = [None, "1.0", True, [], {}, float("nan"), float("inf"), 10**400, -1e301]
    log.add([{"step": n, "loss": value} for n, value in enumerate(strange)] + [{"step": 20, "loss": 2}])
    assert [(p.step, p.mean) for p in log.points("loss")] == [(20, 2.0)]


def test_skipped_steps_and_what_is_not_finite_are_counted():
    log = Log()
    log.add(
        [
            {"step": 1, "loss": 1.0},
            {"step": 2, "loss": None, "nonfinite": ["loss"], "skipped": 1.0},
            {"step": 3, "skipped": 1.0},
        ]
    )
    assert (log.n_skipped, list(log.skipped), log.n_not_finite, log.not_finite_step) == (2, [2, 3], 1, 2)


def test_the_part_asked_for_alone_is_drawn_and_in_full(tmp_path):
    path = write_metrics(tmp_path / "metrics.jsonl", rows(9000))
    metrics = Metrics(path, steps=(4000, 4010))
    metrics.update()
    assert [p.step for p in metrics.log.points("loss")] == list(
        range(4000, 4011)
    ) and metrics.log.last_step == 9000


def test_a_line_that_is_longer_than_what_is_read_at_once_costs_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 500)
    values = rows(4)
    path = write_metrics(
        tmp_path / "metrics.jsonl", [*values[:2], {"step": 9, "why": "x" * 1000}, *values[2:]]
    )
    log = read_log(path)
    assert log.curve("loss")[0].tolist() == [1, 2, 3, 4] and log.n_unreadable > 0


def test_lines_are_parsed_together_as_they_are_alone():
    lines = [json.dumps(r).encode() for r in rows(50)]
    assert parsed(lines) == [json.loads(line) for line in lines]
    # two objects on a line are no line of ours
    assert parsed([b'{"step": 1}, {"step": 2}', b'{"step": 3}']) == [None, {"step": 3}]
    assert parsed([b'{"step": 1', b'"loss": 2}', b"{}"]) == [None, None, {}]


def test_lines_are_counted_and_the_last_kept(tmp_path):
    lines = LogTail(tmp_path / "bad_steps.jsonl", keep=2)
    lines.update()
    assert lines.count == 0
    write_metrics(lines.path, [{"step": n} for n in range(5)])
    append(lines.path, '{"step": 5')
    lines.update()
    assert lines.count == 5 and list(lines.last) == [{"step": 3}, {"step": 4}]
    append(lines.path, "}\n")
    lines.update()
    assert lines.count == 6 and lines.last[-1] == {"step": 5}
    write_metrics(lines.path, [{"step": 9}])
    lines.update()
    assert lines.count == 1 and list(lines.last) == [{"step": 9}]
