"""The keys, types and units of metrics.jsonl, a line for each step, in open_clip's names and jest's."""

from collections import Counter
from collections.abc import Mapping
from typing import TypedDict, cast

from ..base import checkpoints, storage
from ..base.integrity import Damaged

# A key is left out where nothing was computed. Evaluation adds open_clip's val/* keys, one for each score: they depend
# on the run file, so that a type cannot name them.
MetricsLine = TypedDict(
    "MetricsLine",
    {
        "step": int,  # finished updates
        "train/loss": float,  # nats
        "train/lr": float,
        "train/logit_scale": float,  # the multiplier
        "train/logit_bias": float,
        "train/data_time": float,  # seconds of waiting for the super-batch
        "train/batch_time": float,  # seconds of the whole step
        "train/samples_per_second": float,  # trained
        "jest/gradient_norm": float,  # before clipping
        "jest/samples_seen": int,  # so far
        "jest/samples_trained": int,  # so far
        "jest/flops": float,  # so far, as executed; those below too
        "jest/flops_score": float,
        "jest/flops_ref": float,
        "jest/flops_train": float,
        "jest/filter_ratio": float,
        "jest/learnability_super_mean": float,  # nats a matched pair
        "jest/learnability_selected_mean": float,  # nats a matched pair
        "jest/sub_batch_score": float,  # nats a pair of the sub-batch
        "jest/bad_rows": int,  # of the super-batch, images that do not decode
        "jest/duplicates_dropped": int,  # of the super-batch
        "jest/seconds": float,  # of all steps so far
        "jest/selection_overlap": float,  # share of the sub-batch that full resolution would select too
        "jest/score_spearman": float,  # rank correlation of the scores with those of full resolution
        # seconds of this step by part
        "jest/wait_time": float,
        "jest/score_time": float,
        "jest/reference_time": float,
        "jest/select_time": float,
        "jest/log_time": float,
        "jest/agreement_time": float,
        "jest/exchange_time": float,
        "jest/train_time": float,
        "jest/checkpoint_time": float,  # for which the checkpoint before this step kept the loop
    },
    total=False,
)


@storage.retried
def read(run_dir: str) -> list[MetricsLine]:
    """The lines of a run's metrics.jsonl, a line for each step from 1. Raises Damaged where one is lost."""
    path = path_of(run_dir)
    # first, of a run that trains: the lines are written before the checkpoint
    reached = max([1, *checkpoints.steps(run_dir)[-1:]])
    lines = storage.read_lines(path)
    for step, line in enumerate([*lines, *[None] * (reached - len(lines))], 1):
        if not isinstance(line, dict) or line.get("step") != step:
            raise Damaged(f"{path} has no line of step {step} in its place: restore the file from a copy")
    return lines


def by_step(run_dir: str) -> dict[int, MetricsLine]:
    """The lines that are whole, by their step; without those of a step that two lines name."""
    lines = [
        cast(MetricsLine, line)
        for line in storage.read_lines(path_of(run_dir))
        if isinstance(line, dict) and isinstance(line.get("step"), int)
    ]
    times = Counter(line["step"] for line in lines)
    return {line["step"]: line for line in lines if times[line["step"]] == 1}


def path_of(run_dir: str) -> str:
    return f"{run_dir}/metrics.jsonl"


def part_seconds(line: MetricsLine, part: str) -> float:
    """Seconds of one part of the step: wait, score, reference, select, log, agreement, exchange, train, checkpoint."""
    return cast(Mapping[str, float], line).get(f"jest/{part}_time", 0.0)
