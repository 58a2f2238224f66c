"""The flow: Ray Data and Ray Train around jest_core, one file per stage.

In order: plan (what a run will cost), drawings (the demonstration's data), catalogue, reference_scores, super_batches,
learner, selection_log, checkpoints, evaluation, comparison, report; demo runs them all. Under them: storage, shards,
blocks, cluster, progress. On top: __main__.
"""
