"""The names in a run's folder: parsed as they are made, spelled out in one file, read without PyTorch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from recorded import record

from unigen.files import aside_of, draft_of, leftover
from unigen.model.run_options import RUN_OPTIONS
from unigen.outputs import OUTPUTS
from unigen.runs import layout

ROOT = Path(__file__).parents[2]
# Files that state a name because layers below runs/ need it.
STATE = {"runs/layout.py", "model/storage.py", "model/run_options.py", "files.py", "outputs.py"}


def test_names_are_parsed_as_they_are_made():
    for n in (0, 7, 1_000_000):
        assert layout.step_of(layout.step_name(n)) == n and layout.is_checkpoint(layout.step_name(n))
        assert layout.rank_of(layout.heartbeat_file(n)) == layout.rank_of(layout.stack_file(n)) == n
        assert layout.is_earlier(layout.earlier_name(n))
    assert layout.is_checkpoint(layout.BEST)
    for made, role in ((draft_of, "partial"), (aside_of, "old")):
        hidden = made(Path("run") / "step_3")
        assert hidden.parent == Path("run") and leftover(hidden.name) == ("step_3", role)
        assert layout.unfinished(hidden.name) == ("step_3", role) and layout.is_samples(hidden.name)
    assert draft_of(Path("best"), 7).name == ".best.partial-7"


@pytest.mark.parametrize(
    "name",
    [
        "step_", "step_x", "step_-1", "step_3.old", "xstep_3", "step_3\n", f"step_{10**15}", "step_٣", "old-", "old-1x",
        "rank_.json", "rank_1.json.partial", "rank_12345678.json", ".partial-1", ".step_2.partial-1x", ".x.partial-1",
    ],
)  # fmt: skip
def test_names_that_are_none_are_not_taken_for_one(name: str):
    assert layout.step_of(name) is None and not layout.is_checkpoint(name)
    assert not layout.is_earlier(name) and layout.rank_of(name) is None and layout.unfinished(name) is None


@pytest.mark.slow
def test_nobody_else_spells_them_out():
    """Texts for people may name them; a text that is a name, or the beginning of one, may not stand
    elsewhere."""
    names = {
        layout.METRICS,
        layout.BAD_STEPS,
        layout.BAD_RECORDS,
        layout.MANIFEST,
        "training_config",
        "trainer.json",
    }
    names |= {f"{layout.OPTIONS}.json", "step_", ".partial-", ".old-"}
    found, looked = [], 0
    for path in sorted((ROOT / "unigen").rglob("*.py")):
        place = path.relative_to(ROOT / "unigen").as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                looked += 1
                if node.value in names and place not in STATE:
                    found.append(f"{place}:{node.lineno}: {node.value}")
    assert found == [] and looked > 5000
    # what a data folder's reader knows outputs by, from below, are these names
    assert {(layout.MANIFEST, RUN_OPTIONS), (layout.CONFIG, layout.LOG)} <= set(OUTPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["watch", "--once"], ["ckpt", "ls"]])
def test_who_only_reads_a_run_needs_no_pytorch(command: list[str], tmp_path: Path):
    run = record(tmp_path / "run", 600)
    name, *rest = command
    code = (
        "import sys; from unigen.cli import main; assert main(sys.argv[1:]) == 0;"
        " print({'torch', 'PIL', 'transformers', 'unigen.sequence.plan'} & sys.modules.keys())"
    )
    argv = [sys.executable, "-c", code, name, *rest, str(run)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["set()"], done
    assert "step_500" in done.stdout


def test_the_header_of_a_checkpoint_is_read_without_pytorch(golden: Path):
    code = (
        "import sys; from pathlib import Path; import unigen.runs.checkpoint, unigen.runs.folder;"
        " from unigen.model.storage import scan_folder;"
        " found = scan_folder(Path(sys.argv[1])); print(len(found), sum(s.nbytes for s in found.values()));"
        " print({'torch', 'PIL', 'transformers', 'numpy'} & sys.modules.keys())"
    )
    argv = [sys.executable, "-c", code, str(golden / "model")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    counts, loaded = done.stdout.splitlines()
    assert all(int(n) > 100 for n in counts.split()) and loaded == "set()", done
