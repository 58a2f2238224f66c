"""The evaluate stage: every checkpoint of a run -> zero-shot and retrieval scores, one JSON line a task."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jest_core import config as run_files
from jest_core import towers
from jest_core.config import EvaluationSet, Run
from jest_core.evaluation import ClassNames, class_embeddings, retrieval, zero_shot
from jest_core.towers import Towers
from pipelines import checkpoints, progress, storage
from pipelines.shards import open_shard

RESULTS = "eval_results.jsonl"


def run_stage(run: Run) -> list[dict[str, Any]]:
    """Evaluate the checkpoints that have no results yet; returns all results of the run.

    A line of eval_results.jsonl is DataComp's {key, dataset, metrics} with the step and the examples behind it.
    """
    if run.evaluation is None:
        raise ValueError("the run file has no `evaluation` part: nothing to evaluate on")
    directory = run.path(run.run_dir)
    steps = checkpoints.steps(directory)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {directory}/checkpoints: run `jest train` first")
    results = read_results(directory)
    todo = [step for step in steps if step not in {line["step"] for line in results}]
    if todo:
        pair = towers.build(run.model, seed=0)
        if torch.cuda.is_available():
            pair.model.cuda()
        tasks = json.loads(storage.read_bytes(run.path(run.evaluation.classes))) if run.evaluation.classes else {}
        with progress.bar("evaluate", len(todo), "checkpoints") as advance:
            for step in todo:
                towers.load_weights(pair, checkpoints.read(checkpoints.path_of(directory, step)))
                for key, dataset, metrics in _evaluate(run, pair, tasks):
                    results.append(
                        {
                            "key": key,
                            "dataset": dataset,
                            "metrics": metrics,
                            "step": step,
                            "samples_seen": step * run.super_batch_size,
                            "samples_trained": step * run.sub_batch_size,
                        }
                    )
                storage.write_bytes(
                    f"{directory}/{RESULTS}", "".join(json.dumps(line) + "\n" for line in results).encode()
                )
                advance(1)
    last = [line for line in results if line["step"] == steps[-1]]
    shown = "; ".join(f"{line['key']} {100 * line['metrics']['main_metric']:.1f} %" for line in last)
    progress.say("evaluate", f"{run.run_dir} after {steps[-1]} steps: {shown}")
    return results


def read_results(directory: str) -> list[dict[str, Any]]:
    """The lines of eval_results.jsonl; none where nothing was evaluated."""
    path = f"{directory}/{RESULTS}"
    return [json.loads(line) for line in storage.read_bytes(path).decode().splitlines()] if storage.exists(path) else []


def _evaluate(run: Run, pair: Towers, tasks: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(key, dataset, metrics) of each task of each set; main_metric is what DataComp would take."""
    assert run.evaluation is not None
    class_cache: dict[str, Tensor] = {}
    for spec in run.evaluation.sets:
        held = _load(run, spec, pair)
        embeddings = pair.embed(held.pixels, held.tokens, batch_size=run.evaluation.batch_size)
        image, text = embeddings.image.cpu(), embeddings.text.cpu()
        for task in spec.tasks:
            if task == "retrieval":
                same_caption = torch.tensor(np.array(held.captions)[:, None] == np.array(held.captions)[None, :])
                metrics = retrieval(image, text, same_caption)
                metrics["main_metric"] = (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"]) / 2
            else:
                if task not in tasks:
                    raise ValueError(
                        f"evaluation task {task!r} is neither `retrieval` nor in {run.evaluation.classes}, which "
                        f"has {', '.join(tasks)}"
                    )
                if task not in class_cache:
                    class_cache[task] = class_embeddings(pair, _class_names(tasks[task]))
                number = {c["id"]: i for i, c in enumerate(tasks[task]["classes"])}
                labels = [number.get(value) for value in held.columns[tasks[task]["label"]]]
                rows = torch.tensor([i for i, label in enumerate(labels) if label is not None])
                truth = torch.tensor([label for label in labels if label is not None])
                if not len(rows):
                    raise ValueError(
                        f"evaluation set {spec.name!r} has no row of a class of {task!r}; take the task off"
                    )
                metrics = zero_shot(image[rows], class_cache[task], truth)
                metrics["main_metric"] = metrics["acc1"]
            yield f"{spec.name}/{task}", spec.name, metrics


def _class_names(task: dict[str, Any]) -> ClassNames:
    return ClassNames([c["id"] for c in task["classes"]], [c["names"] for c in task["classes"]], task["templates"])


@dataclass(frozen=True)
class _Held:
    pixels: Tensor
    tokens: Tensor
    captions: list[str]
    columns: dict[str, list[str]]


_held: dict[tuple[str, ...], _Held] = {}  # evaluation sets are small and serve many checkpoints


def _load(run: Run, spec: EvaluationSet, pair: Towers) -> _Held:
    paths = storage.expand(run_files.sources(spec.shards), run.path(""))
    key = (pair.inputs.fingerprint, *paths)
    if key not in _held:
        images: list[bytes | None] = []
        captions: list[str] = []
        columns: dict[str, list[str]] = {"concept": [], "group": [], "subgroup": []}
        for path in paths:
            shard = open_shard(path)
            for i, size in enumerate(shard.row_group_sizes):
                images += shard.images(i).to_pylist()
                captions += shard.captions(i)
                for name in columns:
                    columns[name] += shard.strings(i, name) if shard.actual(name) else [""] * size
        pixels, status = pair.view.batch(images)
        rows = np.flatnonzero(status == 0)
        captions = [captions[i] for i in rows]
        columns = {name: [values[i] for i in rows] for name, values in columns.items()}
        _held[key] = _Held(torch.from_numpy(pixels[rows]), pair.tokens(captions), captions, columns)
    return _held[key]
