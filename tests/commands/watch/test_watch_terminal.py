"""The terminal shows what the folder says in any width, and nothing in a folder can steer it."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorded import PROMPTS, record, row, write_checkpoint, write_metrics, write_rank, write_samples

from unigen import cli
from unigen.commands.watch import command
from unigen.commands.watch.health import diagnose, warnings
from unigen.commands.watch.options import WatchOptions
from unigen.commands.watch.terminal import frame
from unigen.figures import figure
from unigen.runs.metrics import Point
from unigen.runs.reader import RunFolder
from unigen.show.curves import AxisRange, Curve, marks, sparkline
from unigen.show.language import Words
from unigen.show.terminal import drawn, width_of

ROOT = Path(__file__).parents[3]


def look(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.update()
    return run


def shown(runs: list[RunFolder], width: int = 120, language: str = "en", colour: bool = False) -> list[str]:
    parts = frame(runs, Words(language, "watch"))
    return "\n".join(drawn(part, width, colour) for part in parts).split("\n")


def test_everything_in_the_folder_is_said(folder):
    lines = shown([look(folder)])
    text = "\n".join(lines)
    for part in (
        "garden", "running", "step 1,240 of 2,000", "62.0%", "time left 37 min", "steps per minute 20.69",
        "waiting for data", "step_500", "step_1000", "best", "88 GB", "29 GB", "node-2", "forward/backward",
        "its gradient norm 41 is a spike", "data/train.jsonl:88", "broken_picture", PROMPTS[0][:20], PROMPTS[1],
        "Here is what I drew after 1200 steps.",
    ):  # fmt: skip
        assert part in text, part
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in rows if "loss" in r][-1]
    for name in ("loss", "text_loss", "learning_rate"):
        (found,) = (line for line in lines if line.startswith(f"{name.replace('_', ' ')} "))
        assert figure(last[name]) in found.split()
    best = min(r["val_loss"] for r in rows if "val_loss" in r)
    assert f"best {figure(best)}" in text
    assert next(line.split() for line in lines if line.startswith("  skipped steps"))[-1] == "×"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [40, 56, 80, 111, 200])
def test_it_fits_any_width(tmp_path, language, width):
    """One run and several, a long Chinese name, a host's name without an end: no line is longer, and columns
    of tables line up."""
    other = record(tmp_path / "运行名称非常长非常长非常长非常长非常长", 50, ranks=1, seed=4)
    write_rank(other, 1, host="h" * 200, step=20)
    runs = [look(record(tmp_path / "garden", 210)), look(other)]
    words = Words(language, "watch")
    for some in ([runs[0]], [runs[1]], runs):
        lines = shown(some, width, language)
        assert max(map(width_of, lines)) <= width
    losses = [figure(run.metrics.log.latest["loss"]) for run in runs]
    found = [next(line for line in lines if loss in line) for loss in losses]
    assert len({width_of(line[: line.index(loss)]) for line, loss in zip(found, losses, strict=True)}) == 1
    header = "\n".join(lines[: lines.index(found[0])])
    assert (words("best") in header) == (width >= 80), "where there is no room, the lesser columns go"


@pytest.mark.parametrize(("lowest", "signed"), [(0.02, False), (0.0, False), (-3.0, True)])
def test_a_scale_goes_below_zero_only_where_a_value_does(tmp_path, lowest, signed):
    """Losses of 9 to 0.02: the room below them does not make the scale of a loss negative."""
    values = [{"step": n + 1, "loss": 9.0 * (1 - n / 40) + lowest * n / 40} for n in range(41)]
    write_metrics(record(tmp_path / "run", 41) / "metrics.jsonl", values)
    (line,) = (line for line in shown([look(tmp_path / "run")], 160) if line.startswith("loss "))
    assert ("-" in line.split(" … ")[0].split()[-1]) == signed, line


def test_a_sparkline_rises_with_its_values():
    curve = Curve(0, False, [Point(n, float(n), n, n) for n in range(8)])
    assert sparkline(curve, (0, 7, AxisRange(0, 7)), 8) == "▁▂▃▄▅▆▇█"
    wide = sparkline(curve, (0, 15, AxisRange(0, 7)), 16)
    assert wide.rstrip() == "▁▂▃▄▅▆▇█" and len(wide) == 16, "what is not there yet is left free"
    assert sparkline(curve, (0, 7, AxisRange(0, 7)), 15)[::2] == "▁▂▃▄▅▆▇█", "the last value stands"
    assert marks([0, 5, 15, 16], (0, 15, AxisRange(0, 7)), 16) == "×    ×         ×"


def test_a_spike_of_one_step_is_not_lost_among_the_others():
    values = [1.0 + 0.01 * math.sin(n) for n in range(2000)]
    values[700] = 9.0
    curve = Curve(0, False, [Point(n, v, v, v) for n, v in enumerate(values)])
    line = sparkline(curve, (0, 1999, AxisRange(0, 9)), 40)
    assert line.index("█") == 14 and set(line[:14] + line[15:]) == {"▂"}


EVIL = "\x1b[2J\x1b]0;owned\x07\u202eevil\u2066 \x9b31m\nnew\rline\u200b"


def test_nothing_in_a_folder_can_steer_the_terminal(tmp_path):
    folder = record(tmp_path / f"run{EVIL.replace('/', '')}", 50, ranks=2, seed=2)
    write_rank(folder, 1, phase=EVIL, host=EVIL, why=EVIL)
    write_metrics(folder / "bad_steps.jsonl", [{"step": 5, "why": EVIL}])
    write_metrics(folder / "bad_records.jsonl", [{"file": EVIL, "line": EVIL, "code": EVIL, "found": EVIL}])
    write_samples(folder, [60], [EVIL])
    for age in (0, 300):
        write_rank(folder, 1, phase=EVIL, host=EVIL, time=time.time() - age)
        lines = shown([look(folder)], 200) + shown([look(folder), look(folder)], 200)
        assert sum("evil" in line for line in lines) > 4  # a heartbeat with such a host counts for nothing
        assert not {c for line in lines for c in line if not c.isprintable()}


def test_the_state_is_coloured(folder):
    assert "\x1b[32m● running\x1b[0m" in shown([look(folder)], colour=True)[0]
    assert "\x1b[32m● running\x1b[0m" in shown([look(folder), look(folder)], colour=True)[1]


# ---- every state and warning, in both languages


@pytest.mark.parametrize("language", ["en", "zh"])
def test_states_and_warnings_are_said_in_both_languages(tmp_path, language):
    """Dead, hung, stopped, finished, new, and a run with every warning: no text lacks a value, all are
    there."""
    words = Words(language, "watch")
    dead, hung, stopped = (record(tmp_path / name, 60, ranks=2) for name in ("dead", "hung", "stopped"))
    finished, new = record(tmp_path / "finished", 40, total=40, ranks=1), tmp_path / "new"
    for rank in (0, 1):
        write_rank(dead, rank, time=time.time() - 300)
        write_rank(stopped, rank, phase="stopped", why="SIGTERM")
    write_rank(hung, 1, time=time.time() - 400)
    write_rank(finished, 0, phase="finished", step=40, total_steps=40)
    write_metrics(new / "metrics.jsonl", [])
    for folder, name in (
        (dead, "dead"),
        (hung, "hung"),
        (stopped, "stopped"),
        (finished, "finished"),
        (new, "new"),
    ):
        lines = shown([look(folder)], 200, language)
        assert words(name) in lines[0] and diagnose(look(folder)).name == name
        for told in diagnose(look(folder)).why:
            assert words(told.key, **told.values)[:10].strip() in "\n".join(lines)

    ill = record(tmp_path / "ill", 60, ranks=3, min_free_gb=1e9)
    values = [row(n, random.Random(n)) for n in range(1, 900)]
    for r in values[-60:]:
        r |= {"grad_norm": 99.0, "data_wait": 0.4, "skipped": 1.0, "nonfinite": ["loss"], "loss": 1e9}
    values += [{"step": 900 + n, "val_loss": 1.0 + n} for n in range(5)]
    write_metrics(ill / "metrics.jsonl", values)
    (ill / "metrics.jsonl").write_text((ill / "metrics.jsonl").read_text() + "x\n")
    write_rank(ill, 0, time=time.time() + 99, since=time.time() - 500)
    write_rank(ill, 1, step=3)
    (ill / "ranks" / "rank_1.stack.txt").write_text("")
    write_checkpoint(ill, "step_7", 7, age=1)
    run = look(ill)
    found = warnings(run, diagnose(run))
    text = "\n".join(shown([run], 200, language))
    assert len(found) >= 11 and [w.level for w in found] == sorted(w.level for w in found)
    for warning in found:
        assert f"! {words(warning.key, **warning.values)}"[:40] in text


# ---- the command


def test_the_command_prints_and_ends_where_there_is_no_terminal(folder, capsys):
    assert cli.main(["watch", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "running" in out and "\x1b" not in out and max(map(width_of, out.splitlines())) < 200
    assert (
        cli.main(["watch", str(folder.parent), "--language", "zh", "--smooth", "0.9", "--steps", "100:200"])
        == 0
    )
    assert "运行中" in capsys.readouterr().out


def test_the_exit_code_tells_of_a_dead_run(tmp_path, capsys):
    folder = record(tmp_path / "run", 20, ranks=1)
    write_rank(folder, 0, time=time.time() - 300)
    assert cli.main(["watch", str(folder), "--once"]) == 1 and "dead" in capsys.readouterr().out
    assert cli.main(["watch", str(folder), "--html", str(tmp_path / "page.html")]) == 1
    out, err = capsys.readouterr()
    assert out == f"-> {tmp_path / 'page.html'}\n" and err.startswith("run: dead; no heartbeat for")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no run is named"),
        (["gone"], "gone: there is no such folder"),
        (["."], "no run is there"),
        (["run", "--smooth", "1"], "smooth is 1.0"),
        (["run", "--interval", "0"], "interval is 0.0"),
        (["run", "--steps", "9:3"], "steps is '9:3'"),
        (["run", "--steps", "9"], "steps is '9'"),
        (["run", "--steps", "a:b"], "steps is 'a:b'"),
        (["run", "--html", "run"], "html is run, which is a folder"),
        (["run", "--html", "run/metrics.jsonl/x.html"], "cannot be written"),
    ],
)
def test_what_cannot_run_is_exit_code_2(argv, message, tmp_path, monkeypatch, capsys):
    record(tmp_path / "run", 3, ranks=1)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path if argv != ["."] else tmp_path / "deep")
    assert cli.main(["watch", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_steps_may_lack_an_end():
    assert command._resolve(WatchOptions(steps="1_000:")) == (1000, 1 << 53)
    assert command._resolve(WatchOptions(steps=":50")) == (0, 50) and command._resolve(
        WatchOptions(steps="7:7")
    ) == (7, 7)


@pytest.mark.slow
def test_a_look_is_quick_and_needs_no_pytorch(folder, tmp_path):
    """Neither the terminal's view nor a page of small pictures imports PyTorch, PIL or pyarrow."""
    heavy = ["torch", "PIL", "pyarrow", "transformers"]
    code = (
        f"import sys; from unigen.cli import main; main(sys.argv[1:]); print([m for m in {heavy!r} if m in"
        " sys.modules])"
    )
    for extra in ([], ["--html", str(tmp_path / "page.html")]):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        argv = [sys.executable, "-c", code, "watch", str(folder), *extra]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_output_without_our_signs_is_no_error(folder, language):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, "-m", "unigen", "watch", str(folder), "--language", language]
    done = subprocess.run(argv, env=env, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout.isascii() and b"====---" in done.stdout, done.stderr
    assert b"\\u25" not in done.stdout, "bars have plain signs, each as wide as its own"
