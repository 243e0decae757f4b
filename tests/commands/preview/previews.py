"""What the tests of the preview share: planners and records."""

import json
import re
from pathlib import Path

from pages import Page

from unigen.commands.preview import command as preview
from unigen.commands.preview.page import write_preview
from unigen.commands.preview.pick import PreviewOptions
from unigen.commands.preview.view import look
from unigen.sequence.draw import RandomKey
from unigen.sequence.pack import pack_blocks
from unigen.sequence.plan import Planner
from unigen.sequence.types import Image, Origin, Pack, Record, Text
from unigen.show.language import Words

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples" / "sample_data_format.json"
PICTURES = ROOT / "examples" / "pictures"
HOUSE = PICTURES / "house_day.png"
SAY = Words("en", "preview")
TIP = re.compile(r"index (\d+) · position (\d+) · id (\d+)(?: · label (\d+))?")


def record(*segments: Text | Image) -> Record:
    return Record(list(segments), Origin(Path("data.jsonl"), 1), "direct")


def packed(entry: Record, number: int, planner: Planner, epoch: int = 0, seed: int = 42) -> Pack:
    """The packed sequence that training makes of the record, without the preview's help."""
    key = RandomKey(seed, epoch, number)
    blocks = planner.fill(entry.sample, planner.outline(entry.sample, planner.token_lengths(entry), key), key)
    return pack_blocks([blocks], planner.tokenizer.special, planner.geometry)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


def page_of(
    tmp_path: Path, planner: Planner, *looks: preview.Look, language: str = "en", model: str | None = "m"
) -> Page:
    options = PreviewOptions(paths=["data.jsonl"], language=language, model_path=model)
    page = Page(write_preview(tmp_path / "preview.html", looks, options, planner).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    return page


def sample_page(tmp_path: Path, entry: Record, planner: Planner, epoch: int = 0, number: int = 0) -> Page:
    view = look(entry, number, planner, RandomKey(42, epoch, number))
    return page_of(tmp_path, planner, preview.Look(number, entry.origin, view, None))
