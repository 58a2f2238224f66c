"""Gibbs sampling of the sub-batch, one example at a time: what Algorithm 1 approximates (Figure 2 of the paper)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jest_core import noise
from jest_core.choices import Criterion, Precision
from jest_core.collectives import Learners
from jest_core.losses import TILE
from jest_core.selection.algorithm import Ties, draw_top
from jest_core.selection.arguments import Settings, Share, Uids, check_scores, checked
from jest_core.selection.embeddings import Embeddings
from jest_core.selection.learnability import ConditionalScores


@torch.no_grad()
def gibbs_select(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    sub_batch_size: int,
    n_iterations: int,
    criterion: Criterion = "learnability",
    gain: float = 1.0,
    uids: Uids,
    occurrences: Int[Tensor, " B"] | None = None,
    seed: int,
    step: int,
    valid: Bool[Tensor, " B"] | None = None,
    precision: Precision = "exact",
    tile: int = TILE,
) -> tuple[Int[Tensor, " b"], Float[Tensor, " n_iterations"]]:
    """The single-site Gibbs sampler that joint selection approximates (Evans et al. 2024, Figure 2, middle).

    It starts with a uniform set. Each iteration removes one example of the set, at random, and draws an example (the
    same, perhaps) from all that are not in the set, by what each would add to the rest; that costs O(B * D). For the
    sigmoid loss and one learner; other arguments as in `select`. Returns the positions of the last set, and the score
    of the set after each iteration, in nats. Raises ValueError where no such selection exists.
    """
    if n_iterations < 0:
        raise ValueError(f"n_iterations {n_iterations} is negative")
    settings = Settings(
        criterion=criterion,
        precision=precision,
        sub_batch_size=sub_batch_size,
        gain=gain,
        seed=seed,
        step=step,
        tile=tile,
    )
    share = checked(learner, reference, settings, Learners(), uids=uids, occurrences=occurrences, valid=valid)
    return _sample(share, settings, n_iterations)


def _sample(share: Share, settings: Settings, n_iterations: int) -> tuple[Tensor, Tensor]:
    models, keyed, learners, device = share.models, (share.uids, share.occurrences), Learners(), share.uids.device
    seed, step, b = settings.seed, settings.step, settings.sub_batch_size
    conditional = ConditionalScores(models, settings.loss, settings.tile, settings.precision)
    check_scores(conditional, share.valid, b, learners)

    start = noise.gumbel(*keyed, seed, step, -1).masked_fill(~share.valid, -torch.inf)
    members, _ = draw_top(start, b, Ties.of(*keyed), share.offsets, learners)
    conditional.add([model[members] for _, model in models])
    score = conditional.set_score(members)
    available = share.valid.clone()
    available[members] = False
    no_example = torch.zeros(2, dtype=torch.int64, device=device)  # which member is drawn again depends on no example
    trace = torch.empty(n_iterations, dtype=torch.float64, device=device)
    for iteration in range(n_iterations):
        site = noise.hash_examples(no_example[None], no_example[:1], seed, step, iteration, -1) % b
        old = members[site]
        conditional.remove([model[old] for _, model in models])
        available[old] = True
        scores = conditional()
        keys = settings.gain * scores + noise.gumbel(*keyed, seed, step, iteration)
        new = keys.masked_fill(~available, -torch.inf).argmax()[None]
        available[new] = False
        members[site] = new
        conditional.add([model[new] for _, model in models])
        score = score + (scores[new] - scores[old]).squeeze()
        trace[iteration] = score
    return members, trace
