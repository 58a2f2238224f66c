"""Memory of a process that reads shards for as long as a run takes."""

import io
import tarfile

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import pages
from pipelines.data.layouts import open_shard, write_index
from pipelines.data.local_cache import LocalCache


@pytest.mark.parametrize("is_cached", [False, True], ids=["", "local cache"])
@pytest.mark.parametrize("kind", ["tar", "parquet", "pages of parquet"])
def test_a_process_that_reads_on_and_on_does_not_grow(kind, is_cached, tmp_path, monkeypatch):
    """Readers live as long as a run; here one reads the same 16 MB again and again."""
    monkeypatch.setattr(pages, "MANY_ROWS", 100 if kind == "pages of parquet" else 10**6)
    images, index = [np.random.default_rng(i).bytes(16 << 10) for i in range(1024)], str(tmp_path / "index")
    if kind == "tar":
        path = str(tmp_path / "a.tar")
        with tarfile.open(path, "w") as tar:
            for i, image in enumerate(images):
                member = tarfile.TarInfo(f"{i:04d}.jpg")
                member.size = len(image)
                tar.addfile(member, io.BytesIO(image))
    else:
        path = str(tmp_path / "a.parquet")
        pq.write_table(pa.table({"jpg": images, "txt": ["a cat"] * 1024}), path, data_page_size=1, write_batch_size=64)
    indexed = index if write_index(path, {}, index) else None
    assert bool(indexed) == (kind != "parquet")
    cache = LocalCache(str(tmp_path / "cache"), 1 << 30) if is_cached else None

    def read() -> None:
        shard = open_shard(path, {}, indexed, cache)
        assert sum(len(shard.images(g, np.arange(0, n, 2))) for g, n in enumerate(shard.row_group_sizes)) == 512

    process, before = psutil.Process(), 0
    for n in range(20):
        if n == 5:
            before = process.memory_info().rss
        read()
    assert process.memory_info().rss - before < 3 * (16 << 20)
