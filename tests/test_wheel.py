"""What ``pip install .`` gives: all that the program needs, and nothing of the tests' own extras."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = {"pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}  # where the names differ
EXTRAS = ["wandb", "tensorboard", "trackio", "bitsandbytes", "peft", "deepspeed", "sklearn", "scipy"]
EXTRAS += ["sacrebleu", "rouge_score", "nltk", "pytest", "hypothesis"]

# What `pip install torch torchvision transformers accelerate`, the user guide's first line, does not bring.
NOT_OF_THE_GUIDE = ["jsonargparse", "einops", "pyarrow"]

# Takes packages away, as where they are not installed; the arguments are those and a folder to import from.
WITHOUT = """
import sys
absent_ones = sys.argv.pop(1).split()
sys.path.insert(0, sys.argv[1])
from importlib.machinery import PathFinder
class Found:
    find_distributions = PathFinder.find_distributions
    @staticmethod
    def find_spec(name, path=None, target=None):
        absent = name.partition(".")[0] in absent_ones
        return None if absent else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Found if finder is PathFinder else finder for finder in sys.meta_path]
"""
# Runs a command of the wheel as where nothing but the dependencies is installed.
ALONE = f"""{WITHOUT}
import unigen, inferencer, evaluation_metrics, train_unified_generation
for module in (unigen, inferencer, evaluation_metrics):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
from unigen.cli import main
sys.exit(main(sys.argv[2:]))
"""


def names(requirements: list[str]) -> set[str]:
    found = {re.split(r"[\[<>=!~ ;]", text, maxsplit=1)[0].lower() for text in requirements}
    return {MODULES.get(name, name.replace("-", "_")) for name in found}


@pytest.mark.slow
def test_every_package_that_is_imported_is_declared():
    declared = names(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        declared |= names(extra)
    imported: dict[str, str] = {}
    for path in [*(ROOT / "unigen").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0]: path.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported[node.module.partition(".")[0]] = path.name
    strangers = imported.keys() - declared - set(sys.stdlib_module_names) - {"unigen"}
    assert not strangers, {name: imported[name] for name in strangers}


def test_what_an_extra_brings_is_named_where_it_is_missing():
    """A user without it is told the very line that installs what pyproject.toml says of the extra."""
    told: dict[str, set[str]] = {}
    for path in (ROOT / "unigen").rglob("*.py"):
        text = re.sub(r'"\s*\n?\s*f?"', "", path.read_text("utf-8"))  # messages over several lines
        for packages, extra in re.findall(r"pip install ((?:'[^']+' )+)\(the extra (\w+)\)", text):
            told.setdefault(extra, set()).update(re.findall(r"'([^']+)'", packages))
    extras = {name: set(wanted) for name, wanted in PROJECT["optional-dependencies"].items() if name != "dev"}
    assert told == extras


@pytest.mark.slow
def test_the_guides_packages_alone_give_one_line_that_names_what_is_missing(golden: Path, tmp_path: Path):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    run = f"{WITHOUT}\nimport runpy\nsys.argv[:] = sys.argv[2:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    script = str(ROOT / "train_unified_generation.py")
    flags = ["--model_path", str(golden / "model"), "--train_data_path", "data.jsonl", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", run, " ".join([*EXTRAS, *NOT_OF_THE_GUIDE]), str(ROOT), script, *flags],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("unigen: error")]
    assert re.search(rf"({'|'.join(NOT_OF_THE_GUIDE)}) is not installed.*Fix: pip install \.", line)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, built from a copy of the project and laid out as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "unigen", source / "unigen", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, source)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([sys.executable, *build, str(source)], check=True, capture_output=True, timeout=300)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "check"])
def test_the_wheel_works_without_the_extras(wheel: Path, tmp_path: Path, command: str, golden: Path):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    argv = {
        "train": ["train", "--model_path", str(golden / "model"), "--train_data_path", "data.jsonl",
                  "--max_steps", "1", "--device", "cpu", "--num_workers", "0", "--output_dir", "run"],
        "check": ["check", "data.jsonl", "--num_workers", "0", "--output", "check.html"],
    }[command]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, " ".join(EXTRAS), str(wheel), *argv],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = {"train": tmp_path / "run" / "step_1" / "manifest.json", "check": tmp_path / "check.html"}
    assert made[command].is_file()
