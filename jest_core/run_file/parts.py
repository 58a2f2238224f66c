"""What a part of a run file is, and what its fields say of themselves beside their type: a unit, a circumstance.

The string under a field is its description: pydantic reads it, run-file.md and the JSON schema show it (describe.py),
and errors quote its first sentence (explain.py).
"""

from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A mapping of a run file: complete, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Unit:
    """The unit of a field: `Annotated[PositiveInt, Unit("pixels")]`."""

    name: str


class _Mark:
    def __repr__(self) -> str:
        return "CIRCUMSTANCE"


CIRCUMSTANCE = _Mark()
T = TypeVar("T")
# A field that says where and how a run is computed, not what: it may change while the run goes on (identity.py)
Circumstance = Annotated[T, CIRCUMSTANCE]
