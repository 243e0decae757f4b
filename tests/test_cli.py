"""The command as its user meets it: help, exit codes, one-line errors, the names the guide promises."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import unigen
from unigen import cli
from unigen.commands.demo import command
from unigen.config import Config, ConfigError, UserError, known_options
from unigen.messages import speaking, spoken
from unigen.printing import width_of

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "transformers", "diffusers", "PIL", "sklearn", "wandb", "rich", "jinja2"]


def python(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def test_overview_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, row in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(row.summary)}$", text, re.M)
    assert cli.main([]) == 2


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"unigen {unigen.__version__}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(name, capsys):
    command = cli.COMMANDS[name]
    assert cli.main([name, "--seed", "1", "--help"]) == 0
    text = capsys.readouterr().out
    for option in cli.kinds(cli.load_name(command.options)):
        assert f"--{option} " in text, option
    assert "--config" in text and text.replace(" \\\n   ", "").rstrip().endswith(command.example)
    foot = text.partition("\nrecipes:")[2].splitlines()
    assert max(map(width_of, foot)) <= 80 and any("--language zh" in line for line in foot)
    assert "+ " not in text and "[ITEM" not in text


def test_help_of_train_is_grouped_and_says_what_the_docstrings_say(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["train", "-h"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    titles = [
        "Which model, and which of its parts learn",
        "How a record becomes tokens",
        "Which data is read",
        "How it is packed",
        "How the weights move",
    ]
    titles += ["Where and how it runs", "Who is told"]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert places[4] < text.index("--learning_rate") < places[5]
    for topic in cli.TOPICS:
        for option, help_line in re.findall(r"^ {8}(\w+): (.+)$", topic.__doc__, re.M):
            assert option in known_options() and " ".join(help_line.split()) in text


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["demo", "--help"], ["train", "--lerning_rate", "1"], ["train"]]
)
def test_help_and_errors_need_no_heavy_package(argv):
    code = (
        f"import sys; from unigen.cli import main; main({argv!r}); print([m for m in {HEAVY!r} if m in"
        " sys.modules])"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


# the last lines are a training's alone, and are passed over
RECIPE = """\
model_path: m
train_sources:
- {path: a.jsonl, fields: {text_prompt: caption}}
- {path: b.jsonl, name: more, weight: 2}
val_data_path: v.jsonl
val_split: test
max_image_tokens: 64
output_dir: out
batch_size: 3
learning_rate: 1e-4
lora_rank: 8
"""


@pytest.mark.parametrize("command", ["check", "preview", "evaluate"])
def test_the_recipe_of_a_training_gives_its_data_and_the_rest_is_passed_over(command, tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE)
    kind = cli.load_name(cli.COMMANDS[command].options)
    options, config = (cli.parse_options(one, ["--config", str(recipe)]) for one in (kind, Config))
    if command == "evaluate":
        assert (options.data_path, options.split) == ("v.jsonl", "test")
        assert (options.output_dir, options.batch_size, options.model_path) == ("outputs/evaluate", 8, None)
        return
    assert options.sources() == config.sources() and options.held_out() == config.held_out()
    assert (options.model_path, options.max_image_tokens) == ("m", 64)
    if command == "check":  # what training decodes is decoded
        recipe.write_text(RECIPE + "check_pictures: full\n")
        told = [
            cli.parse_options(kind, ["--config", str(recipe), *more]).deep for more in ([], ["--no_deep"])
        ]
        assert (options.deep, told) == (None, [True, False])


@pytest.mark.parametrize("command", ["check", "preview"])
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("learnin_rate: 1\n", "unknown option 'learnin_rate'; did you mean learning_rate?"),
        ("weight_decay: much\n", "weight_decay is 'much'"),
        ("train_data_path: c.jsonl\n", "train_sources and train_data_path exclude each other"),
        ("preserve_data_path: c.jsonl\n", "preserve_data_path needs preserve_weight"),
        ("train_also: [norms]\nprobe_data_path: ''\n", "probe_data_path is ''; it is empty"),
        ("paths: [c.jsonl]\n", "paths"),
    ],
)
def test_what_a_training_refuses_of_its_recipe_is_refused_by_what_reads_its_data(
    command, more, words, tmp_path, capsys
):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(RECIPE + more)
    for name in (command, "train"):
        assert cli.main([name, "--config", str(recipe)]) == 2
        assert words in capsys.readouterr().err


def test_other_commands_name_the_one_that_has_an_option(tmp_path, capsys):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("seed: 1\ntrain_data_path: d\n")
    assert cli.main(["generate", "--model_path", "m", "--config", str(recipe)]) == 2
    assert f"{recipe}:2: unknown option 'train_data_path'; it is an option of" in capsys.readouterr().err


def test_all_unknown_names_are_told_in_one_go_each_with_its_answer(tmp_path, capsys):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("seed: 1\nlr: 1\nmodel_path: m\npacking: true\n")
    argv = ["train", "--fp8", "--lerning_rate", "1", "2", "--config", str(recipe), "--zzzz", "--seed", "3"]
    assert cli.main(argv) == 2
    said = [line.strip() for line in capsys.readouterr().err.removeprefix("unigen: error: ").splitlines()]
    starts = ("unknown option --fp8, which", "unknown option --lerning_rate; did you mean --learning_rate?")
    starts += (
        "unknown option --zzzz",
        f"{recipe}:2: unknown option 'lr'; here",
        f"{recipe}:4: unknown option 'pa",
    )
    assert len(said) == 5 and all(line.startswith(start) for line, start in zip(said, starts)), said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["plan", "--html", "x"], "unknown option --html; it is an option of unigen"),
        (["check", "--learning_rate", "3"], "it is an option of unigen train. Fix: leave it out"),
        (["train", "--lerning_rate", "1"], "unknown option --lerning_rate; did you mean --learning_rate?"),
        (["train", "--train_data_path", "x.jsonl"], "model_path is missing"),
        (
            ["train", "--model_path", "m", "--train_data_path", "x.jsonl", "--fp16", "--bf16"],
            "fp16 and bf16 exclude each other",
        ),
        (["demo", "--seed", "many"], "--seed is 'many'"),
        (["--quick"], "unknown command '--quick'"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(argv, message, capsys):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("unigen: error: ") and message in captured.err


def takes_a_text(kind: object) -> bool:
    return str in get_args(kind) or kind in (str, list[str]) or any(map(takes_a_text, get_args(kind)))


PATHS = [
    "model_path",
    "data_root",
    "train_data_path",
    "val_data_path",
    "cache_dir",
    "output_dir",
    "deepspeed_config",
    "resume_from_checkpoint",
    "output",
    "problems",
    "html",
    "run",
    "paths",
    "image",
]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_no_option_takes_an_empty_text_as_a_path(name, capsys):
    """As a shell makes one of a variable that is not set; only a prompt may be empty."""
    row = cli.COMMANDS[name]
    kinds = get_type_hints(cli.load_name(row.options))
    needed = ["--model_path", "m"] if name == "generate" else ["data"] if row.positional else []
    tried = 0
    for option, kind in kinds.items():
        if option in PATHS and takes_a_text(kind):
            given = ["data", ""] if option == row.positional else [f"--{option}", ""]
            assert cli.main([name, *needed, *given]) == 2
            assert option in capsys.readouterr().err, option
            tried += 1
    assert tried >= 1


def test_an_empty_path_is_refused_from_python_and_in_a_source_too():
    given = {"model_path": "m", "train_data_path": "d"}
    for option in ("model_path", "train_data_path", "output_dir", "resume_from_checkpoint", "cache_dir"):
        with pytest.raises(ConfigError, match=option):
            Config(**given | {option: ""}).resolve()
    for path in ("", [""], ["a", ""]):
        with pytest.raises(ConfigError, match="path"):
            Config(model_path="m", train_sources=[{"path": path}]).resolve()


def test_which_errors_are_the_users():
    from unigen.sequence.types import BadRecord

    class CheckpointError(ConfigError):
        pass

    assert isinstance(BadRecord("no_target", "sequence", "[]", "a target", "add one"), UserError)
    assert isinstance(ConfigError("x"), UserError) and isinstance(CheckpointError("x"), UserError)


def test_only_user_errors_lose_their_traceback(monkeypatch, capsys):
    def fail(error: BaseException):
        def run(options: command.DemoOptions) -> None:
            raise error

        return run

    row = cli.COMMANDS["demo"]._replace(run="unigen.commands.demo.command:demo")
    monkeypatch.setitem(cli.COMMANDS, "demo", row)
    monkeypatch.setattr(command, "demo", fail(ValueError("inner")))
    with pytest.raises(ValueError, match="inner"):
        cli.main(["demo"])
    monkeypatch.setattr(command, "demo", fail(ConfigError("learning_rate is odd")))
    assert cli.main(["demo"]) == 2 and capsys.readouterr().err == "unigen: error: learning_rate is odd\n"
    monkeypatch.setattr(command, "demo", fail(KeyboardInterrupt()))
    assert cli.main(["demo"]) == 130


def test_a_command_gets_its_options_and_gives_the_exit_code(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "demo", lambda options: seen.append(options) or 3)
    assert cli.main(["demo", "--quick", "--output_dir", "x"]) == 3
    assert seen == [command.DemoOptions(output_dir="x", quick=True)]


@pytest.mark.slow
def test_the_guides_script_is_unigen_train(tmp_path):
    script = str(ROOT / "train_unified_generation.py")
    shown = python(script, "--help", cwd=tmp_path)
    assert shown.returncode == 0 and "--learning_rate" in shown.stdout
    failed = python(script, "--model_path", "m", "--leraning_rate", "1", cwd=tmp_path)
    assert (
        failed.returncode == 2
        and "did you mean --learning_rate?" in failed.stderr
        and "Traceback" not in failed.stderr
    )


def test_python_m_unigen():
    shown = python("-m", "unigen", "--version")
    assert shown.returncode == 0 and shown.stdout.strip() == f"unigen {unigen.__version__}"


def test_public_names_are_lazy_and_real():
    assert unigen.Config is Config
    assert {
        "load_bagel",
        "save_bagel",
        "UnifiedGenerationDataset",
        "UnifiedTrainer",
        "InterleaveInferencer",
    } <= set(dir(unigen))
    with pytest.raises(AttributeError, match="nothing"):
        _ = unigen.nothing
    for name in unigen.__all__:
        assert getattr(unigen, name) is not None


@pytest.mark.slow
def test_the_guides_inferencer_is_the_packages():
    done = python(
        "-c",
        "import inferencer, unigen; assert inferencer.InterleaveInferencer is unigen.InterleaveInferencer",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("world", "late"), [("1", True), ("2", False)])
def test_one_of_many_processes_ends_without_winding_up_the_interpreter(world, late, tmp_path):
    """There a thread of gloo could abort it. What was printed before is not lost, and the exit code is
    kept."""
    code = (
        "import atexit, os; atexit.register(lambda: print('late')); from unigen.cli import program;"
        " program(['train', '--model_path'])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": world}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--model_path needs a value" in done.stderr
    assert ("late" in done.stdout) == late


def test_who_reads_no_further_gets_no_traceback():
    """``unigen ... | head -1``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "unigen", "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    process.stdout.close()
    assert process.wait(60) == 128 + 13 and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("name", ["preview", "ckpt", "train"])
def test_the_help_is_chinese_and_fits_80_columns(name):
    options = cli.load_name(cli.COMMANDS[name].options)
    with speaking("zh"):
        text = cli.help_text(options, name, cli.COMMANDS[name])
        overview = cli.commands_overview()
    listed = text.partition("参数:")[2].partition("配方：")[0].splitlines()
    assert len(listed) > 10 and max(map(width_of, text.splitlines()[1:])) <= 80
    assert "%%" not in text and "](" not in text and "--language zh" in text
    for page in re.findall(r"docs/[\w.-]+md", text):
        assert (ROOT / page).is_file() and "zh-CN" in page, page
    english = re.compile(r"[a-z]{3,} [a-z]+ [a-z]{3,}")
    assert [line for line in (*listed, *overview.splitlines()) if english.search(line)] == []
    assert "usage:" not in text and "default" not in text and spoken() == "en"
    assert not re.search(r"默认\s+(True|False|）)", text), "a default is written as it is given"
