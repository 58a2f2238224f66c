"""The flow, on Ray: each package makes what the next one needs, and imports only packages above it in this list.

base        files on any storage, Arrow blocks, checkpoints, the Ray cluster, progress lines
data        lists of URLs -> image shards -> catalogue
scores      catalogue + reference -> score cache
stream      catalogue + score cache -> super-batches
evaluation  checkpoints -> zero-shot, few-shot and retrieval scores
training    super-batches -> checkpoints, selection log, metrics
offline     static subsets, and what other tools read
planning    what a run will cost, and what can be checked before it starts
reports     finished runs -> tables and pages
stages      stages one after the other, and runs that build on each other
submit      stages as one job of a Ray cluster
paper       the demonstration and the paper's figures
commands    the command line
in_vain     a failure that would come again, remembered for the retries of one submission
errors      an error that ends a command -> the line that its user reads
__main__    `jest`

An installed jest has this package as `jest_pipelines`, a name that no other project takes. Imports of each other are
relative, so that the same files work as `pipelines` in a checkout.
"""

import os

# Ray reads it when it is imported: a thread that calls Ray after `cluster.disconnect` would start another Ray otherwise
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
