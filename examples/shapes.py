"""Writes a small set of drawn shapes, to train a small model on: ``python examples/shapes.py data/shapes``.

``train.jsonl`` and ``val.jsonl`` hold captions, dialogues about a picture, and edits, in English and in
Chinese, in the formats of docs/data_formats.md; the pictures lie beside them. The same seed writes the same
files. Pillow draws them; nothing else is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIDE, FINE = 16, 8  # pixels of a picture's side; drawn eight times as large and averaged down
BACKGROUND = (244, 244, 240)
# Each with its Chinese name.
COLOURS = {
    "red": ("红色", (214, 40, 40)),
    "green": ("绿色", (46, 150, 70)),
    "blue": ("蓝色", (40, 90, 210)),
    "yellow": ("黄色", (246, 196, 30)),
}
FORMS = {"circle": "圆", "square": "正方形", "triangle": "三角形"}
PLACES = {
    "on the left": ("左边", (5, 8)),
    "on the right": ("右边", (11, 8)),
    "at the top": ("上面", (8, 5)),
    "at the bottom": ("下面", (8, 11)),
    "in the middle": ("中间", (8, 8)),
}
COUNTS = {1: ("one", "一个"), 2: ("two", "两个")}


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one shape in a place, or (``place`` is empty) two of a kind beside each other."""

    colour: str
    form: str
    place: str = ""
    count: int = 1
    shift: tuple[float, float] = (0.0, 0.0)  # in pixels
    radius: float = 3.8

    @classmethod
    def draw_lots(cls, lots: random.Random) -> Scene:
        count = lots.choice((1, 1, 1, 2))
        return cls(
            lots.choice(list(COLOURS)),
            lots.choice(list(FORMS)),
            lots.choice(list(PLACES)) if count == 1 else "",
            count,
            (lots.uniform(-0.4, 0.4), lots.uniform(-0.4, 0.4)),
            lots.uniform(3.6, 4.0) if count == 1 else lots.uniform(3.0, 3.3),
        )

    def centres(self) -> list[tuple[float, float]]:
        x, y = PLACES[self.place][1] if self.place else (SIDE / 2, SIDE / 2)
        step = SIDE / 2
        row = [(n - (self.count - 1) / 2) * step for n in range(self.count)]
        return [(x + offset + self.shift[0], y + self.shift[1]) for offset in row]

    def picture(self) -> Image.Image:
        large = Image.new("RGB", (SIDE * FINE, SIDE * FINE), BACKGROUND)
        pen, r = ImageDraw.Draw(large), self.radius
        for x, y in self.centres():
            if self.form == "circle":
                corners = [(x + r * math.sin(a / 10), y + r * math.cos(a / 10)) for a in range(63)]
            elif self.form == "square":
                half = 0.9 * r
                corners = [
                    (x - half, y - half),
                    (x + half, y - half),
                    (x + half, y + half),
                    (x - half, y + half),
                ]
            else:
                corners = [(x, y - r), (x + 1.05 * r, y + 0.9 * r), (x - 1.05 * r, y + 0.9 * r)]
            pen.polygon([(FINE * px, FINE * py) for px, py in corners], COLOURS[self.colour][1])
        return large.resize((SIDE, SIDE), Image.Resampling.BOX)

    def caption(self, chinese: bool) -> str:
        """ "a red circle on the left", "左边一个红色的圆"."""
        number, amount = COUNTS[self.count]
        if chinese:
            place = PLACES[self.place][0] if self.place else ""
            return f"{place}{amount}{COLOURS[self.colour][0]}的{FORMS[self.form]}"
        if self.count > 1:
            return f"{number} {self.colour} {self.form}s"
        return f"a {self.colour} {self.form} {self.place}"

    def questions(self, chinese: bool) -> list[tuple[str, str]]:
        number, amount = COUNTS[self.count]
        asked = [
            ("what colour is it?", self.colour, "是什么颜色？", COLOURS[self.colour][0]),
            ("what shape is it?", self.form, "是什么形状？", FORMS[self.form]),
            ("how many are there?", number, "有几个？", amount),
        ]
        if self.place:
            asked.append(("where is it?", self.place, "在哪里？", PLACES[self.place][0]))
        return [(row[2], row[3]) if chinese else (row[0], row[1]) for row in asked]

    def edited(self, lots: random.Random, chinese: bool) -> tuple[str, Scene]:
        """An instruction, and what the picture shows after it."""
        many = "s" * (self.count > 1)
        if lots.random() < 0.5:
            colour = lots.choice([name for name in COLOURS if name != self.colour])
            after = replace(self, colour=colour)
            said = f"make the {self.form}{many} {colour}"
            return (f"把{FORMS[self.form]}变成{COLOURS[colour][0]}" if chinese else said), after
        form = lots.choice([name for name in FORMS if name != self.form])
        said = f"turn the {self.form}{many} into {'' if many else 'a '}{form}{many}"
        return (f"把{FORMS[self.form]}变成{FORMS[form]}" if chinese else said), replace(self, form=form)


def records(
    scene: Scene, name: str, lots: random.Random
) -> Iterator[tuple[dict[str, Any], dict[str, Scene]]]:
    """The records about one scene, each with the pictures that it names."""
    image = f"pictures/{name}.png"
    for chinese in (False, True):
        yield {"text_prompt": scene.caption(chinese), "image_path": image}, {image: scene}
    for chinese in (False, True):
        turns: list[dict[str, str]] = [{"role": "user", "type": "image", "image_path": image}]
        for question, answer in lots.sample(scene.questions(chinese), 3):
            turns.append({"role": "user", "type": "text", "content": question})
            turns.append({"role": "assistant", "type": "text", "content": answer})
        yield {"conversations": turns}, {image: scene}
    instruction, after = scene.edited(lots, lots.random() < 0.5)
    result = f"pictures/{name}_edited.png"
    steps = [{"instruction": instruction, "result_image": result}]
    yield {"input_image": image, "editing_steps": steps}, {image: scene, result: after}


def write(folder: Path, train: int, val: int, seed: int) -> dict[str, int]:
    """Writes both halves; how many records each has. No scene of one half is in the other."""
    lots, seen, counts = random.Random(seed), set[Scene](), {}
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for half, scenes in (("train", train), ("val", val)):
        lines = []
        for n in range(scenes):
            scene = Scene.draw_lots(lots)
            assert scene not in seen, "two scenes alike: shift and size are drawn from a continuum"
            seen.add(scene)
            for record, pictures in records(scene, f"{half}_{n:04d}", lots):
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
                for path, shown in pictures.items():
                    if not (folder / path).exists():
                        shown.picture().save(folder / path)
        (folder / f"{half}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[half] = len(lines)
    return counts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a small set of drawn shapes to train on.")
    parser.add_argument("folder", type=Path, help="where to; a new or an empty folder")
    parser.add_argument("--train", type=int, default=1500, help="scenes to learn from, five records each")
    parser.add_argument("--val", type=int, default=25, help="scenes held back")
    parser.add_argument("--seed", type=int, default=1, help="the same seed writes the same files")
    options = parser.parse_args(argv)
    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        parser.error(f"{options.folder} is there and not empty. Fix: name a new folder")
    try:
        written = write(options.folder, options.train, options.val, options.seed)
    except OSError as error:
        parser.error(f"{options.folder} cannot be written ({error.strerror}). Fix: name another folder")
    for half, count in written.items():
        print(f"{options.folder / half}.jsonl: {count:,} records")


if __name__ == "__main__":
    main()
