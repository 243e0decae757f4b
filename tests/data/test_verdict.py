"""One rule says whether a training can start."""

import pytest

from unigen.data.verdict import Verdict, percents


@pytest.mark.parametrize(
    ("good", "bad", "lost", "share", "code", "with_error", "with_skip"),
    [
        (10, 0, 0, 0.01, "clean", True, True),
        (99, 1, 0, 0.01, "few", False, True),
        (98, 1, 0, 0.01, "many", False, False),
        (98, 1, 0, 0.02, "few", False, True),
        (0, 3, 0, 1.0, "many", False, False),
        (99, 1, 1, 1.0, "lost", False, False),
        (99, 0, 1, 1.0, "lost", False, False),
        (0, 0, 0, 0.01, "nothing", False, False),
    ],
)
def test_verdicts(good, bad, lost, share, code, with_error, with_skip) -> None:
    verdict = Verdict(good, bad, lost, share)
    assert verdict.code == code
    assert (verdict.can_train("error"), verdict.can_train("skip")) == (with_error, with_skip)


def test_shares_as_people_write_them() -> None:
    assert [percents(share) for share in (0.01, 0.005, 0.125, 1)] == ["1%", "0.5%", "12.5%", "100%"]
