"""The selection log: what was drawn at each step and its scores, in parts that become valid with a checkpoint.

Parts are named by their first and last step. selection/commits.jsonl says which parts a checkpoint commits; readers
ignore the rest, so after any crash and resume the log has each step once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from jest_core import tables

from ..base import commits, storage

if TYPE_CHECKING:
    from jest_core.training.step_log import StepLog


class SelectionLog:
    """Collects steps since the last checkpoint; the first learner writes them.

    committed: names of the parts that the checkpoint commits from which the run goes on.
    """

    def __init__(self, run_dir: str, committed: list[str]) -> None:
        self.run_dir, self.directory, self.committed = run_dir, f"{run_dir}/selection", committed
        self.steps: list[StepLog] = []

    @storage.retried
    def tidy(self) -> None:
        """Remove what a killed run left: parts that no checkpoint commits, their names, and half-written files."""
        commits.write(self.run_dir, self.committed)
        kept = {f"{prefix}{name}" for name in self.committed for prefix in ("", "steps-", "bad-")}
        kept |= {commits.FILE} if self.committed else set()
        for name in storage.names(self.directory):
            if name not in kept:
                storage.remove(f"{self.directory}/{name}")

    def add(self, result: StepLog) -> None:
        self.steps.append(result)

    def take(self) -> list[StepLog]:
        """The steps collected since the last call."""
        steps, self.steps = self.steps, []
        return steps

    def commit(self, steps: list[StepLog]) -> list[str]:
        """Write steps that were taken, and the names of all parts so far, which the checkpoint after this commits.

        Returns these names. May be repeated where it failed.
        """
        if steps:
            name = f"{steps[0].summary['step']:08d}-{steps[-1].summary['step']:08d}.parquet"
            sizes = [len(step.picks) for step in steps]  # a row group a step, so that one step can be read
            storage.write_table(f"{self.directory}/{name}", pa.concat_tables(step.picks for step in steps), sizes)
            summaries = pa.Table.from_pylist([step.summary for step in steps], schema=tables.STEPS)
            storage.write_table(f"{self.directory}/steps-{name}", summaries)
            if len(bad := pa.concat_tables(step.bad_rows for step in steps)):
                storage.write_table(f"{self.directory}/bad-{name}", bad)
            committed = [*(part for part in self.committed if part != name), name]  # a try that failed is repeated
            commits.write(self.run_dir, committed)
            self.committed = committed
        return self.committed


def parts(run_dir: str) -> list[tuple[str, int, int]]:
    """Of each committed part its name, and the first and the last of its steps; a step is a row group."""
    return [(name, *commits.steps_of(name)) for name in commits.read(run_dir)]


def read(run_dir: str) -> pa.Table:
    """All committed rows, in the columns of tables.SELECTION."""
    return _read(run_dir, "")


def sample(run_dir: str, n_steps: int = 100) -> pa.Table:
    """The committed rows of so many steps (all, if there are not more), evenly from the first to the last."""
    files = [storage.open_parquet(f"{run_dir}/selection/{name}") for name in commits.read(run_dir)]
    groups = [(file, i) for file in files for i in range(file.num_row_groups)]
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(n_steps, len(groups))).astype(int))
    return pa.concat_tables([groups[i][0].read_row_group(groups[i][1]) for i in chosen])


def read_steps(run_dir: str) -> pa.Table:
    """One row per committed step, in the columns of tables.STEPS."""
    return _read(run_dir, "steps-")


def read_bad_rows(run_dir: str) -> pa.Table:
    """Slots whose image did not decode, in the columns of tables.BAD_ROWS; most parts have none, and no file."""
    there = set(storage.names(f"{run_dir}/selection"))
    parts = [f"{run_dir}/selection/bad-{name}" for name in commits.read(run_dir) if f"bad-{name}" in there]
    return pa.concat_tables([tables.BAD_ROWS.empty_table(), *(storage.open_parquet(part).read() for part in parts)])


def _read(run_dir: str, prefix: str) -> pa.Table:
    return pa.concat_tables(
        [storage.open_parquet(f"{run_dir}/selection/{prefix}{name}").read() for name in commits.read(run_dir)]
    )
