"""What a part of a run file is, and which of its fields are circumstances."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A mapping of a run file: complete, and without keys that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Mark:
    def __repr__(self) -> str:
        return "CIRCUMSTANCE"


CIRCUMSTANCE = _Mark()
T = TypeVar("T")
# A field that says where and how a run is computed, not what: it may change while the run goes on (identity.py)
Circumstance = Annotated[T, CIRCUMSTANCE]
