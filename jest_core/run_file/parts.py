"""What a part of a run file is, and what its fields say of themselves beside their type: a unit, a circumstance.

The string under a field is its description: pydantic reads it, run-file.md and the JSON schema show it (describe.py),
and errors quote its first sentence (explain.py).
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """A mapping of a run file: complete, without unknown keys, and with finite numbers alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, values: Any) -> Any:
        """Python, and pydantic with it, takes `true` for 1."""
        for key, value in values.items() if isinstance(values, dict) else ():
            types = _plain_types(cls.model_fields[key].annotation) if key in cls.model_fields else set()
            if isinstance(value, bool) and types & {int, float} and bool not in types:
                raise PydanticCustomError("truth_value", "{key} is a number", {"key": key, "value": value})
        return values


def _plain_types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*map(_plain_types, get_args(annotation)))


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
