"""Checkpoints -> zero-shot, few-shot and retrieval scores.

sets        folders, tars, shards and JSON of evaluation pictures -> examples and class names
first_look  whether the sets of a run file are there, before anything starts
tasks       one set and a model -> the metrics of each task
results     lines of eval_results.jsonl, and the files of open_clip and CLIP_benchmark
evaluate    the stage, and evaluation within the training loop
"""
