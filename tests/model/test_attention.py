"""The mask rule against loops over blocks, every back end against dense attention, and the cache."""

import random

import pytest
import tiny_model as tiny
import torch

from unigen.model.attention import Cache, Tokens, allowed, attend, block_mask, make_plan, plan_attention, plan_full, similar_lengths, store
from unigen.sequence.types import Kind

HEADS, KV_HEADS, WIDTH = 4, 2, 8


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
    places = [(s, b, block.kind, i) for s, blocks in enumerate(samples) for b, block in enumerate(blocks) for i in range(len(block))]
    expected = torch.zeros(len(places), len(places), dtype=torch.bool)
    for q, (s, b, kind, i) in enumerate(places):
        for k, (s2, b2, kind2, j) in enumerate(places):
            if s != s2 or b2 > b:
                continue
            expected[q, k] = (kind != Kind.TEXT or j <= i) if b == b2 else kind2 != Kind.NOISED
    order = pack.index.argsort()
    assert torch.equal(rule(pack)[order][:, order], expected)


@pytest.mark.parametrize("seed", range(12))
def test_planned_attention_is_dense_attention_with_gradients(seed, model):
    pack = tiny.row(random_rows(seed, model), model)
    q, k, v = qkv(len(pack), seed, requires_grad=True)
    target = torch.randn(len(pack), HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    ours, theirs = attend(q, k, v, plan_attention(pack)), dense(q, k, v, rule(pack))
    assert tiny.close(ours.double(), theirs)
    mine = torch.autograd.grad((ours * target).sum(), (q, k, v))
    for a, b in zip(mine, torch.autograd.grad((theirs * target).sum(), (q, k, v)), strict=True):
        assert tiny.close(a, b.float())


@pytest.mark.parametrize("seed", range(4))
def test_flex_attention_is_dense_attention(seed, model):
    pack = tiny.row(random_rows(seed, model), model)
    plan = plan_attention(pack)
    plan.block_mask = block_mask(pack)
    q, k, v = qkv(len(pack), seed)
    assert tiny.close(attend(q, k, v, plan).double(), dense(q, k, v, rule(pack)))


def test_flex_attention_across_several_mask_blocks(model):
    r = random.Random(3)
    samples = [[tiny.text(r, 70), tiny.image(r, Kind.NOISED, grid=(7, 8)), tiny.image(r, Kind.CLEAN, grid=(8, 8))], [tiny.text(r, 90)]]
    pack = tiny.row(samples, model)
    assert len(pack) > 256  # the block mask has several blocks of 128, empty, full and partial ones
    plan = plan_attention(pack)
    plan.block_mask = block_mask(pack)
    q, k, v = qkv(len(pack))
    assert tiny.close(attend(q, k, v, plan).double(), dense(q, k, v, rule(pack)))


@pytest.mark.gpu
def test_flex_attention_on_a_gpu_is_dense_attention_with_gradients(model):
    pack = tiny.row(random_rows(1, model), model).to("cuda")
    q, k, v = (x.cuda().requires_grad_() for x in qkv(len(pack)))
    ours, theirs = attend(q, k, v, plan_attention(pack)), dense(q, k, v, rule(pack))
    assert torch.allclose(ours.double(), theirs, atol=1e-4)
    for a, b in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(theirs.sum(), (q, k, v)), strict=True):
        assert torch.allclose(a, b.float(), atol=1e-3)


@pytest.mark.parametrize("lengths", [[3], [5, 1, 5], [0, 4, 0, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1], []])
def test_pictures_attend_to_the_whole_of_themselves(lengths):
    n = sum(lengths)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    q, k, v = qkv(n)
    ours = attend(q, k, v, plan_full(lengths, torch.device("cpu")))
    assert tiny.close(ours.double(), dense(q, k, v, number[:, None] == number)) if n else ours.shape == (0, HEADS, WIDTH)


def test_groups_hold_similar_lengths_and_every_sample_once():
    lengths = [100, 3, 0, 80, 60, 4, 71]
    groups = similar_lengths(lengths)
    assert sorted(i for g in groups for i in g) == [0, 1, 3, 4, 5, 6]
    assert all(min(lengths[i] for i in g) >= 0.7 * max(lengths[i] for i in g) for g in groups)
    plan = make_plan(torch.arange(sum(lengths)), lengths)
    assert torch.equal(plan.rows[plan.slot], torch.arange(sum(lengths)))
    assert int(plan.real.sum()) == sum(lengths)


# ---- cache ---------------------------------------------------------------------------------------------------------


def grow(cache, n, seed):
    """Appends ``n`` random tokens to every layer."""
    kv = torch.randn(2, n, KV_HEADS, WIDTH, generator=torch.Generator().manual_seed(seed))
    for layer in range(len(cache.layers)):
        cache.append(layer, kv + layer)
    cache.length += n
    return kv


@pytest.mark.parametrize("first", ["original", "copy"])
def test_snapshots_are_isolated(first):
    cache = Cache(2)
    a = grow(cache, 5, 0)
    copy = cache.snapshot()
    contents = {}
    for name in (first, "copy" if first == "original" else "original"):
        contents[name] = grow(cache if name == "original" else copy, 3, len(name))
    for name, holder in (("original", cache), ("copy", copy)):
        for layer in range(2):
            assert torch.equal(holder.past(layer), torch.cat([a, contents[name]], dim=1) + layer), name


def test_a_chain_of_snapshots_keeps_every_state():
    cache, states, whole = Cache(1), [], []
    for step in range(12):
        whole.append(grow(cache, 1 + step, step))
        states.append((cache.snapshot(), torch.cat(whole, dim=1)))
    for old, expected in states:
        assert torch.equal(old.past(0), expected)
    branch = states[3][0]  # growing an old one changes neither the newest nor the others
    grow(branch, 40, 99)
    for old, expected in [s for i, s in enumerate(states) if i != 3]:
        assert torch.equal(old.past(0), expected)
    assert torch.equal(branch.past(0)[:, : states[3][1].shape[1]], states[3][1])


def test_growing_token_by_token_copies_a_linear_amount():
    cache, buffers, copied = Cache(1), [], 0
    for step in range(2000):
        before = cache.layers[0]
        grow(cache, 1, step)
        if cache.layers[0] is not before:
            copied += step
            buffers.append(cache.layers[0])
    assert copied < 12 * 2000  # a geometric series; quadratic copying would be 2,000,000
    assert cache.layers[0].data.shape[1] < 2 * 2000


def test_a_snapshot_shares_memory_until_it_grows_apart():
    cache = Cache(1)
    grow(cache, 4, 0)
    copy = cache.snapshot()
    assert copy.past(0).data_ptr() == cache.past(0).data_ptr()
    grow(cache, 1, 1)  # the original goes on in place; the copy moves away when it grows
    assert copy.past(0).data_ptr() == cache.past(0).data_ptr()
    grow(copy, 1, 2)
    assert copy.past(0).data_ptr() != cache.past(0).data_ptr()


def cached_case(seed, model):
    """Contexts of their own lengths that go on with short blocks, or with pictures and texts of more than 32 tokens."""
    r = random.Random(seed)
    n = r.randint(1, 5)
    caches, pasts = [Cache(1) for _ in range(n)], []
    for i, cache in enumerate(caches):
        length = r.choice([0, 0, 3, 9, 9, 17])
        pasts.append(grow(cache, length, i) if length else torch.zeros(2, 0, KV_HEADS, WIDTH))
    long = [lambda: tiny.text(r, 40), lambda: tiny.image(r, Kind.NOISED, grid=(6, 6)), lambda: tiny.image(r, Kind.CLEAN, grid=(5, 8))]
    blocks = [[r.choice(long)()] if r.random() < 0.6 else tiny.sample(r, 1) for _ in range(n)]
    return caches, pasts, tiny.row(blocks, model)


@pytest.mark.parametrize("seed", range(12))
def test_attention_over_caches_of_different_lengths_is_dense(seed, model):
    caches, pasts, pack = cached_case(seed, model)
    q, k, v = qkv(len(pack), seed)
    ours = attend(q, k, v, plan_attention(pack, caches), 0, caches)
    for s, past in enumerate(pasts):
        mine = (pack.sample == s).nonzero().squeeze(1)
        mask = torch.cat([torch.ones(len(mine), past.shape[1], dtype=torch.bool), rule(pack)[mine][:, mine]], dim=1)
        expected = dense(q[mine], torch.cat([past[0], k[mine]]), torch.cat([past[1], v[mine]]), mask)
        assert tiny.close(ours[mine].double(), expected)


@pytest.mark.parametrize("seed", range(6))
def test_storing_puts_a_row_into_the_caches_in_sequence_order(seed, model):
    caches, pasts, pack = cached_case(seed, model)
    _, k, v = qkv(len(pack), seed)
    store(k, v, pack, 0, caches)
    order = pack.index.argsort()
    for s, (cache, past) in enumerate(zip(caches, pasts, strict=True)):
        mine = order[pack.sample[order] == s]
        cache.length += len(mine)
        assert torch.equal(cache.past(0), torch.cat([past, torch.stack([k[mine], v[mine]])], dim=1))
