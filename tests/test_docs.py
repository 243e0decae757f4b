"""What the documents promise: both languages alike, every link there, every flag real, every command run."""

import dataclasses
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from unigen import cli
from unigen.config import Config, SamplingOptions, known_options

ROOT = Path(__file__).parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCUMENTS = [README, CHINESE, *sorted((ROOT / "docs").glob("*.md"))]
# docs/README.md is the index, one page for both languages.
ENGLISH = [path for path in DOCUMENTS if "zh-CN" not in path.name and path != ROOT / "docs" / "README.md"]
PAIRS = [(path, path.with_name(f"{path.stem}.zh-CN.md")) for path in ENGLISH]

# Commands of the READMEs that another test runs, or that run the tests themselves.
COVERED = {
    "make demo": "tests/commands/demo/test_demo.py",
    "make test": "tests",
    "unigen demo --quick": "tests/commands/demo/test_demo.py",
    "unigen watch outputs/demo/run --html outputs/demo/run.html": "tests/commands/demo/test_demo.py",
    "source .venv/bin/activate": "Makefile",
}
# The workspace of the tests has files where the READMEs say; only what a tiny model and a CPU ask for is
# changed.
TINY_TRAIN = "--max_steps 1 --device cpu --max_image_tokens 16 --num_workers 0 --logging_steps 1"
TINY = {
    "train": TINY_TRAIN,
    "generate": "--max_new_tokens 4 --num_timesteps 3 --height 32 --width 32 --device cpu",
    "check": "--num_workers 0",
    "preview": "--max_image_tokens 16",
    "fetch": "",  # the records of the workspace name no picture of the web
    "cache": "--max_image_tokens 16 --device cpu",
    "watch": "--once",
    "ckpt": "",
}
TINY_ARGUMENTS = [
    ("outputs/unified_training/step_1000", "outputs/unified_training/step_1"),
    ("--nproc_per_node=4", "--nproc_per_node=2"),
]
TINY_PYTHON = [
    ('device="cuda"', 'device="cpu"'),
    ("torch.bfloat16", "torch.float32"),
    ("seed=42", "seed=42, max_pieces=2, max_new_tokens=4, num_timesteps=3, height=32, width=32"),
    ("seed=7", "seed=7, num_timesteps=3"),
    ("understanding_output=True", "understanding_output=True, max_think_token_n=4"),
]


def prose(path: Path) -> str:
    """The document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def headings(path: Path) -> list[tuple[int, str]]:
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", prose(path), re.M)]


def commands(path: Path) -> list[str]:
    """Every command of the bash blocks on one line."""
    text = "".join(body for language, body in blocks(path) if language == "bash").replace("\\\n", " ")
    # a comment has its page's language
    lines = [re.sub(r"(^|\s+)# .*", "", line) for line in text.splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip()]


def table_rows(path: Path) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in re.findall(r"^\| .*\|$", prose(path), re.M)
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
    ours, theirs = ([block for block in blocks(path) if block[0] != "text"] for path in (README, CHINESE))
    assert ours == theirs and {language for language, _ in ours} == {"bash", "python", "json"}


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
    assert is_there(README, "#memory") and is_there(CHINESE, "#显存")


FLAG_TABLES = [README, CHINESE, ROOT / "docs" / "training.md", ROOT / "docs" / "training.zh-CN.md"]


@pytest.mark.parametrize("path", FLAG_TABLES, ids=lambda path: path.name)
def test_the_tables_name_every_flag_and_its_default(path):
    rows = [
        (row[0].strip("`"), row[1])
        for row in table_rows(path)
        if len(row) == 3 and re.fullmatch(r"`\w+`", row[0])
    ]
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    assert sorted(name for name, _ in rows) == sorted(known_options())
    assert [
        (name, shown, defaults[name]) for name, shown in rows if not same_value(shown, defaults[name])
    ] == []


def same_value(cell: str, default: object) -> bool:
    if isinstance(default, bool) or default is None:
        return cell == str(default).lower()
    if isinstance(default, int | float):
        return float(cell) == default
    return cell == default


@pytest.mark.parametrize("name", ["model.md", "model.zh-CN.md"])
def test_the_table_of_sampling_settings_is_the_dataclass(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    table = page[page.index("`unigen.config.SamplingOptions`") :].split("\n\n")[1]
    shown = {}
    for names, default, _ in (line.strip("| ").split(" | ") for line in table.splitlines()[2:]):
        shown |= {setting: default for setting in re.findall(r"`(\w+)`", names)}

    def words(value):
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value).replace("N", "n")

    defaults = {f.name: words(f.default) for f in dataclasses.fields(SamplingOptions)}
    assert shown == defaults | {"think": "false", "do_sample": "false"} and not (
        SamplingOptions.think or SamplingOptions.do_sample
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_in_a_document_exists(path):
    known = {
        name for command in cli.COMMANDS.values() for name in cli.get_type_hints(cli.load(command.options))
    }
    # "--name" stands for any
    known |= {f"no_{name}" for name in known} | {"config", "help", "version", "name", "no_name"}
    known |= {"nproc_per_node", "nnodes"}  # torchrun's
    known |= {"logdir", "project"}  # those of tensorboard and of "trackio show"
    known |= {"nodes", "requeue", "signal", "time"}  # SLURM's
    known |= {
        name
        for script in (ROOT / "benchmarks").glob("*.py")
        for name in re.findall(r'add_argument\("--(\w+)"', script.read_text("utf-8"))
    }
    named = set(re.findall(r"(?<![\w-])--([a-z]+_\w+|[a-z]\w*)(?![\w-])", path.read_text(encoding="utf-8")))
    assert sorted(named - known) == []


def test_the_bars_in_the_readmes_are_the_demos():
    from unigen.commands.demo.exam import BARS, CHANCE

    for path in (README, CHINESE):
        shown = {
            match[0]: (float(row[1]), float(row[2]))
            for row in table_rows(path)
            if (match := re.match(r"\w+_accuracy", row[0]))
        }
        assert shown == {name: (BARS[name], CHANCE[name]) for name in BARS}


@pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)
def test_the_tree_and_the_reading_path_name_what_exists(path):
    tree = next(body for language, body in blocks(path) if language == "text" and "unigen/\n" in body)
    for line in tree.splitlines():
        names = line.strip().split("  ") if line.startswith("  report.py") else [line.strip().split(" ")[0]]
        for name in names:
            assert (ROOT / ("unigen" if line.startswith("  ") else "") / name).exists(), line
    steps = re.findall(r"^\d+\. .*$", prose(path), re.M)
    assert len(steps) >= 8
    for step in steps:
        sources = "".join(
            (ROOT / link).read_text(encoding="utf-8") for link in re.findall(r"\]\((.+?)\)", step)
        )
        for symbol in re.findall(r"`([\w.]+)`(?!\])", step):
            name = symbol.split(".")[-1]
            assert re.search(rf"\b{name}\b", sources), f"{symbol} in: {step}"


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {
        word
        for path in DOCUMENTS
        for word in re.findall(r"(?:^|`)make ([\w-]+)", path.read_text(encoding="utf-8"), re.M)
    }
    assert {"demo", "test"} <= named <= targets


def test_every_command_of_the_readmes_is_run_somewhere():
    kinds = (
        "python train_unified_generation.py",
        *(f"unigen {name}" for name in TINY),
        "torchrun --nproc_per_node=4 train_unified_generation.py",
    )
    assert [line for line in commands(README) if not line.startswith(kinds) and line not in COVERED] == []
    assert [place for place in COVERED.values() if not (ROOT / place).exists()] == []


# The commands themselves, in a folder that looks as the READMEs say.


@pytest.fixture
def workspace(tmp_path, golden, monkeypatch):
    """models/BAGEL-7B-MoT (the tiny checkpoint), data/*.jsonl, the pictures that are named, and the
    scripts."""
    records = json.loads((ROOT / "examples" / "sample_data_format.json").read_text(encoding="utf-8"))
    (tmp_path / "models").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "models" / "BAGEL-7B-MoT").symlink_to(golden / "model")
    (tmp_path / "data" / "pictures").symlink_to(ROOT / "examples" / "pictures")
    for name in ("train", "val"):
        lines = [json.dumps(record) + "\n" for record in records * (3 if name == "train" else 1)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for name in ("recipes", "train_unified_generation.py", "inferencer.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("table.png", "house.png"):
        (tmp_path / name).symlink_to(ROOT / "examples" / "pictures" / "house_day.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path


def tiny(line: str, command: str = "train") -> list[str]:
    for old, new in TINY_ARGUMENTS:
        line = line.replace(old, new)
    extra = TINY[line.split()[1] if line.startswith("unigen") else command]
    if "--resume_from_checkpoint" in line:
        extra = extra.replace("--max_steps 1", "--max_steps 2")
    return shlex.split(line) + shlex.split(extra)


def run_here(words: list[str]) -> int:
    """``unigen ...`` and the guide's script in this process, as an import of PyTorch for each takes longer
    than they do."""
    words = (
        words[1:]
        if words[0] == "unigen"
        else ["train", *words[words.index("train_unified_generation.py") + 1 :]]
    )
    return cli.main(words)


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(workspace, capsys, caplog):
    """Every train and generate command in order: later ones use what earlier ones wrote."""
    lines = [
        line
        for line in commands(README)
        if line.startswith(("unigen ", "python train_")) and line not in COVERED
    ]
    assert len(lines) >= 12
    caplog.set_level(logging.INFO, "unigen")
    for line in lines:
        assert run_here(tiny(line)) == 0, f"{line}\n{capsys.readouterr().err}"
    run = workspace / "outputs" / "unified_training"
    assert (run / "step_1" / "ema.safetensors").exists() and (run / "best" / "ema.safetensors").exists()
    assert (
        "Resumed from outputs/unified_training/step_1 at step 1" in caplog.text
        and (run / "step_2" / "manifest.json").exists()
    )
    assert (workspace / "outputs" / "cat" / "index.html").exists()
    check_layout(run)
    check_python(workspace)


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
    for page in (README, CHINESE):
        listed = next(
            body
            for language, body in blocks(page)
            if language == "text" and body.startswith("outputs/unified_training/")
        )
        heads = {word.rstrip("/") for line in listed.splitlines() for word in line[:23].split()}
        assert sorted(outside - heads) == [] and "step_500" in heads
        assert sorted(name for name in needed if not re.search(rf"(?<![\w.]){re.escape(name)}", listed)) == []
        # a file that is listed beside them comes with --ema
        named = set(re.findall(r"(?<![\w.])\w+\.(?:safetensors|json)\b(?!l)", listed))
        assert named == needed | {"model.safetensors", "config.json"}


def check_python(workspace: Path) -> None:
    """The Python blocks, in order, with the weights of the run as the ``.pt`` file."""
    import torch

    from unigen import load_bagel

    (workspace / "path" / "to").mkdir(parents=True)
    torch.save(
        load_bagel(workspace / "outputs" / "unified_training" / "best").state_dict(),
        workspace / "path" / "to" / "trained_model.pt",
    )
    code = [body for language, body in blocks(README) if language == "python"]
    assert len(code) == 2
    for body in code:
        for old, new in TINY_PYTHON:
            body = body.replace(old, new)
        assert "cuda" not in body
        exec(compile(body, "README.md", "exec"), {"__name__": "__main__"})
    assert (workspace / "winter.png").exists()


DATA_PAGES = [
    "data_formats.md",
    "data.md",
    "check.md",
    "preview.md",
    "fetch.md",
    "cache.md",
    "watch.md",
    "checkpoints.md",
]


@pytest.mark.slow
@pytest.mark.parametrize("page", DATA_PAGES)
def test_the_pages_on_data_from_top_to_bottom(page, workspace, capsys):
    (workspace / "data" / "more").mkdir()
    (workspace / "data" / "more" / "x.jsonl").write_text(
        '{"messages": [{"role": "assistant", "content": "Good day."}]}\n'
    )
    for line in commands(ROOT / "docs" / page):
        if line.startswith("torchrun"):
            code, log = torchrun(workspace, tiny(line, "cache"))
            assert code == 0, log[-2000:]
        else:
            assert run_here(tiny(line)) == 0, f"{line}\n{capsys.readouterr()}"


@pytest.mark.slow
def test_the_torchrun_line_trains_on_two_processes(workspace):
    line = next(line for line in commands(README) if line.startswith("torchrun"))
    assert "--engine fsdp2" in line
    # bf16 on a CPU is slow, and covered above
    code, log = torchrun(workspace, tiny(line.replace("--bf16", "")))
    assert code == 0, log[-2000:]
    assert "2 process(es)" in log
    manifest = json.loads(
        (workspace / "outputs" / "unified_training" / "step_1" / "manifest.json").read_text(encoding="utf-8")
    )
    assert (manifest["engine"], manifest["world"]) == ("fsdp2", 2)


def torchrun(workspace: Path, words: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a ``torchrun`` command."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    process = subprocess.Popen(argv, cwd=workspace, env=env, stderr=subprocess.PIPE, text=True)
    try:
        _, log = process.communicate(timeout=200)
    finally:
        process.terminate()  # torchrun ends its processes when asked to; killed, it would leave them behind
        process.wait(30)
    return process.returncode, log
