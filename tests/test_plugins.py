"""Plugins: what cannot be imported is one line with file and line, no row is replaced, what they add is there
for every other option and in worker processes."""

import json

import pytest

from unigen import cli, plugins
from unigen.config import Config, ConfigError
from unigen.topics import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("no_plugins_after")
SIGN = """
from unigen.data import fields as f
from unigen.data.formats import FORMATS, Format
from unigen.sequence.types import Text


def read(record, folder):
    return [(Text(f.string(record, "reads", ""), target=True), "reads")]


FORMATS["sign"] = Format(read, fields=("reads",), content="reads", pictures=())
"""


@pytest.mark.parametrize(
    ("name", "text", "place", "why"),
    [
        ("broken_a.py", "x = 1\nx +\n", "broken_a.py:2: ", "invalid syntax"),
        ("broken_b.py", "\nimport no_such_package\n", "broken_b.py:2: ", "no_such_package"),
        ("broken_c.py", "def f():\n    return 1 / 0\nf()\n", "broken_c.py:2: ", "ZeroDivisionError"),
        (
            "broken_d.py",
            "from unigen.data.formats import FORMATS\n\nFORMATS['messages'] = None\n",
            "broken_d.py:3: ",
            "'messages' is taken",
        ),
        (
            "broken_e.py",
            "from unigen.topics import OPTIMIZERS\nOPTIMIZERS.update(adamw='x:y')\n",
            "broken_e.py:2: ",
            "'adamw' is taken",
        ),
        (
            "broken_f.py",
            "from unigen.topics import OPTIMIZERS\nOPTIMIZERS |= {'adamw': 'x:y'}\n",
            "broken_f.py:2: ",
            "'adamw' is taken",
        ),
        (
            "broken_g.py",
            "from unigen.topics import OPTIMIZERS\nOPTIMIZERS.setdefault('adamw', 'x:y')\n",
            "broken_g.py:2: ",
            "'adamw' is taken",
        ),
        *(
            (
                f"broken_{n}.py",
                f"from unigen.topics import OPTIMIZERS\n{line}\n",
                f"broken_{n}.py:2: ",
                "removes none",
            )
            for n, line in enumerate(
                (
                    "del OPTIMIZERS['adamw']",
                    "OPTIMIZERS.pop('adamw')",
                    "OPTIMIZERS.popitem()",
                    "OPTIMIZERS.clear()",
                )
            )
        ),
        ("json.py", "", "", "a module is called 'json' already"),
        ("missing.py", None, "", "no such file"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(name, text, place, why, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    for _ in range(2):  # nothing of the first try is left
        code = cli.main(["check", "data.jsonl", "--plugin", str(tmp_path / name)])
        said = capsys.readouterr().err
        assert code == 2 and said.count("\n") == 1 and "Traceback" not in said
        assert said.startswith("unigen: error: --plugin[0] is ") and place in said and why in said
        assert "Fix: " in said


def test_a_module_is_found_in_the_current_folder_before_the_options_that_need_it(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "own_steps.py").write_text(
        "from unigen.topics import OPTIMIZERS\nOPTIMIZERS['own'] = 'own_steps:make'\n"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("optimizer: own\nplugin: own_steps\n")
    for argv in (["--optimizer", "own", "--plugin", "own_steps"], ["--config", "recipe.yaml"]):
        config = cli.parse_config(argv)
        assert (config.optimizer, config.plugin) == ("own", ["own_steps"])
    assert Config(plugin=["own_steps"], optimizer="own").optimizer == "own"
    for wrong in ({"weights": "bf16"}, {"engine": "deepspeed"}):
        with pytest.raises(ConfigError, match=r"own.* Fix: "):
            Config(model_path="m", train_data_path="d", optimizer="own", **wrong).resolve()
    assert cli.main(["train", "--plugin", "no_such_module"]) == 2
    assert "neither installed nor in this folder" in capsys.readouterr().err


def test_one_file_by_several_names_is_one_plugin(tmp_path, monkeypatch):
    (tmp_path / "own_once.py").write_text(
        "from unigen.topics import OPTIMIZERS\nOPTIMIZERS |= {'own': 'x:y'}\n"
    )
    (tmp_path / "own_rows.py").write_text(
        "from unigen.topics import OPTIMIZERS\nOPTIMIZERS['rows'] = 'x:y'\n"
    )
    monkeypatch.chdir(tmp_path)
    names = ["own_once.py", "./own_once.py", str(tmp_path / "own_once.py"), "own_once"]
    assert Config(plugin=names, optimizer="own").plugin == names
    assert Config(plugin=["own_rows", "own_rows.py"], optimizer="rows").optimizer == "rows"
    for before in names:
        assert plugins.lacking([before, "own_rows"], ["sub/../own_once.py"]) == ["own_rows"]
        assert plugins.lacking([before], ["own_once"]) == []


def test_a_name_that_no_table_has_names_those_it_has():
    with pytest.raises(ConfigError, match="one of adamw, adamw8bit"):
        Config(optimizer="adam")
    assert list(OPTIMIZERS) == ["adamw", "adamw8bit"]


def test_a_schedule_gives_a_share_of_the_peak(tmp_path):
    from unigen.training.optim import learning_rate_at

    (tmp_path / "own_rates.py").write_text(
        "from unigen.topics import SCHEDULES\n"
        "SCHEDULES['late'] = lambda progress: min(1.0, 5 * (1.0 - progress))\n"
        "SCHEDULES['below'] = lambda progress: 0.5 - progress\n"
    )
    options = {"plugin": [str(tmp_path / "own_rates.py")], "learning_rate": 2.0}
    config = Config(lr_scheduler_type="late", **options)
    assert [learning_rate_at(step, 100, config) for step in (0, 79)] == [2.0, 2.0]
    assert learning_rate_at(90, 100, config) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"below gives -0\.5 .* Fix: "):
        learning_rate_at(100, 100, Config(lr_scheduler_type="below", **options))


def test_an_optimiser_with_another_state_is_refused(tmp_path, monkeypatch):
    import torch

    from unigen.training.optim import build_optimizer

    (tmp_path / "own_sgd.py").write_text(
        "import torch\nfrom unigen.topics import OPTIMIZERS\n"
        "def make(groups, config):\n    return torch.optim.SGD(groups, lr=config.learning_rate)\n"
        "OPTIMIZERS['sgd'] = 'own_sgd:make'\n"
    )
    config = Config(plugin=[str(tmp_path / "own_sgd.py")], optimizer="sgd")
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"SGD.* Fix: "):
        build_optimizer(model, dict(model.named_parameters()), config)


@pytest.mark.slow
def test_worker_processes_know_what_a_plugin_adds(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_signs.py").write_text(SIGN)
    data = tmp_path / "signs.jsonl"
    data.write_text(json.dumps({"reads": "STOP"}) + "\n")
    monkeypatch.chdir(tmp_path)
    code = cli.main(["check", str(data), "--json", "--plugin", "own_signs", "--num_workers", "1"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["statistics"]["formats"] == {"sign": 1}
