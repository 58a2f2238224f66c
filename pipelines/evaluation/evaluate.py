"""The evaluate stage: checkpoints of a run -> zero-shot, few-shot and retrieval scores; and evaluation in its loop."""

import hashlib
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, TypedDict

import torch
from torch import Tensor

from jest_core.models import towers
from jest_core.models.towers import Towers
from jest_core.run_file import EvaluationSet, Run

from ..base import checkpoints, cluster, manifests, node_checks, owner, progress, storage
from ..base.stage_table import STAGES
from . import results, sets
from .results import Line
from .tasks import SetEvaluation

_PATIENCE = 10.0  # seconds between two looks for a new checkpoint


class _Decoder(TypedDict, total=False):
    decoder: str


@owner.until_return
def run_stage(run: Run, *, watch: bool = False) -> list[Line]:
    """Evaluate the checkpoints that have no results of the run file's tasks yet; returns all results of the run.

    On a cluster each checkpoint is a task. watch: go on, as checkpoints appear, until the run has finished.
    """
    STAGES["evaluate"].refuse(run)
    directory = run.path(run.run_dir)
    while watch and not manifests.is_finished(directory):
        _evaluate_all(run, directory)
        time.sleep(_PATIENCE)
    if not checkpoints.steps(directory):
        raise FileNotFoundError(f"no checkpoint in {directory}/checkpoints: run `jest train` first")
    _evaluate_all(run, directory)
    lines = results.read(directory)
    last = [line for line in lines if line["step"] == lines[-1]["step"]]
    shown = "; ".join(f"{line['key']} {100 * line['metrics']['main_metric']:.1f} %" for line in last)
    progress.say("evaluate", f"{run.run_dir} after {last[-1]['step']} steps: {shown}")
    return lines


def is_due(run: Run, step: int) -> bool:
    """Whether the training loop evaluates after this update."""
    every = run.evaluation.every_steps if run.evaluation else 0
    return bool(every) and (step % every == 0 or step == run.n_steps)


@storage.retried
def is_missing(run: Run, step: int) -> bool:
    """Whether a checkpoint lacks results by the present definition of the sets."""
    return step in _todo(run, run.path(run.run_dir))


def evaluate_step(run: Run, pair: Towers, step: int) -> dict[str, float]:
    """Evaluate a model within a training loop, and write the results; returns them by open_clip's names."""
    path = checkpoints.path_of(run.path(run.run_dir), step)
    lines = _evaluate(run, pair, step, digest(path) if storage.exists(path) else "")
    results.replace(run, lines)
    return results.open_clip_names(lines)


def _todo(run: Run, directory: str) -> list[int]:
    """Steps of checkpoints for which a task has no result of their weights by its present definition."""
    wanted = {(f"{spec.name}/{task}", protocol(run, spec)) for spec in _sets(run) for task in spec.tasks}
    lines: dict[int, list[Line]] = {}
    for line in results.read(directory):
        lines.setdefault(line["step"], []).append(line)

    def is_done(step: int) -> bool:
        there = lines.get(step, [])
        if not wanted <= {(line["key"], line.get("protocol", "")) for line in there}:
            return False
        weights = {line["checkpoint"] for line in there if "checkpoint" in line}
        try:
            return not weights or weights == {digest(checkpoints.path_of(directory, step))}
        except FileNotFoundError:  # the run has removed it since it was listed
            return True

    return [step for step in checkpoints.steps(directory) if not is_done(step)]


def digest(path: str) -> str:
    """A hash of what a checkpoint file holds."""
    return _digest(path, storage.version(path))


@lru_cache(maxsize=10_000)
def _digest(path: str, version: str) -> str:
    """Of the checksums that the file lists at its end, so that gigabytes need not be read to see that nothing changed;
    of all its bytes where it is not the zip file that PyTorch writes. version: that of the file."""
    fs, inner = storage.filesystem(path)
    try:
        with fs.open(inner, "rb", cache_type="none") as file, zipfile.ZipFile(file) as checkpoint:
            return storage.fingerprint([(m.filename, m.CRC, m.file_size) for m in checkpoint.infolist()])[:16]
    except zipfile.BadZipFile:
        return hashlib.sha256(storage.read_bytes(path)).hexdigest()[:16]


def protocol(run: Run, spec: EvaluationSet) -> str:
    """A hash of all that decides a set's scores but the model: its definition, its classes, and the decoder."""
    assert run.evaluation is not None
    tasks = {*spec.tasks, spec.few_shot.classes if spec.few_shot else None}
    used = {name: task for name, task in sets.class_tasks(run).items() if name in tasks}
    decides = [spec.model_dump(), used, run.evaluation.canonical_prompts, *_other_decoder(run).values()]
    return storage.fingerprint(decides)[:16]


def _other_decoder(run: Run) -> _Decoder:
    """The decoder of pictures, where it is not the one of versions that had no other."""
    return {} if run.data.decoder == "pillow" else {"decoder": run.data.decoder}


def _sets(run: Run) -> list[EvaluationSet]:
    assert run.evaluation is not None
    return run.evaluation.sets


def _evaluate_all(run: Run, directory: str) -> None:
    if not _todo(run, directory):
        return
    here = owner.claim(f"{directory}/owner/evaluate")  # not of the run directory, whose owner may be training
    todo = _todo(run, directory)  # another owner may have done some meanwhile
    with progress.bar("evaluate", len(todo), "checkpoints") as advance:
        for lines in _on_cluster(run, todo) if not cluster.is_local() else map(partial(_of_checkpoint, run), todo):
            if lines:
                storage.retried(here.check)()
                results.replace(run, lines)
            advance(1)


def _on_cluster(run: Run, steps: list[int]) -> Iterator[list[Line]]:
    """A Ray task for each checkpoint; yields results as they are ready."""
    import ray

    assert run.evaluation is not None
    cluster.connect()
    node_checks.refuse_unfit(gpus=bool(run.evaluation.gpus), compiled=False)
    task: Any = ray.remote(num_cpus=1, num_gpus=run.evaluation.gpus)(_of_checkpoint)
    left = [task.remote(run, step) for step in steps]
    while left:
        done, left = ray.wait(left)
        yield ray.get(done[0])


def _of_checkpoint(run: Run, step: int) -> list[Line]:
    """Results of one checkpoint; an empty list where its run has removed it since it was listed."""
    pair = towers.build(run.model, seed=0, decoder=run.data.decoder)
    if torch.cuda.is_available():
        pair.model.cuda()
    directory = run.path(run.run_dir)
    path = checkpoints.path_of(directory, step)
    try:
        version, weights = storage.version(path), digest(path)
        towers.load_weights(pair, checkpoints.read(path))
    except FileNotFoundError:
        if step in checkpoints.steps(directory):
            raise
        progress.warn("evaluate", f"{run.run_dir}: skips the checkpoint after {step} steps, which the run has removed")
        return []
    lines = _evaluate(run, pair, step, weights)
    if _is_of_the_run(directory, step, version):
        return lines
    progress.warn("evaluate", f"{run.run_dir}: the run has gone back before step {step}, whose results are left out")
    return []


def _is_of_the_run(directory: str, step: int, version: str) -> bool:
    """Whether the run has not gone back before a checkpoint since it was read in this version. A file that is gone was
    one of its older ones, where later ones are there."""
    newest = (checkpoints.steps(directory) or [0])[-1]
    try:
        return storage.version(checkpoints.path_of(directory, step)) == version
    except FileNotFoundError:
        return step < newest


def _evaluate(run: Run, pair: Towers, step: int, weights: str) -> list[Line]:
    """The model's results for every task of every set. weights: digest of its checkpoint, empty where it has none."""
    class_tasks = sets.class_tasks(run)
    embedded: dict[str, Tensor] = {}  # tasks of the classes file serve several sets
    with ThreadPoolExecutor(cluster.n_cores()) as decoders:
        return [
            Line(
                key=f"{spec.name}/{task}",
                dataset=spec.name,
                metrics=metrics,
                step=step,
                samples_seen=step * run.super_batch_size,
                samples_trained=step * run.sub_batch_size,
                protocol=protocol(run, spec),
                checkpoint=weights,
                **_other_decoder(run),
            )
            for spec in _sets(run)
            for task, metrics in SetEvaluation(run, spec, pair, class_tasks, embedded, decoders).run_tasks()
        ]
