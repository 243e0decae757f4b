"""Blocks -> one packed row, against a packer of a few lines that follows the contract's table token by
token."""

import random
from dataclasses import replace

import pytest
import torch

from unigen.sequence.pack import Geometry, pack_blocks
from unigen.sequence.tokens import SpecialIds
from unigen.sequence.types import Aim, Block, Kind, Pack, Sight

SPECIAL = SpecialIds(50, 51, 52, 53, 54)
GEOMETRY = Geometry(
    latent_stride=4, latent_patch=2, patch_dim=12, max_latent_size=16, vit_patch=2, vit_side=8
)


WEIGHTS = (1.0, 0.25, 0.7)


def text(*ids, **options):
    return Block(Kind.TEXT, len(ids), ids=list(ids), **options)


def image(kind, rows, columns, piece=0, **options):
    n = rows * columns
    content = (
        {"patches": torch.randn(n, 12)}
        if kind == Kind.VIT
        else {"latent": torch.randn(3, rows * 2, columns * 2)}
    )
    if kind == Kind.NOISED:
        content |= {"noise": torch.randn(n, 12), "u": float(torch.randn(())), "loss": True}
    return Block(kind, n, piece, (rows, columns), **content, **options)


def random_sample(r: random.Random) -> list[Block]:
    blocks = []
    for piece in range(r.randint(1, 5)):
        closing = r.choice([None, SPECIAL.text_start, SPECIAL.end])
        weights = {"weight": r.choice(WEIGHTS), "closing_weight": r.choice(WEIGHTS)}
        if r.random() < 0.4:
            ids = [r.randrange(50) for _ in range(r.randint(0, 5))]
            cut = bool(ids) and r.random() < 0.3
            blocks.append(
                text(
                    *ids,
                    loss=r.random() < 0.5,
                    closing_label=closing,
                    dropped=r.random() < 0.2,
                    cut=cut,
                    cut_label=7 if cut else -100,
                    **weights,
                )
            )
        else:
            kind = r.choice([Kind.VIT, Kind.CLEAN, Kind.NOISED])
            dropped = kind != Kind.NOISED and r.random() < 0.2
            sides = r.randint(1, 3), r.randint(1, 3)
            blocks.append(image(kind, *sides, piece, closing_label=closing, dropped=dropped, **weights))
    return blocks


def naive(samples, starts=None):
    """One dict a token, in sequence order."""
    tokens, span = [], 0
    for s, blocks in enumerate(samples):
        position = starts[s] if starts else 0
        for b in blocks:
            if b.dropped:
                position += 0 if b.kind == Kind.TEXT else 1
                continue
            common = {
                "sample": s,
                "span": span,
                "image": b.kind != Kind.TEXT,
                "noised": b.kind == Kind.NOISED,
                "weight": b.weight,
            }
            closing = {"weight": b.closing_weight if b.closing_label else b.weight}
            span += 1
            if b.kind == Kind.TEXT:
                ids = [SPECIAL.text_start, *b.ids, SPECIAL.text_end]
                following = [*b.ids, b.cut_label if b.cut else SPECIAL.text_end]
                labels = [*(following if b.loss else [-100] * len(following)), b.closing_label or -100]
                for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
                    tokens.append(
                        {"ids": token, "kind": Kind.TEXT, "position": position + i, "label": label, **common}
                    )
                tokens[-1] |= closing
                position += len(ids)
            else:
                inner = [{"ids": 0, "kind": b.kind, "label": -100}] * b.length
                first = {"ids": SPECIAL.image_start, "kind": Kind.TEXT, "label": -100}
                last = {"ids": SPECIAL.image_end, "kind": Kind.TEXT, "label": b.closing_label or -100}
                tokens += [{**t, "position": position, **common} for t in (first, *inner, last)]
                tokens[-1] |= closing
                position += b.kind != Kind.NOISED
    return tokens


def test_weights_of_one_are_not_carried():
    pack = pack_blocks([[text(1, 2, loss=True), image(Kind.NOISED, 1, 2)]], SPECIAL, GEOMETRY)
    assert pack.label_weight is pack.noised_weight is None and pack.target_weights == (3, 2)


@pytest.mark.parametrize("seed", range(20))
def test_rows_follow_the_table(seed):
    r = random.Random(seed)
    samples = [random_sample(r) for _ in range(r.randint(0, 4))]
    starts = [r.randrange(9) for _ in samples] if seed % 2 else None
    pack = pack_blocks(samples, SPECIAL, GEOMETRY, starts)
    expected = naive(samples, starts)
    order = pack.index.argsort()
    assert pack.index[order].tolist() == list(range(len(expected))) and len(pack) == sum(
        len(b) for s in samples for b in s
    )
    for column in ("ids", "kind", "position", "label", "sample", "span", "image", "noised"):
        assert getattr(pack, column)[order].tolist() == [int(t[column]) for t in expected], column
    assert pack.n_samples == len(samples)
    assert pack.n_text_labels == sum(t["label"] >= 0 for t in expected)
    assert pack.n_image_targets == sum(t["kind"] == Kind.NOISED for t in expected)
    if pack.label_weight is not None:
        und = [t for t in expected if t["kind"] in (Kind.TEXT, Kind.VIT)]
        labels = torch.tensor([t["weight"] for t in und if t["label"] >= 0])
        noised = torch.tensor([t["weight"] for t in expected if t["kind"] == Kind.NOISED])
        assert torch.equal(pack.label_weight, labels) and torch.equal(pack.noised_weight, noised)
        assert pack.target_weights == pytest.approx((float(labels.sum()), float(noised.sum())), rel=1e-6)
    kinds, halves = pack.kind.tolist(), (range(pack.n_und), range(pack.n_und, len(pack)))
    for lengths, half in zip((pack.und_lengths, pack.gen_lengths), halves, strict=True):
        assert [s for s, n in enumerate(lengths) for _ in range(n)] == [int(pack.sample[i]) for i in half]
    assert pack.vit_rows.tolist() == [i for i in halves[0] if kinds[i] == Kind.VIT]
    assert pack.label_rows.tolist() == [i for i in range(len(pack)) if pack.label[i] >= 0] and all(
        i < pack.n_und for i in pack.label_rows
    )
    assert pack.noised_rows.tolist() == [i - pack.n_und for i in halves[1] if kinds[i] == Kind.NOISED]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_of_a_picture_know_its_block(seed):
    """What is the same for all tokens of a picture, such as its time, is computed once and handed to each."""
    r = random.Random(seed)
    pack = pack_blocks([random_sample(r) for _ in range(3)], SPECIAL, GEOMETRY)
    assert torch.equal(pack.u[pack.vae_first][pack.vae_number], pack.u)
    spans = pack.span[pack.n_und :]
    assert torch.equal(spans[pack.vae_first][pack.vae_number], spans) and len(pack.vae_first) == len(
        spans.unique()
    )


def test_samples_of_one_block_need_no_rule():
    text_, seen, drawn = text(3), image(Kind.VIT, 2, 2), image(Kind.NOISED, 2, 2)
    samples = [[text_], [seen], [drawn], [text_, drawn], [], [replace(seen, dropped=True), text_]]
    found = pack_blocks(samples, SPECIAL, GEOMETRY).sight
    assert found == [Sight.CAUSAL, Sight.FULL, Sight.FULL, Sight.MIXED, Sight.MIXED, Sight.CAUSAL]


@pytest.mark.parametrize("seed", range(8))
def test_halves_are_understanding_then_generation_each_in_sequence_order(seed):
    r = random.Random(seed)
    samples = [random_sample(r) for _ in range(3)]
    pack = pack_blocks(samples, SPECIAL, GEOMETRY)
    assert all(kind in (Kind.TEXT, Kind.VIT) for kind in pack.kind[: pack.n_und].tolist())
    assert all(kind in (Kind.CLEAN, Kind.NOISED) for kind in pack.kind[pack.n_und :].tolist())
    for half in (pack.index[: pack.n_und], pack.index[pack.n_und :]):
        assert half.tolist() == sorted(half.tolist())
    kept = [b for s in samples for b in s if not b.dropped]
    vae = [b for b in kept if b.kind in (Kind.CLEAN, Kind.NOISED)]
    vit = [b for b in kept if b.kind == Kind.VIT]
    assert pack.vae_grid == [b.grid for b in vae] and pack.vit_lengths == [b.length for b in vit]
    assert pack.vae_position.tolist() == [
        i * 16 + j for b in vae for i in range(b.grid[0]) for j in range(b.grid[1])
    ]
    assert pack.vit_position.tolist() == [
        i * 8 + j for b in vit for i in range(b.grid[0]) for j in range(b.grid[1])
    ]
    assert torch.equal(pack.u, torch.tensor([b.u for b in vae for _ in range(b.length)]))
    if vit:
        assert torch.equal(pack.vit_patches, torch.cat([b.patches for b in vit]))
    if vae:
        assert torch.equal(
            pack.noise,
            torch.cat([b.noise if b.noise is not None else torch.zeros(b.length, 12) for b in vae]),
        )


def test_blocks_of_one_picture_share_its_latent_and_samples_do_not():
    shared = image(Kind.CLEAN, 2, 2, piece=1)
    noised = image(Kind.NOISED, 2, 2, piece=1)
    noised.latent = shared.latent
    other = image(Kind.CLEAN, 1, 1, piece=1)
    pack = pack_blocks([[noised, shared], [other]], SPECIAL, GEOMETRY)
    assert pack.vae_block == [0, 0, 1] and len(pack.latents) == 2
    assert pack.latents[0] is shared.latent and pack.latents[1] is other.latent


def test_positions_interpolate_when_the_model_does():
    wide = Geometry(
        latent_stride=4,
        latent_patch=2,
        patch_dim=12,
        max_latent_size=16,
        vit_patch=2,
        vit_side=8,
        interpolate=True,
    )
    pack = pack_blocks([[image(Kind.CLEAN, 1, 2), image(Kind.VIT, 2, 1)]], SPECIAL, wide)
    assert pack.vae_position.tolist() == [0, 8] and pack.vit_position.tolist() == [0, 32]


def test_an_empty_row_has_every_field_at_length_zero():
    pack = pack_blocks([], SPECIAL, GEOMETRY)
    assert isinstance(pack, Pack) and len(pack) == 0 and pack.n_und == 0
    assert pack.vit_patches.shape == (0, 12) and pack.noise.shape == (0, 12)
    full = pack_blocks([[text(1), image(Kind.VIT, 1, 1), image(Kind.NOISED, 1, 1)]], SPECIAL, GEOMETRY)
    for name, value in vars(full).items():
        if isinstance(value, torch.Tensor):
            assert getattr(pack, name).dtype == value.dtype, name


def test_map_reaches_every_tensor_and_keeps_the_rest():
    pack = pack_blocks(
        [[text(1, 2), image(Kind.VIT, 1, 2), image(Kind.NOISED, 2, 2)]],
        SPECIAL,
        GEOMETRY,
        origins=["a.jsonl:3"],
    )
    seen = []
    copy = pack.map(lambda t: seen.append(t) or t.clone())
    tensors = [v for v in vars(pack).values() if isinstance(v, torch.Tensor)] + pack.latents
    assert {id(t) for t in seen} == {id(t) for t in tensors}
    assert (
        copy.origins == ["a.jsonl:3"]
        and copy.n_und == pack.n_und
        and torch.equal(copy.latents[0], pack.latents[0])
    )


def test_ready_latents_are_numbered_before_pictures_with_pixels():
    """One row mixes both; every block still shows its own picture, and posterior draws stay with their
    pixels."""
    pixels = [torch.full((3, 4, 4), float(i)) for i in range(3)]
    draws = [torch.full((3, 2, 2), float(i)) for i in range(3)]

    def fresh(i, piece=0):
        return Block(Kind.CLEAN, 1, piece, (1, 1), pixels=pixels[i], posterior=draws[i])

    ready = [image(Kind.CLEAN, 1, 1, piece) for piece in range(2)]
    pack = pack_blocks(
        [[fresh(0), ready[1], fresh(1, 2)], [ready[0], fresh(2, 1), replace(fresh(2, 1), kind=Kind.NOISED)]],
        SPECIAL,
        GEOMETRY,
    )
    assert all(a is b for a, b in zip(pack.latents, [ready[1].latent, ready[0].latent], strict=True))
    assert all(a is b for a, b in zip(pack.vae_pixels, pixels, strict=True))
    assert all(a is b for a, b in zip(pack.vae_noise, draws, strict=True))
    assert pack.vae_block == [2, 0, 3, 1, 4, 4]
    assert (pack.n_ready, pack.n_to_encode) == (2, 3)


def test_pictures_drawn_from_posteriors_and_means_do_not_mix_in_a_row():
    drawn = Block(Kind.CLEAN, 1, 0, (1, 1), pixels=torch.zeros(3, 4, 4), posterior=torch.zeros(3, 2, 2))
    with pytest.raises(AssertionError, match="or none"):
        pack_blocks([[drawn], [replace(drawn, posterior=None)]], SPECIAL, GEOMETRY)


def test_vit_pictures_with_features_keep_their_place_among_those_with_patches():
    blocks = [image(Kind.VIT, 1, n, piece=n) for n in (1, 2, 3)]
    ready = replace(blocks[1], patches=None, features=torch.randn(2, 7))
    plain, mixed = (pack_blocks([[blocks[0], b], [blocks[2]]], SPECIAL, GEOMETRY) for b in (blocks[1], ready))
    assert mixed.vit_ready == [False, True, False] and mixed.vit_features[0] is ready.features
    assert torch.equal(mixed.vit_patches, torch.cat([blocks[0].patches, blocks[2].patches]))
    assert plain.vit_ready == [] == plain.vit_features and (plain.n_ready, plain.n_to_encode) == (0, 3)
    assert (mixed.n_ready, mixed.n_to_encode) == (1, 2)
    same = ("ids", "position", "index", "kind", "span", "image", "vit_position")
    assert (
        all(torch.equal(getattr(plain, name), getattr(mixed, name)) for name in same)
        and plain.vit_lengths == mixed.vit_lengths
    )
    moved = mixed.map(lambda t: t.clone())
    assert torch.equal(moved.vit_features[0], ready.features) and moved.vit_features[0] is not ready.features


@pytest.mark.parametrize("seed", range(20))
def test_samples_learn_or_are_kept_as_their_aims_say(seed: int):
    r = random.Random(seed)
    samples = [random_sample(r) for _ in range(r.randint(0, 4))]
    aims = [r.choice((Aim.LEARN, Aim.KEEP, Aim.LEARN | Aim.KEEP)) for _ in samples]
    whole, pack = (pack_blocks(samples, SPECIAL, GEOMETRY, aims=chosen) for chosen in (None, aims))
    assert whole.kept_label_rows is None and whole.n_kept_labels == whole.n_kept_image == 0
    sums = []
    for name, first in (("label", 0), ("noised", whole.n_und)):
        rows = getattr(whole, f"{name}_rows")
        aimed = [aims[s] for s in whole.sample[rows + first].tolist()]
        learnt = torch.tensor([Aim.LEARN in aim for aim in aimed], dtype=torch.bool)
        kept = torch.tensor([Aim.KEEP in aim for aim in aimed], dtype=torch.bool)
        assert torch.equal(getattr(pack, f"{name}_rows"), rows[learnt])
        assert torch.equal(getattr(pack, f"kept_{name}_rows"), rows[kept])
        weights = getattr(whole, f"{name}_weight")
        sums.append(float(learnt.sum() if weights is None else weights[learnt].sum()))
        if weights is not None:
            assert torch.equal(getattr(pack, f"{name}_weight"), weights[learnt])
    assert pack.target_weights == pytest.approx(sums)
