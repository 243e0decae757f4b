"""The whole forward: packed = one by one, cached = full, who influences whom, which expert does what, and
gradients that are zero and never missing."""

import random
from dataclasses import replace

import pytest
import tiny_model as tiny
import torch

from unigen.model import flow
from unigen.model.bagel import StateReader, token_losses
from unigen.model.kv_cache import Cache
from unigen.model.sdpa import join_halves
from unigen.sequence.grid import patchify
from unigen.sequence.pack import next_position
from unigen.sequence.types import Block, Kind


@pytest.fixture(scope="module")
def model():
    return tiny.build()


def rows(seed, most=4):
    r = random.Random(seed)
    return [tiny.sample(r) for _ in range(r.randint(2, most))]


def losses(model, pack):
    """(hidden, cross-entropies, squared errors), each in sequence order."""
    out = model(pack, reader=StateReader.of_all(pack))
    return tiny.in_order(pack, out.read), out.ce[pack.index[pack.label >= 0].argsort()], out.mse


def loss(model, pack):
    out = model(pack)
    return out.ce.sum() + out.mse.sum()


@pytest.mark.parametrize("seed", range(6))
def test_a_packed_row_is_its_samples_one_by_one(model, seed):
    samples = rows(seed)
    with torch.no_grad():
        packed = losses(model, tiny.row(samples, model))
        alone = [losses(model, tiny.row([s], model)) for s in samples]
    for together, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert tiny.close(together, torch.cat(parts))


def test_packing_changes_no_gradient(model):
    samples = rows(11)
    together = torch.autograd.grad(loss(model, tiny.row(samples, model)), trainable(model).values())
    alone = torch.autograd.grad(
        sum(loss(model, tiny.row([s], model)) for s in samples), trainable(model).values()
    )
    for name, a, b in zip(trainable(model), together, alone, strict=True):
        assert tiny.close(a, b, 1e-4), name


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- cached = full


def extend(model, caches, blocks):
    """One block more in each context, as inference does it; hidden states [length, D] of each."""
    pack = tiny.row([[b] for b in blocks], model, [c.position for c in caches])
    x0 = model.clean_tokens(pack, model.latents_of(pack))
    t = flow.training_time(pack.u, model.config.timestep_shift)
    grows = all(b.kind != Kind.NOISED for b in blocks)
    hidden = tiny.in_order(
        pack,
        join_halves(model.hidden_states(pack, flow.mix(x0, pack.noise, t), t, caches, update_cache=grows)),
    )
    if grows:
        for cache, block in zip(caches, blocks, strict=True):
            cache.position = next_position(cache.position, block)
    return hidden.split([len(b) for b in blocks])


@pytest.mark.parametrize("seed", range(6))
def test_cached_block_by_block_is_the_full_forward(model, seed):
    """Several contexts of different lengths grow together; noised images are looked at without entering the
    cache."""
    r = random.Random(seed)
    samples = [tiny.sample(r) for _ in range(3)]
    with torch.no_grad():
        full = losses(model, tiny.row(samples, model))[0].split([sum(len(b) for b in s) for s in samples])
        caches = [Cache(3) for _ in samples]
        found: list[list[torch.Tensor]] = [[] for _ in samples]
        for turn in range(max(map(len, samples))):
            for noised in (False, True):
                at = [
                    i
                    for i, s in enumerate(samples)
                    if turn < len(s) and (s[turn].kind == Kind.NOISED) == noised
                ]
                if at:
                    hidden = extend(model, [caches[i] for i in at], [samples[i][turn] for i in at])
                    for i, h in zip(at, hidden, strict=True):
                        found[i].append(h)
    for i, (ours, theirs) in enumerate(zip(found, full, strict=True)):
        assert tiny.close(torch.cat(ours), theirs)
        assert caches[i].length == sum(len(b) for b in samples[i] if b.kind != Kind.NOISED)


def test_looking_without_growing_leaves_the_cache_alone(model):
    r = random.Random(0)
    cache = Cache(3)
    with torch.no_grad():
        extend(model, [cache], [tiny.text(r, 4)])
        before = [cache.past_key_values(i).clone() for i in range(3)]
        extend(model, [cache], [tiny.image(r, Kind.NOISED)])
    assert cache.length == 6 and cache.position == 6
    assert all(torch.equal(cache.past_key_values(i), b) for i, b in enumerate(before))


# ---- who influences whom


def conversation(r):
    target = tiny.image(r, Kind.NOISED, 1, (2, 2))
    clean = tiny.image(r, Kind.CLEAN, 2, (2, 2))
    return [
        tiny.text(r, 3),
        target,
        clean,
        tiny.image(r, Kind.VIT, 1),
        tiny.text(r, 4, loss=True),
        tiny.image(r, Kind.NOISED, 3),
    ]


def changed(model, samples, other):
    """Which blocks (number in the row) have other hidden states."""
    with torch.no_grad():
        a, b = (tiny.row(s, model) for s in (samples, other))
        moved = (
            tiny.in_order(a, tiny.states(model, a)) - tiny.in_order(b, tiny.states(model, b))
        ).abs().amax(1) > 1e-5
    return set(a.span[a.index.argsort()][moved].tolist())


def replaced(samples, s, b, **values):
    return [
        [replace(block, **values) if (i, j) == (s, b) else block for j, block in enumerate(blocks)]
        for i, blocks in enumerate(samples)
    ]


def test_a_noised_image_is_seen_by_nobody_else(model):
    r = random.Random(5)
    samples = [conversation(r), conversation(r)]
    moved = changed(model, samples, replaced(samples, 0, 1, noise=torch.randn(4, 48)))
    assert moved == {1}


@pytest.mark.parametrize(
    ("block", "seen_by"), [(0, {0, 1, 2, 3, 4, 5}), (2, {2, 3, 4, 5}), (3, {3, 4, 5}), (4, {4, 5}), (5, {5})]
)
def test_a_block_is_seen_by_itself_and_what_follows_in_its_sample(model, block, seen_by):
    r = random.Random(6)
    samples = [conversation(r), conversation(r)]
    old = samples[0][block]
    new = (
        tiny.text(r, old.length) if old.kind == Kind.TEXT else tiny.image(r, old.kind, old.segment, old.grid)
    )
    values = (
        {"ids": new.ids}
        if old.kind == Kind.TEXT
        else {"patches": new.patches, "latent": new.latent, "noise": new.noise}
    )
    assert changed(model, samples, replaced(samples, 0, block, **values)) == seen_by


@pytest.mark.parametrize("twin", ["", "_moe_gen"])
@pytest.mark.parametrize(
    "part",
    [
        "mlp{}.down_proj.weight",
        "self_attn.o_proj{}.weight",
        "self_attn.q_proj{}.bias",
        "self_attn.q_norm{}.weight",
    ],
)
def test_each_expert_works_on_its_own_tokens(part, twin):
    """In the last layer, what an expert does with a token stays in that token."""
    model = tiny.build()
    pack = tiny.row([conversation(random.Random(7))], model)
    with torch.no_grad():
        before = tiny.states(model, pack)
        dict(model.named_parameters())[f"language_model.model.layers.2.{part.format(twin)}"].mul_(-1.5)
        moved = (tiny.states(model, pack) - before).abs().amax(1) > 1e-6
    own = (torch.arange(len(pack)) >= pack.n_und) == bool(twin)
    own[0] &= "q_" not in part  # the first token sees itself alone, whatever it asks
    assert torch.equal(moved, own)


def test_markers_of_a_drawn_image_are_text_for_the_experts(model):
    pack = tiny.row([[tiny.image(random.Random(0), Kind.NOISED, grid=(2, 3))]], model)
    assert (
        pack.n_und == 2
        and pack.ids[:2].tolist() == [tiny.SPECIAL.image_start, tiny.SPECIAL.image_end]
        and pack.image.all()
    )


# ---- losses


def test_losses_are_those_of_their_own_tokens(model):
    samples = [*rows(21), conversation(random.Random(1))]
    pack = tiny.row(samples, model)
    with torch.no_grad():
        out, hidden = model(pack), tiny.states(model, pack)
        logits = model.logits(hidden).double()
        labelled = pack.label >= 0
        expected = -logits.log_softmax(-1)[labelled].gather(1, pack.label[labelled, None])[:, 0]
        assert tiny.close(out.ce.double(), expected)
        generated = hidden[pack.n_und :]
        noised = [b for s in samples for b in s if b.kind == Kind.NOISED]
        x0 = torch.cat([patchify(b.latent, 2) for b in noised])
        v = model.llm2vae(generated[pack.kind[pack.n_und :] == Kind.NOISED])
        assert tiny.close(out.mse, (v - (torch.cat([b.noise for b in noised]) - x0)) ** 2)


def test_the_latents_given_win_over_the_pictures(model):
    r = random.Random(2)
    block = tiny.image(r, Kind.NOISED, grid=(2, 2))
    pixels = Block(
        Kind.NOISED, 4, 0, (2, 2), loss=True, pixels=torch.rand(3, 8, 8) * 2 - 1, noise=block.noise, u=block.u
    )
    by_pixels, by_latent = tiny.row([[pixels]], model), tiny.row([[block]], model)
    with torch.no_grad():
        assert torch.equal(model(by_pixels, [block.latent]).mse, model(by_latent).mse)
        latent = model.codec.encode(pixels.pixels[None])[0]
        assert torch.equal(model(by_pixels).mse, model(by_pixels, [latent]).mse)


def test_the_head_in_pieces_has_equal_losses_and_gradients():
    head = torch.nn.Linear(8, 11, bias=False)
    hidden, labels = torch.randn(23, 8, requires_grad=True), torch.randint(11, (23,))
    whole, pieces = token_losses(head, hidden, labels), token_losses(head, hidden, labels, chunk=5)
    assert torch.allclose(whole, pieces)
    for a, b in zip(
        *(torch.autograd.grad(x.sum(), (hidden, head.weight)) for x in (whole, pieces)), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("policy", "held"), [("none", False), ("full", False), ("selective", True)])
def test_rows_that_nobody_reads_change_no_loss_and_no_gradient(policy, held):
    """The last layer goes on with rows that have a loss alone; against one that goes on with all."""
    model = tiny.build()
    tiny.wrap(model, policy, held)
    pack = tiny.row([*rows(4), [tiny.text(random.Random(0), 4, loss=True)]], model)
    seen, last = [], model.language_model.model.layers[-1].mlp
    last.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    results = []
    for reader in (None, StateReader.of_all(pack)):
        model.zero_grad(set_to_none=True)
        out = model(pack, reader=reader)
        (out.ce.sum() + out.mse.sum()).backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (few, mine), (full, wanted) = results
    assert min(seen) == pack.n_text_labels < max(seen) - pack.n_text_labels == pack.n_und
    assert tiny.close(few.ce, full.ce) and tiny.close(few.mse, full.mse)
    assert mine.keys() == wanted.keys() and all(tiny.close(mine[name], g, 1e-4) for name, g in wanted.items())


# ---- zero, not missing


def gradients(model, pack):
    model.zero_grad(set_to_none=True)
    out = model(pack, reader=StateReader.of_all(pack))
    assert torch.isfinite(out.read).all()
    (out.ce.sum() + out.mse.sum()).backward()
    found = {name: p.grad for name, p in trainable(model).items()}
    assert not [name for name, g in found.items() if g is None]
    assert all(torch.isfinite(g).all() for g in found.values())
    return {name: float(g.abs().max()) for name, g in found.items()}


@pytest.mark.parametrize("samples", [0, 2])
def test_an_empty_row_gives_zero_gradients(model, samples):
    pack = tiny.row([[]] * samples, model)
    out = model(pack, reader=StateReader.of_all(pack))
    assert out.read.shape == (0, 32) and out.ce.shape == (0,) and out.mse.shape == (0, 48)
    assert not any(gradients(model, pack).values())


def test_a_row_of_text_gives_zero_gradients_to_everything_visual(model):
    r = random.Random(0)
    found = gradients(model, tiny.row([[tiny.text(r, 5), tiny.text(r, 5, loss=True)]], model))
    visual = ("_moe_gen", "vit_model", "connector", "vae2llm", "llm2vae", "time_embedder")
    for name, size in found.items():
        assert (size == 0) == any(part in name for part in visual), name


def test_every_trainable_weight_learns_from_a_mixed_row(model):
    r = random.Random(0)
    found = gradients(model, tiny.row([conversation(r), conversation(r)], model))
    # The ViT's key biases shift all scores of a query alike, which softmax ignores: zero but for rounding.
    assert [
        name
        for name, size in found.items()
        if size < 1e-6 and not (name.startswith("vit_model") and name.endswith("k_proj.bias"))
    ] == []


@pytest.mark.parametrize("part", ["visual_gen", "visual_und"])
def test_a_model_without_a_part_has_gradients_everywhere(part):
    model = tiny.build(**{part: False})
    names = [name for name, _ in model.named_parameters()]
    gone = (
        ("_moe_gen", "llm2vae", "latent_pos_embed")
        if part == "visual_gen"
        else ("vit_model", "connector", "vit_pos_embed")
    )
    assert not [n for n in names if any(g in n for g in gone)]
    r = random.Random(0)
    gradients(model, tiny.row([[tiny.text(r, 4, loss=True)]], model))
    gradients(model, tiny.row([], model))


# ---- switches


def test_freeze_und_trains_generation_alone_with_the_same_losses(model):
    pack = tiny.row([conversation(random.Random(4))], model)
    everything = StateReader.of_all(pack)
    free = model(pack, reader=everything)
    tiny.wrap(model, held=True)
    try:
        frozen = model(pack, reader=everything)
        assert torch.equal(frozen.read, free.read) and torch.equal(frozen.mse, free.mse)
        model.zero_grad(set_to_none=True)
        frozen.mse.sum().backward()
        for name, p in trainable(model).items():
            own = any(part in name for part in ("_moe_gen", "vae2llm", "llm2vae", "time_embedder"))
            assert (p.grad is not None and bool(p.grad.abs().max() > 0)) == own, name
    finally:
        tiny.wrap(model)
        model.zero_grad(set_to_none=True)


def test_a_fresh_model_starts_from_twins_and_a_silent_velocity_head():
    model = tiny.build()
    model.initialise()
    values = model.state_dict()
    for name, value in values.items():
        if "_moe_gen" in name:
            assert torch.equal(value, values[name.replace("_moe_gen", "")]), name
    assert (
        not values["llm2vae.weight"].any()
        and torch.isfinite(torch.cat([v.flatten() for v in values.values()])).all()
    )


def test_generation_tokens_need_the_generation_expert():
    model = tiny.build(visual_gen=False)
    with pytest.raises(AssertionError, match="visual_gen"):
        model.hidden_states(
            tiny.row([[tiny.image(random.Random(0), Kind.CLEAN)]], model), torch.zeros(9, 48), torch.zeros(9)
        )


# ---- pictures that come encoded


def seen_alone(model, block):
    with torch.no_grad():
        return model.vit_model(block.patches, tiny.row([[block]], model).vit_position, [block.length])


@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_features_in_place_of_patches_change_nothing(chosen):
    """Some or all pictures of a row bring what the frozen ViT makes of them: same losses, same gradients of
    all that learns."""
    model = tiny.build()
    model.vit_model.requires_grad_(False)
    r = random.Random(4)
    samples = [[tiny.image(r, Kind.VIT, i, (2, i + 1)), tiny.text(r, 5, loss=True)] for i in range(3)]
    ready = [
        [replace(s[0], patches=None, features=seen_alone(model, s[0])), s[1]] if i in chosen else s
        for i, s in enumerate(samples)
    ]
    results = []
    for row in (samples, ready):
        model.zero_grad()
        total = loss(model, tiny.row(row, model))
        total.backward()
        results.append((total.detach(), [p.grad.clone() for p in model.connector.parameters()]))
    (plain, wanted), (found, gradients) = results
    assert tiny.close(found, plain) and float(wanted[0].abs().max()) > 0
    assert all(tiny.close(a, b, 1e-4) for a, b in zip(gradients, wanted, strict=True))


def test_a_row_whose_pictures_all_bring_features_never_calls_the_vit(monkeypatch):
    model = tiny.build()
    r = random.Random(1)
    block = tiny.image(r, Kind.VIT, 0, (2, 2))
    ready = replace(block, patches=None, features=seen_alone(model, block))
    monkeypatch.setattr(model.vit_model, "forward", None)
    with torch.no_grad():
        model(tiny.row([[ready, tiny.text(r, 3, loss=True)]], model))


@pytest.mark.parametrize(("sharded", "calls"), [(False, [0, 1, 2]), (True, [1, 2, 3])])
def test_a_sharded_vit_runs_for_every_row_once(monkeypatch, sharded, calls):
    """A row whose pictures all bring features skips the ViT, unless other processes wait for its layers: then
    it sees no patches. Losses are the same."""
    model = tiny.build()
    model.vit_model.requires_grad_(False)
    r = random.Random(1)
    first, second = (tiny.image(r, Kind.VIT, 0, (2, 2)) for _ in range(2))
    ready = [replace(block, patches=None, features=seen_alone(model, block)) for block in (first, second)]
    words = tiny.text(r, 3, loss=True)
    rows = {
        name: tiny.row([[*blocks, words]], model)
        for name, blocks in {"all": ready, "one": [first, ready[1]], "none": [first]}.items()
    }
    with torch.no_grad():
        wanted = {name: model(pack).ce for name, pack in rows.items()}
    seen, genuine = [], model.vit_model.forward
    monkeypatch.setattr(
        model.vit_model, "forward", lambda *args: (seen.append(len(args[0])), genuine(*args))[1]
    )
    model.sharded = sharded
    counts = []
    with torch.no_grad():
        for name, pack in rows.items():
            assert torch.equal(model(pack).ce, wanted[name])
            counts.append(len(seen))
    assert counts == calls and seen == ([0] if sharded else []) + [4, 4]


def test_ready_latents_and_pixels_mix_in_a_row():
    """A row in which one picture brings its latent and another its pixels has the losses of the row of
    pixels."""
    model = tiny.build()
    r = random.Random(2)
    pixels = [torch.rand(3, 4 * n, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    samples = []
    for i, p in enumerate(pixels):
        block = replace(tiny.image(r, Kind.NOISED, 0, (p.shape[1] // 4, 2)), latent=None, pixels=p)
        samples.append(
            [
                tiny.text(r, 2),
                block,
                replace(block, kind=Kind.CLEAN, noise=None, u=float("-inf"), loss=False),
                tiny.text(r, i),
            ]
        )
    plain = tiny.row(samples, model)
    latents = model.latents_of(plain)
    for ready in ((0,), (1,), (0, 1)):
        mixed = [
            [
                replace(b, pixels=None, latent=latents[i]) if b.pixels is not None and i in ready else b
                for b in s
            ]
            for i, s in enumerate(samples)
        ]
        with torch.no_grad():
            found, wanted = losses(model, tiny.row(mixed, model)), losses(model, plain)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and len(wanted[2]) == 6
