"""``InterleaveInferencer``: repeatable, the same in a batch, contexts as in training, and answers that stop
by themselves."""

import numpy as np
import pytest
import torch
from pictures import noise

from unigen.inference.context import Context
from unigen.inference.inferencer import THINK_PROMPTS, InterleaveInferencer
from unigen.inference.options import Guidance, InferenceError, sampling_options
from unigen.inference.pictures import blocks_as_reference
from unigen.model.bagel import StateReader
from unigen.model.weights import load_bagel
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import Block, Image, Kind, Text

FAST = {"num_timesteps": 3, "image_shapes": (32, 32)}
LETTER = 65
AXES = ("text_start", "text_end", "image_end", "letter")
IMAGE_END = AXES.index("image_end")


@pytest.fixture(scope="module")
def model(golden):
    return load_bagel(golden / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def inferencer(model):
    transforms = {
        "vae": ImageTransform(64, 32, 16),
        "vit": ImageTransform(56, 28, 14),
        "vit_edit": ImageTransform(42, 28, 14),
    }
    return InterleaveInferencer(
        model, **{f"{name}_transform": transform for name, transform in transforms.items()}
    )


@pytest.fixture(scope="module")
def picture():
    return noise(48, 32)


def same(a, b):
    """Equal answers: texts as they are, pictures pixel by pixel."""
    assert len(a) == len(b)
    return all(
        x == y if isinstance(x, str) else np.array_equal(np.array(x), np.array(y))
        for x, y in zip(a, b, strict=True)
    )


def machine(golden, **follows):
    """A model in which a token alone decides the next one: each of the tokens below owns a direction of the
    hidden state, and ``follows`` says what the text head reads in it."""
    model = load_bagel(golden / "model", dtype=torch.float32)
    s = Tokenizer.load(golden / "model").special
    ids = {
        "text_start": s.text_start,
        "text_end": s.text_end,
        "image_end": s.image_end,
        "image_start": s.image_start,
        "letter": LETTER,
        "end": s.end,
    }
    decoder, head = model.language_model.model, model.language_model.lm_head.weight
    with torch.no_grad():
        head.zero_()
        decoder.norm.weight.fill_(1.0)
        for axis, name in enumerate(AXES):
            decoder.embed_tokens.weight[ids[name]] = 1000.0 * torch.nn.functional.one_hot(
                torch.tensor(axis), 64
            )
            if name in follows:
                head[ids[follows[name]], axis] = 1.0
    return InterleaveInferencer(model)


WRITES = {"text_start": "letter", "letter": "text_end"}  # every text is one letter


def kinds(answer):
    return ["text" if isinstance(piece, str) else "image" for piece in answer]


# ---- transitions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("follows", "expected"),
    [
        ({"text_end": "image_start", "image_end": "end"}, ["image"]),
        ({"text_end": "text_start"}, ["text", "text", "text"]),  # never stops by itself: max_pieces
        ({"text_end": "end"}, ["text"]),  # it may not stop before it began: the next best, text here
        ({"text_end": "image_start", "image_end": "text_start"}, ["image", "text", "image"]),
        ({"text_end": "image_start", "image_end": "image_start"}, ["image", "image", "image"]),
    ],
)
def test_the_model_decides_what_comes_next(golden, follows, expected):
    answer = machine(golden, **WRITES, **follows).unified_generate("go", max_pieces=3, seed=0, **FAST)
    assert kinds(answer) == expected
    letter = InterleaveInferencer.from_pretrained(golden / "model", device="cpu").tokenizer.decode([LETTER])
    assert all(piece == letter for piece in answer if isinstance(piece, str))


@pytest.mark.slow
def test_a_picture_as_prompt_is_answered_after_its_closing_token(golden, picture):
    inferencer = machine(golden, **WRITES, image_end="text_start", text_end="end")
    assert kinds(inferencer.unified_generate(picture, max_pieces=3)) == ["text"]
    inferencer = machine(golden, **WRITES, image_end="image_start", text_end="text_start")
    assert kinds(inferencer.unified_generate(["a", picture], max_pieces=1, seed=0, **FAST)) == ["image"]


def test_a_model_that_cannot_draw_writes(golden):
    model = machine(golden, **WRITES, text_end="image_start").model
    lame = load_bagel(golden / "model", dtype=torch.float32, visual_gen=False)
    lame.load_state_dict({n: t for n, t in model.state_dict().items() if n in lame.state_dict()})
    assert kinds(InterleaveInferencer(lame).unified_generate("go", max_pieces=2)) == ["text", "text"]


@pytest.mark.slow
def test_contexts_of_a_batch_take_their_own_ways(golden, picture):
    inferencer = machine(golden, **WRITES, text_end="image_start", image_end="end")
    # an answer may not begin with the end: after a picture its next best beginning is a text
    with torch.no_grad():
        inferencer.model.language_model.lm_head.weight[inferencer.tokenizer.special.text_start, IMAGE_END] = (
            0.5
        )
    batch = inferencer.unified_generate_batch(
        [["a"], [picture], ["b", picture, "c"]], max_pieces=3, seed=4, **FAST
    )
    assert [kinds(answer) for answer in batch] == [["image"], ["text", "image"], ["image"]]


# ---- a given plan, seeds, batches


@pytest.mark.parametrize("outputs", [["text"], ["image"], ["text", "image"], ["image", "text", "image"], []])
def test_a_given_plan_is_followed(inferencer, outputs):
    answer = inferencer.unified_generate("a red circle", outputs=outputs, max_new_tokens=5, seed=1, **FAST)
    assert kinds(answer) == outputs
    assert all(piece.size == (32, 32) for piece in answer if not isinstance(piece, str))


@pytest.mark.parametrize("do_sample", [False, True])
def test_seeds_repeat_an_answer_and_others_do_not(inferencer, picture, do_sample):
    ask = lambda seed: inferencer.unified_generate(  # noqa: E731
        ["make it blue", picture],
        outputs=["text", "image"],
        max_new_tokens=8,
        do_sample=do_sample,
        temperature=2.0,
        seed=seed,
        num_timesteps=3,
    )
    first = ask(3)
    assert same(first, ask(3))
    other = ask(4)
    assert not same(first[1:], other[1:]) and (first[0] != other[0]) == do_sample


@pytest.mark.slow
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_batch_is_its_prompts_one_by_one(inferencer, picture, do_sample):
    prompts = [
        ["a cat"],
        ["add a hat", picture],
        [picture, "and make it a good deal larger than it was before", picture],
    ]
    options = {
        "outputs": ["text", "image", "text"],
        "max_new_tokens": 6,
        "do_sample": do_sample,
        "num_timesteps": 3,
        "temperature": 1.0,
    }
    options |= {
        "image_shapes": (32, 48),
        "cfg_text_scale": 3.0,
        "cfg_img_scale": 1.5,
        "cfg_interval": (0.0, 1.0),
    }
    together = inferencer.unified_generate_batch(prompts, seed=10, **options)
    for i, prompt in enumerate(prompts):
        alone = inferencer.unified_generate(prompt, seed=10 + i, **options)
        assert alone[0] == together[i][0] and alone[2] == together[i][2]
        difference = np.abs(np.array(alone[1]).astype(int) - np.array(together[i][1]).astype(int))
        assert difference.max() <= 1  # floored to whole numbers; padding changes the order of sums


def test_a_picture_keeps_the_size_of_the_one_before(inferencer, picture):
    edit = inferencer.unified_generate(["change it", picture], outputs=["image"], num_timesteps=2, seed=0)
    assert edit[0].size == inferencer.vae_transform.size(*picture.size)


def test_without_one_it_is_the_largest_square_that_training_draws(inferencer, model):
    def draw(i):
        return i.unified_generate("draw", outputs=["image"], num_timesteps=2, cfg_text_scale=1.0, seed=0)[0]

    assert draw(inferencer).size == (64, 64)
    # all of a table of 16 x 16 tokens of 16 pixels
    assert draw(InterleaveInferencer(model)).size == (256, 256)


# ---- contexts


def equal(a, b):
    return (
        a.length == b.length
        and a.position == b.position
        and all(
            torch.allclose(a.past_key_values(i), b.past_key_values(i), atol=1e-5)
            for i in range(3)
            if a.length
        )
    )


def sample(*pieces):
    return [Text(piece) if isinstance(piece, str) else Image(piece) for piece in pieces]


def test_a_context_rebuilt_for_drawing_is_a_fresh_one(inferencer, picture):
    """Pictures enter through the ViT alone while the answer is text; when it draws, through the VAE too."""
    context, builder = Context(3), inferencer.builder
    context.pieces = sample("a", picture, "make it blue")
    builder.replay([context], drawing=False)
    seen = context.full.length
    written = inferencer.pieces.write_pieces([context], 4, lambda logits, i: LETTER)[0]
    builder.replay([context], drawing=True)
    fresh = Context(3, sample("a", picture, "make it blue", written))
    fresh.reset(drawing=True)
    builder.add_text([fresh], ["a"])
    builder.add_image([fresh], [builder.shown(fresh, 1)])
    builder.add_text([fresh], ["make it blue"])
    builder.add_text([fresh], [written])
    for name in ("full", "no_text", "no_image"):
        assert equal(getattr(context, name), getattr(fresh, name)), name
    assert context.shape == fresh.shape and torch.allclose(context.last, fresh.last, atol=1e-5)
    assert context.full.length > seen  # the latents came in


def test_a_written_text_leaves_the_contexts_that_a_given_one_leaves(inferencer, picture):
    written, given = _context(inferencer, [picture]), _context(inferencer, [picture])
    text = inferencer.pieces.write_pieces([written], 4, lambda logits, i: LETTER)[0]
    inferencer.builder.add_text([given], [text])
    for name in ("full", "no_text", "no_image"):
        assert equal(getattr(written, name), getattr(given, name)), name
    assert torch.allclose(written.last, given.last, atol=1e-5)


def test_what_guidance_compares_with(inferencer, picture):
    """No text: what stood before the last text, or after the last image if that came later; no image: the
    texts alone."""
    build = lambda *pieces: _context(inferencer, pieces)  # noqa: E731
    c = build("a", picture, "b c")
    assert equal(c.no_text, build("a", picture).full) and equal(c.no_image, build("a", "b c").full)
    c = build("a", "b c", picture)
    assert equal(c.no_text, c.full) and equal(c.no_image, build("a", "b c").full)
    c = build("a")
    assert c.no_text.length == 0 and c.no_image is c.full  # one and the same as long as no picture came in


@pytest.mark.parametrize(
    ("prompt", "think", "contexts"),
    [(["a cat"], False, 2), (["a", "cat"], False, 2), (["a cat"], True, 3), (["PICTURE", "blue"], False, 3)],
)
@pytest.mark.parametrize("entrance", ["reference", "unified"])
def test_contexts_that_go_through_the_model_at_every_step(
    inferencer, picture, monkeypatch, prompt, think, contexts, entrance
):
    """With texts alone the no-image context is the full one, and its velocity is not computed again."""
    rows, forward = [], inferencer.model.hidden_states

    def counted(pack, *rest, **options):
        if pack.noised.any():
            rows.append(pack.n_samples)
        return forward(pack, *rest, **options)

    monkeypatch.setattr(inferencer.model, "hidden_states", counted)
    pieces = [picture if piece == "PICTURE" else piece for piece in prompt]
    settings = {
        "think": think,
        "max_new_tokens": 3,
        "num_timesteps": 3,
        "cfg_interval": (0.0, 1.0),
        "seed": 0,
    }
    if entrance == "reference":
        inferencer.interleave_inference(pieces, **settings, image_shapes=(32, 32))
    else:
        inferencer.unified_generate(pieces, outputs=["image"], **settings, height=32, width=32)
    assert rows == [contexts, contexts]


def _context(inferencer, pieces):
    context = Context(3, sample(*pieces))
    inferencer.builder.replay([context], drawing=True)
    return context


def test_pictures_of_contexts_that_draw_come_as_latents_then_patches(
    inferencer, model, tokenizer_special, picture
):
    context = _context(inferencer, [picture])
    blocks = inferencer.builder.shown(context, 0)
    pack = pack_blocks([blocks], tokenizer_special, model.config.geometry)
    with torch.no_grad():
        hidden = model(pack, reader=StateReader.of_all(pack)).read[pack.index.argsort()]
    assert (
        torch.allclose(context.last, hidden[-1], atol=1e-5)
        and context.full.length == len(pack)
        and context.full.position == 2
    )
    assert [b.kind for b in blocks] == [Kind.CLEAN, Kind.VIT] and context.no_image.length == 0


@pytest.fixture(scope="module")
def tokenizer_special(golden):
    return Tokenizer.load(golden / "model").special


# ---- as the reference


def test_call_takes_a_picture_a_text_or_both(inferencer, picture):
    answer = inferencer(text="a cat", seed=0, **FAST)
    assert answer["text"] is None and answer["image"].size == (32, 32)
    answer = inferencer(image=picture, text="what is it", understanding_output=True, max_think_token_n=4)
    assert answer["image"] is None and isinstance(answer["text"], str)
    answer = inferencer(text="a cat", think=True, max_think_token_n=4, seed=0, **FAST)
    assert isinstance(answer["text"], str) and answer["image"].size == (32, 32)
    with pytest.raises(InferenceError, match="neither an image nor a text"):
        inferencer()


def test_thinking_puts_the_prompt_first_and_the_thought_into_the_full_context_alone(
    model, inferencer, picture
):
    """Against the same steps taken by hand."""
    noise = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    trace, options = (
        {},
        {"num_timesteps": 3, "cfg_text_scale": 3.0, "cfg_img_scale": 1.5, "cfg_interval": (0.0, 1.0)},
    )
    thought, drawn = inferencer.interleave_inference(
        [picture, "make it blue"],
        think=True,
        max_think_token_n=5,
        initial_noise=noise,
        trace=trace,
        **options,
    )
    context, builder = Context(3), inferencer.builder
    context.reset(drawing=True)
    builder.add_text([context], [THINK_PROMPTS["generate"]])
    shown = blocks_as_reference(
        model.config, inferencer.vae_transform, inferencer.vit_transform, picture, draws=True
    )
    builder.add_image([context], [shown])
    builder.add_text([context], ["make it blue"])
    no_text, no_image = context.no_text.snapshot(), context.no_image.snapshot()
    ids = trace["tokens"][0].tolist()
    assert thought == inferencer.tokenizer.decode(ids[1:]).split("<|im_end|>")[0].split("<|im_start|>")[0]
    builder.add_text([context], [thought], only_full=True)
    assert (
        equal(context.no_text, no_text)
        and equal(context.no_image, no_image)
        and context.full.length > no_text.length
    )
    tokens, _ = inferencer.pieces.draw_in([context], [(32, 48)], [noise], sampling_options(**options))[0]
    assert torch.allclose(tokens, trace["latent"][0], atol=1e-4) and drawn.size == (48, 32)


@pytest.mark.parametrize(
    ("guidance", "no_text", "no_image"),
    [
        (Guidance(), ["s", None], ["s", "blue"]),
        (Guidance(thought=True), ["s", None], ["s", "blue", "so"]),
        (Guidance(system=False), [], ["s", "blue"]),
    ],
)
def test_where_a_thought_enters_what_guidance_compares_with(
    inferencer, picture, monkeypatch, guidance, no_text, no_image
):
    """Bagel's eval/gen: gen_images_mp_kris.py adds the thought to cfg_img_past_key_values; gen_images_mp_wise.py
    passes cfg_text_past_key_values=None, with the positions behind the system prompt."""
    build = lambda pieces: _context(inferencer, [picture if p is None else p for p in pieces])  # noqa: E731
    monkeypatch.setattr(inferencer.builder, "guidance", guidance)
    c = build(["s", None, "blue"])
    position = c.no_text.position
    inferencer.builder.add_text([c], ["so"], only_full=True)
    assert equal(c.full, build(["s", None, "blue", "so"]).full)
    assert equal(c.no_image, build(no_image).full)
    assert c.no_text.position == position > 0
    assert equal(c.no_text, build(no_text).full) if no_text else c.no_text.length == 0


def test_the_prompt_of_thinking_matters(model):
    drawn = []
    for prompt in ("x", "a long prompt", "x"):
        trace, inferencer = (
            {},
            InterleaveInferencer(model, think_prompts={"understand": "-", "generate": prompt}),
        )
        inferencer.interleave_inference(
            ["a"], think=True, max_think_token_n=3, seed=0, trace=trace, cfg_text_scale=1.0, **FAST
        )
        drawn.append(trace["latent"][0])
    assert torch.equal(drawn[0], drawn[2]) and not torch.allclose(drawn[0], drawn[1], atol=1e-3)


def test_seeds_repeat_interleave_inference(inferencer):
    draw = lambda seed: inferencer.interleave_inference(["a cat"], seed=seed, **FAST)  # noqa: E731
    assert same(draw(1), draw(1)) and not same(draw(1), draw(2))


# ---- errors


def test_a_model_that_cannot_draw_says_so(golden, picture):
    blind = InterleaveInferencer(load_bagel(golden / "model", visual_gen=False))
    for prompt in ("a", [picture, "a"]):
        with pytest.raises(InferenceError, match="visual_gen=False and cannot draw"):
            blind.unified_generate(prompt, outputs=["image"])
        with pytest.raises(InferenceError, match="visual_gen=False and cannot draw"):
            blind.interleave_inference(prompt if isinstance(prompt, list) else [prompt])


@pytest.mark.slow
def test_a_model_without_eyes_says_so(golden, picture):
    blind = InterleaveInferencer(load_bagel(golden / "model", visual_und=False))
    with pytest.raises(InferenceError, match="visual_und"):
        blind.unified_generate([picture, "what is it"], outputs=["text"])
    with pytest.raises(InferenceError, match="visual_und"):
        blind.interleave_inference([picture], understanding_output=True)
    assert kinds(blind.unified_generate([picture, "blue"], outputs=["image"], num_timesteps=2, seed=0)) == [
        "image"
    ]


def test_the_reference_s_entrance_takes_both_names_but_not_at_once(inferencer):
    ask = lambda **settings: inferencer.interleave_inference(["a"], understanding_output=True, **settings)  # noqa: E731
    assert ask(max_new_tokens=5) == ask(max_think_token_n=5) != ask(max_new_tokens=2)
    with pytest.raises(InferenceError, match="max_think_token_n"):
        ask(max_new_tokens=5, max_think_token_n=6)
    with pytest.raises(InferenceError, match="did you mean max_new_tokens"):
        ask(max_new_token=5)
    drawn = inferencer.interleave_inference(
        ["a"], height=32, width=48, num_timesteps=2, enable_taylorseer=False, seed=0
    )
    assert drawn[0].size == (48, 32)


@pytest.mark.parametrize("method", ["interleave_inference", "unified_generate"])
def test_taylorseer_is_refused_not_ignored(inferencer, method):
    with pytest.raises(InferenceError, match="enable_taylorseer"):
        getattr(inferencer, method)(["a"], enable_taylorseer=True)


def test_a_model_without_a_folder_needs_a_tokenizer(model, golden):
    import copy

    loose = copy.copy(model)
    loose.source = None
    with pytest.raises(InferenceError, match="pass tokenizer="):
        InterleaveInferencer(loose)
    made = InterleaveInferencer(
        loose, tokenizer=Tokenizer.load(golden / "model").tokenizer
    )  # a transformers tokenizer, as in the reference
    assert isinstance(made.tokenizer, Tokenizer)


def test_the_guide_s_import():
    from inferencer import InterleaveInferencer as promised

    assert promised is InterleaveInferencer


def test_block_lengths_are_those_of_the_cache(inferencer):
    context = _context(inferencer, ["a cat"])
    ids = inferencer.tokenizer.encode("a cat")
    assert context.full.length == len(Block(Kind.TEXT, len(ids), ids=ids)) == context.full.position
