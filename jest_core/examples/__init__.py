"""Examples before they are embedded: their order, pixels and tokens, and a learner's share of a super-batch.

order        the seeded order of examples: canonical streams, windows; pure functions
view         image bytes -> pixels: the one scored view
tokenizer    captions -> tokens
inputs       how a model takes both, without the model
preprocess   pixels on their way into a model: resized, augmented by keyed noise, normalised
super_batch  a learner's share of a super-batch as columns, and its exchange with the others
"""
