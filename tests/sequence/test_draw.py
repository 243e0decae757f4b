"""Random numbers by counting: uniform, independent, and those of the arrays."""

import numpy as np

from unigen.sequence.draw import RandomKey, structure_numbers


def test_the_numbers_that_decide_a_structure_are_uniform_and_independent():
    drawn = structure_numbers(3, 1, np.arange(20_000), 4)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.allclose(drawn.mean(0), 0.5, atol=0.01) and np.allclose(drawn.var(0), 1 / 12, atol=0.003)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.03, "neighbouring records"
    others = [structure_numbers(*key, np.arange(20_000), 1)[:, 0] for key in [(4, 1), (3, 2), (3, None)]]
    assert all(abs(np.corrcoef(drawn[:, 0], other)[0, 1]) < 0.03 for other in others)
    assert RandomKey(3, 1, 17).structure(4) == drawn[17].tolist()
    assert RandomKey(3, 1, 17, training=False).structure(1) == others[2][17:18].tolist()


def test_seeds_are_those_of_earlier_versions():
    """Runs go on with the numbers that they began with."""
    assert RandomKey(1, 2, 3).seed_for("noise") == 8633089142435644996
    assert RandomKey(1, 2, 3, training=False).seed_for("noise") == 3981939684017707400
    assert RandomKey(1, 2, 3).structure(2) == [0.3016522872500197, 0.037181417333488564]
