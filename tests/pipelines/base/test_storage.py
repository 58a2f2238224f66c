import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from pipelines.base import storage


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_bytes_tables_and_names_round_trip(folder: str):
    assert storage.names(f"{folder}/none") == []
    storage.write_bytes(f"{folder}/a/x.bin", b"123")
    assert storage.read_bytes(f"{folder}/a/x.bin") == b"123"
    table = pa.table({"k": list(range(10))})
    storage.write_table(f"{folder}/a/y.parquet", table, [4, 0, 6])
    file = storage.open_parquet(f"{folder}/a/y.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] in ([4, 6], [4, 0, 6])
    assert file.read().equals(table)
    assert storage.names(f"{folder}/a") == ["x.bin", "y.parquet"]
    storage.remove(f"{folder}/a/x.bin")
    assert not storage.exists(f"{folder}/a/x.bin")


def test_a_reader_sees_a_whole_local_file_or_none(tmp_path):
    path, size = str(tmp_path / "file"), 1 << 20
    storage.write_bytes(path, b"a" * size)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for letter in (b"a", b"b"):
                storage.write_bytes(path, letter * size)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            data = storage.read_bytes(path)
            assert len(data) == size
            assert len(set(data)) == 1
    finally:
        stop.set()
        writer.join()
    assert storage.names(str(tmp_path)) == ["file"]


def test_a_folder_is_removed_while_others_write_to_it_and_remove_it(tmp_path):
    folder = f"{tmp_path}/fragments"

    def remove(_) -> None:
        for _ in range(300):
            storage.remove_tree(folder)
            time.sleep(0.001)

    def write(writer: int) -> None:
        for i in range(300):
            storage.write_bytes(f"{folder}/{writer}/{i}.bin", b"x")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: job[0](job[1]), [(remove, 0), (write, 1), (remove, 2), (write, 3)]))
    storage.remove_tree(folder)
    assert not storage.exists(folder)
