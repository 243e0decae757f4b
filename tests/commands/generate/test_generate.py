"""``unigen generate`` on the tiny checkpoint: every mode writes its pieces and a page; every mistake is one
clear line."""

import re
import shlex
import shutil
from dataclasses import fields

import pytest
from pages import Page

from unigen import cli
from unigen.config import SamplingOptions
from unigen.inference import inferencer as module
from unigen.sequence.images import open_image
from unigen.version import __version__

TINY = ["--device", "cpu", "--num_timesteps", "3", "--max_new_tokens", "4"]
SHAPE = ["--height", "32", "--width", "48"]


@pytest.fixture
def generate(golden, tmp_path, capsys):
    """Runs the command; (exit code, standard output, standard error, output folder)."""

    def run(*argv: str, model: str | None = None):
        out = tmp_path / "out"
        code = cli.main(
            [
                "generate",
                "--model_path",
                model or str(golden / "model"),
                "--output_dir",
                str(out),
                *TINY,
                *argv,
            ]
        )
        captured = capsys.readouterr()
        return code, captured.out, captured.err, out

    return run


def pieces(folder):
    """What was written, in order of the names, without the page."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "index.html")


def test_text_mode_writes_one_text(generate, golden):
    code, shown, _, out = generate(
        "--prompt", "What is this?", "--image", str(golden / "input.png"), "--mode", "text"
    )
    assert code == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "What is this?" in page and page.count("<img") == 1  # the prompt's picture
    assert [path.suffix for path in pieces(out)] == [".txt"]
    answer = pieces(out)[0].read_text(encoding="utf-8")
    assert answer.strip() in shown and str(out / "index.html") in shown


def test_image_mode_draws_one_picture_of_the_size_asked_for(generate):
    code, shown, _, out = generate("--prompt", "画一只猫", "--mode", "image", *SHAPE)
    assert code == 0
    (path,) = pieces(out)
    picture = open_image(path)
    assert (picture.height, picture.width) == (32, 48)
    assert "48 x 32" in shown
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "画一只猫" in page and page.count("<img") == 1


@pytest.mark.slow
def test_edit_mode_keeps_the_size_of_its_picture(generate, golden):
    code, _, _, out = generate(
        "--prompt", "Make it winter", "--image", str(golden / "input.png"), "--mode", "edit"
    )
    assert code == 0
    (path,) = pieces(out)
    model = module.InterleaveInferencer.from_pretrained(golden / "model", "cpu")
    expected = model.vae_transform.resize(open_image(golden / "input.png"))
    assert open_image(path).size == expected.size
    assert (out / "index.html").read_text(encoding="utf-8").count("<img") == 2  # given and drawn


def test_auto_mode_writes_what_the_model_decides(generate, golden):
    """As many texts and pictures as ``unified_generate`` gives for the same seed, in that order."""
    code, shown, _, out = generate("--prompt", "a", *SHAPE, "--seed", "3")
    assert code == 0
    model = module.InterleaveInferencer.from_pretrained(golden / "model", "cpu")
    answer = model.unified_generate(
        "a", max_new_tokens=4, image_shapes=(32, 48), seed=3, num_timesteps=3, cfg_interval=(0.4, 1.0)
    )
    assert answer
    assert [path.suffix for path in pieces(out)] == [
        ".txt" if isinstance(piece, str) else ".png" for piece in answer
    ]
    assert shown.count("[picture of 48 x 32]") == sum(not isinstance(piece, str) for piece in answer)


def test_several_pictures_come_before_the_prompt(generate, golden):
    image = str(golden / "input.png")
    code, _, _, out = generate("--prompt", "compare", "--image", image, image, "--mode", "text")
    assert code == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 and page.rindex("<img") < page.index("compare", page.index("<body"))


def test_thinking_gives_a_text_and_then_the_picture(generate):
    code, _, _, out = generate("--prompt", "a cat", "--mode", "image", "--think", *SHAPE)
    assert code == 0 and [path.suffix for path in pieces(out)] == [".txt", ".png"]


def test_a_model_that_decides_thinks_first(generate, monkeypatch):
    ways = iter(["image", None])
    monkeypatch.setattr("unigen.inference.pieces.Pieces.next_kind", lambda self, context, first: next(ways))
    code, _, _, out = generate("--prompt", "a cat", "--think", *SHAPE)
    assert code == 0 and [path.suffix for path in pieces(out)] == [".txt", ".png"]


def test_a_size_that_is_asked_for_is_drawn_in_an_edit_too(generate, golden):
    code, _, _, out = generate(
        "--prompt", "Make it winter", "--image", str(golden / "input.png"), "--mode", "edit", *SHAPE
    )
    assert code == 0 and open_image(pieces(out)[0]).size == (48, 32)


def test_every_sampling_setting_is_a_flag(generate, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        module.InterleaveInferencer, "unified_generate", lambda self, prompt, **k: asked.update(k) or ["x"]
    )
    flags = {
        "think": True, "max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "height": 32, "width": 48,
        "num_timesteps": 9,
        "timestep_shift": 2.0, "cfg_text_scale": 4.0, "cfg_img_scale": 2.0, "cfg_interval": (0.1, 0.9),
        "cfg_renorm_min": 0.5,
        "cfg_renorm_type": "channel", "seed": None, "allow_control_tokens": True,
    }  # fmt: skip
    argv = []
    for name, value in flags.items():
        words = (
            []
            if value is True
            else map(str, value)
            if isinstance(value, tuple)
            else ["none" if value is None else str(value)]
        )
        argv += [f"--{name}", *words]
    code, _, error, _ = generate("--prompt", "a", "--mode", "image", *argv)
    assert code == 0, error
    assert set(flags) == {f.name for f in fields(SamplingOptions)}
    drawn = asked["options"].seed  # none asks for another one each time, which the page tells
    assert isinstance(drawn, int)
    assert {name: getattr(asked["options"], name) for name in flags} == flags | {"seed": drawn}


def test_the_page_says_what_made_the_answer_and_how_to_make_it_again(generate, golden, capsys):
    """Pass: model, seed, settings and time stand in the page, in Chinese too, and its command gives the same
    picture."""
    code, _, _, out = generate(
        "--prompt", "a 'cat'", "--mode", "image", *SHAPE, "--seed", "none", "--language", "zh"
    )
    assert code == 0
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    for part in (
        str(golden / "model"),
        "num_timesteps",
        "随机种子",
        "秒",
        "生成条件",
        f"Unigen {__version__}",
    ):
        assert part in page.text, part
    command = shlex.split(page.text[page.text.index("unigen generate") :].partition("\n")[0])
    first = pieces(out)[0].read_bytes()
    shutil.rmtree(out)
    assert cli.main(command[1:]) == 0 and pieces(out)[0].read_bytes() == first
    assert ("--seed" in command) and command[command.index("--prompt") + 1] == "a 'cat'"


@pytest.mark.slow
def test_the_seed_makes_it_repeatable(generate):
    drawn = []
    for seed in ("5", "5", "6"):
        code, _, _, out = generate("--prompt", "a cat", "--mode", "image", *SHAPE, "--seed", seed)
        assert code == 0
        drawn.append(pieces(out)[0].read_bytes())
        shutil.rmtree(out)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "prompt is empty and no image is given"),
        (["--prompt", "Make it winter", "--mode", "edit"], "mode edit redraws a picture, and none is given"),
        (["--prompt", "a", "--height", "32"], "height and width go together"),
        (
            ["--prompt", "a", "--mode", "image", "--height", "32", "--width", "100000"],
            "width is 100000 pixels",
        ),
        (["--prompt", "a", "--cfg_renorm_type", "local"], "--cfg_renorm_type is 'local'"),
        (["--prompt", "a", "--do_sample", "--temperature", "0"], "temperature is 0.0"),
        (["--prompt", "a", "--num_timesteps", "1"], "num_timesteps is 1"),
        (["--prompt", "a", "--mode", "picture"], "--mode is 'picture'"),
        (["--prompt", "a", "--image", "nowhere.png", "--mode", "text"], "nowhere.png"),
        (["--prompt", "a", "--image", "http://127.0.0.1/a.png"], " http://127.0.0.1/a.png: an address"),
        (["--prompt", "a", "--promt", "b"], "did you mean --prompt?"),
    ],
)
def test_a_mistake_is_one_clear_line(generate, argv, words):
    code, shown, error, out = generate(*argv)
    assert code == 2 and shown == ""
    assert error.startswith("unigen: error: ") and error.count("\n") == 1 and words in error
    assert not out.exists()


def test_a_file_that_is_no_picture_is_one_clear_line(generate, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    code, _, error, _ = generate("--prompt", "a", "--image", str(broken), "--mode", "text")
    assert code == 2 and error.count("\n") == 1
    assert re.match(r"unigen: error: .*broken\.png", error)


def test_a_missing_model_is_one_clear_line(generate, tmp_path):
    code, _, error, _ = generate("--prompt", "a", model=str(tmp_path / "no_model"))
    assert code == 2 and error.count("\n") == 1 and "no_model" in error and "Fix: " in error


def test_a_folder_without_weights_is_one_clear_line(generate, golden, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(golden / "model", folder, ignore=shutil.ignore_patterns("ema.safetensors"))
    code, _, error, _ = generate("--prompt", "a", model=str(folder))
    assert code == 2 and error.count("\n") == 1 and "ema.safetensors" in error
