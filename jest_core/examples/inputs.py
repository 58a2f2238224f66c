"""Which pixels and tokens a model needs, without the model or PyTorch: for processes that only read examples."""

from dataclasses import dataclass, replace

from jest_core.examples.decode import View
from jest_core.examples.tokenizer import Tokenizer

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Inputs:
    """view and tokenizer: used where examples are read; mean and std (of pixels in 0..1): where they are embedded."""

    view: View
    mean: Colour
    std: Colour
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """Everything that decides pixels and tokens, as text; the manifest of a score cache contains it."""
        return f"{self.view!r}; mean {self.mean}; std {self.std}; {self.tokenizer.name} {self.tokenizer.context_length}"

    def prepares_as(self, other: "Inputs") -> bool:
        """Whether pixels and tokens of the other model are the same; mean and standard deviation are applied later."""
        return replace(self, mean=other.mean, std=other.std).fingerprint == other.fingerprint
