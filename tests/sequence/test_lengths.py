"""Token lengths are kept as they were given."""

import numpy as np
import pytest

from unigen.sequence.lengths import BLOCK_DTYPE, Grids, RecordLengths, TokenLengths
from unigen.sequence.types import Kind

ONE = RecordLengths(np.array([(7, 6, Kind.TEXT, True, False, False)], BLOCK_DTYPE), [5, 9], [])
TWO = RecordLengths(
    np.array([(4, 1, Kind.TEXT, False, True, False), (14, 0, Kind.NOISED, True, False, False)], BLOCK_DTYPE),
    [2],
    [Grids(3, 4, 5, 6)],
)


def test_records_come_back_as_they_were_given():
    lengths = TokenLengths([ONE, TWO, ONE])
    assert len(lengths) == 3 and [record.texts for record in lengths] == [[5, 9], [2], [5, 9]]
    assert np.array_equal(lengths[1].blocks, TWO.blocks) and lengths[-2].pictures == [Grids(3, 4, 5, 6)]
    assert (TWO.pictures[0].latent, TWO.pictures[0].vit) == ((3, 4), (5, 6))
    with pytest.raises(IndexError):
        lengths[3]
    assert [record.texts for record in lengths.keep([1, 0])] == [[2], [5, 9]]


def test_blocks_of_some_records_and_more_records_after_that():
    lengths = TokenLengths([ONE, TWO])
    blocks = lengths.blocks(np.array([1, 0, 1]))
    assert blocks.table["tokens"].tolist() == [4, 14, 7, 4, 14]
    assert blocks.record.tolist() == [0, 0, 1, 2, 2] and blocks.number.tolist() == [0, 1, 0, 0, 1]
    assert blocks.sums(blocks.table["tokens"], 3).tolist() == [18, 7, 18]
    lengths.append(ONE)
    assert (
        len(lengths) == 3
        and lengths.full(100).tolist() == [7, 18, 7]
        and lengths.full(9).tolist() == [7, 9, 7]
    )


def test_a_picture_too_large_to_count_is_no_small_one():
    with pytest.raises(OverflowError):
        TokenLengths([ONE._replace(pictures=[Grids(1, 1 << 16, 0, 0)])])
