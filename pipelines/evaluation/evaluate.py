"""The evaluate stage: checkpoints of a run -> zero-shot, few-shot and retrieval scores.

eval_results.jsonl has a line a task and checkpoint, DataComp's {key, dataset, metrics} with the step and the examples
behind it; evaluation/ has the same as CLIP_benchmark writes it, and checkpoints/results.jsonl as open_clip does.
"""

import itertools
import json
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jest_core.evaluation import (
    ClassNames,
    FewShot,
    FewShotClassifier,
    ZeroShot,
    class_embeddings,
    draw_shots,
    image_embeddings,
    represent,
    retrieval,
    text_embeddings,
)
from jest_core.examples.view import View
from jest_core.models import towers
from jest_core.models.towers import Towers
from jest_core.run_file import EvaluationSet, Pictures, Run
from jest_core.tables import SlotStatus
from pipelines.base import checkpoints, cluster, progress, storage
from pipelines.data import needs
from pipelines.evaluation import sets
from pipelines.evaluation.sets import Example

RESULTS = "eval_results.jsonl"
Line = dict[str, Any]  # of eval_results.jsonl
_PATIENCE = 10.0  # seconds between two looks for a new checkpoint


def run_stage(run: Run, *, watch: bool = False) -> list[Line]:
    """Evaluate the checkpoints that have no results of the run file's tasks yet; returns all results of the run.

    On a cluster each checkpoint is a task. watch: go on, as checkpoints appear, until the run has finished.
    """
    needs.evaluate(run)
    directory = run.path(run.run_dir)
    while watch and not storage.is_finished(directory):
        _evaluate_all(run, directory)
        time.sleep(_PATIENCE)
    if not checkpoints.steps(directory):
        raise FileNotFoundError(f"no checkpoint in {directory}/checkpoints: run `jest train` first")
    _evaluate_all(run, directory)
    results = read_results(directory)
    last = [line for line in results if line["step"] == results[-1]["step"]]
    shown = "; ".join(f"{line['key']} {100 * line['metrics']['main_metric']:.1f} %" for line in last)
    progress.say("evaluate", f"{run.run_dir} after {last[-1]['step']} steps: {shown}")
    return results


def read_results(directory: str) -> list[Line]:
    """The lines of eval_results.jsonl; none where nothing was evaluated."""
    return _read_lines(f"{directory}/{RESULTS}")


def is_due(run: Run, step: int) -> bool:
    """Whether the training loop evaluates after this update."""
    every = run.evaluation.every_steps if run.evaluation else 0
    return bool(every) and (step % every == 0 or step == run.n_steps)


@storage.retried
def is_missing(run: Run, step: int) -> bool:
    """Whether a checkpoint lacks results by the present definition of the sets."""
    return step in _todo(run, run.path(run.run_dir))


def evaluate_step(run: Run, pair: Towers, step: int) -> dict[str, float]:
    """Evaluate a model as it is now, within a training loop, and keep the results; returns open_clip's names."""
    lines = [_line(run, step, *found) for found in _evaluate(run, pair)]
    _keep(run, lines)
    return open_clip_names(lines)


def open_clip_names(lines: Iterable[Line]) -> dict[str, float]:
    """val/imagenet-zeroshot-val-top1, val/coco-image_to_text_R@1 and so on."""
    out: dict[str, float] = {}
    for line in lines:
        task, name, metrics = line["key"].rsplit("/", 1)[-1], line["dataset"], line["metrics"]
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


def _todo(run: Run, directory: str) -> list[int]:
    """Steps of checkpoints for which a task has no result by its present definition."""
    wanted = {(f"{spec.name}/{task}", protocol(run, spec)) for spec in _sets(run) for task in spec.tasks}
    found: dict[int, set[tuple[str, str]]] = {}
    for line in read_results(directory):
        found.setdefault(line["step"], set()).add((line["key"], line.get("protocol", "")))
    return [step for step in checkpoints.steps(directory) if not wanted <= found.get(step, set())]


def protocol(run: Run, spec: EvaluationSet) -> str:
    """What decides a set's scores, beside the model: a hash of its definition."""
    assert run.evaluation is not None
    named = _class_tasks(run)
    asked = {*spec.tasks, spec.few_shot.classes if spec.few_shot else None}
    used = {task: told for task, told in named.items() if task in asked}
    return storage.fingerprint([spec.model_dump(), used, run.evaluation.canonical_prompts])[:16]


def _sets(run: Run) -> list[EvaluationSet]:
    assert run.evaluation is not None
    return run.evaluation.sets


def _class_tasks(run: Run) -> dict[str, Any]:
    """The tasks of the classes file."""
    path = run.evaluation.classes if run.evaluation else None
    return dict(storage.read_json(run.path(path))) if path else {}


def _evaluate_all(run: Run, directory: str) -> None:
    todo = _todo(run, directory)
    if not todo:
        return
    with progress.bar("evaluate", len(todo), "checkpoints") as advance:
        for lines in _on_cluster(run, todo) if not cluster.is_local() else map(partial(_of_checkpoint, run), todo):
            if lines:
                _keep(run, lines)
            advance(1)


def _on_cluster(run: Run, steps: list[int]) -> Iterator[list[Line]]:
    """A task for each checkpoint; its results come as they are ready."""
    import ray

    assert run.evaluation is not None
    cluster.connect()
    task: Any = ray.remote(num_cpus=1, num_gpus=run.evaluation.gpus)(_of_checkpoint)
    left = [task.remote(run, step) for step in steps]
    while left:
        done, left = ray.wait(left)
        yield ray.get(done[0])


def _of_checkpoint(run: Run, step: int) -> list[Line]:
    """Results of one checkpoint; none where its run has removed it since it was listed."""
    pair = towers.build(run.model, seed=0)
    if torch.cuda.is_available():
        pair.model.cuda()
    directory = run.path(run.run_dir)
    try:
        towers.load_weights(pair, checkpoints.read(checkpoints.path_of(directory, step)))
    except FileNotFoundError:
        if step in checkpoints.steps(directory):
            raise
        progress.say("evaluate", f"{run.run_dir}: the checkpoint after {step} steps was not kept, and has no results")
        return []
    return [_line(run, step, *found) for found in _evaluate(run, pair)]


def _line(run: Run, step: int, spec: EvaluationSet, task: str, metrics: dict[str, float]) -> Line:
    return {
        "key": f"{spec.name}/{task}",
        "dataset": spec.name,
        "metrics": metrics,
        "step": step,
        "samples_seen": step * run.super_batch_size,
        "samples_trained": step * run.sub_batch_size,
        "protocol": protocol(run, spec),
    }


@storage.retried
def _keep(run: Run, lines: list[Line]) -> None:
    """Put the results of one step in place of those that it had, in each of the formats."""
    directory, step = run.path(run.run_dir), lines[0]["step"]
    _put_lines(f"{directory}/{RESULTS}", ("step", "key"), lines)
    told = {**open_clip_names(lines), "epoch": step, "num_samples": lines[0]["samples_trained"]}
    _put_lines(f"{directory}/checkpoints/results.jsonl", ("epoch",), [told])
    for line in lines:
        task = {"retrieval": "zeroshot_retrieval", "few_shot": "few_shot"}.get(
            line["key"].rsplit("/", 1)[-1], "zeroshot_classification"
        )
        # CLIP_benchmark's names: benchmark_{dataset}_{pretrained}_{model}_{language}_{task}.json
        told = {
            "dataset": line["key"].removesuffix("/retrieval").removesuffix("/few_shot").removesuffix("/zero_shot"),
            "model": run.model.name.replace("/", "-"),
            "pretrained": f"step_{step:08d}",
            "task": task,
            "metrics": {k: v for k, v in line["metrics"].items() if k != "main_metric"},
            "language": "en",
        }
        name = "_".join(["benchmark", told["dataset"].replace("/", "-"), told["pretrained"], told["model"], "en", task])
        storage.write_json(f"{directory}/evaluation/{name}.json", told)


def _put_lines(path: str, keys: tuple[str, ...], lines: list[Line]) -> None:
    """Put JSON lines in place of those of a file with the same values of the keys; the first key orders the file."""
    new = [[line[key] for key in keys] for line in lines]
    kept = [line for line in _read_lines(path) if [line[key] for key in keys] not in new]
    ordered = sorted(kept + lines, key=lambda line: line[keys[0]])
    storage.write_bytes(path, "".join(json.dumps(line) + "\n" for line in ordered).encode())


def _read_lines(path: str) -> list[Line]:
    return [json.loads(line) for line in storage.read_bytes(path).decode().splitlines()] if storage.exists(path) else []


def _evaluate(run: Run, pair: Towers) -> Iterator[tuple[EvaluationSet, str, dict[str, float]]]:
    """(set, task, metrics) of every task; main_metric is acc1, or the mean of R@1 both ways."""
    assert run.evaluation is not None
    named = _class_tasks(run)
    embedded: dict[str, Tensor] = {}  # tasks of the classes file serve several sets
    with ThreadPoolExecutor(cluster.n_cores()) as pool:
        for spec in run.evaluation.sets:
            yield from _Evaluation(run, spec, pair, named, embedded, pool).run_tasks()


class _Evaluation:
    """One set, streamed once for all its tasks."""

    def __init__(
        self,
        run: Run,
        spec: EvaluationSet,
        pair: Towers,
        named: dict[str, Any],
        embedded: dict[str, Tensor],
        pool: ThreadPoolExecutor,
    ) -> None:
        assert run.evaluation is not None
        self.run, self.spec, self.pair, self.named, self.embedded, self.pool = run, spec, pair, named, embedded, pool
        self.n_seen, self.n_bad = 0, 0  # pictures, and those of them that do not decode
        self.batch_size, self.canonical = run.evaluation.batch_size, run.evaluation.canonical_prompts
        own = pair.view
        match spec.view:
            case "model":
                self.view = own
            case "crop":
                self.view = View(own.image_size, interpolation=own.interpolation, margin=0.875)
            case "squash":
                self.view = View(own.image_size, interpolation=own.interpolation, resize_mode="squash")

    def run_tasks(self) -> Iterator[tuple[EvaluationSet, str, dict[str, float]]]:
        zero_shots = {task: self._zero_shot(task) for task in self.spec.tasks if task not in ("retrieval", "few_shot")}
        few_shot = self._few_shot() if "few_shot" in self.spec.tasks else None
        pairs = _Pairs() if "retrieval" in self.spec.tasks else None
        columns = {found[0] for found in [*zero_shots.values(), *([few_shot] if few_shot else [])] if found[0]}
        for _, batch, pixels in self._batches(self.spec, columns):
            if zero_shots or pairs is not None:
                image = image_embeddings(self.pair, pixels)
                for column, numbers, scores in zero_shots.values():
                    rows, labels = _labels(batch, column, numbers)
                    scores.add(image[rows], labels)
                if pairs is not None:
                    pairs.add(self.pair, image, batch, by_caption=self.spec.format == "shards")
            if few_shot is not None:
                column, numbers, shots = few_shot
                rows, labels = _labels(batch, column, numbers)
                if len(rows):
                    shots.add(represent(self.pair, pixels[rows]), labels)
        share = self.run.data.max_bad_share
        if self.n_bad > share * self.n_seen:
            raise ValueError(
                f"evaluation set {self.spec.name!r}: {self.n_bad} of {self.n_seen} pictures do not decode, more than "
                f"data.max_bad_share {share}"
            )
        for task in self.spec.tasks:
            try:
                yield self.spec, task, self._result(task, zero_shots, few_shot, pairs)
            except ValueError as error:
                raise ValueError(
                    f"evaluation set {self.spec.name!r}, task {task!r}: {error}; take the task off"
                ) from error

    @staticmethod
    def _result(task: str, zero_shots: dict[str, Any], few_shot: Any, pairs: "_Pairs | None") -> dict[str, float]:
        if task == "retrieval":
            assert pairs is not None
            metrics = pairs.result()
            main = (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"]) / 2
            return {**metrics, "mean_recall@1": main, "main_metric": main}
        metrics = (few_shot if task == "few_shot" else zero_shots[task])[2].result()
        return {**metrics, "main_metric": metrics["acc1"]}

    def _batches(
        self, source: Pictures, columns: Iterable[str], only: Container[int] | None = None
    ) -> Iterator[tuple[list[int], list[Example], Tensor]]:
        """Examples whose pictures decode, with their positions and pixels; a batch is read while the one before it is
        embedded. only: positions of those that are wanted."""
        stream = enumerate(sets.examples(self.run, source, columns))
        wanted = (found for found in stream if only is None or found[0] in only)

        def read() -> tuple[list[int], list[Example], Tensor] | None:
            held = list(itertools.islice(wanted, self.batch_size))
            if not held:
                return None
            pixels, status = self.view.batch(list(self.pool.map(lambda found: found[1].read(), held)), self.pool)
            good = [i for i in range(len(held)) if status[i] == SlotStatus.OK]
            self.n_seen, self.n_bad = self.n_seen + len(held), self.n_bad + len(held) - len(good)
            return [held[i][0] for i in good], [held[i][1] for i in good], torch.from_numpy(pixels[good])

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read)
            while (found := coming.result()) is not None:
                coming = reader.submit(read)
                if found[0]:
                    yield found

    def _classes(self, task: str) -> tuple[str | None, ClassNames]:
        """The column that a task's labels are in (None: the set's own labels), and its classes."""
        if task == "zero_shot":
            return None, sets.classes(self.run, self.spec, canonical=self.canonical)
        if task not in self.named:
            known = ", ".join(self.named) or "no tasks"
            raise ValueError(
                f"evaluation task {task!r} is none of retrieval, few_shot, zero_shot, and not in evaluation.classes "
                f"{self.run.evaluation.classes if self.run.evaluation else None}, which has {known}"
            )
        told = self.named[task]
        ids, names = [c["id"] for c in told["classes"]], [c["names"] for c in told["classes"]]
        return told["label"], ClassNames(ids, names, told["templates"], self.canonical)

    def _zero_shot(self, task: str) -> tuple[str | None, dict[str, int], ZeroShot]:
        column, classes = self._classes(task)
        key = f"{self.spec.name}/{task}" if task == "zero_shot" else task
        if key not in self.embedded:
            self.embedded[key] = class_embeddings(self.pair, classes, self.batch_size)
        return column, {name: i for i, name in enumerate(classes.ids)}, ZeroShot(self.embedded[key])

    def _few_shot(self) -> tuple[str | None, dict[str, int], FewShot]:
        """Classifiers fitted to the pool's shots: labels are read first, and only the drawn pictures are embedded."""
        spec = self.spec.few_shot
        if spec is None:
            raise ValueError(f"evaluation set {self.spec.name!r} has task few_shot and no few_shot.pool to learn from")
        column, classes = self._classes(spec.classes or "zero_shot")
        numbers = {name: i for i, name in enumerate(classes.ids)}
        columns = [column] if column else []
        pool = sets.examples(self.run, spec.pool, columns)
        labels = [numbers.get(_label(example, column) or "", -1) for example in pool]
        drawn = [draw_shots(labels, len(numbers), spec.n_shots, seed) for seed in range(spec.n_seeds)]
        features: dict[int, Tensor] = {}
        for positions, _, pixels in self._batches(spec.pool, columns, set(itertools.chain(*drawn))):
            features |= zip(positions, represent(self.pair, pixels).cpu(), strict=True)
        classifiers = []
        for positions in drawn:
            good = [i for i in positions if i in features]
            if not good:
                raise ValueError(f"evaluation set {self.spec.name!r}: few_shot.pool has no picture of any class")
            shown = torch.stack([features[i] for i in good])
            classifiers.append(
                FewShotClassifier.fit(shown, torch.tensor([labels[i] for i in good]), len(numbers), spec.l2)
            )
        return column, numbers, FewShot(classifiers)


class _Pairs:
    """Embeddings of pictures and of all their captions, for retrieval; float16 on the host."""

    def __init__(self) -> None:
        self.image: list[Tensor] = []
        self.text: list[Tensor] = []
        self.image_group: list[int] = []
        self.text_group: list[int] = []
        self.groups: dict[Any, int] = {}

    def add(self, pair: Towers, image: Tensor, batch: Sequence[Example], *, by_caption: bool) -> None:
        """by_caption: pictures with the same caption belong together; else each picture is a group of its own."""
        rows = [i for i, example in enumerate(batch) if example.captions]
        captions: list[str] = []
        for i in rows:
            key = batch[i].captions[0] if by_caption else len(self.image_group)
            group = self.groups.setdefault(key, len(self.groups))
            self.image_group.append(group)
            captions += batch[i].captions
            self.text_group += [group] * len(batch[i].captions)
        self.image.append(image[rows].half().cpu())
        for start in range(0, len(captions), len(batch)):
            self.text.append(text_embeddings(pair, captions[start : start + len(batch)]).half().cpu())

    def result(self) -> dict[str, float]:
        if not self.text_group:
            raise ValueError("no picture with a caption")
        image, text = torch.cat(self.image).float(), torch.cat(self.text).float()
        return retrieval(image, torch.tensor(self.image_group), text, torch.tensor(self.text_group))


def _label(example: Example, column: str | None) -> str | None:
    return example.label if column is None else example.columns.get(column)


def _labels(batch: Sequence[Example], column: str | None, numbers: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Rows of a batch that have one of the classes, and the number of each one's."""
    found = [numbers.get(_label(example, column) or "", -1) for example in batch]
    rows = [i for i, number in enumerate(found) if number >= 0]
    return torch.tensor(rows, dtype=torch.int64), torch.tensor([found[i] for i in rows], dtype=torch.int64)
