"""Checkpoints -> zero-shot, few-shot and retrieval scores.

sets      folders, tars, shards and JSON of evaluation pictures -> examples and class names
evaluate  the stage, and evaluation within the training loop
"""
