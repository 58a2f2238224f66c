"""Parts of the selection log become valid with the checkpoint that commits them."""

import pyarrow as pa
import pytest

from jest_core import tables
from jest_core.training.step_log import StepLog
from pipelines.base import checkpoints, commits, storage
from pipelines.base.integrity import Damaged
from pipelines.training import selection_log
from pipelines.training.selection_log import SelectionLog


def step(number: int, n_bad: int = 0) -> StepLog:
    """Two selected examples and one refused."""
    rows = {name: [0] * 3 for name in tables.SELECTION.names} | {
        "step": [number] * 3,
        "uid": [f"{3 * number + i:032x}" for i in range(3)],
        "selected": [True, True, False],
    }
    bad = {name: [number] * n_bad for name in tables.BAD_ROWS.names} | dict.fromkeys(("uid", "reason"), ["x"] * n_bad)
    return StepLog(
        pa.table({f.name: pa.array(rows[f.name]).cast(f.type) for f in tables.SELECTION}),
        pa.table({f.name: pa.array(bad[f.name], f.type) for f in tables.BAD_ROWS}),
        dict.fromkeys(tables.STEPS.names, 0) | {"step": number},
    )


def log_of(log: SelectionLog, numbers: range) -> list[str]:
    for number in numbers:
        log.add(step(number, n_bad=number % 2))
    return log.commit(log.take())


def test_readers_see_what_a_checkpoint_commits_and_each_step_once(tmp_path):
    run_dir = str(tmp_path)
    log = SelectionLog(run_dir, [])
    parts = log_of(log, range(2))
    checkpoints.write(run_dir, 2, {"jest": {"log_parts": parts}})
    assert log_of(log, range(2, 4)) == [*parts, "00000002-00000003.parquet"]  # written, but not committed yet
    assert selection_log.parts(run_dir) == [("00000000-00000001.parquet", 0, 1)]
    assert selection_log.read(run_dir)["step"].to_pylist() == [0] * 3 + [1] * 3
    assert selection_log.read_steps(run_dir)["step"].to_pylist() == [0, 1]
    assert selection_log.read_bad_rows(run_dir)["step"].to_pylist() == [1]

    # after a crash here, the next attempt loads the checkpoint, removes later parts, and repeats the steps
    again = SelectionLog(run_dir, commits.read(run_dir))
    again.tidy()
    kept = [f"{prefix}{parts[0]}" for prefix in ("", "bad-", "steps-")]
    assert storage.names(f"{run_dir}/selection") == sorted([*kept, commits.FILE])
    for _ in range(2):  # twice, as after an error between writing the part and its checkpoint
        parts = log_of(again, range(2, 4))
    checkpoints.write(run_dir, 4, {"jest": {"log_parts": parts}})
    assert selection_log.read_steps(run_dir)["step"].to_pylist() == [0, 1, 2, 3]
    assert selection_log.sample(run_dir, 2)["step"].to_pylist() == [0] * 3 + [3] * 3
    assert again.commit(again.take()) == parts  # a checkpoint without a new step


def test_steps_whose_part_could_not_be_committed_are_in_the_next_one(tmp_path, monkeypatch):
    log = SelectionLog(str(tmp_path), [])
    for number in range(4):
        log.add(step(number))
        if number == 1:
            with monkeypatch.context() as failing:
                failing.setattr(commits, "write", lambda *_: (_ for _ in ()).throw(OSError("storage that fails now")))
                with pytest.raises(OSError, match="storage"):
                    log.commit(log.steps)
    assert log.commit(log.take()) == ["00000000-00000003.parquet"]


class Killed(BaseException):
    """Stands for the end of the process."""


def checkpoint(log: SelectionLog, numbers: range) -> None:
    """Log these steps and write a checkpoint, as the training loop does."""
    parts = log_of(log, numbers)
    checkpoints.write(log.run_dir, numbers.stop, {"jest": {"step": numbers.stop, "log_parts": parts}})


def resumed(run_dir: str) -> SelectionLog:
    log = SelectionLog(run_dir, checkpoints.read(run_dir)["jest"]["log_parts"])
    log.tidy()
    return log


def logged(run_dir: str) -> list[int]:
    """The steps of the log, after checking that all of its tables have them."""
    steps = selection_log.read_steps(run_dir)["step"].to_pylist()
    assert selection_log.read(run_dir)["step"].to_pylist() == [number for number in steps for _ in range(3)]
    assert selection_log.read_bad_rows(run_dir)["step"].to_pylist() == [number for number in steps if number % 2]
    assert sum(last + 1 - first for _, first, last in selection_log.parts(run_dir)) == len(steps)
    return steps


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_kill_between_any_two_writes_leaves_each_step_once(where, tmp_path, request, monkeypatch):
    root = str(tmp_path) if where == "disk" else f"{request.getfixturevalue('s3')}/kill-windows"
    write, n_writes = storage.write_bytes, 0
    for n_done in range(6):  # killed before one of: a part's three files, commits.jsonl, the checkpoint; or not at all
        run_dir = f"{root}/{n_done}"
        checkpoint(SelectionLog(run_dir, []), range(2))
        log, n_writes = resumed(run_dir), 0

        def killed(path: str, data: bytes, n_done: int = n_done) -> None:
            nonlocal n_writes
            if n_writes == n_done:
                raise Killed
            n_writes += 1
            write(path, data)

        monkeypatch.setattr(storage, "write_bytes", killed)
        try:
            checkpoint(log, range(2, 4))
        except Killed:
            assert n_done < 5
        monkeypatch.undo()
        assert n_writes == min(n_done, 5)
        reached = checkpoints.steps(run_dir)[-1]
        assert reached == (4 if n_done == 5 else 2)
        assert logged(run_dir) == list(range(reached))
        log = resumed(run_dir)  # checkpoints by time: this attempt writes its next one after another step
        for first, stop in ((2, 3), (3, 6)) if reached == 2 else ((4, 6),):
            checkpoint(log, range(first, stop))
        assert logged(run_dir) == list(range(6))
        kept = {f"{prefix}{name}" for name, _, _ in selection_log.parts(run_dir) for prefix in ("", "steps-", "bad-")}
        assert set(storage.names(f"{run_dir}/selection")) <= kept | {commits.FILE}


def test_a_run_may_resume_from_an_older_checkpoint(tmp_path):
    run_dir = str(tmp_path)
    log = SelectionLog(run_dir, [])
    for stop in (2, 4, 6):
        checkpoint(log, range(stop - 2, stop))
    storage.remove(checkpoints.path_of(run_dir, 6))
    assert logged(run_dir) == list(range(4))  # before anything resumes
    storage.remove(checkpoints.path_of(run_dir, 4))
    assert logged(run_dir) == list(range(2))
    log = resumed(run_dir)
    assert storage.read_bytes(commits.path_of(run_dir)) == b'{"step": 2, "part": "00000000-00000001.parquet"}\n'
    checkpoint(log, range(2, 6))
    assert logged(run_dir) == list(range(6))


def test_reading_the_log_loads_no_checkpoint_and_pruned_ones_leave_no_commits(tmp_path, monkeypatch):
    run_dir = str(tmp_path)
    log = SelectionLog(run_dir, [])
    for stop in range(2, 11, 2):
        checkpoint(log, range(stop - 2, stop))
        checkpoints.prune(run_dir, 1, None)
    monkeypatch.setattr(checkpoints, "read", lambda path: pytest.fail(f"{path} is loaded to read a log"))
    assert logged(run_dir) == list(range(10))
    assert len(storage.read_bytes(commits.path_of(run_dir)).splitlines()) == 5  # one for each part of the log


def test_a_run_of_an_earlier_version_is_read_by_its_checkpoint(tmp_path):
    run_dir = str(tmp_path)
    checkpoint(SelectionLog(run_dir, []), range(2))
    storage.remove(commits.path_of(run_dir))  # as earlier versions do when they resume, since they do not know the file
    assert logged(run_dir) == [0, 1]
    log = resumed(run_dir)
    assert storage.exists(commits.path_of(run_dir))
    checkpoint(log, range(2, 4))
    assert logged(run_dir) == list(range(4))


def test_commits_of_an_older_checkpoint_are_not_used_for_the_newest(tmp_path):
    """The newest checkpoint was written by an earlier version, and so has no line in commits.jsonl."""
    run_dir = str(tmp_path)
    checkpoint(SelectionLog(run_dir, []), range(2))
    before = storage.read_bytes(commits.path_of(run_dir))
    checkpoint(resumed(run_dir), range(2, 4))
    storage.write_bytes(commits.path_of(run_dir), before)
    assert logged(run_dir) == list(range(4))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],  # torn
        lambda data: data.replace(b'"step": 4', b'"step": 6'),
        lambda data: data.replace(b"00000002-", b"00000003-"),
        lambda data: b"\xff\x00" + data[2:],
        lambda data: b"[1]\n" + data,
        lambda data: b"".join(data.splitlines(keepends=True)[1:]),
        lambda data: b'{"step": 2, "part": "cut"}\n' + data,
        lambda data: b"",
    ],
)
def test_damaged_commits_are_made_again_of_the_checkpoint(damage, tmp_path):
    run_dir = str(tmp_path)
    log = SelectionLog(run_dir, [])
    for stop in (2, 4):
        checkpoint(log, range(stop - 2, stop))
    whole = storage.read_bytes(commits.path_of(run_dir))
    assert damage(whole) != whole
    storage.write_bytes(commits.path_of(run_dir), damage(whole))
    assert logged(run_dir) == list(range(4))
    resumed(run_dir)
    assert storage.read_bytes(commits.path_of(run_dir)) == whole


def test_a_damaged_part_of_the_log_is_named(tmp_path):
    run_dir = str(tmp_path)
    checkpoint(SelectionLog(run_dir, []), range(2))
    for name, read in (("", selection_log.read), ("steps-", selection_log.read_steps)):
        path = f"{run_dir}/selection/{name}00000000-00000001.parquet"
        data = bytearray(storage.read_bytes(path))
        data[8 + len(data) // 8] ^= 1  # in the pages, which come first
        storage.write_bytes(path, bytes(data))
        with pytest.raises(Damaged, match=path):
            read(run_dir)
