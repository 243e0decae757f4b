"""What the documents promise: both languages alike, every link there, every flag real, every command run."""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import re
import runpy
import shlex
import sqlite3
import sys
import types
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import run_command

from unigen import cli
from unigen.config import TOPICS, Config, known_options

ROOT = Path(__file__).parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCUMENTS = [README, CHINESE, *sorted(ROOT.glob("CONTRIBUTING*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# docs/README.md is the index, one page for both languages.
ENGLISH = [path for path in DOCUMENTS if "zh-CN" not in path.name and path != ROOT / "docs" / "README.md"]
PAIRS = [(path, path.with_name(f"{path.stem}.zh-CN.md")) for path in ENGLISH]

# How commands begin that are not run here, and why not. Scripts in blocks of "sh" are for other machines.
NOT_RUN = {
    "make ": "runs the demo, ruff, or these tests",
    "python -m pytest": "runs these tests",
    "python3 -m venv": "makes an environment",
    "pip install": "installs",
    "source .venv/bin/activate": "of a shell; the tests run in the environment",
    "hf download": "29 GB",
    "modelscope download": "29 GB",
    "python tools/write_flags.py": "test_the_pages_of_flags_are_what_the_tool_writes",
    "python tools/write_messages.py": "tests/test_messages.py",
    "python benchmarks/": "tests/test_benchmarks.py",
    "unigen demo": "tests/commands/demo/test_demo.py",
    "unigen watch outputs/demo/run": "tests/commands/demo/test_demo.py",
    "unigen watch outputs/unified_training --serve": "tests/commands/watch/test_watch_serve.py",
    "unigen --help": "tests/test_cli.py",
    "unigen evaluate --model_path models/BAGEL-7B-MoT --compare": "tests/commands/evaluate/test_evaluate.py",
    "unigen evaluate --layout geneval": "tests/commands/evaluate/test_folders.py",
    "torchrun --nproc_per_node=2 -m unigen evaluate": "tests/commands/evaluate/test_evaluate_processes.py",
    "unigen generate --model_path models/BAGEL-7B-MoT --prompts_file": (
        "tests/commands/generate/test_many.py"
    ),
    "torchrun --nproc_per_node=8 -m unigen generate": "tests/commands/generate/test_many.py",
    "torchrun --nnodes=2": "several machines",
    "torchrun --nproc_per_node=8 train_unified_generation.py --config recipe.yaml --engine deepspeed": (
        "tests/training/test_deepspeed.py"
    ),
}
# The workspace of the tests has files where the pages say; only what a tiny model and a CPU ask for is
# changed.
TINY_TRAIN = "--max_steps 1 --device cpu --max_image_tokens 16 --num_workers 0 --logging_steps 1"
TINY = {
    "train": TINY_TRAIN,
    "generate": "--max_new_tokens 4 --num_timesteps 3 --height 32 --width 32 --device cpu",
    "evaluate": "--max_new_tokens 4 --num_timesteps 3 --height 32 --width 32 --device cpu",
    "check": "--num_workers 0",
    "preview": "--max_image_tokens 16",
    "fetch": "",  # the records of the workspace name no picture of the web
    "cache": "--max_image_tokens 16 --device cpu",
    "watch": "--once",
    "ckpt": "",
    "init": "",
    "plan": "",
}
TINY_ARGUMENTS = [("outputs/unified_training/step_1000", "outputs/unified_training/step_1")]
# Commands that name these are made for a tiny model: they run as they stand.
TINY_ALREADY = (
    "recipes/mixed_sources.yaml",
    "shapes",
)
# ... those of the model of drawn shapes with less of it.
SHORT = {
    "shapes.py data/shapes": "shapes.py data/shapes --train 6 --val 1",
    "recipes/shapes.yaml": "recipes/shapes.yaml --batch_size 2 --num_workers 0 --device cpu --warmup_steps 1",
    "--batch_size 32": "--batch_size 2 --num_workers 0 --device cpu",
    "--max_steps 20 --learning_rate": "--max_steps 2 --learning_rate",
    "--max_steps 5000": "--max_steps 2",
    "--max_steps 1500": "--max_steps 2",
    "--warmup_steps 20": "--warmup_steps 1",
    " 1000": " 2",
    "unigen evaluate": "unigen evaluate --num_timesteps 3 --max_new_tokens 4 --device cpu",
    "unigen generate": "unigen generate --num_timesteps 3 --max_new_tokens 4 --device cpu",
}
TINY_PYTHON = [
    ('device="cuda"', 'device="cpu"'),
    ("torch.bfloat16", "torch.float32"),
    ("seed=42", "seed=42, max_pieces=2, max_new_tokens=4, num_timesteps=3, height=32, width=32"),
    ("seed=7", "seed=7, num_timesteps=3"),
    ('device="auto"', 'device="cpu"'),
    ("learning_rate=2e-5", 'max_steps=1, device="cpu", max_image_tokens=16, num_workers=0'),
    (
        'load_planner("models/BAGEL-7B-MoT")',
        'load_planner("models/BAGEL-7B-MoT", DataOptions(max_image_tokens=16))',
    ),
    (
        "from unigen import UnifiedGenerationDataset",
        "from unigen.config import DataOptions\nfrom unigen import UnifiedGenerationDataset",
    ),
    ("understanding_output=True", "understanding_output=True, max_think_token_n=4"),
]


def prose(path: Path) -> str:
    """The document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def shown_outputs(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(command, lines of output) of every block of bash that a block of text follows at once."""
    text = path.read_text(encoding="utf-8")
    for body, output in re.findall(r"^```bash\n([^`]*?)^```\n\n```text\n(.*?)^```$", text, flags=re.M | re.S):
        yield " ".join(body.replace("\\\n", " ").split()), output.splitlines()


def columns(line: str) -> int:
    """How wide a line is: a Chinese character has two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def headings(path: Path) -> list[tuple[int, str]]:
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", prose(path), re.M)]


def commands(path: Path) -> list[str]:
    """Every command of the bash blocks on one line."""
    text = "".join(body for language, body in blocks(path) if language == "bash").replace("\\\n", " ")
    # a comment has its page's language
    lines = [re.sub(r"(^|\s+)# .*", "", line) for line in text.splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip()]


def table_rows(path: Path) -> list[list[str]]:
    return table_rows_of(prose(path))


def table_rows_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in re.findall(r"^\| .*\|$", text, re.M)
    ]


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def relative_links(path: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", prose(path)))
    return [link for link in found if "://" not in link]


def is_there(page: Path, link: str) -> bool:
    """Whether a relative link of ``page`` leads to a file of this project, and to one of its headings where
    it names one."""
    target, _, fragment = link.partition("#")
    file = (page.parent / target).resolve() if target else page
    if not file.exists() or not file.is_relative_to(ROOT):
        return False
    return not fragment or fragment in [anchor(title) for _, title in headings(file)]


def test_every_document_has_a_chinese_twin():
    assert PAIRS and [str(twin) for _, twin in PAIRS if not twin.exists()] == []


@pytest.mark.parametrize(("path", "twin"), PAIRS, ids=lambda path: path.name)
def test_both_languages_have_the_same_headings_and_blocks(path, twin):
    assert [level for level, _ in headings(path)] == [level for level, _ in headings(twin)]
    assert [language for language, _ in blocks(path)] == [language for language, _ in blocks(twin)]
    assert commands(path) == commands(twin)
    assert len(table_rows(path)) == len(table_rows(twin))


def test_both_readmes_show_the_same_code():
    def shown(path: Path) -> list[tuple[str, object]]:  # output is in the reader's language
        return [(kind, body.count("\n") if kind == "text" else body) for kind, body in blocks(path)]

    assert shown(README) == shown(CHINESE)
    assert {language for language, _ in blocks(README)} == {"bash", "json", "python", "text"}


@pytest.mark.parametrize(("path", "twin"), PAIRS, ids=lambda path: path.name)
def test_both_languages_have_the_same_python(path, twin):
    ours, theirs = (
        [body for language, body in blocks(page) if language == "python"] for page in (path, twin)
    )
    if path.name != "data_formats.md":  # its comments are translated
        assert ours == theirs


@pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)
def test_a_readme_is_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if columns(line) > 140] == []
    limits = next(number for number, line in enumerate(lines) if "LoRA" in line and "NF4" in line)
    assert limits < 25, "what is not there yet belongs on the first screen"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_prose_are_short(path):
    lines = [line for line in prose(path).splitlines() if not line.startswith(("|", "![", "    "))]
    assert [line for line in lines if columns(line) > 140] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_picture_is_there(path):
    assert [link for link in relative_links(path) if not is_there(path, link)] == []


def test_a_broken_link_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Two words, one\n[a](b.md) ![c](d.png) [`e`](f.py#g) [web](https://example.org)\n```text\n[x](y.md)\n```\n",
        encoding="utf-8",
    )
    assert relative_links(page) == ["b.md", "d.png", "f.py#g"]
    assert anchor(headings(page)[0][1]) == "two-words-one"
    assert (
        not is_there(README, "nothing.md")
        and not is_there(README, "#nothing")
        and not is_there(README, "../../outside")
    )
    assert is_there(README, "docs/training.md#memory") and is_there(CHINESE, "docs/training.zh-CN.md#显存")


@pytest.fixture(scope="module")
def flags():
    """``tools/write_flags.py`` as a module."""
    spec = importlib.util.spec_from_file_location("write_flags", ROOT / "tools" / "write_flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("language", "words"), [("en", "English"), ("zh", "Chinese")])
def test_the_pages_of_flags_are_what_the_tool_writes(language, words, flags):
    words = getattr(flags, words)()
    page = flags.page(words)
    assert flags.PAGES[language].read_text(encoding="utf-8") == page, "run python tools/write_flags.py"
    if language == "zh":
        assert words.unused() == []


def test_a_chinese_text_that_is_missing_or_too_many_is_found(flags):
    words = flags.Chinese()
    words.table["options"]["RunOptions"]["sede"] = words.table["options"]["RunOptions"].pop("save_steps")
    with pytest.raises(KeyError, match=r"RunOptions\.save_steps"):
        flags.page(words)
    assert "RunOptions.sede" in words.unused()


@pytest.mark.parametrize("name", ["flags.md", "flags.zh-CN.md"])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_of_a_command_is_listed_with_its_default(command, name):
    page = prose(ROOT / "docs" / name)
    section = page[page.index(f"## unigen {command}\n") :].split("\n## ")[0]
    section = re.split(r"\n### .*train_sources", section)[0]
    rows = [row for row in table_rows_of(section) if row[0].startswith("`")]
    options = cli.load_name(cli.COMMANDS[command].options)
    if command != "train":  # and those of topics of training, by a link
        linked = [topic for topic in TOPICS if issubclass(options, topic)]
        assert ("#unigen-train" in section) == bool(linked)
        rows += [(f"`{f.name}`", "", shown(f)) for topic in linked for f in dataclasses.fields(topic)]
    defaults = {field.name: shown(field) for field in dataclasses.fields(options)}
    assert defaults.items() <= {row[0].strip("`"): row[2].replace("必填", "required") for row in rows}.items()


def shown(field: dataclasses.Field) -> str:
    """A default as the pages write it."""
    factory = field.default_factory
    if field.default is dataclasses.MISSING and factory is dataclasses.MISSING:
        return "required"
    value = field.default if factory is dataclasses.MISSING else factory()
    if value in (None, [], ""):
        return "none"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value).replace("e-0", "e-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_page_has_a_table_of_flags(path):
    if not path.name.startswith("flags."):
        tabled = [row[0].strip("`") for row in table_rows(path) if len(row) > 2 and row[0].startswith("`")]
        assert len(set(tabled) & set(known_options())) < 2  # a constant of the model has an option's name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_a_document_exists(path):
    known = {name for command in cli.COMMANDS.values() for name in cli.kinds(cli.load_name(command.options))}
    # "--name" and "--option" stand for any
    known |= {f"no_{name}" for name in known} | {"config", "help", "version", "name", "no_name", "option"}
    known |= {"nproc_per_node", "nnodes"}  # torchrun's
    known |= {"model", "local_dir", "include"}  # those of "modelscope download"
    known |= {"logdir", "project"}  # those of tensorboard and of "trackio show"
    known |= {"nodes", "requeue", "signal", "time"}  # SLURM's
    # of the public scorers of docs/benchmarks.md
    known |= {
        "benchmark_data",
        "edit_json",
        "image_dir",
        "image_filepath_data",
        "input",
        "json_path",
        "method",
    }
    known |= {
        "model_args",
        "models",
        "origin_img_root",
        "outfile",
        "output_file",
        "prompts_json",
        "result_img_folder",
    }
    known |= {"results_dir", "save_path", "tasks", "data", "output"}
    known |= {
        name
        for script in (ROOT / "benchmarks").glob("*.py")
        for name in re.findall(r'add_argument\("--(\w+)"', script.read_text("utf-8"))
    }
    named = set(re.findall(r"(?<![\w-])--([a-z]+_\w+|[a-z]\w*)(?![\w-])", path.read_text(encoding="utf-8")))
    assert sorted(named - known) == []


def test_the_bars_in_the_documents_are_the_demos():
    from unigen.commands.demo.exam import BARS, CHANCE

    for name in ("start.md", "start.zh-CN.md"):
        path = ROOT / "docs" / name
        shown = {
            match[0]: (float(row[1]), float(row[2]))
            for row in table_rows(path)
            if (match := re.match(r"\w+_accuracy", row[0]))
        }
        assert shown == {name: (BARS[name], CHANCE[name]) for name in BARS}


@pytest.mark.parametrize("name", ["architecture.md", "architecture.zh-CN.md"])
def test_the_tree_and_the_reading_paths_name_what_exists(name):
    page = ROOT / "docs" / name
    tree = next(body for language, body in blocks(page) if language == "text" and "unigen/\n" in body)
    named = []
    for line in tree.splitlines():
        if not line.startswith("    "):  # where a line goes on
            named.append(("unigen/" if line.startswith("  ") else "") + line.split()[0].rstrip("/"))
    assert [place for place in named if not (ROOT / place).exists()] == []
    rooms = {path.name for path in (ROOT / "unigen").iterdir() if path.is_dir() and path.name[0] not in "_."}
    assert rooms <= {place.removeprefix("unigen/") for place in named}
    steps = re.findall(r"^\d+\. (?:.+\n)(?:   .+\n)*", prose(page), re.M)
    assert len(steps) >= 12
    for step in steps:
        sources = "".join(
            (page.parent / link).read_text(encoding="utf-8") for link in re.findall(r"\]\((.+?)\)", step)
        )
        for symbol in re.findall(r"`([\w.]+)`(?!\])", step):
            assert re.search(rf"\b{symbol.split('.')[-1]}\b", sources), f"{symbol} in: {step}"


@pytest.mark.parametrize("name", ["architecture.md", "architecture.zh-CN.md"])
def test_the_layers_are_those_that_the_structure_test_asks_for(name):
    import test_structure

    assert ("text", test_structure.LAYERS.lstrip("\n")) in blocks(ROOT / "docs" / name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_project_that_a_page_names_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:unigen|tests|tools|benchmarks|recipes|examples|docs)/[\w./-]*\w)[/`]", text)
    )
    assert sorted(place for place in named if not (ROOT / place).exists()) == []


def test_what_the_architecture_adds_as_an_example_works(monkeypatch, tmp_path, capsys):
    from unigen.commands.table import COMMANDS
    from unigen.training.engine import ENGINES, Engine, open_engine
    from unigen.training.optim import SCHEDULES, learning_rate_at

    for table in (COMMANDS, ENGINES, SCHEDULES):
        for name in ("count", "told", "sqrt"):
            monkeypatch.delitem(table, name, raising=False)
            monkeypatch.setitem(table, name, None)
            monkeypatch.delitem(table, name)
    example = types.ModuleType("an_example_of_the_architecture")
    monkeypatch.setitem(sys.modules, example.__name__, example)
    for language, body in blocks(ROOT / "docs" / "architecture.md"):
        if language == "python":
            exec(compile(body, "architecture.md", "exec"), vars(example))

    @dataclass
    class Wider(Config):  # their names in the options' types, as the table of the page says
        lr_scheduler_type: str = "sqrt"
        engine: str = "told"

    config = Wider(learning_rate=2.0, device="cpu")
    assert learning_rate_at(75, 100, config) == pytest.approx(1.0)
    engine = open_engine(config)
    assert isinstance(engine, Engine) and type(engine).__name__ == "Told"
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    assert cli.main(["count", str(tmp_path / "three.txt")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "three.txt"), "3"]


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {
        word
        for path in DOCUMENTS
        for word in re.findall(r"(?:^|`)make ([\w-]+)", path.read_text(encoding="utf-8"), re.M)
    }
    assert {"demo", "test"} <= named <= targets


def why_not(line: str) -> str:
    """Why a command of a page is not run here; empty where it is."""
    return next((reason for start, reason in NOT_RUN.items() if line.startswith(start)), "")


RUN = {path: [line for line in commands(path) if not why_not(line)] for path in ENGLISH}


def test_every_command_is_run_or_has_a_reason_not_to_be():
    kinds = (
        "python train_unified_generation.py",
        "python examples/shapes.py",
        *(f"unigen {name} " for name in TINY),
        "torchrun --nproc_per_node=",
    )
    assert [line for lines in RUN.values() for line in lines if not line.startswith(kinds)] == []
    lines = [line for path in ENGLISH for line in commands(path)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
    assert [
        place for place in NOT_RUN.values() if place.startswith("tests/") and not (ROOT / place).exists()
    ] == []
    assert [path.name for path in ENGLISH if "sh" in dict(blocks(path))] == ["distributed.md"]


# The commands themselves, in a folder that looks as the pages say.


@pytest.fixture
def workspace(tmp_path, golden, monkeypatch):
    """models/BAGEL-7B-MoT (the tiny checkpoint), data/*.jsonl, the pictures that are named, and the
    project's own files."""
    records = json.loads((ROOT / "examples" / "sample_data_format.json").read_text(encoding="utf-8"))
    (tmp_path / "models").mkdir()
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "models" / "BAGEL-7B-MoT").symlink_to(golden / "model")
    (tmp_path / "data" / "pictures").symlink_to(ROOT / "examples" / "pictures")
    for name in ("train", "val"):
        lines = [json.dumps(record) + "\n" for record in records * (3 if name == "train" else 1)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "data" / "more" / "x.jsonl").write_text(
        '{"messages": [{"role": "assistant", "content": "Good day."}]}\n', encoding="utf-8"
    )
    for name in ("recipes", "examples", "tests", "train_unified_generation.py", "inferencer.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("table.png", "house.png"):
        (tmp_path / name).symlink_to(ROOT / "examples" / "pictures" / "house_day.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path


def tiny(line: str, command: str = "train") -> list[str]:
    """The words of a command, with what a tiny model and a CPU ask for."""
    if any(name in line for name in TINY_ALREADY):
        return shlex.split(shortened(line))
    for old, new in TINY_ARGUMENTS:
        line = line.replace(old, new)
    extra = TINY[line.split()[1] if line.startswith("unigen") else command]
    if "--resume_from_checkpoint" in line:
        extra = extra.replace("--max_steps 1", "--max_steps 2")
    return shlex.split(line) + shlex.split(extra)


def shortened(line: str) -> str:
    """A command on the drawn shapes at a reduced size."""
    for full, small in SHORT.items() if "shapes" in line else ():
        line = line.replace(full, small)
    return line


def run_here(words: list[str]) -> int:
    """``unigen ...`` and the guide's script in this process, as an import of PyTorch for each takes longer
    than they do."""
    words = (
        words[1:]
        if words[0] == "unigen"
        else ["train", *words[words.index("train_unified_generation.py") + 1 :]]
    )
    return cli.main(words)


def run_page(path: Path, workspace: Path, capsys, caplog) -> Iterator[tuple[str, str]]:
    """Runs the commands of a page in order, later ones on what earlier ones wrote; (command, what it said)."""
    caplog.set_level(logging.INFO, "unigen")
    for language, body in blocks(path):
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", body)):
            (workspace / name[1]).write_text(body, encoding="utf-8")
    for line in RUN[path]:
        caplog.clear()
        capsys.readouterr()
        if line.startswith("python examples/"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", shortened(line).split()[1:])
                runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
            code, said = 0, capsys.readouterr().out
        elif line.startswith("torchrun"):
            # bf16 on a CPU is slow, and covered elsewhere
            words = tiny(
                re.sub(r"--nproc_per_node=\d", "--nproc_per_node=2", line.replace("--bf16", "")),
                "cache" if "cache" in line else "train",
            )
            script = "train_unified_generation.py"
            argv = (
                ["train", *words[words.index(script) + 1 :]]
                if script in words
                else words[words.index("unigen") + 1 :]
            )
            code, said = 0, run_command(workspace / "printed", argv, 2)
        else:
            code = run_here(tiny(line))
            said = "".join(capsys.readouterr()) + caplog.text
        assert code == 0, f"{path.name}: {line}\n{said[-3000:]}"
        yield line, said


def told(text: str) -> str:
    """Text to compare: numbers are one like the other, and so are blanks."""
    return " ".join(re.sub(r"\d[\d.,:e+-]*", "0", text).split())


def said_as_shown(page: Path, workspace: Path, capsys, caplog) -> int:
    """Runs a page's commands, which say what stands below them; how many outputs these are."""
    outputs = dict(shown_outputs(page))
    shown = len(outputs)
    for line, said in run_page(page, workspace, capsys, caplog):
        for expected in outputs.pop(line, []):  # the log and what is printed come in turn, so in any order
            if expected != "...":
                assert told(expected) in told(said), f"{line}\n{expected}\nis not in\n{said[-4000:]}"
    assert outputs == {}
    return shown


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(workspace, capsys, caplog):
    """Every command, and the output that stands below it, but for its numbers."""
    assert said_as_shown(README, workspace, capsys, caplog) == 2
    run_python(README)
    run = workspace / "outputs" / "unified_training"
    assert (run / "step_1" / "ema.safetensors").exists() and (run / "best" / "ema.safetensors").exists()
    assert (workspace / "outputs" / "cat" / "index.html").exists()
    check_layout(run)


def check_layout(run: Path) -> None:
    """What the run wrote is what "What a run writes" lists, in both languages; a folder of its own has a line
    of its own."""
    from unigen.model.weights import SIDE_FILES

    needed = {
        "ema.safetensors",
        "optimizer.safetensors",
        "trainer.json",
        "training_config.json",
        "manifest.json",
    }
    inside = {path.name for path in (run / "step_1").iterdir()}
    assert inside - {"config.json", *SIDE_FILES} == needed
    outside = {path.name for path in run.iterdir() if not path.name.startswith((".", "step_"))}
    assert {"config.json", "metrics.jsonl", "best", "ranks"} <= outside
    for name in ("training.md", "training.zh-CN.md"):
        listed = next(
            body
            for language, body in blocks(ROOT / "docs" / name)
            if language == "text" and body.startswith("outputs/unified_training/")
        )
        heads = {word.rstrip("/") for line in listed.splitlines() for word in line[:23].split()}
        assert sorted(outside - heads) == [] and "step_500" in heads
        assert sorted(name for name in needed if not re.search(rf"(?<![\w.]){re.escape(name)}", listed)) == []
        # a file that is listed beside them comes with --ema
        named = set(re.findall(r"(?<![\w.])\w+\.(?:safetensors|json)\b(?!l)", listed))
        assert named == needed | {"model.safetensors", "config.json", "probe.json"}


OF_THEIR_OWN = [README, *(ROOT / "docs" / name for name in ("generating.md", "extending.md", "tutorial.md"))]
PAGES = [path for path in ENGLISH if RUN[path] and path not in OF_THEIR_OWN]


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_from_top_to_bottom(path, workspace, capsys, caplog):
    said = dict(run_page(path, workspace, capsys, caplog))
    run = workspace / "outputs" / "unified_training"
    if path.name == "checkpoints.md":
        resumed = next(text for line, text in said.items() if line.endswith("step_1000"))
        assert "Resumed from outputs/unified_training/step_1 at step 1" in resumed
    if path.name == "distributed.md":
        manifest = json.loads((run / "step_2" / "manifest.json").read_text(encoding="utf-8"))
        assert (manifest["engine"], manifest["world"]) == ("fsdp2", 2)


def run_python(page: Path) -> int:
    """Runs the blocks of Python of a page, and returns their number."""
    code = [body for language, body in blocks(page) if language == "python"]
    for body in code:
        for old, new in TINY_PYTHON:
            body = body.replace(old, new)
        assert "cuda" not in body
        exec(compile(body, page.name, "exec"), {"__name__": "__main__"})
    return len(code)


@pytest.mark.slow
def test_the_page_on_python_from_top_to_bottom(workspace, capsys):
    train = "unigen train --model_path models/BAGEL-7B-MoT --train_data_path data/train.jsonl --val_data_path data/val.jsonl"
    assert run_here(tiny(train)) == 0
    assert run_python(ROOT / "docs" / "python.md") == 3
    said = capsys.readouterr().out.splitlines()
    assert sum("val.jsonl:" in line for line in said) == 7


@pytest.mark.slow
def test_the_page_on_generating_from_top_to_bottom(workspace, capsys, caplog):
    """The commands, then the blocks of Python, with the weights of a run as the ``.pt`` file."""
    import torch

    from unigen import load_bagel

    run = workspace / "outputs" / "unified_training"
    train = "unigen train --model_path models/BAGEL-7B-MoT --train_data_path data/train.jsonl --val_data_path data/val.jsonl"
    assert run_here(tiny(train)) == 0
    page = ROOT / "docs" / "generating.md"
    assert len(list(run_page(page, workspace, capsys, caplog))) == 3
    assert (workspace / "outputs" / "cat" / "index.html").exists()
    (workspace / "path" / "to").mkdir(parents=True)
    torch.save(load_bagel(run / "best").state_dict(), workspace / "path" / "to" / "trained_model.pt")
    assert run_python(page) == 2
    assert (workspace / "winter.png").exists()


@pytest.mark.slow
def test_the_tutorial_from_top_to_bottom(workspace, capsys, caplog):
    """Every command at a reduced size, and the output that stands below it, but for its numbers."""
    said_as_shown(ROOT / "docs" / "tutorial.md", workspace, capsys, caplog)
    for place in (
        "preview.html",
        "run.html",
        "outputs/shapes_evaluation/report.html",
        "outputs/edited/index.html",
    ):
        assert (workspace / place).exists(), place


@pytest.mark.slow
@pytest.mark.usefixtures("no_plugins_after")
def test_the_page_on_plugins_from_top_to_bottom(workspace, capsys, caplog):
    """Each example adds its row, from the command line; and a resume asks for it."""
    (workspace / "signs.jsonl").write_text('{"sign": "house.png", "reads": "STOP"}\n', encoding="utf-8")
    with contextlib.closing(sqlite3.connect(workspace / "captions.sqlite")) as database:
        database.execute("CREATE TABLE records (text_prompt TEXT, image_path TEXT)")
        database.executemany("INSERT INTO records VALUES (?, 'house.png')", [("a house",), ("a hut",)])
        database.commit()
    page = ROOT / "docs" / "extending.md"
    said = dict(run_page(page, workspace, capsys, caplog))
    for line, output in shown_outputs(page):
        assert all(told(expected) in told(said[line]) for expected in output)
    assert "captions.sqlite" in (workspace / "rows.html").read_text(encoding="utf-8")
    scores = json.loads((workspace / "mentions" / "metrics.json").read_text(encoding="utf-8"))
    assert "mentions[n=" in json.dumps(scores)
    first = (workspace / "outputs" / "tracked" / "losses.csv").read_text().split(",")
    assert first[0] == "1" and float(first[1]) > 0
    config = json.loads((workspace / "outputs" / "lion" / "config.json").read_text(encoding="utf-8"))
    assert (config["plugin"], config["optimizer"]) == (["my_optimizer"], "lion")
    resume = RUN[page][-2].replace(" --plugin my_tracker", "") + " --resume_from_checkpoint auto"
    assert run_here(tiny(resume)) == 2 and "--plugin my_tracker" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["limits.md", "limits.zh-CN.md"])
def test_every_limit_is_a_constant_where_the_page_says(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`[、，,]? ?)+)`([\w/]+\.py)` \|", page, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| `", page, re.MULTILINE)) >= 20
    for names, file in rows:
        code = (ROOT / "unigen" / file).read_text(encoding="utf-8")
        for constant in re.findall(r"\w+", names):
            assert re.search(rf"^\s*{constant}(, \w+)* = ", code, re.MULTILINE), (constant, file)
