"""A step of a learner: draw the sub-batch of a super-batch, and update on it.

spreading  which learner trains on which selected example, and at which resolution
forward    a learner's share of a sub-batch, at one or two resolutions -> embeddings with gradients
step_log   what a step offered, selected and refused, as rows of the selection log
draw       a super-batch -> the sub-batch of a step: score, select, spread over the learners
optim      AdamW parameter groups, learning-rate schedules
step       one step: draw the sub-batch, update the model on it
"""
