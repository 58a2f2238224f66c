"""The method: joint example selection in plain PyTorch and NumPy. Nothing here knows of Ray or of storage.

Shapes in signatures and docstrings:

    B   examples of a super-batch (or of one learner's share of it, where a docstring says "local")
    b   examples of the sub-batch that is trained on; filter_ratio = 1 - b / B
    D   width of the embeddings; learner and reference may differ
    n   examples of one chunk, n_chunks * n = b
    L   tokens of a caption;  H, W  pixels of an image

Reading order: choices, config, rules, tables, hashing, order, view, tokenizer, inputs, preprocess, flexible, towers,
scorers, examples, losses, learnability, kernels, noise, selection, agreement, spreading, training_pass, step_log,
selector, train_step, optim, collectives, evaluation, flops.
"""
