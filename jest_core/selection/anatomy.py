"""One selection analysed: what its scores consist of, and what its set is worth. For studies, not for training."""

from dataclasses import dataclass

import torch
from torch import Tensor

from jest_core.choices import Method
from jest_core.selection.algorithm import Selection, select
from jest_core.selection.arguments import Uids
from jest_core.selection.embeddings import Embeddings
from jest_core.selection.learnability import ConditionalScores, batch_score, signed_models


@dataclass(frozen=True)
class Anatomy:
    """How joint selection of b from B differs from independent selection of as many, on one super-batch.

    off_diagonal_share: the draw scores of the last chunk are matched-pair scores plus sums over the examples drawn
    before; this is the part of their variance, over the examples not yet drawn, that the sums contribute.
    off_diagonal_deviation, diagonal_deviation: standard deviations of the sums and of the matched-pair scores, in nats.
    overlap: share of b that both select; by chance it is b / B. joint, independent, uniform: exact score of each set
    (learnability), per example of the set, in nats.
    """

    sub_batch_size: int
    super_batch_size: int
    off_diagonal_share: float
    off_diagonal_deviation: float
    diagonal_deviation: float
    overlap: float
    joint: float
    independent: float
    uniform: float


def dissect(
    learner: Embeddings,
    reference: Embeddings,
    *,
    sub_batch_size: int,
    n_chunks: int,
    gain: float = 1.0,
    uids: Uids,
    seed: int,
    step: int,
) -> Anatomy:
    """Anatomy of one draw. Arguments as in `select`; sigmoid loss, learnability, one learner."""

    def drawn(method: Method) -> Selection:
        return select(
            learner,
            reference,
            sub_batch_size=sub_batch_size,
            n_chunks=n_chunks,
            method=method,
            gain=gain,
            uids=uids,
            seed=seed,
            step=step,
        )

    joint, independent = drawn("joint"), drawn("independent")
    uniform = torch.randperm(len(learner), generator=torch.Generator().manual_seed(seed))[:sub_batch_size]
    before = joint.indices[joint.chunk < n_chunks - 1]
    conditional = ConditionalScores(signed_models(learner, reference, "learnability"), "sigmoid")
    if len(before):
        conditional.add([model[before] for _, model in conditional.models])
    left = torch.ones(len(learner), dtype=torch.bool)
    left[before] = False
    diagonal, sums = conditional.diagonal[left], conditional.sums[left]

    def score(indices: Tensor) -> float:
        return float(batch_score(learner, reference, indices)) / sub_batch_size

    common = torch.isin(joint.indices, independent.indices).double().mean()
    return Anatomy(
        sub_batch_size,
        len(learner),
        float(sums.var() / (diagonal.var() + sums.var())),
        float(sums.std()),
        float(diagonal.std()),
        float(common),
        score(joint.indices),
        score(independent.indices),
        score(uniform),
    )
