"""The table of keys: every kind has its row, notes are bounded."""

import pytest

from unigen.data import keys
from unigen.sequence.types import BadRecord


def test_a_slip_of_the_pen_is_named() -> None:
    with pytest.raises(BadRecord) as caught:
        keys.check_keys({"content": "a", "traget": False}, "sequence[1]", "segment")
    assert (caught.value.code, caught.value.field) == ("unknown_key", "sequence[1].traget")
    assert "did you mean target?" in caught.value.fix and "metadata" in caught.value.fix


def test_what_holds_nothing_is_absent() -> None:
    keys.check_keys({"content": "a", "id": None, "tool_calls": [], "audio": ""}, "x", "segment")
    keys.refuse({"videos": [], "chosen": None, "label": 3})


def test_no_key_is_both_known_and_refused() -> None:
    known = {*keys.RECORD, *keys.LEARNING, *(name for row in keys.ITEMS.values() for name in row)}
    assert not known & keys.REFUSED.keys()


def test_notes_of_any_number_of_fields_stay_few() -> None:
    notes = keys.Notes()
    for i in range(5000):
        notes.add([("unread", "id"), ("unread", f"field {i}")])
    assert len(notes) < 600 and notes.of("unread")["id"] == 5000
    assert sum(notes.of("unread").values()) == 10_000 and notes.of("no_picture") == {}
    told = keys.listed(notes.of("unread"), 5000, most=2)
    assert told.startswith("id 5,000 of 5,000, (others)") and told.endswith("more")
