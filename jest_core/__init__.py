"""Joint example selection (JEST, Evans et al. 2024, arXiv:2406.17711) in plain PyTorch and NumPy.

This package imports neither Ray nor any storage; `pipelines` runs it on data. Shapes in signatures and docstrings:

    B   examples of a super-batch (or of one learner's share of it, where a docstring says "local")
    b   examples of the sub-batch that is trained on; filter_ratio = 1 - b / B
    D   width of the embeddings; learner and reference may differ
    n   examples of one chunk, n_chunks * n = b
    R   n_learners + 1, the length of `offsets`: learner r has the positions offsets[r] .. offsets[r + 1]
    L   tokens of a caption;  H, W  pixels of an image

Embeddings have unit-norm rows; row = image, column = text; logit_scale is the multiplier, not its logarithm. A score of
a set of examples is a sum over its pairs, in nats. Modules in reading order, each of which imports only those above it:

    choices      the words that a run file chooses from, and what each choice means
    tables       columns, types and units of every table on disk
    noise        the one source of seeded numbers, by (seed, step, chunk, uid, how often the row came before)
    collectives  sums, gathers and exchanges over the learners: the one file that calls torch.distributed
    losses       sigmoid and softmax losses: whole for small B, tiled and global for training
    run_file     the run file: typed parts, every size that follows
    examples     order, pixels, tokens; a learner's share of a super-batch
    selection    learnability of sets of examples; Algorithm 1
    models       pixels and tokens -> embeddings
    evaluation   embeddings -> zero-shot, few-shot and retrieval scores
    training     a super-batch -> a sub-batch -> an update
    flops        the cost of a step by part

Where the steps of the paper are:

    sigmoid loss of a batch                               losses.sigmoid_loss
    softmax loss (Eq. 1)                                  losses.softmax_loss
    hard learner, easy reference, learnability            choices.CRITERIA, selection/learnability.py
    Algorithm 1, chunk by chunk                           selection/algorithm.py
    the score of a candidate given the chunks before      selection/learnability.py (ConditionalScores)
    Gibbs sampling, which it approximates (Figure 2)      selection/gibbs.py
    reference embeddings, computed once and cached        pipelines/scores
    the step: score, select, train                        training/draw.py, training/step.py
    FlexiJEST: which examples at low resolution           training/mixed_resolution.py, training/draw.py
    FlexiJEST: a tower at another resolution              models/flexible.py
    FLOPs (Table 1, Figure 1)                             flops.py

The names below are the public ones; PyTorch is imported when one of them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jest_core.flops import training_flops
    from jest_core.losses import sigmoid_loss, sigmoid_pair_losses, softmax_loss
    from jest_core.selection import Embeddings, Selection, batch_score, gibbs_select, select

__all__ = [
    "Embeddings",
    "Selection",
    "batch_score",
    "gibbs_select",
    "select",
    "sigmoid_loss",
    "sigmoid_pair_losses",
    "softmax_loss",
    "training_flops",
]

_HOME = dict.fromkeys(__all__, "selection") | {
    "sigmoid_loss": "losses",
    "sigmoid_pair_losses": "losses",
    "softmax_loss": "losses",
    "training_flops": "flops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
