"""docs/metrics.md: its code runs, and its tables name what there is."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from pictures import noise

import evaluation_metrics
from unigen.evaluation.results import Result

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_code_of_the_page_runs(golden, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "BAGEL-7B-MoT").symlink_to(golden / "model")
    for name in ("drawn", "real"):
        (tmp_path / name).mkdir()
        for number in range(5):
            noise(48, 40, number + 10 * (name == "real")).save(tmp_path / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    said = []
    for code in re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, PAGE.name, "exec"), {})
        said.append(output.getvalue())
    assert len(said) == 2
    assert "rougeL[f1|" in said[0] and "no difference shown with n = 3" in said[0]
    assert "biased upwards" in said[1] and "too few to extrapolate" in said[1]


def test_the_tables_name_every_metric_and_field():
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    metrics = {
        name
        for name in evaluation_metrics.__all__
        if hasattr(getattr(evaluation_metrics, name), "__wrapped__")
    }
    assert metrics <= named
    assert named - metrics <= set(Result.__dataclass_fields__)
    assert set(Result.__dataclass_fields__) - named == {"n", "pairs", "parts", "rule", "rows", "function"}
