"""Results of a run's evaluations, on its storage: in jest's lines, and as open_clip and CLIP_benchmark write them.

eval_results.jsonl has a line for each task and checkpoint, DataComp's {key, dataset, metrics} with the step and the
examples so far; evaluation/ has the same as CLIP_benchmark writes it, checkpoints/results.jsonl as open_clip does.
"""

import json
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NotRequired, TypedDict

from jest_core.run_file import Run

from ..base import owner, progress, storage
from ..base.owner import Owner

FILE = "eval_results.jsonl"


class Line(TypedDict):
    """A task's results for one checkpoint: a line of eval_results.jsonl."""

    key: str  # dataset/task
    dataset: str  # name of the evaluation set
    metrics: dict[str, float]  # by name; accuracies and recalls in 0..1, ranks from 1; main_metric is one of them
    step: int  # finished updates
    samples_seen: int  # examples of the super-batches so far
    samples_trained: int  # examples of the sub-batches so far
    protocol: NotRequired[str]  # hash of the set's definition; versions before this key did not write it
    decoder: NotRequired[str]  # data.decoder, where it is not pillow
    checkpoint: NotRequired[str]  # hash of what the checkpoint holds, empty where none was written; as for protocol


def read(directory: str) -> list[Line]:
    """The lines of a run's eval_results.jsonl; none where nothing was evaluated."""
    return _read_lines(f"{directory}/{FILE}")


@storage.retried
def replace(run: Run, lines: list[Line]) -> None:
    """Write the results of one step, in place of those that it had, in each of the formats."""
    directory, step = run.path(run.run_dir), lines[0]["step"]
    of_open_clip = {**open_clip_names(lines), "epoch": step, "num_samples": lines[0]["samples_trained"]}
    with _only_writer(directory) as writer:
        _put_lines(f"{directory}/{FILE}", ("step", "key"), lines, writer)
        _put_lines(_open_clip_path(directory), ("epoch",), [of_open_clip], writer)
        for line in lines:
            name, content = _clip_benchmark(run, line)
            storage.write_json(f"{directory}/evaluation/{name}", content)


@storage.retried
def remove_after(directory: str, step: int) -> None:
    """Remove the results of later steps, which the run makes again: they are of weights that are no more."""
    files = ((f"{directory}/{FILE}", "step"), (_open_clip_path(directory), "epoch"))
    steps = {name: re.search(r"_step_(\d{8})_", name) for name in storage.names(f"{directory}/evaluation", ".json")}
    later = [name for name, found in steps.items() if found and int(found[1]) > step]
    if not later and all(line[key] <= step for path, key in files for line in _read_lines(path)):
        return
    with _only_writer(directory) as writer:
        for path, key in files:
            lines = _read_lines(path)
            if len(kept := [line for line in lines if line[key] <= step]) < len(lines):
                _write_lines(path, kept, writer)
        for name in later:
            storage.remove(f"{directory}/evaluation/{name}")


def _only_writer(directory: str) -> AbstractContextManager[Owner]:
    """Within the block no other process changes a run's results: `jest train` and `jest evaluate --watch` both do."""
    return owner.owned(f"{directory}/owner/results", wait=True)


def open_clip_names(lines: Iterable[Line]) -> dict[str, float]:
    """val/imagenet-zeroshot-val-top1, val/coco-image_to_text_R@1 and so on."""
    out: dict[str, float] = {}
    for line in lines:
        task, name, metrics = _task(line), line["dataset"], line["metrics"]
        if task == "retrieval":
            for side, direction in (("text", "image_to_text"), ("image", "text_to_image")):
                out |= {f"val/{name}-{direction}_R@{k}": metrics[f"{side}_retrieval_recall@{k}"] for k in (1, 5, 10)}
                for kind in ("mean_rank", "median_rank"):
                    out[f"val/{name}-{direction}_{kind}"] = metrics[f"{side}_retrieval_{kind}"]
        elif task == "few_shot":
            out[f"val/{name}-fewshot-val-top1"] = metrics["acc1"]
        else:
            data = name if task == "zero_shot" else f"{name}-{task}"
            out |= {f"val/{data}-zeroshot-val-top{k}": metrics[f"acc{k}"] for k in (1, 5)}
    return out


def _task(line: Line) -> str:
    return line["key"].rsplit("/", 1)[-1]


def _clip_benchmark(run: Run, line: Line) -> tuple[str, dict[str, Any]]:
    """CLIP_benchmark's file: its name, benchmark_{dataset}_{pretrained}_{model}_{language}_{task}.json, and content."""
    kinds = {"retrieval": "zeroshot_retrieval", "few_shot": "few_shot"}
    content = {
        "dataset": line["key"].removesuffix("/retrieval").removesuffix("/few_shot").removesuffix("/zero_shot"),
        "model": run.model.name.replace("/", "-"),
        "pretrained": f"step_{line['step']:08d}",
        "task": kinds.get(_task(line), "zeroshot_classification"),
        "metrics": {k: v for k, v in line["metrics"].items() if k != "main_metric"},
        "language": "en",
    }
    dataset = str(content["dataset"]).replace("/", "-")
    words = ["benchmark", dataset, content["pretrained"], content["model"], content["language"], content["task"]]
    return "_".join(map(str, words)) + ".json", content


def _open_clip_path(directory: str) -> str:
    return f"{directory}/checkpoints/results.jsonl"


def _put_lines(path: str, keys: tuple[str, ...], lines: list[Any], writer: Owner) -> None:
    """Put JSON lines in place of those of a file with the same values of the keys; the first key orders the file."""
    new = [[line[key] for key in keys] for line in lines]
    kept = [line for line in _read_lines(path) if [line[key] for key in keys] not in new]
    _write_lines(path, sorted(kept + lines, key=lambda line: line[keys[0]]), writer)


def _write_lines(path: str, lines: list[Any], writer: Owner) -> None:
    writer.check()
    storage.write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _read_lines(path: str) -> list[Any]:
    """The lines of a file that are whole: what the others said is missing, and so is evaluated again."""
    lines = storage.read_lines(path)
    whole = [line for line in lines if isinstance(line, dict)]
    if len(whole) < len(lines):
        progress.warn("evaluate", f"{path}: {len(lines) - len(whole)} of {len(lines)} lines are damaged, and left out")
    return whole
