"""Checks of a run before it starts: storage, shards, what earlier stages have made, and the cluster."""

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError, NoCredentialsError

from jest_core import run_file
from jest_core.run_file import Run
from jest_core.run_file.rules import DenyRule, DuplicateRule, ScoreRule, SubsetRule

from ..base import checkpoints, cluster, manifests, shard_paths, storage
from ..data import rules
from ..data.catalogue import open_catalogue
from ..data.layouts import open_shard
from ..data.shards import Shard
from ..evaluation import sets
from ..stream.source import open_source
from ..training import run_directory
from . import sizes
from .sizes import Pairs


@dataclass(frozen=True)
class Check:
    """ok is None where something is not there yet, or cannot be seen from here."""

    name: str
    ok: bool | None
    detail: str


class _NotYet(Exception):
    """What another stage has yet to make, or what this machine cannot look up."""


def run_checks(run: Run, pairs: Pairs | None) -> Iterator[Check]:
    """Each check of this run, in the order in which its stages need what is checked."""
    reached = _check("storage", lambda: _storage(run))
    yield reached
    if not reached.ok:
        return
    yield _check("shards", lambda: _shards(run))
    yield _check("catalogue", lambda: _catalogue(run))
    if run.uses_reference and run.reference is not None and run.reference.checkpoint is not None:
        path = run.path(run.reference.checkpoint)
        yield _check("reference", lambda: _checkpoint(path, "train it, or correct reference.checkpoint"))
    if run.reads_scores:
        yield _check("score cache", lambda: _scores(run))
    if run.training.initial_checkpoint is not None:
        start = run.path(run.training.initial_checkpoint)
        yield _check("initial checkpoint", lambda: _checkpoint(start, "correct training.initial_checkpoint"))
    if run.data.replay is not None:
        yield _check("replay", lambda: _replay(run))
    yield _check("run directory", lambda: _run_directory(run))
    for spec in run.evaluation.sets if run.evaluation else []:
        yield _check(f"evaluation set {spec.name}", lambda spec=spec: _evaluation_set(run, spec))  # type: ignore[misc]
    yield _check("cluster", lambda: _cluster(run, pairs))


def _check(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (_NotYet, NoCredentialsError) as error:
        return Check(name, None, str(error))
    except (ValueError, LookupError, OSError, BotoCoreError) as error:
        return Check(name, False, str(error))


def _storage(run: Run) -> str:
    """A probe is written into the run directory, and removed; of a local one the nearest directory is asked."""
    directory = run.path(run.run_dir)
    if "://" not in directory:
        nearest = directory
        while not os.path.isdir(nearest):
            nearest = os.path.dirname(nearest) or "/"
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(f"{nearest} cannot be written to: correct root or run_dir")
        return f"{nearest} can be written to"
    probe = f"{directory}/jest-plan-{uuid.uuid4().hex}"
    storage.write_bytes(probe, b"1")
    storage.remove(probe)
    return f"{directory} can be written to"


def _shards(run: Run) -> str:
    """The first row group of each source has all that the run reads of it, and the rules keep something of it."""
    summaries = []
    for source in run.data.sources:
        paths = shard_paths.expand([source], run.path(""))
        if shard_paths.is_tar(paths[0]):
            summaries.append(f"{len(paths):,} tars")  # their columns are found when the catalogue indexes them
            continue
        shard = open_shard(paths[0], run.data.columns, None)
        uids = shard.uids(0)
        shard.captions(0)
        if shard.actual("image") is None:
            shard.read(0, "image")  # raises with the missing column
        kept = sum(_keeps(run, shard, uids))
        if not kept:
            raise _NotYet(f"the rules keep none of the first {len(uids)} rows of {paths[0]}, perhaps of none")
        summaries.append(f"{len(paths):,} Parquet files; the rules keep {kept} of the first {len(uids)} rows")
    return "; ".join(summaries)


def _keeps(run: Run, shard: Shard, uids: list[str]) -> list[bool]:
    """Which rows of the first row group the rules keep that look at a row alone."""
    kept = [True] * len(uids)
    for rule in run.data.rules:
        if isinstance(rule, DenyRule | SubsetRule):
            if not storage.exists(run.path(rule.file)):
                raise FileNotFoundError(f"data.rules: {rule.rule} names {rule.file}, which is not there")
            if isinstance(rule, DenyRule) and rule.by != "uid":
                shard.strings(0, rule.by)
        elif isinstance(rule, DuplicateRule):
            for name in set(rule.by) - {"uid"}:
                shard.read(0, name)
        elif not (isinstance(rule, ScoreRule) and rule.scores):
            times = rules.apply(rule, shard, 0, uids, {}, None)
            kept = [k and bool(t) for k, t in zip(kept, times, strict=True)]
    return kept


def _catalogue(run: Run) -> str:
    try:
        found = open_catalogue(run.path(run.data.catalogue))
    except FileNotFoundError as error:
        raise _NotYet(str(error)) from None
    return f"{found.order(run).n_rows:,} slots an epoch"


def _checkpoint(path: str, remedy: str) -> str:
    if path.endswith(".pt"):
        if not storage.exists(path):
            raise _NotYet(f"{path} is not there: {remedy}")
        return path
    found = checkpoints.steps(path)
    if not found:
        raise _NotYet(f"{path} has no checkpoint: {remedy}")
    return checkpoints.path_of(path, found[-1])


def _scores(run: Run) -> str:
    assert run.reference is not None
    try:
        open_source(run)
    except FileNotFoundError as error:
        raise _NotYet(str(error)) from None
    return f"{run.reference.scores} belongs to the catalogue"


def _replay(run: Run) -> str:
    from ..training import replay

    replay.refuse(run)
    return f"{run.data.replay} has the steps of this run"


def _run_directory(run: Run) -> str:
    directory = run.path(run.run_dir)
    if not manifests.exists(directory):
        return "new"
    run_directory.refuse_other(run)
    return f"goes on after step {(checkpoints.steps(directory) or [0])[-1]:,}"


def _evaluation_set(run: Run, spec: run_file.EvaluationSet) -> str:
    if next(sets.examples(run, spec), None) is None:
        raise ValueError(f"evaluation.sets: {spec.name} has no pictures: correct its shards or split")
    return "there"


def _cluster(run: Run, pairs: Pairs | None) -> str:
    """The resources of the cluster of RAY_ADDRESS, or of this machine where Ray is started on it."""
    training, need = run.training, sizes.window_bytes(run, pairs)
    if cluster.is_local():
        if training.gpus_per_learner:
            raise _NotYet("no RAY_ADDRESS is set: the learners' GPUs are not looked for")
        have = cluster.local_object_store_bytes()
        if need > have:
            raise _NotYet(
                f"the windows may take {need / 1e9:.2f} GB of Ray's object store, which has {have / 1e9:.2f} GB here: "
                "what does not fit is spilled to disk; data.window_rows or data.n_streams could be smaller"
            )
        return f"the windows take {need / 1e9:.2f} of the {have / 1e9:.2f} GB of Ray's object store"
    import ray

    cluster.connect()
    have_all = ray.cluster_resources()
    wanted = {
        "GPU": training.max_learners * training.gpus_per_learner,
        "CPU": training.max_learners + 1,  # one to read with, at least
    }
    short = [
        f"{name} {wanted[name]:,.0f}, and has {have_all.get(name, 0):,.0f}"
        for name in wanted
        if wanted[name] > have_all.get(name, 0)
    ]
    if short:
        raise ValueError(f"the run wants of the cluster {'; '.join(short)}")
    if need > have_all.get("object_store_memory", 0):
        raise _NotYet(
            f"the windows may take {need / 1e9:.2f} GB, more than the object stores have: the rest is spilled"
        )
    return "the cluster has the GPUs, CPUs and object-store memory that the learners ask for"
