"""The words that a run file chooses from, and what each choice means. Imports neither PyTorch nor Pydantic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Method = Literal["uniform", "independent", "joint"]
Criterion = Literal["learnability", "hard", "easy"]
Loss = Literal["sigmoid", "softmax"]
Draw = Literal["sample", "top_k"]
Precision = Literal["exact", "fast"]  # of selection's sums; fast: products of bfloat16
ForwardPrecision = Literal["fp32", "bf16", "fp16"]  # of a forward pass: float32, or autocast to the other
Schedule = Literal["cosine", "rsqrt", "constant"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Decoder = Literal["pillow", "simplejpeg"]  # of pictures: examples/decode.py


@dataclass(frozen=True)
class MethodTraits:
    """How the sub-batch of a step comes about."""

    selects: bool  # from a super-batch that is larger than the sub-batch
    conditional: bool  # in n_chunks draws, each conditioned on those before
    description: str

    def n_draws(self, n_chunks: int) -> int:
        """How many draws make up a sub-batch, where a conditional method makes n_chunks of them."""
        return n_chunks if self.conditional else 1


METHODS: Mapping[Method, MethodTraits] = {
    "joint": MethodTraits(True, True, "Algorithm 1: each chunk by what it adds to the examples drawn before it"),
    "independent": MethodTraits(True, False, "all at once, each example by the score of its own pair"),
    "uniform": MethodTraits(False, False, "the next examples of the stream, without selection"),
}


@dataclass(frozen=True)
class CriterionTraits:
    """The score of a set of examples: learner_sign * loss by the learner + reference_sign * loss by the reference."""

    learner_sign: Literal[0, 1]
    reference_sign: Literal[0, -1]
    description: str

    @property
    def uses_learner(self) -> bool:
        return self.learner_sign != 0

    @property
    def uses_reference(self) -> bool:
        return self.reference_sign != 0


CRITERIA: Mapping[Criterion, CriterionTraits] = {
    "learnability": CriterionTraits(
        1, -1, "not yet learned, and easy for the reference: learner loss - reference loss"
    ),
    "hard": CriterionTraits(1, 0, "not yet learned: learner loss"),
    "easy": CriterionTraits(0, -1, "easy for the reference: minus its loss; the learner does not score"),
}


@dataclass(frozen=True)
class LossTraits:
    """What a contrastive loss asks of a model, and what a batch costs."""

    has_bias: bool  # whether the logits have a logit_bias
    n_products: int  # matrix products of a batch: of the logits, and of the gradients of images and of texts


LOSSES: Mapping[Loss, LossTraits] = {
    "sigmoid": LossTraits(has_bias=True, n_products=3),
    "softmax": LossTraits(has_bias=False, n_products=4),  # logits twice: a gradient needs the log-sum-exps first
}
