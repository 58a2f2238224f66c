"""The metrics of each step: the first learner writes them to metrics.jsonl, and sends them to trackers and board."""

import contextlib
import json
import math
from collections import deque
from types import TracebackType
from typing import cast

from jest_core import flops, tables
from jest_core.run_file import Run
from jest_core.training.step import Optimisation, StepResult
from jest_core.training.step_log import Summary

from ..base import checkpoints, storage
from ..base.integrity import Damaged
from . import bottleneck, metrics_line, selection_log
from .heartbeat import Board
from .metrics_line import MetricsLine
from .trackers import Trackers

_RECENT = 20  # steps over which progress is averaged
_NO_UPDATE: Optimisation = {
    "loss": math.nan,
    "learning_rate": math.nan,
    "gradient_norm": math.nan,
    "logit_scale": math.nan,
    "logit_bias": math.nan,
}


class Journal:
    """The lines of a run so far, and the seconds of its steps; a context manager, which closes the trackers.

    state: where the run goes on. Lines of later steps are removed from the file: the run makes these steps again.
    """

    def __init__(self, run: Run, board: Board, state: checkpoints.State) -> None:
        self._run, self._board, self._costs = run, board, step_costs(run)
        self._directory = run.path(run.run_dir)
        self._lines = self._up_to(state["step"], state["seconds"])
        self._recent: deque[MetricsLine] = deque(maxlen=_RECENT)
        self._trackers = Trackers(run, state["step"], board.tell)
        self.seconds = state["seconds"]

    @storage.retried
    def _up_to(self, step: int, seconds: float) -> list[str]:
        """The lines of the file up to this step, as the file has them from now on; those that it has lost are made
        again as far as the selection log says it.

        seconds: of these steps.
        """
        path = metrics_line.path_of(self._directory)
        if not step:
            storage.remove(path)
            return []
        there = metrics_line.by_step(self._directory)
        if lost := sorted(set(range(1, step + 1)) - there.keys()):
            there |= self._made_again(lost, there, {step: seconds})
            self._board.tell(
                f"{path} has lost the lines of {len(lost):,} of {step:,} steps (the first is step {lost[0]:,}): made "
                "again from the selection log, without what only they had, as times and learning rates"
            )
        lines = [json.dumps(there[number]) for number in range(1, step + 1)]
        self.write(_text(lines))
        return lines

    def _made_again(
        self, steps: list[int], there: dict[int, MetricsLine], seconds: dict[int, float]
    ) -> dict[int, MetricsLine]:
        """The lines of steps, ascending, as far as the selection log says them; there: the other lines; seconds: of so
        many steps, where that is known."""
        logged: dict[int, Summary] = {}
        with contextlib.suppress(Damaged, FileNotFoundError):
            logged = {row["step"] + 1: row for row in selection_log.read_steps(self._directory).to_pylist()}
        nothing = cast(Summary, dict.fromkeys(Summary.__annotations__, math.nan))
        made: dict[int, MetricsLine] = {}
        for step in steps:
            summary = logged.get(step, nothing)
            before = made.get(step - 1) or there.get(step - 1)
            trained = before["jest/samples_trained"] if before else 0
            trained += summary["n_selected"] if step in logged else self._run.sub_batch_size
            update: Optimisation = {**_NO_UPDATE, "loss": summary["loss"]}
            result = StepResult(tables.SELECTION.empty_table(), tables.BAD_ROWS.empty_table(), summary, update, {}, {})
            times = {"wait": math.nan, "batch": math.nan}
            made[step] = metrics(self._run, result, step, trained, seconds.get(step, math.nan), times, self._costs)
        return made

    def add(self, result: StepResult, step: int, times: dict[str, float]) -> None:
        """A finished step; times: seconds by part, `batch` all of it."""
        self.seconds += times["batch"]
        trained = self._trained() + result.summary["n_selected"]
        line = metrics(self._run, result, step, trained, self.seconds, times, self._costs)
        self._lines.append(json.dumps(line))
        self._recent.append(line)
        self._trackers.log(step, line)
        self._board.put(step, bottleneck.note(self._recent))

    def _trained(self) -> int:
        """Examples trained on so far: a uniform step leaves out pictures that do not decode."""
        trained: int = json.loads(self._lines[-1])["jest/samples_trained"] if self._lines else 0
        return trained

    def add_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Put an evaluation's scores, made after the last step, on that step's line."""
        self._lines[-1] = json.dumps(json.loads(self._lines[-1]) | scores)
        self._trackers.log(step, scores)

    def text(self) -> bytes:
        """metrics.jsonl as it is now."""
        return _text(self._lines)

    def write(self, text: bytes) -> None:
        storage.write_bytes(metrics_line.path_of(self._directory), text)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trackers.close(failed=error is not None)


def _text(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def step_costs(run: Run) -> dict[str, float]:
    """FLOPs of a step of this run, as executed, with the scoring forward reused, and by part."""
    step = flops.step_flops(run)
    return {
        "flops_step": step.total,
        "flops_step_with_reuse": step.total_with_reuse,
        "flops_score": step.score,
        "flops_reference": step.reference,
        "flops_select": step.select,
        "flops_train": step.train,
        "flops_loss": step.loss,
        "flops_optimizer": step.optimizer,
        "flops_agreement": step.agreement,
    }


def metrics(
    run: Run,
    result: StepResult,
    step: int,
    trained: int,
    seconds: float,
    times: dict[str, float],
    costs: dict[str, float],
) -> MetricsLine:
    """One line of metrics.jsonl.

    trained: examples trained on so far. seconds: of all steps so far. times: seconds of the step by part; `batch` is
    all of it, and `checkpoint` is for how long the checkpoint before it kept the loop. costs: those of `step_costs`.
    """
    parts = dict(times)
    batch = parts.pop("batch")
    optimisation, summary = result.optimisation, result.summary
    line = {
        "step": step,
        "train/loss": optimisation["loss"],
        "train/lr": optimisation["learning_rate"],
        "train/logit_scale": optimisation["logit_scale"],
        "train/logit_bias": optimisation["logit_bias"],
        "train/data_time": times["wait"],
        "train/batch_time": batch,
        "train/samples_per_second": summary["n_selected"] / batch,
        "jest/gradient_norm": optimisation["gradient_norm"],
        "jest/samples_seen": step * run.super_batch_size,
        "jest/samples_trained": trained,
        "jest/flops": step * costs["flops_step"],
        "jest/flops_score": step * costs["flops_score"],
        "jest/flops_ref": step * costs["flops_reference"],
        "jest/flops_train": step * costs["flops_train"],
        "jest/filter_ratio": 1 - run.sub_batch_size / run.super_batch_size,
        "jest/learnability_super_mean": summary["super_batch_matched_score"],
        "jest/learnability_selected_mean": summary["sub_batch_matched_score"],
        "jest/sub_batch_score": summary["sub_batch_score"],
        "jest/bad_rows": summary["n_bad"],
        "jest/duplicates_dropped": summary["n_duplicates"],
        "jest/seconds": seconds,
        **{f"jest/{name}": value for name, value in result.agreement.items()},
        **{f"jest/{name}_time": value for name, value in parts.items()},
    }
    # NaN is no JSON: what was not computed is left out
    return cast(MetricsLine, {k: v for k, v in line.items() if v == v})
