"""What is said of options that no command has: misspelt ones, and those of other trainers."""

from __future__ import annotations

import re

import pytest

from unigen.cli import load_name, main
from unigen.commands.table import COMMANDS
from unigen.config import Config, ConfigError, TrainSource, known_options
from unigen.others import names_of_others, nearest, unknown
from unigen.values import kinds

OURS = {name for command in COMMANDS.values() for name in kinds(load_name(command.options))} | set(
    kinds(TrainSource)
)


def test_no_name_of_others_is_ours_and_each_stands_once():
    names = [name for part in names_of_others().values() for name in part]
    assert len(names) == len(set(names)) > 200
    assert not set(names) & set(known_options())


@pytest.mark.parametrize("name", names_of_others()["same"])
def test_the_same_under_another_name_is_an_option(name: str):
    ours = names_of_others()["same"][name]
    assert set(ours if isinstance(ours, list) else [ours]) <= OURS


def test_every_flag_and_command_in_an_answer_exists():
    answers = [text for part in ("instead", "absent") for text in names_of_others()[part].values()]
    flags = {flag for text in answers for flag in re.findall(r"--(\w+)", text)} - {
        "nproc_per_node",
        "config",
        "revision",
    }
    commands = {name for text in answers for name in re.findall(r"unigen (\w+)", text)}
    assert len(flags) > 20 and flags <= OURS
    assert commands and commands <= set(COMMANDS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("train --lr 1e-5", ["--lr;", "--learning_rate"]),
        ("train --load_in_4bit true", ["--quantize nf4"]),
        ("train --use-lora", ["--lora_rank 64"]),
        ("train --fp8", ["--fp8, which is not here"]),
        ("train --epochs 3", ["--num_epochs"]),
        ("generate --prompt a --num_inference_steps 20", ["--num_timesteps"]),
        ("generate --prompt a --steps 20", ["--num_timesteps"]),
        ("train --steps 20", ["--max_steps"]),
        ("generate --prompt a --lr 1", ["--learning_rate", "does not take"]),
    ],
)
def test_an_option_of_another_trainer_is_answered(argv: str, words: list[str], capsys):
    assert main(argv.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said


# What people write who come from LLaMA-Factory, ms-swift, transformers, diffusers, kohya and the reference.
WRITTEN = [
    "lora_dropout",
    "lora_target_modules",
    "cutoff_len",
    "deepspeed",
    "dataset_dir",
    "template",
    "flash_attn",
    "report_to",
    "save_strategy",
    "mixed_precision",
    "resolution",
    "center_crop",
    "random_flip",
    "snr_gamma",
    "train_text_encoder",
    "validation_prompt",
    "num_train_epochs",
    "dataloader_num_workers",
    "push_to_hub",
    "torch_compile",
    "packing",
    "neat_packing",
    "num_shard",
    "ema_decay",
    "finetune_from_hf",
    "auto_resume",
    "resume_from",
    "expected_num_tokens",
    "ce_weight",
    "mse_weight",
    "warmup_proportion",
    "optim",
    "per_device_train_batch_size",
    "train_type",
    "target_modules",
    "attn_impl",
    "system",
    "max_length",
    "lazy_tokenize",
    "padding_free",
    "unet_lr",
    "network_dim",
    "network_args",
    "flip_aug",
    "caption_extension",
    "optimizer_type",
    "full_bf16",
    "data_backend_config",
    "flow_schedule_shift",
    "caption_dropout_probability",
    "lr_num_cycles",
    "weighting_scheme",
    "prefetch_factor",
    "num_replicate",
    "fsdp_config",
    "revision",
]


@pytest.mark.parametrize("name", WRITTEN)
def test_an_option_that_people_write_is_answered_as_a_flag_in_a_recipe_and_in_python(name, tmp_path, capsys):
    assert name not in known_options()
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(f"{name}: 1\n")
    assert main(["train", f"--{name.replace('_', '-')}", "1"]) == 2
    assert main(["train", "--config", str(recipe)]) == 2
    flag, key = capsys.readouterr().err.splitlines()
    with pytest.raises(ConfigError) as raised:
        Config(**{name: 1})
    for said in (flag, key, str(raised.value)):
        assert "Fix: " in said and ("here" in said), said


def test_a_recipe_is_answered_too(tmp_path, capsys):
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text("model_path: m\nper_device_train_batch_size: 4\n")
    assert main(["train", "--config", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert f"{recipe}:2" in said and "here it is batch_size" in said


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lerning_rate", "learning_rate"),
        ("batchsize", "batch_size"),
        ("outputdir", "output_dir"),
        ("epochs", "num_epochs"),
        ("lora_rnk", "lora_rank"),
        ("steps", None),  # of many
        ("dataset_mixing", None),
        ("teacher", None),
        ("media", None),
        ("zzzz", None),
    ],
)
def test_only_a_name_that_is_alike_is_guessed(name: str, meant: str | None):
    assert nearest(name, known_options()) == meant


def test_a_name_that_is_like_none_is_looked_for_elsewhere():
    assert unknown("zzzzqqqq", known_options(), "--").startswith(". Fix: ")
    assert unknown("zzzzqqqq", known_options(), "--", lambda name: f"; {name} there") == "; zzzzqqqq there"


def test_python_and_sources_tell_all_unknown_names_in_one_go():
    with pytest.raises(ConfigError) as raised:
        Config(lr=1, seed=2, lerning_rate=3)
    assert ["'lr'; here" in raised.value.args[0], "did you mean learning_rate?" in str(raised.value)] == [
        True
    ] * 2
    with pytest.raises(ConfigError) as raised:
        Config(train_sources=[{"path": "a", "wieght": 1, "nam": "b"}])
    assert str(raised.value).count("unknown key") == 2
