"""Models: pixels and tokens -> unit-norm embeddings, at one or several resolutions, whole or sharded.

folders         a folder with a model, as open_clip's `local-dir:` and Hugging Face have it
configurations  open_clip's models by name, with jest's (configs/): sizes, and which pixels and tokens they need
flexible        ViT image towers at several resolutions, with one set of weights (FlexiViT)
sharding        weights sharded over the learners (FSDP2), and gathered again
weights         weights in files of jest and of other programs, under an open_clip model's names; what does not fit
towers          an open_clip model as learner or frozen reference -> embeddings; which models are refused
trial           a training pass of a model without weights: which parameters get no gradient, what it changes unseen
scorers         further scores of a pair: text quality, image quality, or a user's scorer
flop_counts     FLOPs of a forward pass, by PyTorch's counter
outlines        sizes and FLOPs of models by name, counted once and cached on disk, for plans without PyTorch
"""
