"""The small parts against formulas written out entry by entry."""

import math

import pytest
import torch

from unigen.model.layers import (
    PositionTable,
    RMSNorm,
    SwiGLU,
    TimeEmbedder,
    activation,
    rope_angles,
    rotate,
    sincos_table,
)
from unigen.model.schemas import ACTIVATIONS


def test_rms_norm():
    norm = RMSNorm(4, eps=0.1)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 4)
    for row, out in zip(x.tolist(), norm(x).tolist(), strict=True):
        size = math.sqrt(sum(v * v for v in row) / 4 + 0.1)
        assert out == pytest.approx(
            [v / size * w for v, w in zip(row, norm.weight.tolist(), strict=True)], rel=1e-5
        )


def test_rms_norm_squares_in_float32():
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # 300^2 is beyond float16
    assert RMSNorm(4, 1e-6).half()(x).tolist() == [[1.0] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_without_gradients_is_the_one_with_gradients(dtype):
    """Bit for bit in float32; in bfloat16 it rounds once instead of twice."""
    norm = RMSNorm(64, 1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64).to(dtype)
    with torch.no_grad():
        found = norm(x)
    assert torch.allclose(found, norm(x), rtol=0.0 if dtype == torch.float32 else 2**-7, atol=0)


def test_swiglu():
    part = SwiGLU(3, 5)
    x = torch.randn(2, 3)
    gate, up = x @ part.gate_proj.weight.T, x @ part.up_proj.weight.T
    assert torch.allclose(part(x), (gate / (1 + torch.exp(-gate)) * up) @ part.down_proj.weight.T, atol=1e-6)


def test_the_position_table_has_columns_first_and_sines_before_cosines():
    side, width = 5, 16
    table, quarter = sincos_table(side, width), width // 4
    for row in range(side):
        for column in range(side):
            expected = []
            for at in (column, row):
                angles = [at * 10000 ** (-i / quarter) for i in range(quarter)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert table[row * side + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_position_table_is_fixed_and_looked_up():
    table = PositionTable(4, 8)
    table.fill()
    assert not table.pos_embed.requires_grad
    assert torch.equal(table(torch.tensor([6, 0])), sincos_table(4, 8)[[6, 0]])


def test_time_embedding_is_cosines_then_sines():
    embedder = TimeEmbedder(256)
    for layer in (embedder.mlp[0], embedder.mlp[2]):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    t = 0.37
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    raw = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert embedder(torch.tensor([t]))[0].tolist() == pytest.approx(
        [v / (1 + math.exp(-v)) for v in raw], abs=1e-5
    )


def test_rotary_embedding_turns_pairs_of_the_two_halves():
    x, position, theta = torch.randn(3, 2, 6), torch.tensor([0, 1, 9]), 100.0
    out = rotate(x, *rope_angles(position, 6, theta))
    for t, p in enumerate(position.tolist()):
        for i in range(3):
            a = p * theta ** (-2 * i / 6)
            for h in range(2):
                u, v = float(x[t, h, i]), float(x[t, h, i + 3])
                assert float(out[t, h, i]) == pytest.approx(u * math.cos(a) - v * math.sin(a), abs=1e-5)
                assert float(out[t, h, i + 3]) == pytest.approx(v * math.cos(a) + u * math.sin(a), abs=1e-5)


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(a, b):
        return float(
            (
                rotate(q, *rope_angles(torch.tensor([a]), 8, 1e4))
                * rotate(k, *rope_angles(torch.tensor([b]), 8, 1e4))
            ).sum()
        )

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4) and score(7, 3) != pytest.approx(
        score(7, 4), abs=1e-3
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_that_of_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-8, 8, 1001)
    assert torch.allclose(activation(name)(x), ACT2FN[name](x), atol=1e-6, rtol=1e-6)
