"""A step of a learner: draw the sub-batch of a super-batch, and update on it.

placement  which learner trains on which selected example
mixed_resolution  which examples are trained at low resolution (FlexiJEST)
forward    a learner's share of a sub-batch, at one or two resolutions -> embeddings with gradients
bad_pictures  how many pictures of the last steps did not decode, and when that ends a run
step_log   what a step selected, and a sample of what it did not, as rows of the selection log
draw       a super-batch -> the sub-batch of a step: score, select, spread over the learners
optim      AdamW parameter groups, learning-rate schedules
step       one step: draw the sub-batch, update the model on it
"""
