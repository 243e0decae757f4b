"""Next tokens and the image ODE, with several contexts at once, against one at a time and against loops
without a cache."""

import itertools

import pytest
import torch

from unigen.config import SamplingOptions
from unigen.inference.sampler import Canvas, draw, extend, feed_tokens, write_texts
from unigen.model import flow
from unigen.model.bagel import StateReader
from unigen.model.kv_cache import Cache
from unigen.model.sdpa import join_halves
from unigen.model.weights import load_bagel
from unigen.sequence.pack import pack_blocks
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.types import Block, Kind

PROMPTS = ["a cat", "draw a red circle on a white background, please", "hi"]


@pytest.fixture(scope="module")
def model(golden):
    return load_bagel(golden / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(golden / "model")


def text(tokenizer, words):
    ids = tokenizer.encode(words)
    return Block(Kind.TEXT, len(ids), ids=ids)


def contexts(model, tokenizer, prompts):
    caches = [Cache(3) for _ in prompts]
    extend(model, tokenizer.special, caches, [text(tokenizer, p) for p in prompts])
    return caches


def greedy(logits, i):
    return int(logits.argmax())


def test_writing_in_a_batch_is_writing_alone_and_without_a_cache(model, tokenizer):
    together = write_texts(model, tokenizer.special, contexts(model, tokenizer, PROMPTS), 6, greedy)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert write_texts(model, tokenizer.special, contexts(model, tokenizer, [prompt]), 6, greedy) == [
            found
        ]
        ids, expected = tokenizer.encode(prompt), [tokenizer.special.text_start]
        while len(expected) < 6:  # the whole row anew for every token
            row = [Block(Kind.TEXT, len(ids), ids=ids), Block(Kind.TEXT, len(expected) - 1, ids=expected[1:])]
            pack = pack_blocks([row], tokenizer.special, model.config.geometry)
            with torch.no_grad():
                hidden = model(pack, reader=StateReader.of_all(pack)).read
            token = int(model.logits(hidden[-2]).argmax())  # the last one closes the text
            if token == tokenizer.special.text_end:
                break
            expected.append(token)
        assert found == expected


def test_texts_stop_on_their_own(model, tokenizer):
    """Each context ends at its own length; the others go on, and the caches hold what was written."""
    s, lengths, seen = tokenizer.special, [1, 4, 2], []

    def pick(logits, i):
        count = sum(1 for j in seen if j == i)
        seen.append(i)
        return s.text_end if count + 1 == lengths[i] else 65

    caches = contexts(model, tokenizer, PROMPTS)
    before = [c.length for c in caches]
    assert write_texts(model, s, caches, 9, pick) == [[s.text_start] + [65] * (n - 1) for n in lengths]
    assert [c.length - b for c, b in zip(caches, before, strict=True)] == lengths
    assert [c.position for c in caches] == [c.length for c in caches]


def test_max_tokens_counts_the_opening_one(model, tokenizer):
    assert write_texts(
        model, tokenizer.special, contexts(model, tokenizer, ["a"]), 1, lambda logits, i: 65
    ) == [[tokenizer.special.text_start]]
    assert write_texts(
        model, tokenizer.special, contexts(model, tokenizer, ["a"]), 3, lambda logits, i: 65
    ) == [[tokenizer.special.text_start, 65, 65]]


def test_feeding_token_by_token_is_extending_by_the_text(model, tokenizer):
    words, s = text(tokenizer, "a hat"), tokenizer.special
    one, other = contexts(model, tokenizer, ["x"])[0], contexts(model, tokenizer, ["x"])[0]
    whole = extend(model, s, [one], [words])
    for token in [s.text_start, *words.ids, s.text_end]:
        last = feed_tokens(model, [other], [token])
    assert (
        torch.allclose(whole, last, atol=1e-5)
        and one.position == other.position
        and one.length == other.length
    )
    assert torch.allclose(one.past_key_values(2), other.past_key_values(2), atol=1e-5)


def rows_of_the_last_mlps(model, monkeypatch):
    """How many rows go through both experts' last MLP from here on."""
    rows, layer = {"": 0, "_moe_gen": 0}, model.language_model.model.layers[-1]
    for expert in rows:
        mlp = getattr(layer, f"mlp{expert}")

        def counted(x, expert=expert, forward=mlp.forward):
            rows[expert] += len(x)
            return forward(x)

        monkeypatch.setattr(mlp, "forward", counted)
    return rows


def test_the_last_layer_goes_on_with_what_is_read(model, tokenizer, monkeypatch):
    """Of a prompt its closing token, of a picture that is drawn its latent tokens, without the markers."""
    rows = rows_of_the_last_mlps(model, monkeypatch)
    canvases = [canvas(model, tokenizer, i) for i in range(2)]
    assert rows == {"": 4, "_moe_gen": 0}  # a full and a no-image context each
    draw(model, tokenizer.special, canvases, SamplingOptions(num_timesteps=2, cfg_text_scale=1.0))
    assert rows == {"": 4, "_moe_gen": 2 * 3 + 4 * 2}


# ---- drawing


def canvas(model, tokenizer, i):
    """A context of its own size, a picture of its own size."""
    full, no_image = (
        contexts(model, tokenizer, [PROMPTS[i]])[0],
        contexts(model, tokenizer, ["other " * i])[0],
    )
    grid = [(2, 3), (4, 2), (1, 1)][i]
    noise = torch.randn(grid[0] * grid[1], 64, generator=torch.Generator().manual_seed(i))
    return Canvas(full, Cache(3), no_image, grid, noise)


OPTIONS = [
    SamplingOptions(num_timesteps=4, cfg_text_scale=1.0),
    SamplingOptions(num_timesteps=4, cfg_text_scale=4.0, cfg_img_scale=1.0),
    SamplingOptions(
        num_timesteps=5,
        cfg_text_scale=3.0,
        cfg_img_scale=2.0,
        cfg_interval=(0.3, 0.9),
        cfg_renorm_type="channel",
        timestep_shift=1.5,
    ),
    SamplingOptions(
        num_timesteps=4,
        cfg_text_scale=3.0,
        cfg_img_scale=2.0,
        cfg_interval=(0.0, 1.0),
        cfg_renorm_type="text_channel",
        cfg_renorm_min=0.5,
    ),
]


def slow(model, tokenizer, c, o):
    """The contract's sampling, one picture and one context at a time."""

    def velocity(x, t, cache):
        n = c.grid[0] * c.grid[1]
        pack = pack_blocks(
            [[Block(Kind.NOISED, n, 0, c.grid)]], tokenizer.special, model.config.geometry, [cache.position]
        )
        hidden = join_halves(model.hidden_states(pack, x, torch.full((n,), t), [cache], update_cache=False))
        return model.velocities(hidden[pack.n_und :])

    x = c.noise
    line = torch.linspace(1, 0, o.num_timesteps)
    times = (o.timestep_shift * line / (1 + (o.timestep_shift - 1) * line)).tolist()
    for t, t_next in itertools.pairwise(times):
        v = velocity(x, t, c.full)
        if o.cfg_interval[0] < t <= o.cfg_interval[1]:
            with_image = velocity(x, t, c.no_image)
            v = flow.guide(
                v,
                velocity(x, t, c.no_text),
                with_image,
                o.cfg_text_scale,
                o.cfg_img_scale,
                o.cfg_renorm_type,
                o.cfg_renorm_min,
            )
        x = x - (t - t_next) * v
    return x


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "text", "interval", "text_channel"])
@torch.no_grad()
def test_pictures_drawn_together_are_those_drawn_alone(model, tokenizer, options):
    canvases = [canvas(model, tokenizer, i) for i in range(3)]
    lengths = [c.full.length for c in canvases]
    together = draw(model, tokenizer.special, canvases, options)
    for c, found in zip(canvases, together, strict=True):
        assert torch.allclose(found, slow(model, tokenizer, c, options), atol=1e-4)
    assert [c.full.length for c in canvases] == lengths  # nothing that is being drawn enters a context


def lengths_of_rows(model, monkeypatch):
    """The number of samples of every row that goes through the decoder from here on."""
    rows, forward = [], model.hidden_states

    def counted(pack, *rest, **options):
        rows.append(pack.n_samples)
        return forward(pack, *rest, **options)

    monkeypatch.setattr(model, "hidden_states", counted)
    return rows


GUIDED = SamplingOptions(num_timesteps=4, cfg_text_scale=3.0, cfg_img_scale=1.5, cfg_interval=(0.7, 1.0))


@torch.no_grad()
def test_a_context_that_is_the_full_one_is_not_computed_again(golden, tokenizer, monkeypatch):
    """One step of the three is outside of the interval: a context a picture; the others take two in place of
    three.

    The decoder computes in float64, velocities are float32: how many rows a matrix product has changes no bit
    of them.
    """
    model = load_bagel(golden / "model", dtype=torch.float64)
    shared, apart = canvas(model, tokenizer, 0), canvas(model, tokenizer, 1)
    shared.no_image = shared.full
    copy = Canvas(shared.full, shared.no_text, shared.full.snapshot(), shared.grid, shared.noise)
    rows = lengths_of_rows(model, monkeypatch)
    assert torch.equal(
        draw(model, tokenizer.special, [shared], GUIDED)[0], draw(model, tokenizer.special, [copy], GUIDED)[0]
    )
    assert rows == [2, 2, 1, 3, 3, 1]
    rows.clear()
    mixed = draw(model, tokenizer.special, [shared, apart], GUIDED)
    assert rows == [5, 5, 2]
    assert torch.allclose(mixed[0], slow(model, tokenizer, copy, GUIDED), atol=1e-4)
    assert torch.allclose(mixed[1], slow(model, tokenizer, apart, GUIDED), atol=1e-4)
