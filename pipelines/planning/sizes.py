"""Bytes of a run in memory, read and written, from its run file and its catalogue."""

import math
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError

from jest_core import flops
from jest_core.models import configurations, outlines
from jest_core.run_file import Run

from ..base import manifests, progress
from ..data.catalogue import open_catalogue
from ..data.tar_index import GROUP_ROWS
from ..stream import windows
from ..stream.read_ahead import STORE_SHARE

_BYTES_A_PARAMETER = 16  # float32 weight, gradient, and AdamW's two moments
_CACHED_BYTES = 64  # of a pair in a score cache, beside its embeddings
# As measured in the reproduction: 42 to 46 bytes an example in the runs that score, 1,116 to 1,119 a line
_LOGGED_BYTES = 46  # of an example in the selection log
_METRICS_BYTES = 1_120  # of a line of metrics.jsonl


@dataclass(frozen=True)
class Pairs:
    """Of the run's catalogue."""

    n_slots: int  # of an epoch
    n_rows: int  # of its shards, those too that are dropped: they are read with the others of their row group
    n_row_groups: int
    mean_bytes: float  # of a row, in its shard


def pairs(run: Run) -> Pairs | None:
    """None where the catalogue is not made, or its storage cannot be reached from here."""
    directory = run.path(run.data.catalogue)
    try:
        if not manifests.exists(directory):
            raise FileNotFoundError("it is not made yet")
        found = open_catalogue(directory)
        shards = found.shards
        n_rows = sum(shards["rows"].to_pylist())
        n_bytes, n_groups = sum(shards["bytes"].to_pylist()), len(found.row_groups)
        return Pairs(found.order(run).n_rows, n_rows, n_groups, n_bytes / max(1, n_rows))
    except (OSError, BotoCoreError) as error:
        progress.say("plan", f"without the catalogue {directory}: {error}")
        return None


def encoded_bytes(pairs: Pairs | None) -> float:
    """Of a picture, as it travels."""
    return pairs.mean_bytes if pairs else windows.ENCODED_BYTES


def read_size(run: Run) -> int:
    """Of the pixels of an example that is read: with data.decode `late` those that are scored."""
    size = outlines.image_size(run.model.name)
    return run.selection.score_image_size or size if run.data.decode == "late" else size


def cached_width(run: Run) -> int:
    """Of the embeddings that are read with an example; 0 where none are."""
    return outlines.width(run.reference.model.name) if run.reads_scores and run.reference is not None else 0


def example_bytes(run: Run, encoded: float) -> float:
    """Of an example in a window or a super-batch, whose picture has so many bytes."""
    tokens = configurations.context_length(run.model.name, run.model.context_length)
    return sum(windows.example_bytes(read_size(run), tokens, cached_width(run), encoded).values())


def group_slots(pairs: Pairs | None) -> float:
    """Of a row group in an epoch: examples for which it is read once. Those of a tar where there is no catalogue."""
    return pairs.n_slots / max(1, pairs.n_row_groups) if pairs else float(GROUP_ROWS)


def window_rows(run: Run, pairs: Pairs | None) -> float:
    """Of a window, which is of whole row groups."""
    return max(float(run.data.window_rows), group_slots(pairs))


def window_bytes(run: Run, pairs: Pairs | None) -> float:
    """Of Ray's object stores together, while the run trains: a window of each stream from which learners take, beside
    the share of the stores that is read ahead, and no more than there are slots; where several learners share a
    stream, each holds its windows."""
    most = float(min(run.n_steps * run.super_batch_size, pairs.n_slots if pairs else math.inf))
    streams = max(run.data.n_streams, run.training.max_learners)
    held = streams * window_rows(run, pairs) / (1 - STORE_SHARE)
    return min(held, most * streams / run.data.n_streams) * example_bytes(run, encoded_bytes(pairs))


def super_batch_bytes(run: Run, pairs: Pairs | None) -> float:
    """Of each learner's host: this super-batch and two to come."""
    return 3 * run.super_batch_size // run.training.max_learners * example_bytes(run, encoded_bytes(pairs))


def embedding_bytes(run: Run) -> float:
    """Of each learner's device: the super-batch's embeddings by the learner and the reference, float32."""
    if not run.selection.selects:
        return 0.0
    return run.super_batch_size // run.training.max_learners * sum(_widths(run)) * 8


def state_bytes(run: Run) -> float:
    """Of each learner's device: weights, gradients (once more, to be exchanged, where there are several learners),
    AdamW's moments; of sharded weights its share of these, what it holds whole of weights and gradients, and on the
    first learner the whole weights once more where it evaluates within the loop."""
    training = run.training
    if training.shard_weights and training.max_learners > 1:
        gathered = outlines.n_gathered(run.model.name, run.model.context_length)
        n, evaluates = flops.n_parameters(run.model), run.evaluation is not None and run.evaluation.every_steps > 0
        return n * _BYTES_A_PARAMETER / training.max_learners + 8 * gathered + 4 * n * evaluates
    return flops.n_parameters(run.model) * (_BYTES_A_PARAMETER + 4 * (run.training.max_learners > 1))


def reference_bytes(run: Run) -> float:
    """Of each learner's device: the reference, where it scores online."""
    if run.reference is None or not run.uses_reference or run.reads_scores:
        return 0.0
    return 4 * flops.n_parameters(run.reference.model)


def checkpoint_bytes(run: Run) -> float:
    """Of one: weights and AdamW's moments."""
    return flops.n_parameters(run.model) * 12


def cache_bytes(run: Run, n_pairs: float) -> float:
    """Of the score cache of so many pairs: two float16 embeddings and what comes with them."""
    assert run.reference is not None
    return n_pairs * (4 * outlines.width(run.reference.model.name) + _CACHED_BYTES)


def read_bytes(run: Run, pairs: Pairs | None) -> dict[str, float]:
    """By all steps: the row groups of every super-batch, dropped rows included, and their cached scores."""
    n_seen = run.n_steps * run.super_batch_size * (pairs.n_rows / max(1, pairs.n_slots) if pairs else 1.0)
    bytes_read = {"shards, while training": n_seen * encoded_bytes(pairs)}
    if run.reads_scores:
        bytes_read["score cache, while training"] = cache_bytes(run, n_seen)
    return bytes_read


def written_bytes(run: Run) -> dict[str, float]:
    """By all steps: every checkpoint, those too that are removed again, the selection log, and metrics.jsonl, which is
    written whole at each checkpoint."""
    training = run.training
    n_checkpoints = -(-run.n_steps // training.checkpoint_every_steps)
    logged = run.sub_batch_size + training.n_refused_logged * run.selection.selects
    return {
        f"{n_checkpoints:,} checkpoints": n_checkpoints * checkpoint_bytes(run),
        "selection log": run.n_steps * logged * _LOGGED_BYTES,
        "metrics": (n_checkpoints + 1) / 2 * run.n_steps * _METRICS_BYTES,
    }


def _widths(run: Run) -> list[int]:
    models = [run.model, *([run.reference.model] if run.uses_reference and run.reference is not None else [])]
    return [outlines.width(model.name) for model in models]
