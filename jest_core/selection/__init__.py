"""Joint example selection: embeddings of a super-batch -> the sub-batch with the highest learnability.

embeddings    one model's embeddings of a super-batch, with its logit_scale and logit_bias
learnability  scores of sets of examples: learner loss minus reference loss, as running sums over the examples drawn
kernels       the same sums as one CUDA kernel, in Triton
consensus     an error of one learner is raised by all of them; so is a difference of their settings
arguments     the arguments of a selection, checked
algorithm     Algorithm 1: `select`, chunk by chunk, each conditioned on those before; independent selection
gibbs         the brute-force sampler that Algorithm 1 approximates (the paper's Figure 2)
anatomy       one selection analysed: the parts of its scores, and the score of the set
agreement     selection by scores at low resolution compared with selection by scores at full resolution
"""

from jest_core.selection.algorithm import Selection, select
from jest_core.selection.embeddings import Embeddings
from jest_core.selection.gibbs import gibbs_select
from jest_core.selection.learnability import batch_score

__all__ = ["Embeddings", "Selection", "batch_score", "gibbs_select", "select"]
