"""Examples before they are embedded: their order, pixels and tokens, and a learner's share of a super-batch.

order        the seeded order of examples, in streams that do not depend on the number of learners
decode       image bytes -> pixels, in the view that is scored
rgbx         pictures as arrays of four bytes a pixel: decoded, resized, cut
exif         how a picture has to be turned to be upright
tokenizer    captions -> tokens
inputs       which view and which tokens a model needs, without the model
preprocess   pixels -> the input of a model: resized, augmented, normalised
super_batch  a learner's share of a super-batch as columns, and how examples are sent to other learners
"""
