"""What a run's super-batches are made of, by the manifests of its catalogue and of its score cache."""

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
    """What a run's super-batches are made of: the catalogue and, unless nothing is scored, the reference's cache."""

    order: Order
    catalogue: Catalogue
    scale_and_bias: tuple[float, float] | None


def open_source(run: Run) -> Source:
    """Read the manifests. Raises where a stage has not run, or the cache belongs to another catalogue."""
    found = open_catalogue(run.path(run.data.catalogue))
    if not run.reads_scores:
        return Source(found.order(run), found, None)
    assert run.reference is not None
    directory = run.path(run.reference.scores)
    scores = score_cache.opened(directory)
    score_cache.refuse_other(scores, found, directory)
    scale_and_bias = score_cache.scale_and_bias(scores)
    if scores["config"]["catalogue"] == found.manifest["fingerprint"]:
        return Source(found.order(run, score_cache.good_slots(directory)), found, scale_and_bias)
    by_scores = any(isinstance(rule, ScoreRule) and rule.scores for rule in run.data.rules)
    if score_cache.n_bad(scores["counts"]) and not by_scores:
        raise ValueError(
            f"{directory} found rows that do not decode, and {run.data.catalogue} may keep them: refine with a rule "
            "{rule: score, scores: ..., at_least: -1}, which drops what was not scored"
        )
    return Source(found.order(run), found, scale_and_bias)
