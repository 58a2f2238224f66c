"""The part `subset`: what `jest select` selects from the whole catalogue, before any training."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat

from jest_core.run_file.parts import Part, Unit
from jest_core.run_file.reference import Reference


class Subset(Part):
    """A static subset, which `jest select` writes: the pairs that fixed models select from the whole catalogue."""

    directory: str = Field(examples=["selected"])
    """Directory of the subset, which `jest select` writes. The rule `subset` trains on it."""

    learner: Reference | None = None
    """Fixed model in the learner's place, described by the same keys as the reference. It may be left out with
    selection.criterion easy, which scores with the reference alone."""

    cpus_per_task: Annotated[PositiveFloat, Unit("CPUs")] = 2
    """CPUs of each Ray task of `jest select`. A task selects from one super-batch."""

    gpus_per_task: Annotated[NonNegativeFloat, Unit("GPUs")] = 0
    """GPUs of each Ray task of `jest select`. 0: it selects on CPUs."""
