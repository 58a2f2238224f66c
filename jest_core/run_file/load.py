"""A run file's text -> Run, with the overrides of a command line; and back."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml
from pydantic import ValidationError

from jest_core.run_file import consistency
from jest_core.run_file.explain import explain
from jest_core.run_file.paths import join
from jest_core.run_file.schema import Run
from jest_core.run_file.yaml_text import read

_FOLDER = "local-dir:"  # before the folder of a model


def load(
    text: str, overrides: Sequence[str | Mapping[str, Any]] | None = None, source: str = "run file", saved: bool = False
) -> Run:
    """Parse a run file's YAML text. Raises ValueError naming field, value, remedy.

    overrides: each `a.b=c`, c as YAML, or a mapping nested as a run file is; the later win. saved: the run.yaml of a
    run that was begun, whose values were compared with each other then; a later version may be stricter.
    """
    values = parse(text, source)
    for override in overrides or []:
        if isinstance(override, str):
            _override(values, override)
        else:
            values = merged(values, deepcopy(override))
    values = _with_folders(values, str(values.get("root", ".")))
    try:
        run = Run.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}:\n" + "\n".join(explain(error, values))) from None
    run = run.model_copy(update={"root": join("", run.root)})  # workers have other working directories
    if not saved and (problems := consistency.problems(run)):
        raise ValueError(f"{source}:\n" + "\n".join(f"  {line}" for line in problems))
    return run


def parse(text: str, source: str) -> dict[str, Any]:
    """YAML text as keys and values. Raises ValueError where it is something else."""
    values = read(text, source)
    if not isinstance(values, dict):
        raise ValueError(f"{source} is not a mapping of keys to values")
    return values


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """values with changes, part by part; a list or a value is replaced whole."""
    out = dict(values)
    for key, change in changes.items():
        old = out.get(key)
        out[key] = merged(old, change) if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return out


def _with_folders(value: Any, root: str) -> Any:
    """With models' names of the kind `local-dir:FOLDER` below root, as all paths of a run file are."""
    if isinstance(value, dict):
        return {key: _with_folders(part, root) for key, part in value.items()}
    if isinstance(value, str) and value.startswith(_FOLDER):
        return _FOLDER + join(join("", root), value.removeprefix(_FOLDER))
    return value


def dump(run: Run) -> str:
    """The resolved run file: every value, the defaults too."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override!r} has no '='; write --set selection.n_chunks=8")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ValueError(f"--set {override!r}: {parent!r} is not a part of the run file")
    place[last] = read(value, f"--set {override!r}")
