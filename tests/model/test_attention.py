"""The mask rule against loops over blocks, every back end against dense attention, and the cache."""

import random

import numpy as np
import pytest
import tiny_model as tiny
import torch

from unigen.model import flex
from unigen.model.attention import prepare_attention
from unigen.model.flex import Flex
from unigen.model.kv_cache import Cache
from unigen.model.mask import Tokens, allowed
from unigen.model.sdpa import Cached, Groups, join_halves, similar_lengths, split
from unigen.sequence.blockmask import BLOCK, FULL, NONE, PARTIAL, padded
from unigen.sequence.pack import with_mask
from unigen.sequence.types import Kind

HEADS, KV_HEADS, WIDTH = 4, 2, 16


@pytest.fixture(scope="module")
def model():
    return tiny.build()


def random_rows(seed, model, most=5):
    r = random.Random(seed)
    return [tiny.sample(r) for _ in range(r.randint(1, most))]


def dense(q, k, v, mask):
    """Softmax attention in float64, written out; ``mask`` [queries, keys]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v.double())


def qkv(n, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, WIDTH, generator=g, **options) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def rule(pack):
    tokens = Tokens.of(pack)
    return allowed(tokens.unsqueeze(1), tokens.unsqueeze(0))


@pytest.mark.parametrize("seed", range(10))
def test_the_rule_is_the_table(seed, model):
    samples = random_rows(seed, model)
    pack = tiny.row(samples, model)
    places = [
        (s, b, block.kind, i)
        for s, blocks in enumerate(samples)
        for b, block in enumerate(blocks)
        for i in range(len(block))
    ]
    expected = torch.zeros(len(places), len(places), dtype=torch.bool)
    for q, (s, b, kind, i) in enumerate(places):
        for k, (s2, b2, kind2, j) in enumerate(places):
            if s != s2 or b2 > b:
                continue
            expected[q, k] = (kind != Kind.TEXT or j <= i) if b == b2 else kind2 != Kind.NOISED
    order = pack.index.argsort()
    assert torch.equal(rule(pack)[order][:, order], expected)


def attend(attention, pack, *qkv, layer=0):
    """Attention of whole tensors [T, heads, d]."""
    halves = (pack.ids[: pack.n_und], pack.ids[pack.n_und :])
    return join_halves(attention(*(split(x, halves) for x in qkv), layer))


@pytest.mark.parametrize("seed", range(12))
def test_attention_in_batches_is_dense_attention_with_gradients(seed, model):
    pack = tiny.row(random_rows(seed, model), model)
    q, k, v = qkv(len(pack), seed, requires_grad=True)
    target = torch.randn(len(pack), HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    attention = prepare_attention(pack)
    assert isinstance(attention, Groups)
    ours, theirs = attend(attention, pack, q, k, v), dense(q, k, v, rule(pack))
    assert tiny.close(ours.double(), theirs)
    mine = torch.autograd.grad((ours * target).sum(), (q, k, v))
    for a, b in zip(mine, torch.autograd.grad((theirs * target).sum(), (q, k, v)), strict=True):
        assert tiny.close(a, b.float())


@pytest.mark.parametrize(
    "kinds", [[Kind.TEXT], [Kind.VIT], [Kind.NOISED], [Kind.TEXT, Kind.TEXT], [Kind.TEXT, Kind.NOISED]]
)
def test_samples_of_one_block_need_no_mask(kinds, model):
    """Texts are causal, pictures full; where both share a batch, or lengths differ, a mask says so."""
    r = random.Random(0)
    pack = tiny.row(
        [[tiny.text(r, 7) if kind == Kind.TEXT else tiny.image(r, kind, grid=(3, 3))] for kind in kinds],
        model,
    )
    attention = Groups.of(pack)
    assert [batch.mask is None for batch in attention.batches] == [len(set(kinds)) == 1]
    q, k, v = qkv(len(pack))
    assert tiny.close(attend(attention, pack, q, k, v).double(), dense(q, k, v, rule(pack)))


# ---- flex attention


def long_rows(model):
    """Packed sequences of several blocks of 128: whole, partial and empty ones, and every kind of segment."""
    r = random.Random(3)
    image = lambda kind, *grid: tiny.image(r, kind, grid=grid)  # noqa: E731
    yield [[tiny.text(r, 70), image(Kind.NOISED, 7, 8), image(Kind.CLEAN, 8, 8)], [tiny.text(r, 90)]]
    yield [
        [
            image(Kind.VIT, 8, 8),
            image(Kind.CLEAN, 8, 8),
            image(Kind.VIT, 8, 8),
            image(Kind.VIT, 8, 8),
            tiny.text(r, 60),
        ]
        for _ in range(2)
    ]
    yield [[tiny.text(r, n) for n in (5, 200, 40)] for _ in range(3)]
    yield [[image(Kind.NOISED, 8, 8)] for _ in range(7)]
    yield [tiny.sample(r) for _ in range(40)]
    yield []


def in_place(pack):
    """Where each token lies in the padded sequence."""
    n = torch.arange(len(pack))
    return torch.where(n < pack.n_und, n, padded(pack.n_und) + n - pack.n_und)


@pytest.mark.parametrize("row", range(6))
def test_the_mask_of_the_loader_is_the_rule(row, model):
    """Every pair of tokens, every block of pairs; padding sees padding alone, and is seen by it alone."""
    pack = with_mask(tiny.row(list(long_rows(model))[row], model))
    lower, upper, span, place, hidden = pack.mask_rule
    found = (lower[:, None] <= place) & (place <= upper[:, None]) & ((hidden < 0) | (hidden == span[:, None]))
    at, total = in_place(pack), len(place)
    assert total == padded(pack.n_und) + padded(len(pack) - pack.n_und) and total % BLOCK == 0
    real = torch.zeros(total, dtype=torch.bool)
    real[at] = True
    assert torch.equal(found[at][:, at], rule(pack))
    assert not found[real][:, ~real].any() and not found[~real][:, real].any()
    assert found.any(dim=1).all(), "a query that sees nothing would divide by zero"
    blocks = found.view(total // BLOCK, BLOCK, total // BLOCK, BLOCK).transpose(1, 2).flatten(2)
    kinds = torch.where(blocks.all(-1), FULL, torch.where(blocks.any(-1), PARTIAL, NONE))
    assert torch.equal(pack.mask_blocks, kinds.to(torch.uint8))


def test_the_mask_of_the_loader_knows_all_kinds_of_blocks(model):
    seen = set()
    for samples in long_rows(model):
        seen |= set(with_mask(tiny.row(samples, model)).mask_blocks.flatten().tolist())
    assert seen == {NONE, PARTIAL, FULL}


@pytest.mark.slow
@pytest.mark.parametrize("row", range(5))
def test_flex_attention_is_dense_attention(row, model):
    pack = tiny.row(list(long_rows(model))[row], model)
    q, k, v = qkv(len(pack))
    assert tiny.close(attend(Flex(pack), pack, q, k, v).double(), dense(q, k, v, rule(pack)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_flex_attention_of_short_sequences_is_dense_attention(seed, model):
    pack = tiny.row(random_rows(seed, model), model)
    q, k, v = qkv(len(pack), seed)
    assert tiny.close(attend(Flex(pack), pack, q, k, v).double(), dense(q, k, v, rule(pack)))


@pytest.fixture
def unbroken(monkeypatch):
    monkeypatch.setattr(flex, "_broken", "")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no module triton"),
        FileNotFoundError("cc"),
        torch._dynamo.exc.TorchDynamoException("no compiler"),
    ],
)
def test_without_a_compiler_attention_goes_on_and_says_so_once(error, model, unbroken, monkeypatch, caplog):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(flex, "_compiled", lambda: refuse)
    pack = tiny.row(random_rows(1, model), model)
    q, k, v = qkv(len(pack))
    for _ in range(2):
        attention = Flex(pack)
        for layer in range(2):
            assert tiny.close(
                attend(attention, pack, q, k, v, layer=layer).double(), dense(q, k, v, rule(pack))
            )
    assert len(caplog.records) == 1 and str(error) in caplog.text and "Fix:" in caplog.text


@pytest.mark.parametrize(
    "error",
    [torch._dynamo.exc.FailOnRecompileLimitHit("limit"), torch.OutOfMemoryError("full"), ValueError("x")],
)
def test_other_failures_of_flex_attention_are_loud(error, model, unbroken, monkeypatch):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(flex, "_compiled", lambda: refuse)
    pack = tiny.row(random_rows(1, model), model)
    with pytest.raises(type(error)):
        attend(Flex(pack), pack, *qkv(len(pack)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (4, 2, 64), (28, 4, 128)])
@pytest.mark.parametrize("tokens", [60, 107, 128, 300, 1000])
def test_flex_attention_on_a_gpu_is_dense_attention_with_gradients(
    tokens, heads, kv_heads, width, dtype, model, unbroken
):
    if dtype == torch.float32 and width == 128 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("float32 with heads of width 128 does not fit the shared memory of this card")
    r, half = random.Random(tokens), (tokens - 6) // 2
    samples = [
        [tiny.text(r, half // 2), tiny.image(r, Kind.NOISED, grid=(1, half - half // 2))],
        [tiny.text(r, tokens - half - 6)],
    ]
    wide = tiny.build(max_latent_size=1000)
    pack = tiny.row(samples, wide).to("cuda")
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(tokens, n, width, generator=g).to("cuda", dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    ours, theirs = attend(Flex(pack), pack, q, k, v), dense(q, k, v, rule(pack))
    assert not flex._broken
    way = torch.randn(ours.shape, generator=g).cuda()
    found = torch.autograd.grad((ours * way).sum(), (q, k, v))
    for a, b in zip(
        (ours, *found), (theirs, *torch.autograd.grad((theirs * way).sum(), (q, k, v))), strict=True
    ):
        # TF32
        assert (a.double() - b.double()).norm() / b.double().norm() < (
            2e-2 if dtype == torch.bfloat16 else 2e-3
        )


@pytest.mark.gpu
def test_narrow_heads_on_a_gpu_take_the_other_way(model, unbroken):
    pack = tiny.row(random_rows(1, model), model).to("cuda")
    q, k, v = (x[..., :8].cuda().requires_grad_() for x in qkv(len(pack)))
    assert torch.allclose(attend(Flex(pack), pack, q, k, v).double(), dense(q, k, v, rule(pack)), atol=1e-4)


@pytest.mark.parametrize("lengths", [[3], [5, 1, 5], [0, 4, 0, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1], []])
def test_pictures_attend_to_the_whole_of_themselves(lengths):
    n = sum(lengths)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    q, k, v = qkv(n)
    (ours,) = Groups.pictures(lengths, torch.device("cpu"))((q,), (k,), (v,))
    assert (
        tiny.close(ours.double(), dense(q, k, v, number[:, None] == number))
        if n
        else ours.shape == (0, HEADS, WIDTH)
    )


def test_groups_hold_similar_lengths_and_every_sample_once():
    lengths = [100, 3, 0, 80, 60, 4, 71]
    groups = similar_lengths(lengths)
    assert sorted(i for g in groups for i in g) == [0, 1, 3, 4, 5, 6]
    assert all(min(lengths[i] for i in g) >= 0.7 * max(lengths[i] for i in g) for g in groups)
    ends = np.cumsum(lengths)
    slots = Groups([np.arange(b - n, b) for n, b in zip(lengths, ends)], torch.device("cpu"))
    assert torch.equal(slots.rows[slots.slot], torch.arange(sum(lengths)))
    assert int(slots.real.sum()) == sum(lengths)


# ---- cache


def update_cache(cache, n, seed):
    """Appends ``n`` random tokens to every layer."""
    kv = torch.randn(2, n, KV_HEADS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for layer in range(len(cache.layers)):
        cache.room(layer, n, kv[0])[:, -n:] = kv + layer
    cache.length += n
    return kv


@pytest.mark.parametrize("first", ["original", "copy"])
def test_snapshots_are_isolated(first):
    cache = Cache(2)
    a = update_cache(cache, 5, 0)
    copy = cache.snapshot()
    contents = {}
    for name in (first, "copy" if first == "original" else "original"):
        contents[name] = update_cache(cache if name == "original" else copy, 3, len(name))
    for name, holder in (("original", cache), ("copy", copy)):
        for layer in range(2):
            assert torch.equal(
                holder.past_key_values(layer), torch.cat([a, contents[name]], dim=1) + layer
            ), name


def test_a_chain_of_snapshots_keeps_every_state():
    cache, states, whole = Cache(1), [], []
    for step in range(12):
        whole.append(update_cache(cache, 1 + step, step))
        states.append((cache.snapshot(), torch.cat(whole, dim=1)))
    for old, expected in states:
        assert torch.equal(old.past_key_values(0), expected)
    branch = states[3][0]  # growing an old one changes neither the newest nor the others
    update_cache(branch, 40, 99)
    for old, expected in [s for i, s in enumerate(states) if i != 3]:
        assert torch.equal(old.past_key_values(0), expected)
    assert torch.equal(branch.past_key_values(0)[:, : states[3][1].shape[1]], states[3][1])


def test_growing_token_by_token_copies_a_linear_amount():
    cache, buffers, copied = Cache(1), [], 0
    for step in range(2000):
        before = cache.layers[0]
        update_cache(cache, 1, step)
        if cache.layers[0] is not before:
            copied += step
            buffers.append(cache.layers[0])
    assert copied < 12 * 2000  # a geometric series; quadratic copying would be 2,000,000
    assert cache.layers[0].data.shape[1] < 2 * 2000


def test_a_snapshot_shares_memory_until_it_grows_apart():
    cache = Cache(1)
    update_cache(cache, 4, 0)
    copy = cache.snapshot()
    assert copy.past_key_values(0).data_ptr() == cache.past_key_values(0).data_ptr()
    update_cache(cache, 1, 1)  # the original goes on in place; the copy moves away when it grows
    assert copy.past_key_values(0).data_ptr() == cache.past_key_values(0).data_ptr()
    update_cache(copy, 1, 2)
    assert copy.past_key_values(0).data_ptr() != cache.past_key_values(0).data_ptr()


def cached_case(seed, model):
    """Contexts of their own lengths that go on with short blocks, or with pictures and texts of more than 32
    tokens."""
    r = random.Random(seed)
    n = r.randint(1, 5)
    caches, pasts = [Cache(1) for _ in range(n)], []
    for i, cache in enumerate(caches):
        length = r.choice([0, 0, 3, 9, 9, 17])
        pasts.append(update_cache(cache, length, i) if length else torch.zeros(2, 0, KV_HEADS, WIDTH))
    long = [
        lambda: tiny.text(r, 40),
        lambda: tiny.image(r, Kind.NOISED, grid=(6, 6)),
        lambda: tiny.image(r, Kind.CLEAN, grid=(5, 8)),
    ]
    blocks = [[r.choice(long)()] if r.random() < 0.6 else tiny.sample(r, 1) for _ in range(n)]
    return caches, pasts, tiny.row(blocks, model)


def stored(pack, s):
    """Where the tokens of sample ``s`` are stored."""
    return (pack.sample == s).nonzero().squeeze(1)


@pytest.mark.parametrize("update_cache", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_attention_over_caches_of_different_lengths_is_dense(seed, update_cache, model):
    caches, pasts, pack = cached_case(seed, model)
    attention = prepare_attention(pack, caches, update_cache)
    assert isinstance(attention, Cached)
    for again in range(
        1 + (not update_cache)
    ):  # without growing, the same context is looked at again and again
        q, k, v = qkv(len(pack), seed + 100 * again)
        ours = attend(attention, pack, q, k, v)
        for s, past in enumerate(pasts):
            mine = stored(pack, s)
            mask = torch.cat(
                [torch.ones(len(mine), past.shape[1], dtype=torch.bool), rule(pack)[mine][:, mine]], dim=1
            )
            expected = dense(q[mine], torch.cat([past[0], k[mine]]), torch.cat([past[1], v[mine]]), mask)
            assert tiny.close(ours[mine].double(), expected)


@pytest.mark.parametrize("update_cache", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_keys_and_values_stay_in_the_caches_only_where_they_grow(seed, update_cache, model):
    caches, pasts, pack = cached_case(seed, model)
    q, k, v = qkv(len(pack), seed)
    attend(prepare_attention(pack, caches, update_cache), pack, q, k, v)
    for s, (cache, past) in enumerate(zip(caches, pasts, strict=True)):
        mine = stored(pack, s)
        if update_cache:
            cache.length += len(mine)
            past = torch.cat([past, torch.stack([k[mine], v[mine]])], dim=1)
        assert torch.equal(cache.past_key_values(0), past) if cache.length else not past.shape[1]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[300], [5, 200, 17], [1369, 1370]])
def test_pictures_on_a_gpu_need_no_batches(lengths):
    """In FlashAttention's kernel for sequences of any lengths; heads of the ViT's width, 72."""
    from unigen.model.attention import PictureAttention, picture_attention

    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(lengths), 4 * 72, generator=g).cuda().bfloat16()
    attention = picture_attention(lengths, x, 4)
    assert isinstance(attention, PictureAttention)
    q, k, v = (
        torch.randn(sum(lengths), 4, 72, generator=g).cuda().bfloat16().requires_grad_() for _ in range(3)
    )
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    (ours,), theirs = attention((q,), (k,), (v,)), dense(q, k, v, number[:, None] == number)
    found, wanted = (torch.autograd.grad(y.sum(), (q, k, v)) for y in (ours, theirs))
    for a, b in zip((ours, *found), (theirs, *wanted), strict=True):
        assert (a.double() - b.double()).norm() <= 2e-2 * b.double().norm() + 1e-3
