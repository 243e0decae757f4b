"""Rectified flow against versions written out number by number."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unigen.model import flow

UNIT = st.floats(0, 1)
SHIFT = st.floats(0.2, 8)


@given(UNIT, SHIFT)
def test_the_shift(t, s):
    assert float(flow.shift_time(torch.tensor(t, dtype=torch.float64), s)) == pytest.approx(
        s * t / (1 + (s - 1) * t), abs=1e-9
    )


def test_the_shift_keeps_its_ends_and_one_leaves_time_alone():
    t = torch.linspace(0, 1, 11)
    assert flow.shift_time(t, 3.0)[0] == 0 and flow.shift_time(t, 3.0)[-1] == 1
    assert torch.equal(flow.shift_time(t, 1.0), t)
    assert (flow.shift_time(t, 3.0)[1:-1] > t[1:-1]).all()  # towards the noise


@given(st.floats(-8, 8), SHIFT)
def test_training_time(u, s):
    t = 1 / (1 + math.exp(-u))
    assert float(flow.training_time(torch.tensor(u, dtype=torch.float64), s)) == pytest.approx(
        s * t / (1 + (s - 1) * t), abs=1e-9
    )


def test_minus_infinity_is_a_clean_image():
    assert flow.training_time(torch.tensor([float("-inf")]), 3.0).tolist() == [0.0]


def test_mix_velocity_and_step_agree():
    """Following the true velocity from noise at t = 1 arrives at the data, in one step or in many."""
    x0, noise = torch.randn(6, 4), torch.randn(6, 4)
    t = torch.rand(6)
    expected = torch.stack([(1 - t[i]) * x0[i] + t[i] * noise[i] for i in range(6)])
    assert torch.allclose(flow.mix(x0, noise, t), expected)
    assert torch.equal(flow.mix(x0, noise, torch.zeros(6)), x0) and torch.equal(
        flow.mix(x0, noise, torch.ones(6)), noise
    )
    x, times = noise, flow.sampling_times(7, 3.0)
    for a, b in itertools.pairwise(times):
        x = flow.euler_step(x, flow.velocity(x0, noise), a, b)
    assert torch.allclose(x, x0, atol=1e-5)


@pytest.mark.parametrize(("points", "shift"), [(2, 1.0), (8, 3.0), (50, 1.5)])
def test_sampling_times(points, shift):
    times = flow.sampling_times(points, shift)
    line = [1 - i / (points - 1) for i in range(points)]
    assert times.tolist() == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in line], abs=1e-6)
    assert times[0] == 1 and times[-1] == 0


# ---- guidance


def guided(v, no_text, no_image, a, b, kind, least):
    """The contract's sentences, on lists."""

    def norm(rows):
        return math.sqrt(sum(x * x for row in rows for x in row))

    def renorm(new, per_token):
        groups = [[i] for i in range(len(v))] if per_token else [list(range(len(v)))]
        out = [None] * len(v)
        for group in groups:
            scale = min(1.0, max(least, norm([v[i] for i in group]) / (norm([new[i] for i in group]) + 1e-8)))
            for i in group:
                out[i] = [x * scale for x in new[i]]
        return out

    def step(base, towards, w):
        return [
            [x + w * (y - x) for x, y in zip(p, q, strict=True)] for p, q in zip(base, towards, strict=True)
        ]

    if a <= 1:
        return v
    new = step(no_text, v, a)
    if kind == "text_channel":
        new = renorm(new, True)
        return step(no_image, new, b) if b > 1 else new
    if b > 1:
        new = step(no_image, new, b)
    return renorm(new, kind == "channel")


@pytest.mark.parametrize("kind", ["global", "channel", "text_channel"])
@pytest.mark.parametrize(("a", "b"), [(4.0, 1.5), (4.0, 1.0), (1.0, 1.5), (1.0, 1.0), (0.5, 2.0), (1.2, 3.0)])
@pytest.mark.parametrize("least", [0.0, 0.9, 1.0])
def test_guidance(kind, a, b, least):
    g = torch.Generator().manual_seed(0)
    v, no_text, no_image = (torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(3))
    no_text[0] = 3 * v[0]  # here guidance shortens, so that the renormalisation must not lengthen
    found = flow.guide(v, no_text, no_image, a, b, kind, least)
    expected = torch.tensor(
        guided(v.tolist(), no_text.tolist(), no_image.tolist(), a, b, kind, least), dtype=torch.float64
    )
    assert torch.allclose(found, expected, atol=1e-12)


def test_guidance_asks_only_for_what_it_uses():
    v = torch.randn(3, 2)
    assert flow.guide(v, None, None, 1.0, 2.0, "global", 0.0) is v
    # without a difference nothing moves
    assert torch.equal(flow.guide(v, v, None, 2.0, 1.0, "global", 0.0), v)
    with pytest.raises(AssertionError):
        flow.guide(v, v, None, 2.0, 2.0, "global", 0.0)


def test_renormalisation_never_lengthens():
    g = torch.Generator().manual_seed(1)
    v, no_text, no_image = (torch.randn(64, 4, generator=g) for _ in range(3))
    assert flow.guide(v, no_text, no_image, 5.0, 2.0, "global", 0.0).norm() <= v.norm() * 1.0001
    assert (
        flow.guide(v, no_text, no_image, 5.0, 2.0, "channel", 0.0).norm(dim=1) <= v.norm(dim=1) * 1.0001
    ).all()
