"""Joint example selection: embeddings of a super-batch -> the sub-batch with the highest learnability.

learnability  scores of sets of examples: learner loss minus reference loss, and running sums over what is taken
kernels       the same sums fused for CUDA, in Triton
algorithm     Algorithm 1: chunk by chunk, each conditioned on those before; independent; Gibbs
anatomy       one super-batch taken apart: what draw scores are made of
agreement     scoring at low resolution against scoring at full resolution
"""

from jest_core.selection.algorithm import Selection, gibbs_select, select
from jest_core.selection.learnability import Embeddings, batch_score

__all__ = ["Embeddings", "Selection", "batch_score", "gibbs_select", "select"]
