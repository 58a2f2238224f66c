"""The flow: Ray Data and Ray Train around jest_core, one file per stage.

In order: plan (what a run will cost), drawings (the demonstration's data), catalogue, reference_scores, super_batches
(with read_ahead, rows and prefetch), learner, selection_log, checkpoints, evaluation, comparison, report; demo runs
them all. Under them: storage, shards, blocks, cluster, progress. On top: __main__.
"""

import os

# Ray reads it when it is imported: a thread that calls Ray after `cluster.disconnect` would start another Ray otherwise
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
