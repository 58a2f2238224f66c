"""Joint example selection in plain PyTorch and NumPy: the method. Nothing here knows of Ray or of storage.

Shapes in signatures and docstrings:

    B   examples of a super-batch (or of one learner's share of it, where a docstring says "local")
    b   examples of the sub-batch that is trained on; filter_ratio = 1 - b / B
    D   width of the embeddings; learner and reference may differ
    n   examples of one chunk, n_chunks * n = b
    L   tokens of a caption;  H, W  pixels of an image

Embeddings have unit-norm rows; row = image, column = text; logit_scale is the multiplier, not its logarithm. Modules in
reading order, each of which imports only what is above it:

    choices      the words among which a run file chooses
    tables       columns, types and units of every table on disk
    hashing      integers -> 64 hashed bits, alike in NumPy and PyTorch
    noise        random numbers keyed by (seed, step, chunk, uid, occurrence)
    collectives  gather and exchange over the learners: the one file that calls torch.distributed
    losses       sigmoid and softmax losses: whole for small B, tiled and global for training
    run_file     the run file: typed parts, every size that follows
    examples     order, pixels, tokens; a learner's share of a super-batch
    selection    learnability of sets of examples; Algorithm 1
    models       pixels and tokens -> embeddings
    evaluation   embeddings -> zero-shot, few-shot and retrieval scores
    training     a super-batch -> a sub-batch -> an update
    flops        the cost of a step by part

The names below are the public ones; they import PyTorch when they are first used.
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
