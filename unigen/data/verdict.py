"""Whether a training can start on what was read: one rule for the data set, ``unigen check`` and the guard of
a running training."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Verdict(NamedTuple):
    """What was read of the data, and what follows from it."""

    good: int  # records that can be used
    bad: int  # records that cannot
    lost: int  # files that could not be read to their end; how many records that costs nobody knows
    max_bad_share: float  # of all records, that on_bad_record=skip may leave out

    @property
    def code(self) -> Literal["clean", "few", "many", "lost", "nothing"]:
        """``few``: training starts with ``on_bad_record`` skip. With neither: ``many``, too many bad records;
        ``lost``, a damaged file; ``nothing``, no record."""
        if self.lost:
            return "lost"
        if self.bad:
            return "few" if self.good and self.bad <= self.max_bad_share * self.total else "many"
        return "clean" if self.good else "nothing"

    @property
    def total(self) -> int:
        return self.good + self.bad

    @property
    def share(self) -> float:
        """Bad ones among all records."""
        return self.bad / max(self.total, 1)

    def can_train(self, on_bad_record: str) -> bool:
        return self.code == "clean" or (self.code == "few" and on_bad_record == "skip")


def percents(share: float) -> str:
    """A share that options give: 1%, 0.5%."""
    return f"{100 * share:.3g}%"
