"""What is asked of a model, before it works: sizes, texts and pictures, settings without effect, and the room
of its context."""

import json
import logging
import shutil

import pytest
import torch
from pictures import noise

from unigen import cli
from unigen.config import ConfigError, DataOptions, TrainSource, UserError
from unigen.inference.inferencer import InterleaveInferencer
from unigen.inference.options import InferenceError
from unigen.model.weights import load_bagel, load_planner
from unigen.sequence.images import PictureError
from unigen.sequence.types import Kind

FAST = {"num_timesteps": 2, "seed": 0}


@pytest.fixture(scope="module")
def inferencer(golden):
    return InterleaveInferencer.from_pretrained(golden / "model", "cpu")


@pytest.fixture(scope="module")
def short(golden, tmp_path_factory):
    """The tiny model with a context of 400 tokens."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(golden / "model", folder)
    config = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps(config | {"max_position_embeddings": 400}))
    return folder


@pytest.fixture(scope="module")
def small(short):
    return InterleaveInferencer(load_bagel(short, dtype=torch.float32))


@pytest.fixture
def told(inferencer, caplog):
    """The warnings, each anew in every test."""
    inferencer.requests._told.clear()
    caplog.set_level(logging.WARNING, "unigen")
    return lambda: [message for message in caplog.messages]


def no_work(monkeypatch, inferencer):
    monkeypatch.setattr(inferencer.model, "hidden_states", lambda *_, **__: pytest.fail("the model worked"))


# ---- sizes


@pytest.mark.slow
def test_a_size_asked_for_wins_over_the_pictures_at_every_entrance(inferencer):
    picture = noise(64, 32)
    ask = {"height": 48, "width": 16, **FAST}
    assert inferencer.unified_generate([picture, "blue"], outputs=["image"], **ask)[0].size == (16, 48)
    assert inferencer.interleave_inference([picture, "blue"], image_shapes=(48, 16), **FAST)[0].size == (
        16,
        48,
    )
    assert inferencer(picture, "blue", image_shapes=(48, 16), **FAST)["image"].size == (16, 48)
    assert inferencer(picture, "blue", **ask)["image"].size == (16, 48)


@pytest.mark.parametrize("entrance", ["interleave_inference", "unified_generate"])
def test_a_size_between_two_strides_is_rounded_down_and_told_once(inferencer, entrance, told):
    for _ in range(2):
        options = {"outputs": ["image"]} if entrance == "unified_generate" else {}
        drawn = getattr(inferencer, entrance)(["a"], image_shapes=(100, 70), **options, **FAST)
        assert drawn[0].size == (64, 96)
    assert [message for message in told() if "rounded" in message] == [
        "height 100 and width 70 are rounded down to 96 x 64, multiples of 16 pixels"
    ]


SIZES = [
    ((0, 32), "height"), ((-16, 32), "height"), ((15, 32), "height is 15 pixels; this model draws from 16 to 256"),
    ((272, 32), "height is 272 pixels"), ((32, 10**12), "width"), ((32,), "image_shapes"), ((32, None), "width"),
    (32, "image_shapes"), ("32x32", "image_shapes"), ((32.5, 32), "height"), ((True, 32), "height"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "words"), SIZES)
@pytest.mark.parametrize("entrance", ["interleave_inference", "unified_generate", "__call__"])
def test_a_size_that_cannot_be_drawn_is_refused_before_work(inferencer, monkeypatch, shape, words, entrance):
    no_work(monkeypatch, inferencer)
    prompt = [None, "a"] if entrance == "__call__" else [["a"]]
    with pytest.raises(InferenceError, match=words):
        getattr(inferencer, entrance)(*prompt, image_shapes=shape)


def test_noise_of_another_shape_is_refused(inferencer, monkeypatch):
    no_work(monkeypatch, inferencer)
    with pytest.raises(
        InferenceError, match=r"initial_noise is \[5, 64\]; a picture of 32 x 32 takes \[4, 64\]"
    ):
        inferencer.interleave_inference(["a"], image_shapes=(32, 32), initial_noise=torch.zeros(5, 64))


@pytest.mark.parametrize(
    ("size", "becomes"),
    [({"max_image_size": 1000}, 256), ({"max_image_size": 100}, 96), ({"min_image_size": 7}, 16)],
)
def test_a_source_s_size_that_would_become_another_is_refused_with_that_one(golden, size, becomes):
    source = TrainSource("a.jsonl", "pets", **size)
    (name,) = size
    config = load_bagel(golden / "model").config
    planner = load_planner(golden / "model", DataOptions())
    with pytest.raises(
        ConfigError,
        match=rf"{name} of pets is {size[name]} and would become {becomes}: .*Fix: {name}: {becomes}",
    ):
        config.planner(planner.tokenizer, DataOptions(), source)
    config.planner(planner.tokenizer, DataOptions(), TrainSource("a.jsonl", "pets", **{name: becomes}))


# ---- settings without effect


@pytest.mark.parametrize(
    ("outputs", "settings", "idle"),
    [
        (["text"], {"height": 32, "width": 32, "cfg_text_scale": 2.0}, "height, width, cfg_text_scale"),
        (["image"], {"do_sample": True, "max_new_tokens": 9}, "max_new_tokens, do_sample"),
        (["text"], {"temperature": 0.9, "max_new_tokens": 2}, "temperature"),
        (
            ["image"],
            {"cfg_text_scale": 1.0, "cfg_interval": (0.0, 1.0), "think": True, "max_new_tokens": 2},
            "cfg_interval",
        ),
    ],
)
def test_settings_that_nothing_reads_are_told(inferencer, outputs, settings, idle, told):
    size = {"height": 32, "width": 32, "num_timesteps": 2} if outputs == ["image"] else {"max_new_tokens": 2}
    inferencer.unified_generate("a", outputs=outputs, **{**size, **settings})
    assert told() == [f"no effect on this answer: {idle}"]


def test_what_is_read_is_not_told(inferencer, told):
    inferencer.unified_generate(
        "a", outputs=["text"], max_new_tokens=2, do_sample=True, temperature=0.9, seed=3
    )
    inferencer.unified_generate(
        "a", outputs=["image"], height=32, width=32, num_timesteps=2, cfg_img_scale=2.0
    )
    assert told() == []


# ---- texts and pictures


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "piece 1 of the prompt is empty"),
        ([], "a prompt is empty"),
        (["a", " \n"], "piece 2 of the prompt is empty"),
        (["\ud800"], "half a character"),
        ([None], "piece 1 of the prompt is None"),
        ([3], "piece 1 of the prompt is 3"),
        ([{"image": "a.png"}], "piece 1 of the prompt is {'image'"),
    ],
)
@pytest.mark.parametrize("entrance", ["interleave_inference", "unified_generate"])
def test_a_prompt_that_says_nothing_is_refused_before_work(inferencer, monkeypatch, prompt, words, entrance):
    no_work(monkeypatch, inferencer)
    if entrance == "interleave_inference":
        prompt = prompt if isinstance(prompt, list) else [prompt]
    with pytest.raises(InferenceError) as error:
        getattr(inferencer, entrance)(prompt)
    assert words in str(error.value) and "Fix: " in str(error.value)


@pytest.mark.slow
def test_call_opens_pictures_by_path(inferencer, golden, tmp_path):
    path = golden / "input.png"
    ask = {"text": "what is it", "understanding_output": True, "max_new_tokens": 4}
    expected = inferencer(image=path, **ask)
    assert inferencer(image=str(path), **ask) == inferencer(image=path.read_bytes(), **ask) == expected
    two = inferencer.interleave_inference(
        [path, path, "what is it"], understanding_output=True, max_new_tokens=4
    )
    assert inferencer(image=[str(path), path], **ask)["text"] == two[0]


def test_call_names_what_is_no_picture_and_no_text(inferencer, monkeypatch, tmp_path):
    no_work(monkeypatch, inferencer)
    (tmp_path / "no.png").write_text("<html>")
    for image, words in [
        (str(tmp_path / "gone.png"), "gone.png"),
        (str(tmp_path / "no.png"), "no.png"),
        (str(tmp_path), tmp_path.name),
        ("https://127.0.0.1/a.png", "^https://127.0.0.1/a.png: an address"),
    ]:
        with pytest.raises(PictureError, match=words) as error:
            inferencer(image=image, text="a")
        assert "\n" not in str(error.value)
    for image in ("", 3, {"a": 1}, [None]):
        with pytest.raises(InferenceError, match="image is"):
            inferencer(image=image, text="a")
    with pytest.raises(InferenceError, match="text is int"):
        inferencer(text=3)


@pytest.mark.parametrize("outputs", ["text", ["video"], 3, [None]])
def test_outputs_are_a_list_of_known_pieces(inferencer, outputs):
    with pytest.raises(InferenceError, match="outputs"):
        inferencer.unified_generate("a", outputs=outputs)


@pytest.mark.parametrize("pieces", [0, -1, True, 1.5, None])
def test_max_pieces_is_a_count(inferencer, pieces):
    with pytest.raises(InferenceError, match="max_pieces"):
        inferencer.unified_generate("a", max_pieces=pieces)


# ---- the context


def test_a_prompt_beyond_the_context_is_refused_before_work_with_the_counts(small, monkeypatch):
    no_work(monkeypatch, small)
    prompt = len(small.tokenizer.encode("a cat")) + 2
    for entrance, options in (
        (small.unified_generate, {"outputs": ["text"]}),
        (small.unified_generate, {}),
        (small.interleave_inference, {"understanding_output": True}),
    ):
        with pytest.raises(InferenceError) as error:
            entrance(["a cat"], max_new_tokens=401 - prompt, **options)
        message = str(error.value)
        assert (
            f"takes {prompt} tokens and the answer up to {401 - prompt}" in message and "holds 400" in message
        )
        assert f"max_new_tokens of at most {400 - prompt}" in message
    with pytest.raises(InferenceError, match="takes 4,002 tokens"):
        small.unified_generate("x" * 4000, outputs=["text"], max_new_tokens=1)


def test_the_counts_are_those_of_the_contexts(small):
    """All of the context may be used: the prompt's tokens are counted as the cache counts them."""
    picture, samples = noise(64, 48), {}
    for draws in (False, True):
        sample, _ = small.requests.prepare(
            [["what", picture]], ["image"] if draws else ["text"], options(draws)
        )
        context = small._context(sample[0])
        small.builder.replay([context], drawing=draws)
        samples[draws] = context.full.length
        kinds = [block.kind for block in small.builder.shown(context, 1)]
        assert (Kind.CLEAN in kinds) == draws
        fits = 400 - context.full.length
        assert small.requests.room.refusal(sample[0], ["text"], options(draws, fits), None, draws=draws) == ""
        assert small.requests.room.refusal(sample[0], ["text"], options(draws, fits + 1), None, draws=draws)
    assert samples[True] > samples[False]


def options(draws, tokens=1):
    from unigen.config import SamplingOptions

    return SamplingOptions(max_new_tokens=tokens, **({"height": 32, "width": 32} if draws else {}))


def test_pictures_count_too(small, monkeypatch):
    no_work(monkeypatch, small)
    with pytest.raises(InferenceError, match="fewer or smaller pictures"):
        small.unified_generate(["a", noise(256, 256)], outputs=["image"], height=256, width=256)
    with pytest.raises(InferenceError, match="fewer or smaller pictures"):
        small.interleave_inference(["a", noise(256, 256)], image_shapes=(256, 256))


@pytest.mark.slow
def test_an_answer_ends_with_a_word_where_the_context_is_full(small, monkeypatch, caplog):
    monkeypatch.setattr(small.pieces, "next_kind", lambda context, first: "text")
    caplog.set_level(logging.WARNING, "unigen")
    # a text of 120 letters, never a stop
    monkeypatch.setattr(small.pieces, "picker", lambda *_: lambda logits, i: 65)
    answer = small.unified_generate("a", max_new_tokens=120, max_pieces=8)
    assert 1 <= len(answer) < 8 and "ends early" in caplog.text and "holds 400" in caplog.text


def test_the_command_refuses_before_it_reads_the_weights(short, monkeypatch, capsys, tmp_path):
    from unigen.model import weights

    monkeypatch.setattr(weights, "read_parameter", lambda *_, **__: pytest.fail("weights were read"))
    argv = ["generate", "--model_path", str(short), "--prompt", "hi", "--mode", "text", "--device", "cpu"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert "holds 400" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- what stands in a prompt


ENTRANCES = {
    "unified_generate": lambda i, prompt: i.unified_generate(prompt, outputs=["text"]),
    "unified_generate_batch": lambda i, prompt: i.unified_generate_batch([prompt], outputs=["text"]),
    "interleave_inference": lambda i, prompt: i.interleave_inference(prompt, understanding_output=True),
}


@pytest.mark.parametrize("ask", ENTRANCES.values(), ids=ENTRANCES)
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["<|im_end|> hi"], r"piece 1 .*<\|im_end\|> at character 1 .*allow_control_tokens"),
        (["a", "see <image>"], r"piece 2 .*<image> at character 5 .*Path\('a.png'\).*allow_control_tokens"),
        (["a", "PICTURE"], r"piece 2 of the prompt is the text .*Fix: Path\(...\)"),
    ],
)
def test_a_text_that_is_none_is_refused_before_work(inferencer, monkeypatch, tmp_path, prompt, words, ask):
    no_work(monkeypatch, inferencer)
    picture = tmp_path / "图 片.png"
    noise(32, 32).save(picture)
    with pytest.raises(InferenceError, match=words):
        ask(inferencer, [str(picture) if piece == "PICTURE" else piece for piece in prompt])


def test_control_tokens_that_are_meant_are_sent(inferencer):
    asked = {"outputs": ["text"], "max_new_tokens": 2}
    for prompt in ("<|im_end|> hi", "<image> hi"):
        assert inferencer.unified_generate(prompt, allow_control_tokens=True, **asked)
        assert inferencer.interleave_inference(
            [prompt], understanding_output=True, max_think_token_n=2, allow_control_tokens=True
        )


def test_a_prompt_of_one_text_needs_no_list(inferencer):
    asked = {"outputs": ["text"], "max_new_tokens": 2}
    plain = inferencer.unified_generate_batch([["abc"], ["d"]], **asked)
    assert inferencer.unified_generate_batch(["abc", "d"], **asked) == plain
    with pytest.raises(InferenceError, match="piece 1 of prompt 2 is empty"):
        inferencer.unified_generate_batch(["abc", " "], **asked)
    for prompts in ("abc", None):
        with pytest.raises(InferenceError, match=r"prompts is .*a list of prompts"):
            inferencer.unified_generate_batch(prompts, **asked)
    with pytest.raises(InferenceError, match="piece 1 of the prompt is None"):
        inferencer.unified_generate(None)
    with pytest.raises(InferenceError, match="options is 3"):
        inferencer.unified_generate("a", options=3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dtype": "bf16"}, "dtype is 'bf16'. Fix: torch.bfloat16"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"folder": None}, "the checkpoint's folder is None"),
    ],
)
@pytest.mark.parametrize("load", [load_bagel, InterleaveInferencer.from_pretrained, InterleaveInferencer])
def test_an_argument_of_loading_that_cannot_be_is_named(given, words, load):
    if load is InterleaveInferencer:
        given, words = {"model": "not read"}, "model is 'not read'"
    elif "folder" not in given:
        given = {"folder": "not read", **given}
    with pytest.raises(UserError) as error:
        load(**given)
    assert words in str(error.value) and "Fix: " in str(error.value)


def test_the_command_line_refuses_them_too(golden, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog <|im_end|>\n")
    given = ["generate", "--model_path", str(golden / "model"), "--output_dir", str(tmp_path / "out")]
    for asked, said in (
        (["--prompt", "<|im_end|> hi"], "<|im_end|> at character 1"),
        (["--prompt", "<image> hi", "--mode", "image"], "the tag <image>"),
        (["--prompts_file", str(prompts), "--layout", "geneval"], "prompts.txt"),
    ):
        assert cli.main([*given, *asked]) == 2
        assert said in capsys.readouterr().err
