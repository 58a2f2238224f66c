"""The catalogue, the order and the score cache that a run's super-batches are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jest_core.run_file import Run
from jest_core.run_file.rules import ScoreRule

from ..data.catalogue import Catalogue, open_catalogue
from ..scores import score_cache

if TYPE_CHECKING:
    from jest_core.examples.order import Order


@dataclass(frozen=True)
class Source:
    """What a run's super-batches are made of.

    scale_and_bias: the reference's logit_scale and logit_bias; None where the run reads no score cache.
    """

    order: Order
    catalogue: Catalogue
    scale_and_bias: tuple[float, float] | None


def open_source(run: Run) -> Source:
    """Open catalogue and score cache. Raises FileNotFoundError where a stage has not run, and ValueError where the
    cache was made for another catalogue, or with another decoder."""
    catalogue = open_catalogue(run.path(run.data.catalogue))
    if not run.reads_scores:
        return Source(catalogue.order(run), catalogue, None)
    assert run.reference is not None
    directory = run.path(run.reference.scores)
    scores = score_cache.opened(directory)
    score_cache.refuse_other(scores, catalogue, directory)
    score_cache.refuse_other_decoder(scores, run.data.decoder, directory)
    scale_and_bias = score_cache.scale_and_bias(scores)
    if scores["config"]["catalogue"] == catalogue.manifest["fingerprint"]:
        return Source(catalogue.order(run, score_cache.good_slots(directory)), catalogue, scale_and_bias)
    by_scores = any(isinstance(rule, ScoreRule) and rule.scores for rule in run.data.rules)
    if score_cache.n_bad(scores["counts"]) and not by_scores:
        raise ValueError(
            f"{directory} has rows that do not decode, and {run.data.catalogue} may keep them: refine it with a rule "
            "{rule: score, scores: ..., at_least: -1}, which drops rows without a score"
        )
    return Source(catalogue.order(run), catalogue, scale_and_bias)


def streams_of(run: Run, rank: int, n_learners: int) -> range:
    """The streams that a learner reads: those of which its share of a super-batch has slots."""
    m, share = run.super_batch_size // run.data.n_streams, run.super_batch_size // n_learners
    return range(rank * share // m, -(-(rank + 1) * share // m))
