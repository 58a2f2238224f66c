"""Parts of the selection log become valid with the checkpoint that lists them."""

import pyarrow as pa

from jest_core import tables
from jest_core.training.step_log import StepLog
from pipelines.base import checkpoints, storage
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
    assert log_of(log, range(2, 4)) == [*parts, "00000002-00000003.parquet"]  # written, and not committed yet
    assert selection_log.parts(run_dir) == [("00000000-00000001.parquet", 0, 1)]
    assert selection_log.read(run_dir)["step"].to_pylist() == [0] * 3 + [1] * 3
    assert selection_log.read_steps(run_dir)["step"].to_pylist() == [0, 1]
    assert selection_log.read_bad_rows(run_dir)["step"].to_pylist() == [1]

    # a crash now: the next try takes up the checkpoint, clears away, and makes the same steps again
    again = SelectionLog(run_dir, selection_log.committed(run_dir))
    again.tidy()
    assert storage.names(f"{run_dir}/selection") == [f"{prefix}{parts[0]}" for prefix in ("", "bad-", "steps-")]
    for _ in range(2):  # the second time as after an error between the part and its checkpoint
        parts = log_of(again, range(2, 4))
    checkpoints.write(run_dir, 4, {"jest": {"log_parts": parts}})
    assert selection_log.read_steps(run_dir)["step"].to_pylist() == [0, 1, 2, 3]
    assert selection_log.sample(run_dir, 2)["step"].to_pylist() == [0] * 3 + [3] * 3
    assert again.commit(again.take()) == parts  # a checkpoint without a new step
