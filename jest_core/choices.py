"""The words among which a run file chooses, for all that take them; imports nothing, so that it costs nothing."""

from typing import Literal

Method = Literal["joint", "independent"]
Criterion = Literal["learnability", "hard", "easy"]
Loss = Literal["sigmoid", "softmax"]
Draw = Literal["sample", "top_k"]
Precision = Literal["exact", "fast"]  # of selection's sums; fast: products of bfloat16
ForwardPrecision = Literal["fp32", "bf16", "fp16"]  # of a forward pass: float32, or autocast to the other
Schedule = Literal["cosine", "rsqrt", "constant"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
