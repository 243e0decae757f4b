"""Sample -> blocks: every rule of docs/model.md, section "Sequence"."""

import random

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image as Picture

from unigen.config import DataOptions
from unigen.sequence.draw import RandomKey
from unigen.sequence.grid import patchify, to_unit
from unigen.sequence.lengths import TokenLengths
from unigen.sequence.pack import Geometry, pack_blocks
from unigen.sequence.plan import Planner, Transforms
from unigen.sequence.tokens import Tokenizer
from unigen.sequence.transform import ImageTransform
from unigen.sequence.types import BadRecord, Image, Kind, Origin, Record, Text

GEOMETRY = Geometry(
    latent_stride=16, latent_patch=2, patch_dim=64, max_latent_size=16, vit_patch=14, vit_side=8
)
TRANSFORMS = Transforms(
    vae=ImageTransform(128, 32, 16, limit=256),
    vit=ImageTransform(112, 28, 14, limit=112),
    vit_edit=ImageTransform(56, 28, 14, limit=112),
)
NO_DROPOUT = {"text_cond_dropout_prob": 0.0, "vit_cond_dropout_prob": 0.0, "vae_cond_dropout_prob": 0.0}
KEY = RandomKey(seed=1, epoch=0, record=0)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return Tokenizer.load(golden / "model")


@pytest.fixture(scope="module")
def planner(tokenizer):
    def make(max_length=4096, **options):
        return Planner(tokenizer, GEOMETRY, TRANSFORMS, DataOptions(**options), max_length)

    return make


def picture(width=64, height=48, colour=(200, 30, 30)):
    return Picture.new("RGB", (width, height), colour)


def sample_of(code: str, text="a small cat", image=None):
    """``T``/``t``: context / target text, ``I``/``i``: context / target image."""
    return [Text(text, c == "t") if c in "Tt" else Image(image or picture(), c == "i") for c in code]


def record_of(sample):
    return Record(sample, Origin("x.jsonl", 1), "direct")


def shown(planner, sample, key=KEY):
    """A block as its kind, ``*`` where it carries loss, ``>`` and the initial of what its closing token
    announces."""
    special = planner.tokenizer.special
    names = {None: "", special.text_start: ">text", special.image_start: ">image", special.end: ">end"}
    blocks = planner.outline(sample, planner.token_lengths(record_of(sample)), key)
    return " ".join(
        f"{b.kind.name.lower()}{'*' * b.loss}{names[b.closing_label]}" for b in blocks if not b.dropped
    )


PLAIN = [  # sample, blocks when next-modality tokens are trained, blocks when they are not
    ("Tt", "text>text text*>end", "text text*"),
    ("t", "text*>end", "text*"),
    ("It", "vit>text text*>end", "vit text*"),
    ("ITt", "vit text>text text*>end", "vit text text*"),
    ("IITt", "vit vit text>text text*>end", "vit vit text text*"),
    ("Ti", "text>image noised*", "text noised*"),
    ("ITi", "clean vit text>image noised*", "clean vit text noised*"),
    ("TIi", "text clean vit>image noised*", "text clean vit noised*"),
    ("Tti", "text>text text*>image noised* clean vit>end", "text text* noised*"),
    ("Tit", "text>image noised* clean vit>text text*>end", "text noised* clean vit text*"),
    ("Tii", "text>image noised* clean vit>image noised* clean vit>end", "text noised* clean vit noised*"),
    ("TtTt", "text>text text*>end text>text text*>end", "text text* text text*"),
    ("TiTi", "text>image noised* clean vit>end text>image noised*", "text noised* clean vit text noised*"),
    (
        "ITiTi",
        "clean vit text>image noised* clean vit>end text>image noised*",
        "clean vit text noised* clean vit text noised*",
    ),
    ("TtTi", "text>text text*>end text>image noised*", "text text* text noised*"),
    ("TiTt", "text>image noised* clean vit>end text>text text*>end", "text noised* clean vit text text*"),
    ("TtT", "text>text text*>end text", "text text* text"),
    ("TiT", "text>image noised* clean vit>end text", "text noised* clean vit text"),
    ("tit", "text*>image noised* clean vit>text text*>end", "text* noised* clean vit text*"),
    (
        "ittI",
        "noised* clean vit>text text*>text text*>end clean vit",
        "noised* clean vit text* text* clean vit",
    ),
]


@pytest.mark.parametrize(("code", "trained", "reference"), PLAIN)
def test_how_segments_enter_and_what_they_announce(planner, code, trained, reference):
    assert shown(planner(**NO_DROPOUT, single_image_stop_prob=0.0), sample_of(code)) == trained
    without = planner(**NO_DROPOUT, train_transitions=False, single_image_stop_prob=1.0)
    assert shown(without, sample_of(code)) == reference


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("Ti", "text>image noised* clean vit>end"),
        ("i", "noised* clean vit>end"),
        ("TiTi", "text>image noised* clean vit>end text>image noised* clean vit>end"),
        ("Tti", "text>text text*>image noised* clean vit>end"),
    ],
)
def test_a_share_of_single_images_learns_to_stop(planner, code, expected):
    assert shown(planner(**NO_DROPOUT, single_image_stop_prob=1.0), sample_of(code)) == expected


def test_that_share_is_single_image_stop_prob(planner):
    p, sample = planner(single_image_stop_prob=0.15), sample_of("Ti")
    lengths = p.token_lengths(record_of(sample))
    share = sum(len(p.outline(sample, lengths, RandomKey(0, 0, i))) > 2 for i in range(2000)) / 2000
    assert 0.12 < share < 0.18


def test_without_the_vit_pictures_enter_by_their_latents_alone(planner):
    p = planner(visual_und=False, **NO_DROPOUT)
    assert shown(p, sample_of("ITit")) == "clean text>image noised* clean>text text*>end"


# ---- labels in the row


def batch_of(p, sample, key=KEY):
    blocks = p.fill(sample, p.outline(sample, p.token_lengths(record_of(sample)), key), key)
    return blocks, pack_blocks([blocks], p.tokenizer.special, p.geometry)


def test_labels_are_the_next_tokens(planner, tokenizer):
    p, sample = (
        planner(**NO_DROPOUT, single_image_stop_prob=0.0),
        [Text("hi"), Text("a cat", True), Image(picture(), True)],
    )
    _, pack = batch_of(p, sample)
    ids, s, order = tokenizer.encode("a cat"), tokenizer.special, pack.index.argsort()
    found = [
        (i, x) for i, x in zip(pack.ids[order].tolist(), pack.label[order].tolist(), strict=True) if x >= 0
    ]
    inside = list(zip([s.text_start, *ids], [*ids, s.text_end], strict=True))
    assert found == [(s.text_end, s.text_start), *inside, (s.text_end, s.image_start), (s.image_end, s.end)]


def test_context_carries_no_text_loss(planner):
    _, pack = batch_of(planner(train_transitions=False, **NO_DROPOUT), sample_of("TITi"))
    assert pack.n_text_labels == 0 and pack.n_image_targets > 0


# ---- dropout


def outlines(p, sample, n=2000):
    lengths = p.token_lengths(record_of(sample))
    return [p.outline(sample, lengths, RandomKey(7, 0, i)) for i in range(n)]


def test_dropout_has_the_reference_shares_and_spares_targets(planner):
    drawn = outlines(planner(), sample_of("ITti"))
    share = lambda i: sum(blocks[i].dropped for blocks in drawn) / len(drawn)  # noqa: E731
    kinds = [b.kind for b in drawn[0][:5]]
    assert kinds == [Kind.CLEAN, Kind.VIT, Kind.TEXT, Kind.TEXT, Kind.NOISED]
    assert 0.27 < share(0) < 0.33 and 0.27 < share(1) < 0.33 and 0.08 < share(2) < 0.12
    assert share(3) == share(4) == 0
    both = sum(blocks[0].dropped and blocks[1].dropped for blocks in drawn) / len(drawn)
    assert 0.07 < both < 0.11  # independent of each other


def test_samples_that_only_write_and_validation_drop_nothing(planner):
    always = planner(text_cond_dropout_prob=1.0, vit_cond_dropout_prob=1.0, vae_cond_dropout_prob=1.0)
    assert not any(b.dropped for blocks in outlines(always, sample_of("ITt"), 20) for b in blocks)
    sample = sample_of("ITi")
    blocks = always.outline(
        sample, always.token_lengths(record_of(sample)), RandomKey(7, 0, 1, training=False)
    )
    assert not any(b.dropped for b in blocks)
    dropped = always.outline(sample, always.token_lengths(record_of(sample)), RandomKey(7, 0, 1))
    assert [b.dropped for b in dropped] == [True, True, True, False]


def test_a_dropped_image_still_advances_the_position_and_a_text_does_not(planner):
    p = planner(
        text_cond_dropout_prob=0.0,
        vit_cond_dropout_prob=1.0,
        vae_cond_dropout_prob=1.0,
        single_image_stop_prob=0.0,
    )
    _, pack = batch_of(p, sample_of("ITi"))
    assert pack.position[0] == 2  # the text follows two blocks that left nothing else
    p = planner(
        text_cond_dropout_prob=1.0,
        vit_cond_dropout_prob=0.0,
        vae_cond_dropout_prob=0.0,
        single_image_stop_prob=0.0,
    )
    _, pack = batch_of(p, sample_of("ITi"))
    assert pack.position[pack.kind == Kind.NOISED].unique().tolist() == [2]


# ---- determinism


def numbers(p, sample, key):
    blocks, _ = batch_of(p, sample, key)
    noised = [b for b in blocks if b.kind == Kind.NOISED]
    return [b.u for b in noised], torch.cat([b.noise for b in noised])


def test_random_numbers_depend_on_seed_epoch_and_record_alone(planner):
    p, sample = planner(), sample_of("ITii")
    u, noise = numbers(p, sample, RandomKey(1, 2, 3))
    again = numbers(planner(), sample, RandomKey(1, 2, 3))
    assert again[0] == u and torch.equal(again[1], noise)
    for other in (RandomKey(2, 2, 3), RandomKey(1, 3, 3), RandomKey(1, 2, 4)):
        v, n = numbers(p, sample, other)
        assert v != u and not torch.equal(n, noise)
    assert len(set(u)) == 2


def test_purposes_are_independent(planner):
    sample = sample_of("ITii")
    u, noise = numbers(planner(), sample, KEY)
    v, n = numbers(
        planner(text_cond_dropout_prob=1.0, vit_cond_dropout_prob=1.0, vae_cond_dropout_prob=1.0), sample, KEY
    )
    assert u == v and torch.equal(noise, n)  # dropout changes neither times nor noise
    some, other = planner(), planner(text_cond_dropout_prob=0.9)
    kinds = (Kind.CLEAN, Kind.VIT)
    # nor one block's another's
    for a, b in zip(outlines(some, sample, 50), outlines(other, sample, 50), strict=True):
        assert [x.dropped for x in a if x.kind in kinds] == [x.dropped for x in b if x.kind in kinds]
    keys = {
        RandomKey(s, e, r).seed_for(purpose)
        for s in (0, 1)
        for e in (0, 1)
        for r in (0, 1, 11)
        for purpose in ("time", "noise", "structure")
    }
    assert len(keys) == 36


def test_validation_repeats_itself_in_every_epoch(planner):
    p, sample = planner(), sample_of("ITii")
    u, noise = numbers(p, sample, RandomKey(1, 0, 3, training=False))
    v, n = numbers(p, sample, RandomKey(1, 9, 3, training=False))
    assert u == v and torch.equal(noise, n)


# ---- lengths


@pytest.mark.parametrize("seed", range(6))
def test_token_lengths_are_the_pack_s(planner, seed):
    r = random.Random(seed)
    p = planner()
    for k in range(4):
        sample = [Text("word " * r.randint(0, 6), True)]
        for _ in range(r.randint(0, 3)):
            segment = (
                Text("a b", r.random() < 0.5)
                if r.random() < 0.5
                else Image(picture(r.randint(20, 200), r.randint(20, 200)), r.random() < 0.5)
            )
            sample.insert(0, segment)
        key = RandomKey(seed, 0, k)
        _, pack = batch_of(p, sample, key)
        assert p.length(sample, p.token_lengths(record_of(sample)), key) == len(pack)


@pytest.mark.parametrize("over", [1, 3, 7])
def test_a_long_answer_is_cut_at_its_end(planner, tokenizer, over):
    sample = [Text("hi"), Text("a beautiful sunset over the ocean", True)]
    whole = sum(len(b) for b in planner().outline(sample, planner().token_lengths(record_of(sample)), KEY))
    p = planner(max_sequence_length=whole - over)
    blocks, pack = batch_of(p, sample)
    ids, s = tokenizer.encode("a beautiful sunset over the ocean"), tokenizer.special
    kept = len(ids) - over
    assert len(pack) == whole - over and blocks[1].ids == ids[:kept]
    answer = pack.label[pack.span == 1].tolist()
    assert answer[:-1] == ids[: kept + 1]  # the last one is the token that followed the cut, not <|im_end|>
    assert s.text_end not in answer


def test_several_answers_are_cut_from_the_last(planner, tokenizer):
    sample = sample_of("TtTt", text="a beautiful sunset over the ocean")
    n = len(tokenizer.encode(sample[0].text))
    whole = 4 * (n + 2)
    blocks, _ = batch_of(planner(max_sequence_length=whole - n - 2), sample)
    assert [b.length for b in blocks] == [n, n - 3, n, 1] and [b.cut for b in blocks] == [
        False,
        True,
        False,
        True,
    ]


def test_the_shorter_of_model_and_option_limits(planner, tokenizer):
    sample = sample_of("t", text="a beautiful sunset over the ocean")
    for p in (
        planner(max_length=8),
        planner(max_length=8, max_sequence_length=100),
        planner(max_length=100, max_sequence_length=8),
    ):
        assert len(batch_of(p, sample)[1]) == 8


def test_context_that_does_not_fit_is_a_bad_record(planner):
    p = planner(max_sequence_length=20)
    with pytest.raises(BadRecord, match=r"too_long.*max_sequence_length = 20.*Fix") as error:
        p.token_lengths(record_of(sample_of("Ii")))
    assert error.value.code == "too_long"
    with pytest.raises(BadRecord, match="too_long"):
        p.token_lengths(record_of(sample_of("Tt", text="a beautiful sunset over the ocean " * 3)))


def test_no_pass_is_longer_than_allowed(planner):
    """What ``token_lengths`` accepts fits in every epoch pass, whatever is drawn."""
    for limit in range(20, 60):
        p = planner(max_sequence_length=limit, single_image_stop_prob=0.5)
        sample = sample_of("Tti", image=picture(32, 32))
        try:
            lengths = p.token_lengths(record_of(sample))
        except BadRecord:
            continue
        assert all(p.length(sample, lengths, RandomKey(0, 0, i)) <= limit for i in range(10))


def test_parts_left_out_are_named(planner):
    with pytest.raises(BadRecord, match=r"segment 1.*visual_gen is false.*Fix"):
        planner(visual_gen=False).token_lengths(record_of(sample_of("Ti")))
    with pytest.raises(BadRecord, match=r"segment 0.*visual_und is false.*Fix"):
        planner(visual_und=False).token_lengths(record_of(sample_of("It")))
    assert shown(planner(visual_gen=False), sample_of("It")) == "vit>text text*>end"


def test_an_unreadable_picture_is_a_bad_record(planner, tmp_path):
    with pytest.raises(
        BadRecord,
        match=rf"missing_picture in field 'segment 0': found {tmp_path}/none.png: there is no such file.*Fix",
    ):
        planner().token_lengths(record_of([Image(tmp_path / "none.png"), Text("a", True)]))


# ---- contents


def test_blocks_of_one_picture_show_it_in_both_ways(planner):
    source = noise(90, 70)
    blocks, pack = batch_of(planner(**NO_DROPOUT), [Image(source, True), Text("a", True)])
    noised, clean, vit, _ = blocks
    assert noised.pixels is clean.pixels and torch.equal(to_unit(clean.pixels), TRANSFORMS.vae(source))
    assert noised.posterior is clean.posterior and noised.posterior.shape == (
        16,
        2 * noised.grid[0],
        2 * noised.grid[1],
    )
    assert torch.equal(to_unit(vit.patches), patchify(TRANSFORMS.vit_edit(source), 14))
    assert pack.vae_block == [0, 0] and len(pack.vae_pixels) == 1
    generation = pack.kind[pack.n_und :]
    assert (
        torch.isfinite(pack.u[generation == Kind.NOISED]).all()
        and (pack.u[generation == Kind.CLEAN] == float("-inf")).all()
    )


def test_samples_that_only_write_use_the_understanding_resize(planner):
    source = noise(150, 120)
    blocks, _ = batch_of(planner(), [Image(source), Text("a", True)])
    assert (
        torch.equal(to_unit(blocks[0].patches), patchify(TRANSFORMS.vit(source), 14))
        and blocks[0].pixels is None
    )


# ---- lengths of many epoch passes at once


def token_lengths(p, samples):
    return TokenLengths(p.token_lengths(record_of(sample)) for sample in samples)


@pytest.mark.parametrize(
    ("limit", "options"), [(4096, {}), (70, {}), (4096, {"train_transitions": False}), (4096, NO_DROPOUT)]
)
@pytest.mark.parametrize("epoch", [0, 3, None])
def test_lengths_of_many_passes_are_those_of_each(planner, limit, options, epoch):
    p = planner(limit, **options, single_image_stop_prob=0.4)
    codes = ["Tt", "Ti", "ITt", "ITi", "Tti", "tit", "ITiTi", "TiTt", "i"]
    samples = [
        sample_of(code, text="word " * (7 * i + 1), image=picture(40, 30)) for i, code in enumerate(codes)
    ]
    samples = [sample for sample in samples if fits(p, sample)] * 40
    assert len(samples) > 150
    lengths = token_lengths(p, samples)
    keys = [RandomKey(9, epoch or 0, 5 + i, training=epoch is not None) for i in range(len(samples))]
    wanted = [p.length(sample, lengths[i], key) for i, (sample, key) in enumerate(zip(samples, keys))]

    def of_passes(records):
        return lengths.of_passes(records, 5 + records, 9, epoch, p.options, limit)

    found = of_passes(np.arange(len(samples)))
    assert found.tolist() == wanted and (epoch is None or len(set(wanted)) > 5)
    some = np.array([3, 77, 12, 77])
    assert of_passes(some).tolist() == [wanted[i] for i in some]
    assert (lengths.full(limit) >= found).all()
    assert of_passes(np.zeros(0, np.int64)).tolist() == []


def fits(p, sample):
    try:
        p.token_lengths(record_of(sample))
    except BadRecord:
        return False
    return True


# ---- caption variants


def test_each_pass_uses_one_caption_variant_and_validation_the_first(planner):
    p = planner(**NO_DROPOUT)
    words = ("a cat", "a small grey cat on a red chair", "cat")
    sample = [Text(words[0], others=words[1:]), Image(picture(), True)]
    lengths, seen = p.token_lengths(record_of(sample)), set()
    for i in range(60):
        key = RandomKey(1, 0, i)
        blocks = p.fill(sample, p.outline(sample, lengths, key), key)
        assert blocks[0].length == len(blocks[0].ids)
        seen.add(p.tokenizer.decode(blocks[0].ids))
    assert seen == set(words)
    held_out = RandomKey(1, 0, 5, training=False)
    assert (
        p.tokenizer.decode(p.fill(sample, p.outline(sample, lengths, held_out), held_out)[0].ids) == words[0]
    )


def test_a_row_has_room_for_the_longest_caption_variant(planner):
    p = planner(**NO_DROPOUT)
    sample = [Text("a cat", others=("a cat " * 20,)), Image(picture(), True)]
    lengths = token_lengths(p, [sample] * 30)
    bounds = lengths.of_passes(np.arange(30), np.arange(30), 1, 0, p.options, p.max_length)
    actual = [p.length(sample, lengths[i], RandomKey(1, 0, i)) for i in range(30)]
    assert all(a <= b for a, b in zip(actual, bounds)) and max(actual) == max(bounds) and len(set(actual)) > 1


def test_tokens_by_kind_counts_what_a_sample_shows(planner):
    p = planner(**NO_DROPOUT)
    samples = [sample_of("ITi"), sample_of("Tt")]
    lengths = token_lengths(p, samples)
    blocks = [
        b
        for i, s in enumerate(samples)
        for b in p.outline(s, p.token_lengths(record_of(s)), RandomKey(0, 0, i, training=False))
    ]
    wanted = {kind.name.lower(): sum(len(b) for b in blocks if b.kind == kind) for kind in Kind}
    packs = [
        pack_blocks([p.fill(s, p.outline(s, lengths[i], key), key)], p.tokenizer.special, p.geometry)
        for i, s in enumerate(samples)
        for key in [RandomKey(0, 0, i, training=False)]
    ]
    found = lengths.tokens_by_kind(p.max_length)
    # also what closes a prompt or a picture has a label: what comes next
    assert found.pop("trained_text") == sum(pack.n_text_labels for pack in packs)
    assert found.pop("trained_image") == sum(pack.n_image_targets for pack in packs)
    assert found == wanted
    # a cut takes labels, and nothing but text
    talk = lengths.keep([1])
    whole, cut = (talk.tokens_by_kind(int(talk.full(p.max_length)[0]) - n) for n in (0, 2))
    assert cut == whole | {"text": whole["text"] - 2, "trained_text": whole["trained_text"] - 2}


def test_a_control_token_in_a_text_is_a_bad_record_unless_it_is_allowed(planner):
    sample = [Text("draw", others=("a cat", "x<|vision_end|>")), Text("<|im_end|>", True)]
    for bad, number in ((sample, 0), (sample[1:], 0), ([Text("a"), sample[1]], 1)):
        with pytest.raises(BadRecord) as error:
            planner().token_lengths(record_of(bad))
        assert error.value.code == "control_token" and error.value.segment == number
    with pytest.raises(BadRecord, match=r"<\|vision_end\|> at character 2 of caption variant 3"):
        planner().token_lengths(record_of(sample))
    made = planner(allow_control_tokens=True)
    assert made.token_lengths(record_of(sample)).texts[-1] == 1, "one token"
