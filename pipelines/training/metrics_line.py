"""The keys, types and units of metrics.jsonl, a line for each step, in open_clip's names and jest's."""

import json
from collections.abc import Mapping
from typing import TypedDict, cast

from ..base import storage

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
    """The lines of a run's metrics.jsonl, a line for each step from 1."""
    return [json.loads(line) for line in storage.read_bytes(f"{run_dir}/metrics.jsonl").decode().splitlines()]


def part_seconds(line: MetricsLine, part: str) -> float:
    """Seconds of one part of the step: wait, score, reference, select, log, agreement, exchange, train, checkpoint."""
    return cast(Mapping[str, float], line).get(f"jest/{part}_time", 0.0)
