"""What makes a run this run: which fields decide whether a directory that was begun may go on with a run file.

A field counts unless its type in the schema is a `Circumstance`: where and how a run is computed, not what. A field
that a later version adds needs a default that means "as before".
"""

from typing import Any

from pydantic import ValidationError

from jest_core.run_file.parts import CIRCUMSTANCE, Part
from jest_core.run_file.schema import Run

Identity = dict[str, Any]  # `part.field`, as a manifest keeps it -> its value in JSON


def identity(run: Run) -> Identity:
    """The values that make a run this run, flat, so that a difference can be named."""
    flat = {}
    for part, values in _counted(run).items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{part}.{key}".rstrip(".")] = value
    return flat


def in_todays_fields(saved: Identity, run: Run) -> Identity:
    """An identity that an earlier version saved, in the fields of this one: what it did not know has its default, and
    what is a circumstance now is left out. As it is where this version cannot read it.

    run: where the circumstances come from, which a saved identity lacks.
    """
    dumped = run.model_dump(mode="json")
    values = _circumstances(run, dumped)
    parts: dict[str, Any] = {}
    for key, value in saved.items():
        part, _, field = key.partition(".")
        if field:
            parts.setdefault(part, {})[field] = value
        else:
            parts[part] = value
    for part, fields in parts.items():
        circumstances = _circumstances(getattr(run, part, None), dumped.get(part))
        values[part] = circumstances | fields if isinstance(fields, dict) else fields
    try:
        return identity(Run.model_validate(values))
    except ValidationError:
        return saved


def _counted(part: Part) -> dict[str, Any]:
    dumped = part.model_dump(mode="json")
    fields = type(part).model_fields.items()
    return {name: _value(getattr(part, name), dumped[name]) for name, field in fields if not _lets_go_on(field)}


def _value(value: Any, dumped: Any) -> Any:
    if isinstance(value, Part):
        return _counted(value)
    return [_value(*pair) for pair in zip(value, dumped, strict=True)] if isinstance(value, list) else dumped


def _circumstances(part: Any, dumped: Any) -> dict[str, Any]:
    if not isinstance(part, Part):
        return {}
    return {name: dumped[name] for name, field in type(part).model_fields.items() if _lets_go_on(field)}


def _lets_go_on(field: Any) -> bool:
    return CIRCUMSTANCE in field.metadata
