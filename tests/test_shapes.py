"""``examples/shapes.py``: what a record says is what its picture shows, the halves are apart, the same seed
writes the same bytes."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from unigen.data.dataset import UnifiedGenerationDataset
from unigen.sequence.images import open_image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shapes():
    """``examples/shapes.py`` as a module."""
    spec = importlib.util.spec_from_file_location("shapes", ROOT / "examples" / "shapes.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "shapes"
    shapes.main([str(folder), "--train", "40", "--val", "10"])
    return folder


def test_a_folder_that_cannot_be_is_told_in_a_line(shapes, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        shapes.main([str(tmp_path / "file" / "x")])
    assert ended.value.code == 2 and "cannot be written (" in capsys.readouterr().err


def seen(shapes, path: Path) -> tuple[str, str, int]:
    """Colour, form and number of the shapes in a picture, from its pixels alone."""
    pixels = np.asarray(open_image(path), float)
    ink = np.abs(pixels - shapes.BACKGROUND).sum(-1)
    ink = ink > ink.max() / 2
    mean = pixels[ink].mean(0)
    colour = min(shapes.COLOURS, key=lambda name: np.abs(mean - shapes.COLOURS[name][1]).sum())
    columns = np.flatnonzero(ink.any(0))
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    part = ink[:, runs[0][0] : runs[0][-1] + 1]
    rows = np.flatnonzero(part.any(1))
    part = part[rows[0] : rows[-1] + 1]
    half = len(part) // 2
    form = "square" if part.mean() > 0.95 else "circle"
    if part[:half].sum() < 0.6 * part[-half:].sum():
        form = "triangle"
    return colour, form, len(runs)


def test_every_record_says_what_its_pictures_show(shapes, folder):
    edits = 0
    for half, scenes in (("train", 40), ("val", 10)):
        data = UnifiedGenerationDataset(folder / f"{half}.jsonl", check_pictures="full")
        statistics = data.statistics()
        assert statistics["tasks"] and len(data) == 5 * scenes and statistics["unread"] == {}
        for line in (folder / f"{half}.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "text_prompt" in record:
                colour, form, count = seen(shapes, folder / record["image_path"])
                number, amount = shapes.COUNTS[count]
                caption, number = record["text_prompt"], "a" if count == 1 else number
                english = caption.startswith(f"{number} {colour} {form}")
                chinese = f"{amount}{shapes.COLOURS[colour][0]}的{shapes.FORMS[form]}" in caption
                assert english or chinese, (caption, colour, form, count)
            elif "input_image" in record:
                step = record["editing_steps"][0]
                before, after = (
                    seen(shapes, folder / path) for path in (record["input_image"], step["result_image"])
                )
                assert before != after and before[2] == after[2]
                new = after[0] if before[1] == after[1] else after[1]
                words = (new, shapes.COLOURS.get(new, [""])[0] or shapes.FORMS.get(new, ""))
                assert any(word and word in step["instruction"] for word in words), step
                edits += 1
    assert edits == 50


def test_the_same_seed_writes_the_same_bytes_and_a_full_folder_is_left_alone(shapes, folder, capsys):
    again = folder.parent / "again"
    shapes.main([str(again), "--train", "40", "--val", "10"])
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 2 + 2 * 50
    assert all((folder / path).read_bytes() == (again / path).read_bytes() for path in files)
    with pytest.raises(SystemExit) as stopped:
        shapes.main([str(again)])
    assert stopped.value.code == 2 and "not empty" in capsys.readouterr().err
