import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.base import cluster
from pipelines.stream.read_ahead import Share, read_ahead

pytestmark = pytest.mark.usefixtures("ray_session")
ROW = 1000  # bytes


def read(item: dict[str, Any], notes: str) -> pa.Table:
    """A stand-in for reading a window: ten rows, after a while that differs; it notes when it began and ended."""
    number, folder = item["number"], Path(notes)
    with (folder / "begun").open("a") as file:
        file.write(f"{number} {time.time()}\n")
    if item["number"] in item["fails"]:
        raise FileNotFoundError(f"shard {number} is gone")
    if number in item["dies"] and not (folder / f"died-{number}").exists():
        (folder / f"died-{number}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(random.Random(number).uniform(0, 0.05))
    with (folder / "ended").open("a") as file:
        file.write(f"{number} {time.time()}\n")
    return pa.table({"number": [number] * 10, "data": [b"x" * ROW] * 10})


def rows(
    share: Share, folder: Path, numbers: Iterator[int], fails=(), dies=(), most_rows: int = 10_000
) -> Iterator[tuple[int, pa.Table]]:
    def item(number: int) -> dict[str, Any]:
        return {"number": number, "fails": fails, "dies": dies}

    return read_ahead(numbers, item, lambda _: 10, ROW, most_rows, read, share, notes=str(folder))


def times(folder: Path, name: str) -> dict[int, float]:
    path = folder / name
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(number): float(when) for number, when in map(str.split, lines)}


def in_order(share: Share, folder: Path, n: int, **settings: Any) -> list[int]:
    folder.mkdir(exist_ok=True)
    return [
        number
        for number, table in rows(share, folder, iter(range(n)), **settings)
        if table["number"].to_pylist() == [number] * 10
    ]


def test_several_learners_read_at_once_each_in_its_order_while_workers_die(tmp_path):
    """Tasks whose process is killed are run again."""
    with ThreadPoolExecutor(3) as learners:
        found = learners.map(lambda i: in_order(Share(i, 3, 6), tmp_path / str(i), 30, dies=[4 + i]), range(3))
        assert list(found) == [list(range(30))] * 3
    assert len(list(tmp_path.rglob("died-*"))) == 3


@pytest.mark.parametrize(
    ("rank", "n_learners", "read_cpus", "most"), [(0, 1, 3, 3), (0, 2, 3, 1), (1, 2, 3, 2), (7, 8, 4, 1)]
)
def test_no_more_tasks_than_the_share_has_cpus(tmp_path, rank, n_learners, read_cpus, most):
    assert in_order(Share(rank, n_learners, read_cpus), tmp_path, 20) == list(range(20))
    begun, ended = times(tmp_path, "begun"), times(tmp_path, "ended")
    at_once = [sum(begun[i] <= begun[n] < ended[i] for i in range(20)) for n in range(20)]
    assert max(at_once) <= most


@pytest.mark.parametrize(("n_learners", "read_cpus"), [(1, 1), (3, 4), (8, 12), (7, 64), (64, 65), (64, 3)])
def test_learners_have_the_cpus_together_and_one_each_at_least(n_learners, read_cpus):
    tasks = [Share(rank, n_learners, read_cpus).look()[0] for rank in range(n_learners)]
    assert sum(tasks) == max(read_cpus, n_learners)
    assert max(tasks) - min(tasks) <= 1


def test_what_nobody_takes_stays_within_the_bytes_of_the_share(tmp_path, monkeypatch):
    share = Share(0, 1, 4)
    monkeypatch.setattr(share, "look", lambda: (4, 55 * ROW))  # room for five windows of ten rows
    with closing(rows(share, tmp_path, iter(range(100)))) as reader:
        time.sleep(1)
        assert len(times(tmp_path, "begun")) == 0  # a generator that nobody has asked
        assert next(reader)[0] == 0
        time.sleep(1.5)
        assert len(times(tmp_path, "ended")) == 1 + 5
        assert [next(reader)[0] for _ in range(3)] == [1, 2, 3]
        time.sleep(1.5)
        assert len(times(tmp_path, "ended")) == 4 + 5


def test_no_more_is_read_than_the_learner_needs_soon(tmp_path):
    with closing(rows(Share(0, 1, 2), tmp_path, iter(range(100)), most_rows=40)) as reader:
        assert next(reader)[0] == 0
        time.sleep(1.5)
        assert len(times(tmp_path, "ended")) == 1 + 4 + 2  # those that are ready, and one for each CPU


def test_larger_rows_than_was_thought_are_counted(tmp_path, monkeypatch):
    share = Share(0, 1, 4)
    monkeypatch.setattr(share, "look", lambda: (4, 55 * ROW))
    reader = read_ahead(
        iter(range(100)),
        lambda number: {"number": number, "fails": (), "dies": ()},
        lambda _: 10,
        1,  # byte
        10_000,
        read,
        share,
        notes=str(tmp_path),
    )
    with closing(reader):
        for number in range(30):
            assert next(reader)[0] == number
        time.sleep(1.5)
        assert len(times(tmp_path, "ended")) <= 30 + 60 / 10
    first = times(tmp_path, "begun")
    assert len(first) < 100


def test_an_error_comes_in_its_turn(tmp_path):
    arrived: list[int] = []
    with pytest.raises(FileNotFoundError, match="shard 7 is gone"):
        arrived.extend(number for number, _ in rows(Share(0, 1, 4), tmp_path, iter(range(20)), fails=[7]))
    assert arrived == list(range(7))


def test_an_error_of_the_plan_is_raised_after_what_was_planned(tmp_path):
    def plan() -> Iterator[int]:
        yield from range(5)
        raise ValueError("row groups changed")

    arrived: list[int] = []
    with pytest.raises(ValueError, match="row groups changed"):
        arrived.extend(number for number, _ in rows(Share(0, 1, 4), tmp_path, plan()))
    assert arrived == list(range(5))


def test_closing_ends_the_thread_and_the_tasks(tmp_path):
    reader = rows(Share(0, 1, 4), tmp_path, iter(range(10_000)))
    assert next(reader)[0] == 0
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]
    time.sleep(0.5)
    begun = len(times(tmp_path, "begun"))
    time.sleep(1)
    assert len(times(tmp_path, "begun")) == begun < 100


def test_a_share_follows_the_cluster():
    n = cluster.n_cores()
    assert Share(0, 1, None).look()[0] == n
    assert Share(0, 2 * n, None).look()[0] == 1
    assert Share(3, 4, 10).look()[0] == 3
    assert Share(0, 2, 4).look()[1] * 2 == Share(0, 1, 4).look()[1] > 0
