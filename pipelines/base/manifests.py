"""The manifest of a stage's output directory: what the stage read, with which settings, and what came of it.

A stage writes `manifest.json` when it starts (`complete` is false) and again when it ends, with its results. So a stage
is safe to run again: it refuses a directory that was made with other settings, and does not make a finished one again.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, NotRequired, TypedDict, TypeVar, cast

from . import owner, storage

NAME = "manifest.json"

Config = dict[str, Any]  # the settings of any stage, in JSON
C = TypeVar("C")
M = TypeVar("M", bound=Mapping[str, Any])


class Manifest(TypedDict, Generic[C]):
    """What every manifest has; each stage's own type of manifest adds its results.

    config: whatever decides the stage's results; another value of it needs another directory.
    fingerprint: SHA-256 of all the rest in hex; a finished manifest has it.
    """

    stage: str
    complete: bool
    config: C
    fingerprint: NotRequired[str]


AnyManifest = Manifest[Config]  # of a stage whose results the reader does not use


def path_of(directory: str) -> str:
    return f"{directory}/{NAME}"


def exists(directory: str) -> bool:
    """Whether a stage has begun to write a directory."""
    return storage.exists(path_of(directory))


def refuse_other(
    directory: str,
    stage: str,
    config: Mapping[str, object],
    kind: type[M],
    *,
    today: Callable[[Config], Config] = dict,
    extends: Callable[[Config, list[str]], bool] = lambda old, differing: False,
) -> M | None:
    """The manifest of a stage's output directory, None where nothing has begun there; writes nothing.

    kind: the type of the stage's manifests. today: turns a configuration that an earlier version wrote into the fields
    of this version. extends: whether a stage that began with the first configuration may go on with this one, which
    differs from it in the listed fields.
    Raises ValueError, naming the difference, where the directory was begun with another configuration.
    """
    if not exists(directory):
        return None
    manifest = _whole(directory)
    old = today(manifest["config"])
    differing = [k for k in sorted(old.keys() | config.keys()) if old.get(k) != config.get(k)]
    if manifest["stage"] != stage or (differing and not extends(old, differing)):
        detail = "; ".join(f"{k}: there {_short(old.get(k))}, here {_short(config.get(k))}" for k in differing)
        raise ValueError(
            f"{directory} was made by {manifest['stage']!r} with another configuration ({detail}); choose "
            "another directory, or remove it"
        )
    return cast(M, {**manifest, "complete": manifest["complete"] and not differing})


def begin(directory: str, stage: str, config: Mapping[str, object], kind: type[M], **changes: Any) -> M | None:
    """Claim a stage's output directory; returns its manifest where the stage has finished with this configuration.

    This process owns the directory from here on, as `owner.claim` says, unless the stage has finished there.
    changes: `today` and `extends` of `refuse_other`, which refuses a directory of another configuration.
    """
    look = storage.retried(partial(refuse_other, directory, stage, config, kind, **changes))
    manifest = look()
    if manifest is None or not manifest["complete"]:
        owner.claim(directory)
        manifest = look()  # another owner may have finished it meanwhile
    if manifest is not None and manifest["complete"]:
        return manifest
    if manifest is None or manifest["config"] != config:
        begun = {"stage": stage, "complete": False, "config": config}
        storage.retried(storage.write_json)(path_of(directory), begun)
    return None


@storage.retried
def finish(directory: str, manifest: M) -> M:
    """Write a finished stage's manifest and return it, with its fingerprint."""
    whole = {**manifest, "fingerprint": storage.fingerprint(manifest)}
    storage.write_json(path_of(directory), whole)
    return cast(M, whole)


def read(directory: str) -> AnyManifest:
    """Any stage's manifest, finished or not. Raises FileNotFoundError where no stage has written there."""
    if not exists(directory):
        raise FileNotFoundError(f"{directory} holds no {NAME}: no stage has written there; correct the path")
    return _whole(directory)


def _whole(directory: str) -> AnyManifest:
    """A manifest. Raises ValueError where it is not as it was written: its settings decide what is made of the rest."""
    manifest: Any = storage.read_json(path_of(directory))
    parts = manifest if isinstance(manifest, dict) else {}
    rest = {key: value for key, value in parts.items() if key != "fingerprint"}
    kinds = {"stage": str, "complete": bool, "config": dict}
    is_whole = all(isinstance(rest.get(key), kind) for key, kind in kinds.items())
    if is_whole and (rest["complete"] or "fingerprint" in parts):
        is_whole = parts.get("fingerprint") == storage.fingerprint(rest)
    if not is_whole:
        raise ValueError(
            f"{path_of(directory)} is not as it was written: restore it from a copy, or remove it and run the stage "
            "again, which does what is missing"
        )
    return cast(AnyManifest, manifest)


def is_finished(directory: str) -> bool:
    """Whether a stage has written all of a directory."""
    return exists(directory) and bool(read(directory).get("complete"))


def finished(directory: str, stage: str, kind: type[M], remedy: str) -> M:
    """A stage's finished manifest. Raises FileNotFoundError, with the remedy, where there is none."""
    if not exists(directory) or not (manifest := read(directory))["complete"] or manifest["stage"] != stage:
        raise FileNotFoundError(f"{directory} holds no finished {stage}: {remedy}")
    return cast(M, manifest)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."
