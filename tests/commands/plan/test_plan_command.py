"""``unigen plan``: what fits, the smallest change that does, recipes, and mistakes in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from gpu_setup import published
from safetensors.torch import load_file, save_file

from unigen import cli
from unigen.commands.plan.changes import CHANGES, fitting
from unigen.commands.plan.command import load_of, read_memory, room_of
from unigen.commands.plan.report import flags
from unigen.config import Config
from unigen.model.parts import WORDS
from unigen.model.sizes import Load
from unigen.show.language import texts

ROOT = Path(__file__).parents[3]
RECIPES = {
    "bagel_7b_qlora_16gb": (16, 1),
    "bagel_7b_qlora_24gb": (24, 1),
    "bagel_7b_lora_48gb": (48, 1),
    "bagel_7b_lora_80gb": (80, 1),
    "bagel_7b_full_8x80gb": (80, 8),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config files of BAGEL-7B-MoT, and nothing else."""
    folder, said = tmp_path_factory.mktemp("7b"), published().to_dict()
    for name in ("llm_config", "vit_config"):
        (folder / f"{name}.json").write_text(json.dumps(said.pop(name)))
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict]:
    code = cli.main(["plan", *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_plan_in_both_languages_needs_config_files_alone(configs, capsys):
    asked = ["--model_path", str(configs), "--lora_rank", "64", "--gradient_checkpointing"]
    for language, fits in (("en", "fits, "), ("zh", "放得下")):
        asked_here = [*asked, "--max_num_tokens", "4096", "--gpu_memory", "80GB", "--language", language]
        assert cli.main(["plan", *asked_here]) == 0
        shown = capsys.readouterr().out
        assert fits in shown and "14,768,740,832" in shown and "161,480,704" in shown
        unread = texts(language)["plan"]["unread"]
        assert unread not in shown
        assert cli.main(["plan", *asked_here, "--train_data_path", "not/there.csv"]) == 0
        assert unread in " ".join(capsys.readouterr().out.split())
        assert all(texts(language)["plan"][f"phase_{phase}"] in shown for phase in ("load", "train", "save"))
    assert not [*configs.glob("*.safetensors")]


@pytest.mark.slow
@pytest.mark.parametrize(("language", "page"), [("en", "plan.md"), ("zh", "plan.zh-CN.md")])
def test_a_plan_with_changes_begins_with_the_run_that_was_asked_for(language, page, configs, capsys):
    """As the document shows it; the numbers of the changed run stand below its changes."""
    asked = ["--model_path", str(configs), "--max_num_tokens", "8192", "--gpu_memory", "24GB"]
    assert cli.main(["plan", *asked, "--language", language]) == 1
    first, changes, *changed = capsys.readouterr().out.split("\n\n")
    assert "286 GB" in first and "263 GB" in first and "286 GB" not in "".join(changed)
    assert (
        "--gradient_checkpointing" in changes and "--quantize nf4" in changes and "161,480,704" in changed[0]
    )
    assert f"{first}\n\n{changes}\n```" in (ROOT / "docs" / page).read_text("utf-8")
    these = texts(language)["plan"]["these"]
    assert these.lower() in changes.lower() and these in changed[-1]
    one = [*asked, "--gpu_memory", "300GB", "--language", language]
    assert cli.main(["plan", *one]) == 0
    assert texts(language)["plan"]["as_asked"].partition("{")[0] not in capsys.readouterr().out


@pytest.mark.slow
def test_the_plan_as_json(configs, capsys):
    code, found = plan(capsys, "--model_path", str(configs), "--max_num_tokens", "4096", "--gpu_memory", "24")
    assert code == 1 and found["changes"] and found["asked_peak"] > 200e9
    assert found["peak"] <= found["room"] == room_of(24)
    assert found["peak"] == pytest.approx(sum(found["device"].values()))
    assert max(found["points"].values()) == found["peak"] and found["at"] in found["points"]
    assert found["card"] == "RTX 4090" and found["seconds"] > 0
    code, found = plan(capsys, "--model_path", str(configs), "--max_num_tokens", "4096")
    assert code == 0 and found["fits"] is None and found["seconds"] is None


def test_weights_that_lie_there_say_how_the_embedding_is_held(small_model, capsys, tmp_path):
    low = tmp_path / "low"
    shutil.copytree(small_model, low)
    weights = load_file(low / "ema.safetensors")
    save_file(weights | {WORDS: weights[WORDS].bfloat16()}, low / "ema.safetensors")
    asked = ["--freeze_und", "--max_num_tokens", "256", "--max_image_tokens", "16"]
    there, less = (
        plan(capsys, "--model_path", str(folder), *asked)[1]["device"]["weights"]
        for folder in (small_model, low)
    )
    assert weights[WORDS].dtype == torch.float32 and there - less == 2 * weights[WORDS].numel()


def test_targets_that_are_kept_are_planned_beside_those_that_are_learnt(configs, capsys):
    asked = ["--model_path", str(configs), "--lora_rank", "8", "--max_num_tokens", "2048"]
    kept = ["--preserve_weight", "1"]
    alone, both, other = (
        plan(capsys, *asked, *more)[1]["sequence"]
        for more in ([], kept, [*kept, "--preserve_data_path", "other.jsonl"])
    )
    assert both["labels"] == 2 * alone["labels"] and both["noised"] == 2 * alone["noised"]
    assert other == {**alone, "kept": [alone["labels"], alone["noised"]]}


def changed(room: float, gpus: int = 1, **options) -> tuple[list[str], Config, bool]:
    """Names of the changes that make the 7B fit ``room`` GB, the options then, and whether it does."""
    model = published()

    def asked(config: Config) -> Load:
        return Load.filled(config.max_num_tokens or 16_384, model, min(config.max_image_tokens, 4096))

    config = Config(model_path="m", **options)
    found = fitting(model, config, gpus, room * 1e9, asked)
    assert not found.fits or found.plan.peak <= room * 1e9
    return [name for name, _ in found.changes], found.config, found.fits


@pytest.mark.slow
def test_what_fits_is_left_alone_and_what_does_not_gets_the_most_harmless_change():
    draws = {"freeze_und": True, "freeze_vit": True}
    assert changed(300, gradient_checkpointing=True) == (
        [],
        Config(model_path="m", gradient_checkpointing=True),
        True,
    )
    names, config, fits = changed(135, **draws)
    assert fits and names == ["recompute"] and config.gradient_checkpointing
    names, config, fits = changed(80, gpus=8, **draws)
    assert fits and names[-1] == "shard" and config.engine == "fsdp2"
    names, config, fits = changed(100, **draws)
    assert fits and "adamw8bit" in names and "adapters" not in names
    names, config, fits = changed(26, **draws)
    assert fits and names[-2:] == ["adapters", "nf4"] and config.quantize == "nf4"
    order = [name for name, _ in CHANGES]
    assert [order.index(name) for name in names] == sorted(order.index(name) for name in names)
    names, config, fits = changed(5, **draws)
    assert not fits and "nf4" in names


@pytest.mark.slow
def test_no_change_can_be_left_out(configs):
    """Each of the changes that are named is needed."""
    from unigen.commands.plan.changes import _tried

    model = published()

    def asked(config: Config) -> Load:
        return Load.filled(config.max_num_tokens or 16_384, model, min(config.max_image_tokens, 4096))

    config = Config(model_path="m")
    found = fitting(model, config, 1, 40e9, asked)
    assert found.fits and len(found.changes) > 1
    for step in found.changes:
        fewer = _tried(model, config, 1, asked, [other for other in found.changes if other is not step])
        assert fewer is None or fewer.plan.peak > 40e9, step


@pytest.mark.slow
def test_a_recipe_of_what_fits_is_written_and_read(configs, capsys, tmp_path):
    recipe = tmp_path / "fits.yaml"
    asked = ["--model_path", str(configs), "--max_num_tokens", "8192", "--gpu_memory", "24GB"]
    code, first = plan(capsys, *asked, "--auto", str(recipe))
    assert code == 1 and first["auto"] == str(recipe.resolve())
    said = yaml.safe_load(recipe.read_text())
    assert (
        said["quantize"] == "nf4"
        and said["max_num_tokens"] == first["sequence"]["und"] + first["sequence"]["gen"]
    )
    code, again = plan(capsys, "--config", str(recipe), "--gpu_memory", "24GB", "--auto", str(recipe))
    assert code == 0 and again["peak"] == first["peak"] and not again["changes"]
    recipe.write_text("mine: true\n")
    assert cli.main(["plan", *asked, "--auto", str(recipe)]) == 2
    assert "someone else wrote" in capsys.readouterr().err and recipe.read_text() == "mine: true\n"


LORA = ["--lora_rank", "4", "--train_also"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpu_memory", "much"], "gpu_memory is 'much'"),
        (["--gpu_memory", "0GB"], "gpu_memory is '0GB'"),
        (["--latent_tokens", "9000", "--max_num_tokens", "4096"], "latent_tokens and vit_tokens are 9,000"),
        (["--freeze_und", "--no_visual_gen"], "freeze_und trains the generation expert"),
        (["--quantize", "nf4"], "needs lora_rank"),
        (["--gpus", "2", "--engine", "deepspeed"], "deepspeed is not planned"),
        (["--lora_rank", "8", "--lora_targets", "nobody"], "'nobody' means nothing"),
        # what the run itself refuses
        (["--lora_rank", "5000"], "lora_rank is 5000"),
        ([*LORA, "*.q_proj_moe_gen.weight"], "whose matrix lora_targets adapts"),
        ([*LORA, "*.q_proj.weight", "--quantize", "nf4"], "whose matrix is quantised"),
        ([*LORA, "norms", "--freeze_und"], "freeze_und keeps"),
        (["--lora_rank", "4", "--learning_rate_vit", "1e-5"], "learning_rate_vit says nothing"),
        (["--lora_rank", "4", "--freeze_und", "--lora_targets", "*.q_proj"], "freeze_und keeps"),
        (["--expect_text_loss", "4", "1"], "the smaller number first"),
    ],
)
def test_mistakes_are_one_line(configs, capsys, argv, words):
    assert cli.main(["plan", "--model_path", str(configs), *argv]) == 2
    said = capsys.readouterr().err
    assert words in said and "Fix: " in said and said.count("\n") == 1


def test_a_folder_without_configs_is_named(tmp_path, capsys):
    assert cli.main(["plan", "--model_path", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert cli.main(["plan"]) == 2 and "model_path is missing" in capsys.readouterr().err


def test_gigabytes_as_people_write_them():
    assert [read_memory(text) for text in ("24GB", "24 GiB", " 24", "79.6gb", None)] == [
        24,
        24,
        24,
        79.6,
        None,
    ]


@pytest.mark.slow
def test_a_part_that_a_change_leaves_still_loses_its_rate(configs, capsys):
    rated = ["--learning_rate_vit", "1e-6", "--weight_decay_connector", "0.1"]
    asked = ["--model_path", str(configs), "--max_num_tokens", "4096", "--gpu_memory", "24"]
    found = plan(capsys, *asked, *rated)[1]
    options = {name: value for change in found["changes"] for name, value in change["options"].items()}
    assert options["freeze_vit"] is False and options["lora_rank"] == 64  # frozen first, then only adapted
    assert options["learning_rate_vit"] is options["weight_decay_connector"] is None


@pytest.mark.parametrize(
    ("gigabytes", "gib"),
    # as torch reports: T4, L40S, RTX 4090, two A100; as the driver does: L4
    [(16, 14.56), (48, 44.40), (24, 23.64), (40, 39.5), (80, 79.25), (24, 22.49)],
)
def test_a_card_gives_what_is_planned_with(gigabytes, gib):
    """And not much more than that."""
    assert 0.92 * gib < room_of(gigabytes) / 2**30 < gib + 0.005  # they round


def test_options_as_they_are_typed():
    assert flags({"a": True, "b": False, "c": None, "d": ["x", "y"]}) == "--a --no_b --c none --d x y"


def test_cached_pictures_are_not_encoded(configs):
    from unigen.commands.plan.options import PlanOptions

    model = published()
    options = PlanOptions(model_path="m", max_num_tokens=8192)
    assert load_of(options, options, model).pixels == 4096 * 256
    cached = PlanOptions(model_path="m", max_num_tokens=8192, cache_dir="c", vit_tokens=1000)
    load = load_of(cached, cached, model)
    assert (load.pixels, load.patches, load.labels, load.tokens) == (0, 1000, 8192 - 4096 - 1000, 8192)


# ---- the recipes of the repository


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_card_it_is_made_for(name, configs, capsys):
    """And its first lines say so: the planned memory and the first losses."""
    gigabytes, gpus = RECIPES[name]
    path = ROOT / "recipes" / f"{name}.yaml"
    card = ["--gpu_memory", f"{gigabytes}GB", "--gpus", str(gpus)]
    code, found = plan(capsys, "--config", str(path), "--model_path", str(configs), *card)
    assert code == 0 and found["fits"] and not found["changes"]
    comment = " ".join(re.findall(r"^# ?(.*)", path.read_text("utf-8"), re.M))
    assert f"at most {found['peak'] / 1e9:.1f} GB" in comment
    assert "0.38 to 0.41" in comment and "0.55 to 1.34" in comment and f"recipes/{name}.yaml" in comment
    if "qlora" in name:
        assert found["trained"] == 161_480_704 and found["sequence"]["gen"] > 3000
        assert found["sequence"]["und"] + found["sequence"]["gen"] >= (4096 if "16gb" in name else 16_384)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_and_dry_runs_on_the_tiny_model(name, golden, tmp_path, capsys):
    """The tiny model's weights are random: it is below the recipe's band, which stops the run, and goes on
    with the flag. Quantised layers need bitsandbytes."""
    if "qlora" in name:
        pytest.importorskip("bitsandbytes")
    tiny = [
        "--model_path",
        str(golden / "model"),
        "--output_dir",
        str(tmp_path / "run"),
        "--num_workers",
        "0",
    ]
    tiny += ["--train_data_path", str(ROOT / "examples" / "sample_data_format.json")]
    tiny += ["--device", "cpu", "--dry_run", "--max_image_tokens", "16", "--max_num_tokens", "512"]
    if "16gb" in name:  # the examples have records that are only read
        tiny += ["--visual_und"]
    asked = ["train", "--config", str(ROOT / "recipes" / f"{name}.yaml"), *tiny]
    assert cli.main(asked) == 2
    assert re.search(r"first (text|image) loss is .*Fix: .*--preflight warn", capsys.readouterr().err)
    assert cli.main([*asked, "--preflight", "warn"]) == 0
