"""Flags and recipes become options: every rule of the command line once."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unigen.cli import UsageError, parse_config, parse_options
from unigen.commands.demo.command import DemoOptions
from unigen.commands.generate.options import GenerateOptions
from unigen.config import Config, ConfigError, UserError, known_options
from unigen.values import union_members

ROOT = Path(__file__).parents[1]


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def error(*argv: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse_config(list(argv))
    return str(caught.value)


def test_nothing_given_is_the_defaults():
    assert parse_config([]) == Config()


@pytest.mark.usefixtures("no_plugins_after")
def test_every_option_is_a_flag_and_a_key(tmp_path):
    samples = {bool: ("true", True), int: ("7", 7), float: ("0.5", 0.5), str: ("x", "x")}
    samples[list[str]] = ("[a, b]", ["a", "b"])
    samples[dict[str, str]] = ("{a: b}", {"a": "b"})
    samples[tuple[float, float]] = ("[0.5, 4.0]", (0.5, 4.0))
    sources = ("[{path: a.jsonl, weight: 2}]", [{"path": "a.jsonl", "weight": 2}])
    hints = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        kind = union_members(hints[field.name])[0]
        if get_origin(kind) is Literal:
            written = value = get_args(kind)[-1]
        elif field.name == "model_load_mode":
            written, value = "2", 2
        elif field.name == "device":
            written = value = "cuda:1"
        elif field.name == "optimizer":
            written = value = "adamw8bit"
        elif field.name == "lr_scheduler_type":
            written = value = "linear"
        elif field.name == "plugin":  # which reading it imports
            written, value = "[json, unigen.version]", ["json", "unigen.version"]
        else:
            written, value = sources if kind == list[dict[str, Any]] else samples[kind]
        assert getattr(parse_config([f"--{field.name}", written]), field.name) == value, field.name
        from_recipe = parse_config(["--config", recipe(tmp_path, f"{field.name}: {written}\n")])
        assert getattr(from_recipe, field.name) == value, field.name
        assert type(getattr(from_recipe, field.name)) is type(value), field.name


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate"])
@pytest.mark.parametrize("written", ["2e-5", "2.0E-05", "0.00002"])
def test_numbers(flag, written, tmp_path):
    assert parse_config([flag, written]).learning_rate == 2e-5
    assert parse_config([f"{flag}={written}"]).learning_rate == 2e-5
    key = flag[2:]
    assert parse_config(["--config", recipe(tmp_path, f"{key}: {written}")]).learning_rate == 2e-5


def test_a_whole_number_is_a_float_where_a_float_is_asked_for():
    value = parse_config(["--warmup_ratio", "0"]).warmup_ratio
    assert value == 0.0 and isinstance(value, float)


def test_a_negative_number_is_a_value():
    for name, value in (("seed", "-1"), ("weight_decay", "-0.001")):
        assert f"--{name} is {value}; it is out of range" in error(f"--{name}", value)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--bf16"], True),
        (["--bf16", "--fp16", "false"], True),
        (["--bf16", "true"], True),
        (["--bf16=true"], True),
        (["--bf16", "false"], False),
        (["--bf16=false"], False),
        (["--no_bf16"], False),
        (["--no-bf16"], False),
        (["--bf16", "--no_bf16"], False),
        (["--no_bf16", "--bf16"], True),
    ],
)
def test_switches(argv, value):
    assert parse_config(argv).bf16 is value


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_a_word_of_a_choice_is_no_truth_value_of_yaml(word, tmp_path):
    assert parse_config(["--compile", word]).compile == word
    assert parse_config(["--config", recipe(tmp_path, f"compile: {word}\n")]).compile == word


def test_a_switch_that_is_on_by_default_turns_off():
    assert parse_config(["--no_visual_gen"]).visual_gen is False
    assert parse_config(["--train_transitions", "false"]).train_transitions is False


def test_several_paths(tmp_path):
    assert parse_config(["--train_data_path", "a.jsonl"]).train_data_path == "a.jsonl"
    assert parse_config(["--train_data_path", "a.jsonl", "b c.jsonl", "--bf16"]).train_data_path == [
        "a.jsonl",
        "b c.jsonl",
    ]
    assert parse_config(["--train_data_path", "[a.jsonl, b.jsonl]"]).train_data_path == ["a.jsonl", "b.jsonl"]
    assert parse_config(["--train_data_path", "[a].jsonl"]).train_data_path == "[a].jsonl"
    assert parse_config(
        ["--train_data_path", "a", "--seed", "1", "--train_data_path", "b"]
    ).train_data_path == ["a", "b"]
    text = "train_data_path:\n  - a.jsonl\n  - b.jsonl\nval_data_path: [c.jsonl]\n"
    config = parse_config(["--config", recipe(tmp_path, text)])
    assert config.train_data_path == ["a.jsonl", "b.jsonl"] and config.val_data_path == ["c.jsonl"]


def test_a_path_that_exists_stays_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a parser that opens what looks like a file would read it
    (tmp_path / "a.jsonl").write_text('{"text_prompt": "x"}\n')
    (tmp_path / "list.yaml").write_text("[p, q]\n")
    assert parse_config(["--train_data_path", "a.jsonl", "list.yaml"]).train_data_path == [
        "a.jsonl",
        "list.yaml",
    ]
    assert (
        parse_config(["--train_data_path", "list.yaml", "--output_dir", "list.yaml"]).train_data_path
        == "list.yaml"
    )


def test_texts_are_not_read_as_yaml(tmp_path):
    assert parse_config(["--wandb_run_name", "2026-11-01"]).wandb_run_name == "2026-11-01"
    assert parse_config(["--output_dir", "007", "--wandb_project", "a: b # c"]).wandb_project == "a: b # c"
    config = parse_config(
        ["--config", recipe(tmp_path, "wandb_run_name: 2026-11-01\noutput_dir: 007\nwandb_project: 1e3\n")]
    )
    assert (config.wandb_run_name, config.output_dir, config.wandb_project) == ("2026-11-01", "007", "1e3")


def test_none_is_no_value(tmp_path):
    first = recipe(tmp_path, "ema: 0.99\nmodel_path: m\neval_steps: 3\n", "first.yaml")
    second = recipe(tmp_path, "model_path:\neval_steps: null\n", "second.yaml")
    config = parse_config(["--config", first, second, "--ema", "none"])
    assert config.ema is None and config.model_path is None and config.eval_steps is None


@pytest.mark.parametrize("place", ["before", "after"])
def test_flags_win_wherever_config_stands(place, tmp_path):
    config = [
        "--config",
        recipe(tmp_path, "seed: 1\nlearning_rate: 3e-4\nbf16: true\ntrain_data_path: [r]\n"),
    ]
    flags = ["--seed", "2", "--no_bf16", "--train_data_path", "f"]
    parsed = parse_config(config + flags if place == "before" else flags + config)
    assert (parsed.seed, parsed.learning_rate, parsed.bf16, parsed.train_data_path) == (2, 3e-4, False, "f")


@pytest.mark.parametrize("repeat", [False, True])
def test_a_later_recipe_wins(repeat, tmp_path):
    first = recipe(tmp_path, "seed: 1\nnum_epochs: 5\n", "first.yaml")
    second = recipe(tmp_path, "seed: 2\n", "second.yaml")
    argv = ["--config", first, "--config", second] if repeat else ["--config", first, second]
    parsed = parse_config(argv)
    assert (parsed.seed, parsed.num_epochs) == (2, 5)


def test_an_empty_recipe_changes_nothing(tmp_path):
    assert parse_config(["--config", recipe(tmp_path, "# nothing\n")]) == Config()


def test_an_unknown_flag_names_the_nearest():
    assert "--lerning_rate" in error("--lerning_rate", "1") and "did you mean --learning_rate?" in error(
        "--lerning_rate", "1"
    )
    assert "did you mean --learning_rate?" in error("--learnin-rate=1")
    assert "did you mean" not in error("--zzzzqqqq", "1")
    assert "unknown option -x" in error("-x", "1")
    assert "--" in error("--", "a")
    assert "unknown option --learning" in error("--learning", "1")  # no silent abbreviations


def test_an_unknown_key_names_file_line_and_the_nearest(tmp_path):
    path = recipe(tmp_path, "seed: 1\n\nlerning_rate: 1e-5\n")
    message = error("--config", path)
    assert f"{path}:3" in message and "'lerning_rate'" in message and "did you mean learning_rate?" in message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'", "a number"]),
        (["--num_epochs", "1.5"], ["--num_epochs", "'1.5'", "a whole number"]),
        (["--eval_steps", "often"], ["--eval_steps", "'often'", "a whole number", "none"]),
        (["--bf16", "maybe"], ["--bf16", "'maybe'", "true or false"]),
        (["--lr_scheduler_type", "cos"], ["--lr_scheduler_type", "'cos'", "linear, cosine, constant"]),
        (["--seed"], ["--seed", "needs a value", "a whole number"]),
        (["--config"], ["--config", "needs a value"]),
        (["--seed", "1", "2"], ["--seed", "one value", "1 2"]),
        (["--no_bf16", "true"], ["--no_bf16", "takes no value", "--bf16 true"]),
        (["data.jsonl"], ["'data.jsonl'", "--option"]),
        (["--no_seed"], ["--no_seed"]),
    ],
)
def test_errors_name_option_value_and_what_was_expected(argv, parts):
    message = error(*argv)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("seed: 1\nlearning_rate: fast\n", [":2: learning_rate", "'fast'", "a number"]),
        ("num_epochs: true\n", [":1: num_epochs", "true", "a whole number"]),
        ("output_dir: [a, b]\n", [":1: output_dir", "['a', 'b']", "a path"]),
        ("seed: 1\nbf16: true\nseed: 2\n", [":3", "seed", "line 1"]),
        ("- seed\n", [":1", "option: value"]),
        ("seed: [1\n", ["not valid YAML"]),
        ("optim:\n  seed: 1\n", [":1", "unknown option 'optim'"]),
        ("seed: !!python/object:os.system x\n", [":1: ", "cannot be read", "os.system"]),
    ],
)
def test_recipe_errors_name_file_and_line(text, parts, tmp_path):
    path = recipe(tmp_path, text)
    message = error("--config", path)
    assert path in message and "\n" not in message
    for part in parts:
        assert part in message


def test_a_recipe_that_cannot_be_read(tmp_path):
    assert "absent.yaml" in error("--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert "binary.yaml" in error("--config", str(tmp_path / "binary.yaml"))


def test_numbers_in_a_list_of_a_recipe(tmp_path):
    path = recipe(tmp_path, "model_path: m\ncfg_interval: [4e-1, 1]\nimage: [1.png, b c.png]\n")
    options = parse_options(GenerateOptions, ["--config", path])
    assert options.cfg_interval == (0.4, 1.0) and options.image == ["1.png", "b c.png"]


def test_generate_options():
    argv = [
        "--model_path",
        "m",
        "--prompt",
        "-- 3 + 4 = ?",
        "--image",
        "a.png",
        "2",
        "null",
        "--cfg_interval",
        "0.2",
        "0.9",
        "--think",
    ]
    options = parse_options(GenerateOptions, argv)
    assert (
        options.prompt == "-- 3 + 4 = ?" and options.image == ["a.png", "2", "null"] and options.think is True
    )
    assert options.cfg_interval == (0.2, 0.9)
    assert parse_options(
        GenerateOptions, ["--model_path", "m", "--image", "a.png", "--image", "[b].png"]
    ).image == ["a.png", "[b].png"]
    assert parse_options(GenerateOptions, ["--model_path", "m", "--prompt", "[1, 2]"]).prompt == "[1, 2]"
    assert parse_options(GenerateOptions, ["--model_path", "m", "--prompt=--bf16"]).prompt == "--bf16"
    assert parse_options(GenerateOptions, ["--model_path", "m", "--cfg_interval=[0, 1e-1]"]).cfg_interval == (
        0.0,
        0.1,
    )
    with pytest.raises(UsageError, match="--cfg_interval"):
        parse_options(GenerateOptions, ["--model_path", "m", "--cfg_interval", "0.2"])
    with pytest.raises(UsageError, match="--model_path is missing"):
        parse_options(GenerateOptions, ["--prompt", "x"])
    first, second = (parse_options(GenerateOptions, ["--model_path", "m"]).image for _ in range(2))
    assert first == [] and first is not second


def test_demo_options():
    assert parse_options(DemoOptions, ["--quick", "--seed", "3"]) == DemoOptions(quick=True, seed=3)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_are_valid(path):
    config = parse_config(["--config", str(path)])
    config.train_data_path = None if config.train_sources else "x.jsonl"
    assert config.resolve() is config
    assert config != Config(train_data_path="x.jsonl")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1))
def test_any_text_arrives_unchanged(text):
    if text not in ("none", "None", "null"):
        assert parse_config([f"--wandb_project={text}"]).wandb_project == text


@given(value=st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=10))
@settings(max_examples=50, deadline=None)
def test_any_number_arrives_unchanged(value):
    assert parse_config(["--learning_rate", repr(value)]).learning_rate == value


# Ranges


def valid(**options: object) -> Config:
    return Config(model_path="m", train_data_path="d", **options)  # type: ignore[arg-type]


def test_a_valid_config_resolves_to_itself():
    config = valid()
    assert config.resolve() is config


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"freeze_und": True, "visual_gen": False}, "freeze_und"),
        ({"freeze_und": True, "freeze_llm": True}, "freeze_und"),
        ({"visual_gen": False, "visual_und": False, "freeze_llm": True}, "freeze_llm"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_steps": 0}, "max_steps"),
        ({"save_total_limit": 0}, "save_total_limit"),
        ({"text_cond_dropout_prob": 1.5}, "text_cond_dropout_prob"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"warmup_ratio": 1.1}, "warmup_ratio"),
        ({"ema": 1.0}, "ema"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_values_that_cannot_work(options, name):
    with pytest.raises(ConfigError, match=f"^{name} .*--{name}"):
        valid(**options).resolve()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"learning_rate": 1e20}, "learning_rate"),
        ({"adam_beta1": 1.0}, "adam_beta1"),
        ({"adam_beta2": -0.1}, "adam_beta2"),
        ({"adam_epsilon": 0.0}, "adam_epsilon"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"device": "gpu"}, "device"),
        ({"model_path": ""}, "model_path"),
        ({"batch_size": True}, "batch_size"),
        ({"engine": "horovod"}, "engine"),
        ({"train_data_path": [""]}, "train_data_path"),
    ],
)
def test_python_is_checked_when_the_config_is_made(options, name):
    with pytest.raises(ConfigError, match=f"^{name} is .*Fix: give"):
        Config(**{"model_path": "m", "train_data_path": "d", **options})
    config = valid()
    (value,) = options.values()
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=f"^{name} is "):
        config.resolve()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_steps": 11, "max_steps": 10}, "warmup_steps is 11, above max_steps 10"),
        ({"weight_decay": 200.0, "learning_rate": 0.01}, "weight_decay is 200.0"),
        ({"text_loss_weight": 0, "image_loss_weight": 0}, "text_loss_weight is 0"),
        ({"text_loss_weight": 0, "visual_gen": False}, "text_loss_weight is 0"),
        ({"image_loss_weight": 2, "visual_gen": False}, "image_loss_weight says nothing"),
        ({"timestep_shift": 2, "visual_gen": False}, "timestep_shift says nothing"),
        ({"expect_image_loss": (0.0, 1.0), "visual_gen": False}, "expect_image_loss says nothing"),
        ({"text_cond_dropout_prob": 0.2, "visual_gen": False}, "text_cond_dropout_prob says nothing"),
        ({"vit_cond_dropout_prob": 0.2, "visual_gen": False}, "vit_cond_dropout_prob says nothing"),
        ({"single_image_stop_prob": 1, "train_transitions": False}, "single_image_stop_prob says nothing"),
        ({"max_bad_share": 0.5}, "max_bad_share needs on_bad_record"),
        ({"eval_steps": 5}, "eval_steps has nothing to measure"),
        ({"wandb_mode": "offline"}, "wandb_mode needs wandb_project"),
        ({"model_load_mode": 1, "precision": "fp32"}, "model_load_mode is 1, bfloat16"),
        ({"model_load_mode": 1, "fp16": True}, "model_load_mode is 1, bfloat16"),
        ({"wandb_run_name": "x"}, "wandb_run_name needs wandb_project"),
        ({"sample_steps": 3}, "sample_steps needs sample_prompts"),
        ({"checkpointing_policy": "selective"}, "checkpointing_policy is selective, but"),
        ({"shard_size": 2}, "shard_size needs engine fsdp2"),
        ({"compile": "on", "engine": "deepspeed"}, "compile is on"),
    ],
)
def test_options_that_contradict_each_other(options, words):
    with pytest.raises(ConfigError, match=rf"^{words}.*Fix: .*\(--\w+ \.\.\.\)$"):
        valid(**options).resolve()


def test_numbers_of_numpy_and_paths_become_plain(tmp_path):
    import numpy as np

    config = valid(seed=np.int64(3), learning_rate=np.float32(0.5), bf16=np.bool_(True), output_dir=tmp_path)
    found = (config.seed, config.learning_rate, config.bf16, config.output_dir)
    assert found == (3, 0.5, True, str(tmp_path)) and list(map(type, found)) == [int, float, bool, str]


def test_model_and_data_are_required():
    with pytest.raises(ConfigError, match="model_path is missing"):
        Config(train_data_path="d").resolve()
    with pytest.raises(ConfigError, match="train_data_path is missing"):
        Config(model_path="m").resolve()


def test_errors_are_one_family():
    assert (
        issubclass(ConfigError, UserError)
        and issubclass(UsageError, UserError)
        and issubclass(UserError, ValueError)
    )


def test_the_options_the_guide_names_exist():
    guide = (
        "model_path train_data_path val_data_path output_dir batch_size gradient_accumulation_steps"
        " num_epochs learning_rate"
    )
    guide += (
        " wandb_project wandb_run_name text_loss_weight image_loss_weight lr_scheduler_type fp16 bf16"
        " resume_from_checkpoint"
    )
    guide += " max_sequence_length num_workers"
    assert set(guide.split()) <= set(known_options())


def test_a_config_survives_its_dictionary():
    config = valid(train_transitions=False, ema=0.5)
    assert Config(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"learning_rate": 0.1, "lora_rank": 8}, "learning_rate"),
        ({"learning_rate": 1e-10}, "learning_rate"),
        ({"learning_rate_vit": 0.5}, "learning_rate_vit"),
        ({"learning_rate": 0.1, "optimizer": "adamw8bit"}, "learning_rate"),
        ({}, ""),
        ({"lora_rank": 8}, ""),
        ({"learning_rate": 3e-3}, ""),  # a small model from random weights
        ({"learning_rate": 0.03, "lora_rank": 8}, ""),
        ({"learning_rate": 0.0}, ""),
    ],
)
def test_a_learning_rate_far_from_those_of_fine_tuning_is_a_warning(options, told):
    lines = valid(**options).warnings()
    assert [line.partition(" is ")[0] for line in lines] == [told] * bool(told)
    for line in lines:  # the fix works
        name, value = line.partition("Fix: --")[2].split()
        assert not valid(**options | {name: float(value)}).warnings()
