"""The shape of the house: which way imports point, where heavy packages live, how long a file may be."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A line is a layer. A file imports from the lines below its own and from its own folder, never beside it or
# above.
LAYERS = """
version
others messages plugins printing figures
values
topics
rules
config files recipe bars schema
foreign outputs remote
sequence
model data
cache runs inference
evaluation tracking show
training
commands
cli __init__
__main__
"""
LAYER = {part: number for number, line in enumerate(LAYERS.split("\n")) for part in line.split()}

# Package -> the only files (relative to unigen/, "model/*" for a folder) that import it.
HOMES = {
    "PIL": ["sequence/images.py", "show/raster.py"],
    "torch.distributed": [
        "runs/channel.py",
        "training/engine.py",
        "training/fsdp.py",
        "training/deepspeed.py",
    ],
    "deepspeed": ["training/deepspeed.py"],
    "bitsandbytes": ["model/quantise.py", "training/adam8bit.py"],
    "peft": ["model/lora.py"],
    "wandb": ["tracking/services.py"],
    "trackio": ["tracking/services.py"],
    "tensorboard": ["tracking/tensorboard.py"],
    "torch.utils.tensorboard": ["tracking/tensorboard.py"],
    "sklearn": ["commands/demo/*"],
    "transformers": ["sequence/tokens.py", "model/*", "evaluation/towers.py"],
    "sacrebleu": ["evaluation/text.py"],
    "rouge_score": ["evaluation/text.py"],
    "nltk": ["evaluation/text.py"],
    "tokenizers": ["commands/init/model.py"],
    "jsonargparse": ["cli.py"],
    "pyarrow": ["data/tables.py", "data/unpack.py"],
    "socket": ["commands/fetch/client.py"],
    "ssl": ["commands/fetch/client.py"],
    "http": ["commands/fetch/client.py", "commands/watch/serve.py"],
    "urllib.request": ["commands/fetch/client.py"],
    "urllib3": ["commands/fetch/client.py", "evaluation/judge.py"],
    "requests": ["commands/fetch/client.py"],
    "idna": ["commands/fetch/addresses.py"],
    "filelock": ["files.py"],
    "fsspec": ["remote.py"],
    "jinja2": ["show/pages.py"],
    "rich": ["bars.py", "show/terminal.py"],
    "fcntl": ["files.py"],
}
FORBIDDEN = ["pickle", "torchvision"]
MAX_LINES = 600
# Functions that every room may have: they do the same in each.
IN_EVERY_ROOM = {
    "run", "write", "report", "more", "as_json",  # of a command, its page, its report, its JSON
    "open_file", "parse_json", "row_at",  # by the rules of the room
    "verify",  # the command, and the metric that is called so
}  # fmt: skip


def imports(path: Path, package: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of a file, late ones too; ``from a import b`` gives ``a.b``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = path.relative_to(package.parent).parts[: -node.level]
                base = ".".join([*inside, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def part_of(path: Path, package: Path) -> str:
    """The top-level module or folder of the package a file belongs to."""
    return path.relative_to(package).with_suffix("").parts[0]


def wrong_ways(package: Path) -> list[str]:
    """Imports that point beside or above the layer of their file."""
    found = []
    for path in sorted(package.rglob("*.py")):
        part = part_of(path, package)
        if part not in LAYER:
            found.append(f"{path.name}: {part} has no place in the layers")
            continue
        for line, name in imports(path, package):
            if not is_under(name, "unigen"):
                continue
            target = [*name.split("."), "__init__"][1]
            target = target if target in LAYER else "__init__"  # a name of the package itself
            if target != part and LAYER[target] >= LAYER[part]:
                found.append(f"{path.relative_to(package)}:{line}: {part} must not import {target}")
    return found


def circles(package: Path) -> list[str]:
    """Imports that lead back to the file they stand in, late ones and those for types too."""
    files = {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)): path
        for path in package.rglob("*.py")
    }
    arrows = {
        name: {(line, target) for line, target in imports(path, package)} for name, path in files.items()
    }
    leads: dict[str, set[str]] = {}
    for name in files:
        ahead = [name]
        leads[name] = set()
        while ahead:
            for _, target in arrows[ahead.pop()]:
                target = target if target in files else target.rpartition(".")[0]
                if target in files and target not in leads[name]:
                    leads[name].add(target)
                    ahead.append(target)
    return [
        f"{name}:{line}: {target} leads back here"
        for name in sorted(files)
        for line, target in sorted(arrows[name])
        if name in leads.get(target if target in files else target.rpartition(".")[0], set())
    ]


def strangers(package: Path) -> list[str]:
    """Imports of a heavy package outside its home, or of one that is not used at all."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        for line, name in imports(path, package):
            for heavy, homes in HOMES.items():
                at_home = any(
                    place == home or (home.endswith("/*") and place.startswith(home[:-1])) for home in homes
                )
                if is_under(name, heavy) and not at_home:
                    found.append(f"{place}:{line}: {heavy} belongs in {', '.join(homes)}")
            found += [
                f"{place}:{line}: {package_name} is not used here"
                for package_name in FORBIDDEN
                if is_under(name, package_name)
            ]
    return found


def namesakes(package: Path) -> list[str]:
    """Classes, types (``Row = dict[str, Any]``) and public functions of one name in several files."""
    homes: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            for name in [getattr(target, "name", getattr(target, "id", "")) for target in targets]:
                public = isinstance(node, ast.FunctionDef) and not name.startswith("_")
                if re.match("_?[A-Z][a-z]", name) or (public and name not in IN_EVERY_ROOM):
                    homes.setdefault(name, []).append(path.relative_to(package).as_posix())
    return [f"{name}: {', '.join(files)}" for name, files in sorted(homes.items()) if len(files) > 1]


def oversized(package: Path) -> list[str]:
    lines = {
        path.relative_to(package).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in package.rglob("*.py")
    }
    return [f"{name}: {count} lines" for name, count in sorted(lines.items()) if count > MAX_LINES]


@pytest.mark.slow
def test_imports_point_one_way():
    assert wrong_ways(ROOT / "unigen") == []


@pytest.mark.slow
def test_no_import_leads_back():
    assert circles(ROOT / "unigen") == []


@pytest.mark.slow
def test_heavy_packages_stay_in_their_files():
    assert strangers(ROOT / "unigen") == []


def test_files_are_short_and_named_for_what_they_hold():
    assert oversized(ROOT / "unigen") == []
    assert [
        path
        for path in (ROOT / "unigen").rglob("*")
        if path.stem in ("utils", "util", "helpers", "common", "misc")
    ] == []


@pytest.mark.slow
def test_a_name_stands_for_one_thing():
    assert namesakes(ROOT / "unigen") == []


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by their names alone; with two it runs none."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.slow
def test_every_module_says_what_it_is():
    empty = [path for path in (ROOT / "unigen").rglob("*.py") if path.read_text(encoding="utf-8").strip()]
    assert empty, "no modules found: the checks above looked at nothing"
    assert [
        str(path) for path in empty if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ] == []


# The checks themselves must be able to fail.


def house(folder: Path, **files: str) -> Path:
    package = folder / "unigen"
    for name, text in files.items():
        path = package / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model__bagel", "from unigen.data.dataset import X"),
        ("model__bagel", "from unigen.data import dataset"),
        ("model__bagel", "from unigen import data"),
        ("model__bagel", "from ..data import dataset"),
        ("model__bagel", "import unigen.data.dataset as d"),
        ("data__dataset", "def f():\n    from unigen.model import bagel"),
        ("sequence__pack", "import unigen.model.flow"),
        ("config", "from unigen.sequence import types"),
        ("inference__sampler", "from unigen.training import losses"),
        ("evaluation__text", "from unigen.cli import main"),
        ("config", "from unigen import __version__"),
        ("model__bagel", "import unigen"),
        ("show__pages", "from unigen.tracking import console"),
        ("commands__demo__exam", "from unigen import cli"),
        ("helper", "x = 1"),
    ],
)
def test_a_wrong_way_is_found(name, text, tmp_path):
    assert len(wrong_ways(house(tmp_path, **{name: text}))) == 1


def test_right_ways_are_not_found(tmp_path):
    files = {
        "sequence__tokens": "from unigen.config import UserError\nfrom unigen.sequence import types",
        "model__bagel": "from unigen.sequence.types import Pack\nfrom . import mot\nfrom .mot import Decoder",
        "training__trainer": (
            "from unigen.evaluation import text\nfrom unigen.data import loader\nfrom unigen.inference import"
            " sampler"
        ),
        "commands__demo": "from unigen.show import pages\nfrom unigen.commands.train import train",
        "cli": "from unigen.version import __version__",
    }
    assert wrong_ways(house(tmp_path, **files)) == []


@pytest.mark.parametrize(
    "back",
    [
        "from unigen.watch.command import Options",
        "def f():\n    from unigen.watch import command",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import unigen.watch.command",
        "from .command import Options",
    ],
)
def test_an_import_that_leads_back_is_found(back, tmp_path):
    files = {
        "watch__command": "from unigen.watch import folder",
        "watch__folder": "import unigen.watch.page",
        "watch__page": back,
    }
    assert len(circles(house(tmp_path, **files, watch__words="from unigen.watch import page"))) == 3


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import fsdp",
        "def f():\n    import wandb",
        "from PIL import Image",
        "import peft",
        "from sklearn.datasets import load_digits",
        "import transformers",
        "import pickle",
    ],
)
def test_a_stranger_is_found(text, tmp_path):
    assert len(strangers(house(tmp_path, training__losses=text))) == 1


def test_at_home_nobody_is_a_stranger(tmp_path):
    files = {
        "sequence__images": "from PIL import Image",
        "model__weights": "import transformers",
        "tracking__services": "import wandb",
    }
    assert strangers(house(tmp_path, **files)) == []


def test_a_long_file_is_found(tmp_path):
    assert oversized(house(tmp_path, config="x = 1\n" * (MAX_LINES + 1))) == [
        f"config.py: {MAX_LINES + 1} lines"
    ]


def test_namesakes_are_found(tmp_path):
    files = {
        "model__source": "class Source: ...\ndef told(): ...\ndef run(): ...\ndef _own(): ...",
        "topics": "Source = str\ndef told(): ...\ndef run(): ...\ndef _own(): ...",
        "data__tar": "from unigen.topics import Source",
    }
    assert namesakes(house(tmp_path, **files)) == [
        "Source: model/source.py, topics.py",
        "told: model/source.py, topics.py",
    ]
