"""A prompt's pictures become the blocks that training makes of them, for whoever asks."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise

from unigen import cli
from unigen.config import Config, DataOptions
from unigen.inference import context as context_module
from unigen.inference import inferencer as inferencer_module
from unigen.inference.context import Context, ContextBuilder
from unigen.inference.inferencer import THINK_PROMPTS, InterleaveInferencer
from unigen.inference.pictures import run_transform, trained_transform
from unigen.model.run_options import RUN_OPTIONS, RunOptionsError
from unigen.model.weights import load_bagel
from unigen.sequence.draw import RandomKey
from unigen.sequence.images import open_image
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import Block, Image, Kind, Origin, Record, Text

# Sizes of the release, divided; all different, so that no mistake hides.
SIZES = {
    "vae_transform": {"max_size": 128, "min_size": 64},
    # two pictures have to share them
    "vit_transform": {"max_size": 112, "min_size": 28, "max_pixels": 15_000},
    "vit_edit_transform": {"max_size": 70, "min_size": 28, "max_pixels": 6_000},
}
NOTHING_DROPPED = {"text_cond_dropout_prob": 0.0, "vit_cond_dropout_prob": 0.0, "vae_cond_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def model(golden):
    return load_bagel(golden / "model", dtype=torch.float32, constants=SIZES)


@pytest.fixture
def entered(monkeypatch):
    """What enters contexts from here on: blocks by cache. Nothing is computed."""
    blocks: dict[int, list[Block]] = {}

    def extend(model, special, caches, given):
        for cache, block in zip(caches, given, strict=True):
            blocks.setdefault(id(cache), []).append(block)
        return torch.zeros(len(caches), 64)

    monkeypatch.setattr(context_module, "extend", extend)
    return blocks


def planner_of(inferencer):
    """As a training run with default options makes it."""
    config = inferencer.model.config
    return config.planner(inferencer.tokenizer, DataOptions(**NOTHING_DROPPED))


def trained(planner, sample):
    """The blocks of the sample in training, contents and all, up to its last piece."""
    sizes = planner.token_lengths(Record(sample, Origin("x.jsonl", 1), "direct"))
    draw = RandomKey(seed=1, epoch=0, record=0)
    blocks = planner.fill(sample, planner.outline(sample, sizes, draw), draw)
    return [block for block in blocks if block.segment < len(sample) - 1 and block.kind != Kind.NOISED]


def assert_same(found, expected):
    """Kinds, grids, ids and contents, to the bit."""
    assert [(b.kind, b.length, b.grid) for b in found] == [(b.kind, b.length, b.grid) for b in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.ids or []) == (theirs.ids or [])
        for name in ("pixels", "patches"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert (mine is None) == (other is None)
            assert mine is None or (mine.dtype == other.dtype and torch.equal(mine, other))


SIDES = st.integers(8, 700)
JPEG = st.booleans()


def source(width, height, seed, jpeg):
    """A picture that is opened already, or the bytes of a JPEG (which may be decoded small)."""
    picture = noise(width, height, seed)
    if not jpeg:
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()


PICTURES = st.builds(source, SIDES, SIDES, st.integers(0, 3), JPEG)
PIECES = st.lists(
    st.one_of(st.sampled_from(["a cat", "", "Mach es blau. 猫"]).map(Text), PICTURES.map(Image)),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(pieces=PIECES, target=st.sampled_from([Text("yes", True), Image(noise(64, 48), True)]))
def test_training_and_inference_make_the_same_blocks(model, pieces, target):
    inferencer = inferencer_module.InterleaveInferencer(model)
    context = Context(3, list(pieces))
    with pytest.MonkeyPatch.context() as patch:
        found: list[Block] = []

        def extend(model, special, caches, blocks):
            found.extend(b for cache, b in zip(caches, blocks, strict=True) if cache is context.full)
            return torch.zeros(len(caches), 64)

        patch.setattr(context_module, "extend", extend)
        inferencer.builder.replay([context], drawing=isinstance(target, Image))
    assert_same(found, trained(planner_of(inferencer), [*pieces, target]))


@settings(max_examples=20, derandomize=True, database=None, deadline=None)
@given(columns=st.integers(4, 8), rows=st.integers(4, 8), before=st.lists(PICTURES, max_size=1))
def test_a_picture_that_the_model_drew_is_seen_as_the_copy_of_a_target(model, columns, rows, before):
    """Of a size that training keeps, and so draws."""
    picture = noise(16 * columns, 16 * rows)
    inferencer = InterleaveInferencer(model)
    context = Context(3, [*map(Image, before), Text("draw"), Image(picture, True)])
    context.reset(drawing=True)
    found = inferencer.builder.shown(context, len(context.pieces) - 1)
    expected = trained(planner_of(inferencer), [*context.pieces, Text("that is it", True)])
    assert_same(found, expected[-2:])
    assert found[0].grid == (rows, columns)


def test_what_is_drawn_at_another_size_is_not_resized_before_it_is_seen(model):
    """32 x 48 is below the smallest side that pictures are scaled up to."""
    context = Context(3, [Text("draw"), Image(noise(48, 32), True)])
    context.reset(drawing=True)
    clean, _ = InterleaveInferencer(model).builder.shown(context, 1)
    assert clean.grid == (2, 3)


def test_the_figures_of_the_release(golden, entered):
    """A 1600 x 1200 edit: 1,036 ViT tokens, 3,072 of the VAE; a question about 100 x 100 pixels: 256."""
    release = {"max_latent_size": 64, "vit_max_num_patch_per_side": 70}
    inferencer = InterleaveInferencer(load_bagel(golden / "model", constants=release))
    lengths = []
    for picture, drawing in ((noise(1600, 1200), True), (noise(100, 100), False)):
        context = Context(3, [Image(picture)])
        inferencer.builder.replay([context], drawing)
        lengths.append([(block.kind, block.length) for block in entered.pop(id(context.full))])
    assert lengths == [[(Kind.CLEAN, 3072), (Kind.VIT, 1036)], [(Kind.VIT, 256)]]
    # 3,640 tokens, as the reference
    assert InterleaveInferencer(inferencer.model).vit_transform.size(1024, 768) == (980, 728)


# ---- every entrance


@pytest.fixture
def seen(monkeypatch):
    """The prompts' blocks of every picture that enters a context, computed as ever."""
    shown: list[list[Block]] = []
    add_image = ContextBuilder.add_image

    def noted(self, contexts, blocks):
        shown.extend(list(b) for b in blocks)
        return add_image(self, contexts, blocks)

    monkeypatch.setattr(ContextBuilder, "add_image", noted)
    return shown


FAST = {"num_timesteps": 2, "max_new_tokens": 3, "seed": 0}


@pytest.mark.parametrize(
    ("outputs", "think"),
    [(["text"], False), (["text"], True), (["image"], False), (["image"], True), (["text", "image"], False)],
)
def test_an_answer_of_given_pieces_shows_pictures_as_training_does(model, seen, outputs, think):
    inferencer, prompt = InterleaveInferencer(model), [noise(200, 90), noise(90, 90, 1), "what?"]
    inferencer.unified_generate(prompt, outputs=outputs, think=think, height=64, width=64, **FAST)
    target = Image(noise(64, 64), True) if "image" in outputs else Text("x", True)
    expected = trained(planner_of(inferencer), [Image(prompt[0]), Image(prompt[1]), Text("what?"), target])
    assert_same([block for blocks in seen for block in blocks], [b for b in expected if b.kind != Kind.TEXT])


def test_the_reference_s_entrance_resizes_for_the_vae_first(model, seen):
    inferencer, picture = InterleaveInferencer(model), noise(200, 90)
    inferencer.interleave_inference([picture, "what?"], understanding_output=True, max_think_token_n=2)
    resized = inferencer.vae_transform.resize(picture)
    assert [b.grid for blocks in seen for b in blocks] == [
        tuple(n // 14 for n in inferencer.vit_transform.size(*resized.size)[::-1])
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "draws"), [("text", False), ("image", True), ("edit", True)])
@pytest.mark.parametrize("think", [False, True])
def test_the_command_line_shows_pictures_as_training_does(
    golden, tmp_path, monkeypatch, seen, mode, draws, think
):
    load = load_bagel
    monkeypatch.setattr(inferencer_module, "load_bagel", lambda *a, **k: load(*a, **k, constants=SIZES))
    path = tmp_path / "a.png"
    noise(200, 90).save(path)
    argv = [
        "--model_path",
        str(golden / "model"),
        "--output_dir",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--mode",
        mode,
    ]
    argv += [
        "--image",
        str(path),
        "--prompt",
        "what?",
        "--num_timesteps",
        "2",
        "--max_new_tokens",
        "3",
        *["--think"] * think,
    ]
    assert cli.main(["generate", *argv]) == 0
    inferencer = InterleaveInferencer(load(golden / "model", constants=SIZES))
    target = Image(noise(64, 64), True) if draws else Text("x", True)
    expected = trained(planner_of(inferencer), [Image(path), Text("what?"), target])
    assert_same([block for blocks in seen for block in blocks], [b for b in expected if b.kind != Kind.TEXT])
    if draws:  # an edit keeps the size that training gives a target of that size
        drawn = next((tmp_path / "out").rglob("*.png"))
        assert open_image(drawn).size == planner_of(inferencer).transforms.vae.size(200, 90)


def test_a_model_that_decides_to_draw_sees_the_prompt_anew(model, seen, monkeypatch):
    """Through the ViT alone until it opens a picture; then as a sample that draws; then what it drew."""
    inferencer, ways = InterleaveInferencer(model), iter(["text", "image", None])
    monkeypatch.setattr(inferencer.pieces, "next_kind", lambda context, first: next(ways))
    inferencer.unified_generate([noise(200, 90), "what?"], height=32, width=48, **FAST)
    looks, draws, drawn = seen
    vae, vit_edit = (planner_of(inferencer).transforms.vae, planner_of(inferencer).transforms.vit_edit)
    assert [b.kind for b in looks] == [Kind.VIT]
    assert [b.kind for b in draws] == [b.kind for b in drawn] == [Kind.CLEAN, Kind.VIT]
    assert draws[0].grid == tuple(n // 16 for n in vae.size(200, 90)[::-1])
    assert draws[1].grid == tuple(n // 14 for n in vit_edit.size(200, 90)[::-1])
    assert drawn[0].grid == (2, 3)


# ---- thinking


@pytest.mark.parametrize(("kind", "system"), [("text", "understand"), ("image", "generate")])
def test_a_model_that_decides_thinks_first_with_the_prompt_of_what_it_decided(
    model, monkeypatch, kind, system
):
    """A drawing has a thought before it, in the full context alone; a text holds its thought."""
    inferencer, ways, texts = InterleaveInferencer(model), iter([kind, None]), []
    monkeypatch.setattr(inferencer.pieces, "next_kind", lambda context, first: next(ways))
    add_text = ContextBuilder.add_text

    def noted(self, contexts, given, only_full=False):
        texts.append(list(given))
        return add_text(self, contexts, given, only_full)

    monkeypatch.setattr(ContextBuilder, "add_text", noted)
    answer = inferencer.unified_generate("a cat", think=True, height=32, width=32, **FAST)
    assert [isinstance(piece, str) for piece in answer] == ([True] if kind == "text" else [True, False])
    assert texts[:3] == [["a cat"], [THINK_PROMPTS[system]], ["a cat"]] and texts[3:] == (
        [] if kind == "text" else [answer[:1]]
    )


def test_thinking_draws_what_the_reference_draws(model):
    """The same thought and the same picture as ``interleave_inference`` for a prompt of one text."""
    inferencer = InterleaveInferencer(model)
    settings = {
        "think": True,
        "num_timesteps": 4,
        "max_new_tokens": 6,
        "seed": 3,
        "height": 32,
        "width": 48,
        "cfg_interval": (0.0, 1.0),
    }
    theirs = inferencer.interleave_inference(["a cat"], **settings)
    ours = inferencer.unified_generate("a cat", outputs=["image"], **settings)
    assert ours[0] == theirs[0]
    difference = (
        torch.tensor(list(ours[1].tobytes())).int() - torch.tensor(list(theirs[1].tobytes())).int()
    ).abs()
    assert difference.max() <= 1  # floored to whole numbers


def test_a_thought_stays_hidden_when_the_context_is_built_anew(model):
    inferencer = InterleaveInferencer(model)
    context = Context(3, [Text("a cat")])
    inferencer.builder.replay([context], drawing=True)
    inferencer.pieces.think([context], 3, lambda logits, i: 65)
    hidden = [(c.full.length, c.no_text.length, c.no_image.length) for c in [context]]
    inferencer.builder.replay([context], drawing=True)
    assert hidden == [(context.full.length, context.no_text.length, context.no_image.length)]
    assert context.no_image.length < context.full.length


# ---- the run's own sizes


def test_explicit_transforms_win(model):
    vae, vit, edit = ImageTransform(96, 32, 16), ImageTransform(84, 28, 14), ImageTransform(42, 14, 14)
    given = InterleaveInferencer(model, vae_transform=vae, vit_transform=vit, vit_edit_transform=edit)
    found = given.builder.planner.transforms
    assert [replace(t, limit=None) for t in (found.vae, found.vit, found.vit_edit)] == [vae, vit, edit]
    # as the reference's users pass it
    plain = InterleaveInferencer(model, vit_transform=vit).builder.planner.transforms
    assert (
        plain.vit_edit == planner_of(given).transforms.vit_edit
        and plain.vae == planner_of(given).transforms.vae
    )


def test_a_checkpoint_of_a_run_shows_pictures_as_that_run_did(golden, tmp_path):
    config = load_bagel(golden / "model", constants=SIZES).config
    folder = tmp_path / "step_1"
    folder.mkdir()
    (folder / RUN_OPTIONS).write_text(
        json.dumps(Config(max_image_tokens=12, train_data_path="x.jsonl").to_dict())
    )
    assert (
        trained_transform(config, folder)
        == config.planner(None, DataOptions(max_image_tokens=12)).transforms.vae
    )
    assert trained_transform(config, None) == config.planner(None, DataOptions()).transforms.vae
    assert trained_transform(config, tmp_path) == trained_transform(config, None)


def test_of_several_sources_the_widest_limits_hold(golden):
    config = load_bagel(golden / "model", constants=SIZES).config
    entries = [
        {"path": "a", "max_image_size": 96, "max_image_tokens": 9},
        {"path": "b", "min_image_size": 32},
    ]
    run = Config(train_sources=entries, max_image_tokens=20)
    found = run_transform(config, run.sources(), run.max_image_tokens)
    assert (found.max_size, found.min_size, found.max_tokens) == (128, 32, 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"max_image_tokens": "many"}',
        '{"max_image_tokens": 0}',
        '{"train_sources": [{"pth": "a"}]}',
    ],
)
def test_options_of_a_run_that_cannot_be_read_are_named(golden, tmp_path, text):
    (tmp_path / RUN_OPTIONS).write_text(text)
    with pytest.raises(RunOptionsError, match=RUN_OPTIONS):
        trained_transform(load_bagel(golden / "model").config, tmp_path)
