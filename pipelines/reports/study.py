"""A finished run's checkpoints -> what selection does on one super-batch: Figure 2, and what joint selection adds.

No training. The super-batch is the run's first; each checkpoint scores it anew.
"""

import math
from dataclasses import asdict
from typing import TypedDict, cast

import torch
from torch import Tensor

from jest_core.examples.super_batch import Examples
from jest_core.models import configurations, towers
from jest_core.run_file import Run
from jest_core.selection import Embeddings, batch_score, gibbs_select, select
from jest_core.selection.anatomy import dissect
from jest_core.selection.learnability import pair_scores

from ..base import checkpoints, cluster, progress
from ..stream import super_batches
from ..stream.source import open_source


class AnatomyLine(TypedDict):
    """`Anatomy` of one draw, and after how many updates the learner drew: fields and units as there."""

    step: int
    sub_batch_size: int
    super_batch_size: int
    off_diagonal_share: float
    off_diagonal_deviation: float
    diagonal_deviation: float
    overlap: float
    joint: float
    independent: float
    uniform: float


class _Options(TypedDict):
    """What all draws of one figure have in common."""

    sub_batch_size: int
    seed: int
    step: int


class MethodScores(TypedDict):
    """Learnability of the sub-batch that each method selects, in nats a pair."""

    joint: float
    independent: float


class Matrices(TypedDict):
    """Learnability of each image (row) with each caption (column), in nats."""

    selected: list[list[float]]
    refused: list[list[float]]


class Figure2(TypedDict):
    """What a draw selects: learnability of sub-batches, in nats a pair."""

    step: int  # updates of the learner
    sub_batch_size: int
    chunks: dict[str, float]  # by the number of chunks
    gibbs: list[list[float]]  # [iteration from 0, learnability]
    filter_ratio: dict[str, MethodScores]  # by the filter ratio
    matrices: Matrices


_CHUNKS = (1, 2, 4, 8, 16, 32)
_SIDE = 48  # rows of the matrix that is shown


def super_batch(run: Run, sub_batch_size: int) -> tuple[Run, Examples, Embeddings]:
    """The run with sub-batches of this size, a super-batch of it, and the reference's embeddings of that."""
    training = run.training.model_copy(update={"sub_batch_size": sub_batch_size, "examples_trained": sub_batch_size})
    run = run.model_copy(update={"training": training})
    n_streams = math.gcd(run.data.n_streams, run.super_batch_size)  # a small super-batch has no row of each of many
    run = run.model_copy(update={"data": run.data.model_copy(update={"n_streams": n_streams, "decode": "eager"})})
    cluster.connect()
    source = open_source(run)
    size = configurations.inputs_of(run.model, run.data.decoder).view.image_size
    examples = next(super_batches.stream(run, source, size, rank=0, n_learners=1, first_step=0))
    assert source.scale_and_bias is not None
    assert examples.reference_image is not None
    assert examples.reference_text is not None
    reference = Embeddings(
        torch.nn.functional.normalize(examples.reference_image.float(), dim=1),
        torch.nn.functional.normalize(examples.reference_text.float(), dim=1),
        *source.scale_and_bias,
    )
    return run, examples, reference


def learner_at(run: Run, step: int, examples: Examples) -> Embeddings:
    """The super-batch as the run's learner saw it after so many updates; 0: before the first."""
    pair = towers.build(run.model, seed=run.seed, decoder=run.data.decoder)
    if step:
        towers.load_weights(pair, checkpoints.read(checkpoints.path_of(run.path(run.run_dir), step)))
    return pair.embed(
        examples.pixels,
        examples.tokens,
        batch_size=run.training.score_batch_size,
        resolution=pair.resolution(run.selection.score_image_size, run.selection.score_patch_size),
        precision=run.selection.score_precision,
    )


def sizes(run: Run, sub_batch_sizes: list[int]) -> list[AnatomyLine]:
    """Anatomy of a draw for each age of the learner and each size of the sub-batch."""
    wide, examples, reference = super_batch(run, max(sub_batch_sizes))
    out = []
    for step in [0, *checkpoints.steps(run.path(run.run_dir))]:
        learner = learner_at(wide, step, examples)
        for b in sub_batch_sizes:
            part = slice(0, round(b / (1 - run.selection.filter_ratio)))
            anatomy = dissect(
                learner[part],
                reference[part],
                sub_batch_size=b,
                n_chunks=run.selection.n_chunks,
                gain=run.selection.gain,
                uids=examples.uids[part],
                seed=run.seed,
                step=step,
            )
            out.append(cast(AnatomyLine, {"step": step, **asdict(anatomy)}))
            progress.say("study", f"step {step}, b {b}: off-diagonal {anatomy.off_diagonal_share:.1%}")
    return out


def figure2(run: Run, n_iterations: int) -> Figure2:
    """Figure 2 of the paper, by the newest checkpoint: learnability by chunks, by Gibbs sampling and by filter ratio;
    and the matrices of some selected and some refused examples."""
    b = run.training.sub_batch_size
    wide, examples, reference = super_batch(run, 2 * b)  # for filter ratios up to 0.9
    step = checkpoints.steps(run.path(run.run_dir))[-1]
    learner, uids = learner_at(wide, step, examples), examples.uids
    whole = slice(0, run.super_batch_size)
    options = _Options(sub_batch_size=b, seed=run.seed, step=step)

    def learnability(indices: Tensor) -> float:
        return float(batch_score(learner[whole], reference[whole], indices)) / b

    drawn = {
        n: select(learner[whole], reference[whole], n_chunks=n, uids=uids[whole], **options).indices
        for n in _CHUNKS
        if b % n == 0
    }
    _, trace = gibbs_select(learner[whole], reference[whole], n_iterations=n_iterations, uids=uids[whole], **options)
    by_ratio = {}
    for ratio in (0.0, 0.5, 0.8, 0.9):
        part = slice(0, round(b / (1 - ratio)))
        scores = dissect(learner[part], reference[part], n_chunks=run.selection.n_chunks, uids=uids[part], **options)
        by_ratio[str(ratio)] = MethodScores(joint=scores.joint, independent=scores.independent)
    selected = drawn[max(n for n in drawn if n <= run.selection.n_chunks)][:_SIDE]
    refused = torch.tensor(sorted(set(range(run.super_batch_size)) - set(selected.tolist())))[:_SIDE]
    return {
        "step": step,
        "sub_batch_size": b,
        "chunks": {str(n): learnability(indices) for n, indices in drawn.items()},
        "gibbs": [[i, float(trace[i]) / b] for i in _logarithmic(n_iterations)],
        "filter_ratio": by_ratio,
        "matrices": {
            "selected": _matrix(learner, reference, selected),
            "refused": _matrix(learner, reference, refused),
        },
    }


def _matrix(learner: Embeddings, reference: Embeddings, rows: Tensor | slice) -> list[list[float]]:
    scores: list[list[float]] = pair_scores(learner[rows], reference[rows]).round(decimals=4).tolist()
    return scores


def _logarithmic(n: int) -> list[int]:
    """About twenty positions from 0 to n - 1, closer at the start."""
    return sorted({min(n - 1, round(n ** (i / 20)) - 1) for i in range(21)})


def matrix(run: Run, side: int) -> list[list[float]]:
    """The learnability of each image with each caption among the first examples of the run's first super-batch."""
    wide, examples, reference = super_batch(run, min(side, run.training.sub_batch_size))
    learner = learner_at(wide, checkpoints.steps(run.path(run.run_dir))[-1], examples)
    return _matrix(learner, reference, slice(0, side))
