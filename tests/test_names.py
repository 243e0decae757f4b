"""A folder whose name is not UTF-8 (Chinese names from a zip made in GBK), from the data to the pages."""

import json
import os
import shutil
from pathlib import Path

import pytest
from processes import flags, run_command

from unigen.cli import main
from unigen.files import json_of

ROOT = Path(__file__).parents[1]
NAME = os.fsdecode(b"\xca\xfd\xbe\xdd")


def test_json_keeps_characters_and_escapes_what_is_not_utf8():
    assert json_of({"a": "数据"}) == '{"a": "数据"}'
    text = json_of({"a": f"数据/{NAME}"}, indent=1)
    assert text.encode() and json.loads(text) == {"a": f"数据/{NAME}"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / f"data_{NAME}"
    folder.mkdir()
    shutil.copy(ROOT / "examples/sample_data_format.json", folder / f"x{NAME}.json")
    shutil.copytree(ROOT / "examples/pictures", folder / "pictures")
    return folder


@pytest.mark.slow
def test_a_name_that_is_not_utf8_works_to_the_end(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, page = tmp_path / f"run_{NAME}", tmp_path / f"page_{NAME}.html"
    model = str(ROOT / "tests/golden/model")
    for argv in (
        ["check", str(data), "--num_workers", "0", "--output", str(page)],
        ["preview", str(data), "--output", str(tmp_path / f"shown_{NAME}.html"), "--samples", "2"],
        ["fetch", str(data), "--output_dir", str(tmp_path / f"out_{NAME}")],
    ):
        assert main(argv) == 0, capsys.readouterr()
    given = {"model_path": model, "train_data_path": str(data), "output_dir": str(run), "max_steps": 1}
    train = ["train", *flags(given | {"num_workers": 1, "max_image_tokens": 16})]
    assert r"\udcca\udcfd" in run_command(tmp_path / "log", train)
    assert json.loads((run / "config.json").read_text("utf-8"))["train_data_path"] == str(data)
    capsys.readouterr()
    for argv in (
        ["watch", str(run), "--once"],
        ["watch", str(run), "--html", str(tmp_path / f"watched_{NAME}.html")],
        ["ckpt", "ls", str(run)],
        ["ckpt", "verify", str(run)],
        ["ckpt", "export", str(run / "step_1"), str(tmp_path / f"export_{NAME}")],
    ):
        assert main(argv) == 0, capsys.readouterr()
    out, err = capsys.readouterr()
    assert r"\udcca" in out and (out + err).encode("utf-8")
