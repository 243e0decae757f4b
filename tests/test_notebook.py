"""``examples/quickstart.ipynb``: its cells run one after another, and those that were committed show pictures."""

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SMALLER = {
    "train=1500, val=25": "train=8, val=2",
    "warmup_steps=20": "warmup_steps=1",
    "max_steps=5000": 'max_steps=1, device="cpu"',
    "batch_size=32": "batch_size=2, num_workers=0",
}


def test_the_committed_notebook_shows_what_its_cells_gave():
    assert NOTEBOOK["nbformat"] == 4 and all(cell["execution_count"] for cell in CODE)
    shown = [output for cell in CODE for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(shown) == 3 and len(json.dumps(NOTEBOOK)) < 100_000


@pytest.mark.slow
def test_its_cells_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "shapes", raising=False)
    names: dict = {}
    last = None
    for cell in CODE:
        text = "".join(cell["source"])
        for full, small in SMALLER.items():
            text = text.replace(full, small)
        tree = ast.parse(text)
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if shown is not None:
            last = eval(compile(ast.Expression(shown.value), "cell", "eval"), names)
    sys.modules.pop("shapes", None)
    assert (tmp_path / "outputs" / "shapes" / "best").is_dir()
    assert last is not None and last.width == 3 * 68 + 4
