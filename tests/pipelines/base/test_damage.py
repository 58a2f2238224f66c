import pytest

from pipelines.base import damage, storage
from pipelines.base.integrity import Damaged


def test_a_damaged_part_has_a_note_until_it_is_made_again(tmp_path):
    paths = [f"{tmp_path}/{number:05d}.parquet" for number in range(3)]
    for path in paths:
        storage.write_bytes(path, b"torn")
    with damage.noted(paths[0], "catalogue"):
        pass
    for _ in range(2):  # two readers
        with (
            pytest.raises(
                Damaged, match=rf"is not Parquet: .*; run `jest catalogue` again, which makes {paths[1]} again"
            ),
            damage.noted(paths[1], "catalogue"),
        ):
            storage.open_parquet(paths[1])
    with pytest.raises(ZeroDivisionError), damage.noted(paths[2], "catalogue"):
        1 / 0  # noqa: B018
    assert damage.whole(str(tmp_path)) == {"00000.parquet", "00002.parquet"}
    assert b"00001.parquet is damaged" in storage.read_bytes(f"{paths[1]}.damaged")
    damage.remove_note(paths[1])
    damage.remove_note(paths[0])  # without a note
    assert len(damage.whole(str(tmp_path))) == 3
