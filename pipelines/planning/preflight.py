"""Checks of a run before it starts: storage, shards, what earlier stages have made, and the cluster."""

import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError, NoCredentialsError

from jest_core import run_file
from jest_core.models import folders
from jest_core.run_file import Run
from jest_core.run_file.rules import DenyRule, DuplicateRule, ScoreRule, SubsetRule

from ..base import checkpoints, cluster, manifests, shard_paths, storage
from ..data import rules, url_lists
from ..data.catalogue import open_catalogue
from ..data.layouts import open_shard
from ..data.shards import Shard
from ..evaluation import first_look
from ..stream.source import open_source
from ..training import run_directory
from . import large_row_groups, learners, sizes
from .machines import Machines
from .sizes import Pairs


@dataclass(frozen=True)
class Check:
    """ok is None where something is not there yet, or cannot be seen from here."""

    name: str
    ok: bool | None
    detail: str


class _NotYet(Exception):
    """What another stage has yet to make, or what this machine cannot look up."""


def run_checks(run: Run, pairs: Pairs | None, manifest: Machines | None = None) -> Iterator[Check]:
    """Each check of this run, in the order in which its stages need what is checked. manifest: the cluster as a file
    describes it, in the place of the one that is there now."""
    reached = _check("storage", lambda: _storage(run))
    yield reached
    if not reached.ok:
        return
    if run.ingest is not None:
        yield _check("metadata", lambda: _metadata(run))
    yield _check("shards", lambda: _shards(run))
    yield _check("catalogue", lambda: _catalogue(run))
    if run.uses_reference and run.reference is not None and run.reference.checkpoint is not None:
        yield _check("reference", lambda: _reference(run))
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
    yield _check("cluster", lambda: _manifest(run, manifest) if manifest else _cluster(run, pairs))


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


def _metadata(run: Run) -> str:
    """The lists of URLs are there, with the columns that `jest ingest` needs of them."""
    assert run.ingest is not None
    if manifests.is_finished(run.path(run.ingest.shards)):
        return "fetched"
    patterns = run_file.sources(run.ingest.urls)
    paths = [path for pattern in patterns for path in shard_paths.expand([pattern], run.path(""))]
    url_lists.refuse_columns(open_shard(paths[0], run.ingest.columns), run.ingest)
    return f"{len(paths):,} Parquet files of URLs and captions"


def _shards(run: Run) -> str:
    """The first row group of each source has all that the run reads of it, and the rules keep something of it."""
    summaries = []
    for source in run.data.sources:
        try:
            paths = shard_paths.expand([source], run.path(""))
        except FileNotFoundError as error:
            if remedy := _maker_of_shards(run, source):
                raise _NotYet(f"{error}; {remedy}") from None
            raise
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


def _maker_of_shards(run: Run, source: str) -> str:
    """Which stage has yet to make the shards of a source; "" where none would."""
    if run.ingest is not None and run.path(source).startswith(f"{run.path(run.ingest.shards)}/"):
        return "" if manifests.is_finished(run.path(run.ingest.shards)) else "`jest ingest` fetches them"
    if run.data.refines is not None and not manifests.is_finished(run.path(run.data.refines)):
        return f"they come with those of {run.data.refines}, which this run refines"
    return ""


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
    large = large_row_groups.advice(found, run.data.window_rows)
    return f"{found.order(run).n_rows:,} slots an epoch" + (f"; {large}" if large else "")


def _checkpoint(path: str, remedy: str) -> str:
    """A run directory, a file, or a folder as open_clip and Hugging Face have them."""
    try:
        found = checkpoints.file_of(path)
    except FileNotFoundError as error:
        raise _NotYet(f"{error} ({remedy})") from None
    if not storage.exists(found):
        raise _NotYet(f"{found} is not there: {remedy}")
    return found


def _reference(run: Run) -> str:
    """The reference's weights are there; those of a folder were trained on the pictures that it would see."""
    assert run.reference is not None
    assert run.reference.checkpoint is not None
    found = _checkpoint(run.path(run.reference.checkpoint), "train it, or correct reference.checkpoint")
    beside = found.rpartition("/")[0]
    if run.reference.model.name.removeprefix(folders.PREFIX) != beside and storage.exists(f"{beside}/{folders.FILE}"):
        from jest_core.models import configurations  # with PyTorch, which takes seconds

        inputs = configurations.inputs_of(run.reference.model, run.data.decoder)
        configurations.refuse_other_pixels(folders.read(f"{folders.PREFIX}{beside}"), inputs, found, "reference.model.")
    return found


def _scores(run: Run) -> str:
    assert run.reference is not None
    try:
        open_source(run)
    except FileNotFoundError as error:
        raise _NotYet(str(error)) from None
    return f"{run.reference.scores} belongs to the catalogue"


def _replay(run: Run) -> str:
    from ..training import replay

    try:
        replay.refuse(run)
    except FileNotFoundError as error:
        raise _NotYet(f"{error}: train the run of data.replay first") from None
    return f"{run.data.replay} has the steps of this run"


def _run_directory(run: Run) -> str:
    directory = run.path(run.run_dir)
    if not manifests.exists(directory):
        return "new"
    run_directory.refuse_other(run)
    return f"goes on after step {(checkpoints.steps(directory) or [0])[-1]:,}"


def _evaluation_set(run: Run, spec: run_file.EvaluationSet) -> str:
    first_look.look(run, spec)
    return "there"


def _manifest(run: Run, manifest: Machines) -> str:
    """The nodes of a manifest, all groups at their largest, have what the run asks for."""
    gpus = run.training.gpus_per_learner

    def refusal(n: int) -> str:
        if short := learners.short(run, n, manifest.most):
            return f"the run wants of the cluster of {manifest.source}, at its largest, {short}"
        if gpus and n > (places := manifest.places(**learners.place(run))):
            return (
                f"{n} learners of {gpus:g} GPUs do not fit on the nodes of {manifest.source}, which have room "
                f"for {places}: change training.gpus_per_learner, or the nodes"
            )
        return ""

    try:
        n = learners.most(run, refusal)
    except ValueError as error:
        if manifest.unknown:
            raise _NotYet(
                f"{error}, without the machines of {', '.join(manifest.unknown)}: the file does not say what they "
                "have, which Ray finds by their type; add `resources: {CPU: N, GPU: N}` to a copy of the file"
            ) from None
        raise
    now = "; it starts with fewer nodes, and grows" if learners.short(run, n, manifest.least) else ""
    return f"{manifest.source} has {learners.in_words(run, n)}{now}"


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
    try:
        n = learners.most(run, lambda n: learners.short(run, n, have_all))
    except ValueError as short:
        said = f"the run wants of the cluster {short}"
        if not cluster.grows():
            raise ValueError(f"{said}, and nothing adds nodes to it: add some, or lower training.n_learners") from None
        raise _NotYet(
            f"{said} now; its autoscaler may add nodes (`jest plan --cluster FILE` says how many it may)"
        ) from None
    if need > have_all.get("object_store_memory", 0):
        raise _NotYet(
            f"the windows may take {need / 1e9:.2f} GB, more than the object stores have: the rest is spilled"
        )
    return f"the cluster has {learners.in_words(run, n)}, and the object-store memory"
