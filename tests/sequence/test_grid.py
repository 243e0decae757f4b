"""Pictures as grids: the order inside a patch, and where a patch stands in a position table."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unigen.sequence.grid import grid_positions, patchify, to_unit, unpatchify

SIDES = st.integers(1, 5)


@given(SIDES, SIDES, st.integers(1, 4), st.integers(1, 4))
def test_patches_run_row_column_and_inside_y_x_channel(rows, columns, patch, channels):
    x = torch.arange(channels * rows * columns * patch * patch).reshape(
        channels, rows * patch, columns * patch
    )
    expected = [
        [
            int(x[c, r * patch + y, k * patch + z])
            for y in range(patch)
            for z in range(patch)
            for c in range(channels)
        ]
        for r in range(rows)
        for k in range(columns)
    ]
    tokens = patchify(x, patch)
    assert tokens.tolist() == expected
    assert torch.equal(unpatchify(tokens, (rows, columns), patch), x)


def test_sides_must_be_whole_patches():
    with pytest.raises(Exception, match=r"divide|divisible"):
        patchify(torch.zeros(3, 5, 4), 2)


@given(st.integers(1, 9), st.integers(1, 9))
def test_extrapolated_positions_count_from_the_corner(rows, columns):
    assert grid_positions(rows, columns, 16).tolist() == [
        r * 16 + c for r in range(rows) for c in range(columns)
    ]


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 16, 64, 70]))
def test_interpolated_positions_spread_over_the_table(rows, columns, side):
    found = grid_positions(rows, columns, side, interpolate=True)
    assert found.shape == (rows * columns,)
    row, column = found.reshape(rows, columns) // side, found.reshape(rows, columns) % side
    for line, n in ((row[:, 0], rows), (column[0], columns)):
        for i, bucket in enumerate(line.tolist()):
            exact, rest = divmod(i * side, n)
            # Exactly on an edge, float32 (the reference's, too) may fall to either side.
            assert bucket == exact if rest else bucket in (exact, exact - 1)
    assert torch.equal(row, row[:, :1].expand(-1, columns)) and torch.equal(
        column, column[:1].expand(rows, -1)
    )


def test_interpolation_of_a_full_table_is_the_table():
    assert grid_positions(8, 8, 8, interpolate=True).tolist() == list(range(64))
    assert grid_positions(2, 4, 8, interpolate=True).tolist() == [0, 2, 4, 6, 32, 34, 36, 38]


def test_levels_become_the_numbers_of_the_reference_to_the_bit():
    """All 256, against the operations of the reference in their order; floats are left alone."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    wanted = levels.to(torch.float32).div(255).sub(0.5).div(0.5)
    assert torch.equal(to_unit(levels), wanted)
    assert to_unit(wanted) is wanted


@pytest.mark.gpu
def test_levels_become_the_same_bits_on_a_gpu():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_unit(levels.cuda()).cpu(), to_unit(levels))
