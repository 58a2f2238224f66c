"""What pydantic finds wrong with single values of a run file -> a line each, with field, value and remedy."""

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.resources import files
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from jest_core.run_file.parts import Part
from jest_core.run_file.rules import Rule, RuleOrBasicFilter, expanded
from jest_core.run_file.schema import Run

Location = tuple[int | str, ...]
_MOST_CHARACTERS = 100  # of a value that an error shows
_COMPLETE = "runs/demo-small/joint.yaml"
_MOST_LINES = 30  # of errors
_SHOULD_BE = "Input should be "  # as pydantic begins


def explain(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    """A line for each value that is wrong; where a key is missing, a last one that names a complete run file. values:
    the run file's, as they were validated."""
    errors: dict[Location, list[Any]] = {}
    for each in error.errors(include_url=False):
        errors.setdefault(_written(each, values), []).append(each)
    lines = [_line(place, group) for place, group in errors.items() if not _is_refined(place, group, errors)]
    more = [f"  ... and {len(lines) - _MOST_LINES} more"] * (len(lines) > _MOST_LINES)
    if any(each["type"] == "missing" for group in errors.values() for each in group):
        deploy = files("jest_deploy")
        more.append(f"  all keys are in {deploy / 'docs' / 'run-file.md'}; a complete file is {deploy / _COMPLETE}")
    return lines[:_MOST_LINES] + more


def start(field: FieldInfo) -> Any:
    """A value to start from where a key is missing: the field's first example, or those of a part's required keys; None
    where there is neither."""
    if field.examples:
        return field.examples[0]
    parts = parts_of(field.annotation)
    return start_of(parts[0]) if len(parts) == 1 else None


def start_of(part: type[Part]) -> dict[str, Any]:
    """The required keys of a part, with values to start from."""
    return {key: start(field) for key, field in part.model_fields.items() if field.is_required()}


def on_one_line(value: Any) -> str:
    """A value as it is written in a run file, on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, Part):
        value = value.model_dump()
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).removesuffix("...\n").strip()


def parts_of(annotation: Any) -> list[type[Part]]:
    """The parts among the types that an annotation is made of: of `list[Scorer] | None` Scorer."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return [annotation]
    return [part for argument in get_args(annotation) for part in parts_of(argument)]


def tag_of(part: type[Part]) -> str:
    """The name of a rule in a run file."""
    return str(get_args(part.model_fields["rule"].annotation)[0])


def first_sentence(text: str | None) -> str:
    """Of a description, on one line."""
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join((text or "").split()))[0]


def _line(place: Location, errors: list[Any]) -> str:
    """errors: more than one where a value is of none of several types."""
    error, key = errors[0], ".".join(str(x) for x in place)
    parts, field = _meaning(error["loc"])
    meaning = first_sentence(field.description) if field else ""
    match error["type"]:
        case "extra_forbidden":
            known = [name for part in parts for name in part.model_fields]
            near = _near(error["loc"][-1], known) or _elsewhere(error["loc"][-1])
            return f"  {key} is not a key of a run file; " + (near or "remove it, or correct its spelling")
        case "missing":
            value = start(field) if field and place[-1] in error["loc"][-1:] and isinstance(place[-1], str) else None
            such_as = f", such as `{place[-1]}: {on_one_line(value)}`" * (value is not None)
            return f"  {key} is missing; a run file is complete: add it{such_as}. {meaning}".rstrip()
        case "truth_value":
            key = ".".join(str(x) for x in (*place, error["ctx"]["key"]))
            return f"  {key} = {error['ctx']['value']}: Input should be a number, and not a truth value"
        case "string_type" if len(errors) == 1 and isinstance(error["input"], (bool, int, float)):
            return f"  {key} = {_shown(error['input'])}: Input should be text: put it in quotes ({meaning})"
        case "union_tag_invalid":
            rules = parts_of(RuleOrBasicFilter if place[0] == "data" else Rule)
            return _not_among(f"{key}.rule", error["ctx"]["tag"], [tag_of(rule) for rule in rules])
        case "union_tag_not_found":
            return f"  {key} = {_shown(error['input'])} names no rule; write {{rule: NAME, ...}}"
        case "literal_error":
            return _not_among(key, error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]))
    why = " or ".join(
        [error["msg"].removeprefix("Value error, "), *(e["msg"].removeprefix(_SHOULD_BE) for e in errors[1:])]
    )
    why = re.sub(r"valid dictionary or instance of \w+", "mapping of keys to values", why)
    return f"  {key} = {_shown(error['input'])}: {why}" + f" ({meaning})" * bool(meaning)


def _is_refined(place: Location, group: list[Any], others: Iterable[Location]) -> bool:
    """Whether a value is wrong only as one of the types that it may have, and something in it as another."""
    as_type = all(error["loc"][-1:] != place[-1:] for error in group)
    return as_type and any(other != place and other[: len(place)] == place for other in others)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


def _not_among(place: str, value: Any, choices: list[str]) -> str:
    near = _near(value, choices)
    return f"  {place} = {value!r} is none of {', '.join(choices)}" + f"; {near}" * bool(near)


def _near(word: Any, known: Iterable[str]) -> str:
    near = get_close_matches(str(word), list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def _elsewhere(key: Any) -> str:
    """Where a key is that stands in another part."""
    parts = {name: part for name, field in Run.model_fields.items() for part in parts_of(field.annotation)[:1]}
    places = [f"{name}.{key}" for name, part in parts.items() if key in part.model_fields]
    return f"did you mean {' or '.join(places)}?" if places else ""


def _written(error: Any, values: Mapping[str, Any]) -> Location:
    """Where an error is, in the keys of the run file: pydantic's location names types of a union too."""
    place = list[int | str]()
    value: Any = values
    for depth, key in enumerate(error["loc"], 1):
        if isinstance(value, Mapping) and key in value:
            place.append(key)
            value = value[key]
        elif isinstance(value, list) and key in range(len(read := expanded(value))):
            position, value = read[key]
            place.append(position)
        elif error["type"] == "missing" and depth == len(error["loc"]):
            place.append(key)
    return tuple(place)


def _meaning(location: Location) -> tuple[list[type[Part]], FieldInfo | None]:
    """The parts that may have the last key of a location, and the field that it is, if it is one."""
    parts, field = list[type[Part]]([Run]), None
    for key in location:
        inside = parts if field is None else parts_of(field.annotation)
        tagged = [part for part in inside if "rule" in part.model_fields and tag_of(part) == key]
        if len(inside) > 1 and tagged:
            parts, field = tagged, None
        elif isinstance(key, str) and inside:
            parts = inside
            field = next((part.model_fields[key] for part in parts if key in part.model_fields), None)
    return parts, field
