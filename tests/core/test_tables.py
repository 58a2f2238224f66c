import pytest

from jest_core import tables


def test_uids_round_trip():
    uids = ["0123456789abcdef" * 2, "f" * 32, "0" * 32]
    assert tables.uid_to_hex(*tables.uid_from_hex(uids)) == uids
    assert tables.uid_from_hex([])[0].shape == (0,)


def test_a_short_uid_is_refused():
    with pytest.raises(ValueError, match="32 hex digits"):
        tables.uid_from_hex(["0123456789abcdef"] * 2 + ["0123456789abcdef" * 2])
