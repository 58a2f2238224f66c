"""How a model takes pictures and captions, without the model: for those who only prepare them. Imports no PyTorch."""

from dataclasses import dataclass, replace

from jest_core.examples.tokenizer import Tokenizer
from jest_core.examples.view import View

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Inputs:
    """view and tokenizer: what readers do; mean and std, of pixels 0..1: what the device does with their pixels."""

    view: View
    mean: Colour
    std: Colour
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """What decides how images and captions are presented, in words."""
        return f"{self.view!r}; mean {self.mean}; std {self.std}; {self.tokenizer.name} {self.tokenizer.context_length}"

    def prepares_as(self, other: "Inputs") -> bool:
        """Whether pixels and tokens are those of another model; mean and standard deviation are applied later."""
        return replace(self, mean=other.mean, std=other.std).fingerprint == other.fingerprint
