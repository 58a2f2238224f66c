"""Damage to a file that jest wrote is an error that names it, or changes nothing of what is read."""

import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.base import blocks, checkpoints, integrity, storage
from pipelines.base.integrity import Damaged


def damages(data: bytes, rng: np.random.Generator, n: int, start: int = 0) -> Iterable[bytes]:
    """Copies of a file with a flipped bit from `start` on; a few are cut off, or have a block of zeros or of another
    place, as disks and networks leave them."""
    for number in range(n):
        out, place = bytearray(data), int(rng.integers(start, len(data)))
        match number % 10:
            case 7:
                del out[place:]
            case 8:
                out[place : place + 512] = bytes(len(out[place : place + 512]))
            case 9:
                other = int(rng.integers(len(data) - 512))
                out[place : place + 512] = data[other : other + len(out[place : place + 512])]
            case _:
                out[place] ^= 1 << int(rng.integers(8))
        yield bytes(out)


def outcomes(copies: Iterable[bytes], read: Callable[[bytes], object], expected: object) -> Counter[str]:
    counts: Counter[str] = Counter()
    for data in copies:
        try:
            counts["equal" if read(data) == expected else "differs"] += 1
        except Damaged as error:
            counts["named" if "name." in str(error) else "not named"] += 1
    return counts


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Columns of each kind that jest writes, with metadata as parts of caches and catalogues have it."""
    rng, n = np.random.default_rng(0), 60
    columns = {
        "uid": [f"{i:032x}" for i in range(n)],
        "status": ["ok" if i % 7 else None for i in range(n)],
        "embedding": blocks.pack(rng.standard_normal((n, 8)).astype(np.float16)),
        "cosine": rng.standard_normal(n),
        "selected": rng.standard_normal(n) > 0,
    }
    return pa.table(columns).replace_schema_metadata({b"jest.scores": b'{"counts": {"ok": 51}}'})


def written(table: pa.Table, path: str) -> bytes:
    storage.write_table(path, table, [30, 30])
    return storage.read_bytes(path)


def read_table(data: bytes) -> tuple[pa.Table, dict[bytes, bytes]]:
    file = integrity.ParquetFile("name.parquet", io.BytesIO(data))
    table = pa.concat_tables(file.read_row_group(i) for i in range(file.num_row_groups))
    return table, file.schema_arrow.metadata


def test_no_damage_to_a_table_changes_what_is_read(table, tmp_path):
    data = written(table, f"{tmp_path}/table.parquet")
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    expected = (table, table.schema.metadata)
    for start in (0, footer - 60):
        counts = outcomes(damages(data, np.random.default_rng(start), 300, start), read_table, expected)
        assert not counts["differs"] + counts["not named"]
        assert counts["named"] > 200


def test_a_sealed_table_is_plain_parquet_and_one_without_a_seal_is_read(table, tmp_path):
    data = written(table, f"{tmp_path}/sealed.parquet")
    assert b"jest footer SHA-256" in data
    assert pq.read_table(f"{tmp_path}/sealed.parquet").equals(table)
    assert pq.read_metadata(f"{tmp_path}/sealed.parquet").num_row_groups == 2
    pq.write_table(table, f"{tmp_path}/plain.parquet")  # as users and versions before have it
    assert storage.open_parquet(f"{tmp_path}/plain.parquet").read().equals(table)


def test_a_file_that_is_little_but_its_footer_is_whole(tmp_path):
    names = [f"column {i}" for i in range(1500)]
    pq.ParquetWriter(f"{tmp_path}/plain.parquet", pa.schema(dict.fromkeys(names, pa.string()))).close()
    assert storage.open_parquet(f"{tmp_path}/plain.parquet").read().column_names == names


def test_footers_of_any_size_are_verified(tmp_path):
    wide = pa.table({f"column {i}": [i] for i in range(1500)})  # a footer that is longer than what is read at first
    for table, groups in ((wide, [1]), (pa.table({"a": pa.array([], pa.int64())}), []), (pa.table({}), None)):
        path = f"{tmp_path}/name.parquet"
        storage.write_table(path, table, groups)
        assert storage.open_parquet(path).read().equals(table)
        data = bytearray(storage.read_bytes(path))
        data[-40] ^= 1
        storage.write_bytes(path, bytes(data))
        with pytest.raises(Damaged, match=r"name\.parquet is damaged, or is not Parquet: its footer is not the one"):
            storage.open_parquet(path)


def test_an_error_of_the_storage_is_no_damage(table, tmp_path):
    class Refused(io.BytesIO):
        def read(self, n: int | None = -1) -> bytes:
            raise ConnectionResetError("reset by peer")

    with pytest.raises(ConnectionResetError, match="reset by peer"):
        integrity.ParquetFile("name.parquet", Refused(written(table, f"{tmp_path}/table.parquet")))


@pytest.fixture(scope="module")
def checkpoint() -> bytes:
    model = torch.nn.Linear(16, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    sink = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "jest": {"step": 1}}, sink)
    return sink.getvalue()


def test_no_damage_to_a_checkpoint_changes_what_is_loaded(checkpoint, tmp_path):
    path = f"{tmp_path}/name.pt"

    def load(data: bytes) -> str:
        storage.write_bytes(path, data)
        loaded = checkpoints.read(path)
        numbers = [value.numpy().tobytes() for value in loaded["state_dict"].values()]
        numbers += [
            value.numpy().tobytes() for state in loaded["optimizer"]["state"].values() for value in state.values()
        ]
        return repr((numbers, loaded["jest"], loaded["optimizer"]["param_groups"]))

    expected = load(checkpoint)
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as file:
        directory = file.start_dir
    for start in (0, directory):
        counts = outcomes(damages(checkpoint, np.random.default_rng(start), 300, start), load, expected)
        assert not counts["differs"] + counts["not named"]
        assert counts["named"] > 100


def test_a_record_that_is_marked_as_a_folder_is_damage(checkpoint):
    """PyTorch reads nothing of such a record, and returns whatever was in memory."""
    data = bytearray(checkpoint)
    data[checkpoint.rindex(b"PK\x01\x02") + 38] |= 0x10
    with pytest.raises(Damaged, match=r"name\.pt is damaged: archive/"):
        integrity.refuse_damaged_zip("name.pt", bytes(data))


def test_checkpoints_without_checksums_are_read_or_refused_with_the_reason(tmp_path):
    path, content = f"{tmp_path}/name.pt", {"state_dict": {"a": torch.arange(5.0)}}
    torch.save(content, path, _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    assert checkpoints.read(path)["state_dict"]["a"].tolist() == [0, 1, 2, 3, 4]
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(before)
    with pytest.raises(Damaged, match="save it again where PyTorch wrote it without checksums"):
        checkpoints.read(path)


def test_a_column_name_that_is_not_text_is_damage_with_the_files_name(tmp_path):
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"caption": ["a"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"caption", b"\xfaaption"))
    with pytest.raises(Damaged, match=r"shard\.parquet is damaged, or is not Parquet"):
        storage.open_parquet(str(path))
