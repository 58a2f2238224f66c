"""What parts say, as tables; and the work of the process that starts a stage, which is linear in the shards."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jest_core import tables
from pipelines.base import storage
from pipelines.data.descriptions import Descriptions
from tests.benchmarks import bench_catalogue as drivers

SMALL = 100  # shards, and four times as many


def test_the_tables_have_what_the_parts_say(tmp_path):
    n, parts = 5, dict(drivers.described(5))
    parts[2].update({"group_rows": [], "group_slots": [], "counts": {}, "rows": 0, "is_paged": True})
    descriptions = Descriptions(n)
    for number in (3, 1, 0, 2, 4, 1):  # in any order, and one again
        descriptions.add(number, parts[number])
    paths, sources = [f"{number}.parquet" for number in range(n)], [0, 0, 1, 1, 1]
    descriptions.write_tables(str(tmp_path), paths, sources)
    shards = [
        {
            "is_paged": False,
            **parts[i],
            "counts": list(parts[i]["counts"].items()),
            "path": paths[i],
            "source": sources[i],
        }
        for i in range(n)
    ]
    groups = [
        {"shard": i, "row_group": g, "rows": rows, "slots": slots}
        for i in range(n)
        for g, (rows, slots) in enumerate(zip(parts[i]["group_rows"], parts[i]["group_slots"], strict=True))
    ]
    for name, rows, schema in (("shards", shards, tables.SHARDS), ("row_groups", groups, tables.ROW_GROUPS)):
        written = storage.open_parquet(f"{tmp_path}/{name}.parquet").read()
        assert written.cast(schema).to_pylist() == pa.Table.from_pylist(rows, schema).to_pylist()
    assert descriptions.counts()["kept"] == sum(part["counts"].get("kept", 0) for part in parts.values())


def work(function: Callable[[Any], None], argument: object) -> tuple[int, int]:
    """Calls of functions, and bytes that Arrow allocates."""
    calls, before = 0, pa.default_memory_pool().total_bytes_allocated()

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function(argument)
    finally:
        sys.setprofile(None)
    return calls, pa.default_memory_pool().total_bytes_allocated() - before


@pytest.mark.parametrize(
    "driver",
    [drivers.plan_scores, drivers.rows_of_parts, drivers.start, drivers.report, drivers.export_scores, "tables"],
    ids=lambda driver: driver if isinstance(driver, str) else driver.__name__,
)
def test_four_times_the_shards_are_four_times_the_work(driver, tmp_path: Path):
    used = []
    for n in (SMALL, SMALL, 4 * SMALL):  # the first time fills caches
        folder = tmp_path / str(n)
        drivers.make(folder, n)
        tables_of = partial(drivers.write_tables, catalogue=str(folder / "again"))
        used.append(work(tables_of, n) if driver == "tables" else work(driver, folder))
    (calls, of_few), (more_calls, of_many) = used[1:]
    assert more_calls <= 4.5 * calls
    assert of_many <= 4.5 * of_few + 100_000
