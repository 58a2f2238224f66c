import pytest

from jest_core import tables


def test_uids_round_trip():
    uids = ["0123456789abcdef" * 2, "f" * 32, "0" * 32]
    assert tables.uid_to_hex(*tables.uid_from_hex(uids)) == uids
    assert tables.uid_from_hex([])[0].shape == (0,)


def test_a_short_uid_is_refused():
    with pytest.raises(ValueError, match="32 hex digits"):
        tables.uid_from_hex(["0123456789abcdef"] * 2 + ["0123456789abcdef" * 2])


def test_statuses_keep_the_numbers_and_labels_of_stored_tables():
    assert {status.label: int(status) for status in tables.SlotStatus} == {
        "ok": 0,
        "missing": 1,
        "no_image": 2,
        "too_large": 3,
        "damaged": 4,
        "duplicate": 5,
    }
    assert tables.status_labels([4, 0]) == ["damaged", "ok"]
