"""Models: pixels and tokens -> unit-norm embeddings, at one or several resolutions, whole or sharded.

configurations  open_clip's models by name, with jest's own (configs/): sizes, and how they take pictures and captions
flexible        ViT image towers at several resolutions, from one set of weights
towers          an open_clip model as learner or frozen reference -> embeddings; what is refused
sharding        weights in shares over the learners (FSDP2), and whole again
scorers         further scores of a pair: text quality, image quality, or a user's own
flop_counts     FLOPs of a forward pass, by PyTorch's counter
outlines        sizes and FLOPs of models by name, counted once and kept, for plans without PyTorch
"""
