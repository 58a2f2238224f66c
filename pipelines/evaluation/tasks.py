"""One evaluation set and a model -> the metrics of each of its tasks, in one pass over its pictures."""

import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

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
from jest_core.examples.decode import View
from jest_core.models.towers import Towers
from jest_core.run_file import EvaluationSet, Pictures, Run
from jest_core.tables import SlotStatus

from . import sets
from .sets import ClassTask, Example

Scorer = TypeVar("Scorer", ZeroShot, FewShot)
Batch = tuple[list[int], list[Example], Tensor]  # positions in the stream, examples, and their pixels (n, 3, H, W)


@dataclass(frozen=True)
class _Classifier(Generic[Scorer]):
    """A classification task's scorer. column: of the labels; None: the labels that come with the set."""

    column: str | None
    numbers: dict[str, int]  # of each class, by its id
    scorer: Scorer

    def labels(self, batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Rows of a batch that have one of the classes (n,), and the number of each one's class (n,)."""
        numbers = _numbers(batch, self.column, self.numbers)
        rows = [i for i, number in enumerate(numbers) if number >= 0]
        return torch.tensor(rows, dtype=torch.int64), torch.tensor([numbers[i] for i in rows], dtype=torch.int64)


class SetEvaluation:
    """One set and one model.

    class_tasks: those of evaluation.classes. embedded: class embeddings by task, which several sets share, and which
    this adds to. decoders: threads.
    """

    def __init__(
        self,
        run: Run,
        spec: EvaluationSet,
        pair: Towers,
        class_tasks: dict[str, ClassTask],
        embedded: dict[str, Tensor],
        decoders: Executor,
    ) -> None:
        assert run.evaluation is not None
        self.run, self.spec, self.pair, self.class_tasks, self.embedded = run, spec, pair, class_tasks, embedded
        self.decoders, self.classes_file = decoders, run.evaluation.classes
        self.n_seen, self.n_bad = 0, 0  # pictures, and those of them that do not decode
        self.batch_size, self.canonical = run.evaluation.batch_size, run.evaluation.canonical_prompts
        self.view = _view(pair.view, spec)

    def run_tasks(self) -> Iterator[tuple[str, dict[str, float]]]:
        """(task, metrics) of each task; main_metric is acc1, or the mean of R@1 both ways.

        Raises ValueError where a task does not fit the set, or more pictures than data.max_bad_share do not decode.
        """
        zero_shots = {task: self._zero_shot(task) for task in self.spec.tasks if task not in ("retrieval", "few_shot")}
        few_shot = self._few_shot() if "few_shot" in self.spec.tasks else None
        pairs = _Pairs() if "retrieval" in self.spec.tasks else None
        columns = {each.column for each in zero_shots.values()} | ({few_shot.column} if few_shot else set())
        for _, batch, pixels in self._batches(self.spec, [name for name in columns if name]):
            if zero_shots or pairs is not None:
                image = image_embeddings(self.pair, pixels)
                for classifier in zero_shots.values():
                    rows, labels = classifier.labels(batch)
                    classifier.scorer.add(image[rows], labels)
                if pairs is not None:
                    pairs.add(self.pair, image, batch, by_caption=self.spec.format == "shards")
            if few_shot is not None:
                rows, labels = few_shot.labels(batch)
                if len(rows):
                    few_shot.scorer.add(represent(self.pair, pixels[rows]), labels)
        self._refuse_bad()
        for task in self.spec.tasks:
            try:
                yield task, _result(few_shot if task == "few_shot" else zero_shots.get(task), pairs)
            except ValueError as error:
                raise ValueError(
                    f"evaluation set {self.spec.name!r}, task {task!r}: {error}; remove the task from its tasks"
                ) from error

    def _refuse_bad(self) -> None:
        share = self.run.data.max_bad_share
        if self.n_bad > share * self.n_seen:
            raise ValueError(
                f"evaluation set {self.spec.name!r}: {self.n_bad} of {self.n_seen} pictures do not decode, more than "
                f"data.max_bad_share {share}: repair the set, or raise data.max_bad_share"
            )

    def _batches(self, source: Pictures, columns: Iterable[str], only: Container[int] | None = None) -> Iterator[Batch]:
        """Examples whose pictures decode; a batch is read while the one before it is embedded.

        only: positions in the stream of the examples that are wanted; all, if not given.
        """
        stream = enumerate(sets.examples(self.run, source, columns))
        wanted = (item for item in stream if only is None or item[0] in only)

        def read() -> Batch | None:
            items = list(itertools.islice(wanted, self.batch_size))
            if not items:
                return None
            encoded = list(self.decoders.map(lambda item: item[1].read(), items))
            pixels, status = self.view.batch(encoded, self.decoders)
            good = [i for i in range(len(items)) if status[i] == SlotStatus.OK]
            self.n_seen, self.n_bad = self.n_seen + len(items), self.n_bad + len(items) - len(good)
            return [items[i][0] for i in good], [items[i][1] for i in good], torch.from_numpy(pixels[good])

        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read)
            while (batch := coming.result()) is not None:
                coming = reader.submit(read)
                if batch[0]:
                    yield batch

    def _classes(self, task: str) -> tuple[str | None, ClassNames]:
        """The column that has a task's labels (None: those that come with the set), and its classes."""
        if task == "zero_shot":
            return None, sets.classes(self.run, self.spec, canonical=self.canonical)
        if task not in self.class_tasks:
            listed = ", ".join(self.class_tasks) or "no tasks"
            raise ValueError(
                f"evaluation set {self.spec.name!r}: task {task!r} is none of retrieval, few_shot, zero_shot, and not "
                f"in evaluation.classes {self.classes_file}, which has {listed}: correct the task, or add it there"
            )
        of_file = self.class_tasks[task]
        ids, names = [c["id"] for c in of_file["classes"]], [c["names"] for c in of_file["classes"]]
        return of_file["label"], ClassNames(ids, names, of_file["templates"], self.canonical)

    def _zero_shot(self, task: str) -> _Classifier[ZeroShot]:
        column, classes = self._classes(task)
        key = f"{self.spec.name}/{task}" if task == "zero_shot" else task
        if key not in self.embedded:
            self.embedded[key] = class_embeddings(self.pair, classes, self.batch_size)
        return _Classifier(column, _numbered(classes), ZeroShot(self.embedded[key]))

    def _few_shot(self) -> _Classifier[FewShot]:
        """Classifiers fitted to the pool's shots: labels are read first, and only the drawn pictures are embedded."""
        spec = self.spec.few_shot
        if spec is None:
            raise ValueError(
                f"evaluation set {self.spec.name!r} has task few_shot and no few_shot.pool to learn from: give the "
                "pool, or remove the task from its tasks"
            )
        column, classes = self._classes(spec.classes or "zero_shot")
        numbers = _numbered(classes)
        columns = [column] if column else []
        labels = _numbers(sets.examples(self.run, spec.pool, columns), column, numbers)
        drawn = [draw_shots(labels, len(numbers), spec.n_shots, seed) for seed in range(spec.n_seeds)]
        features: dict[int, Tensor] = {}
        for positions, _, pixels in self._batches(spec.pool, columns, set(itertools.chain(*drawn))):
            features |= zip(positions, represent(self.pair, pixels).cpu(), strict=True)
        classifiers = []
        for positions in drawn:
            good = [i for i in positions if i in features]
            if not good:
                raise ValueError(
                    f"evaluation set {self.spec.name!r}: few_shot.pool has no picture of any class: correct the pool, "
                    "or few_shot.classes"
                )
            shown = torch.stack([features[i] for i in good])
            classifiers.append(
                FewShotClassifier.fit(shown, torch.tensor([labels[i] for i in good]), len(numbers), spec.l2)
            )
        return _Classifier(column, numbers, FewShot(classifiers))


class _Pairs:
    """Embeddings of pictures and of all their captions, for retrieval; float16 on the host."""

    def __init__(self) -> None:
        self.image: list[Tensor] = []
        self.text: list[Tensor] = []
        self.image_group: list[int] = []
        self.text_group: list[int] = []
        self.groups: dict[str | int, int] = {}

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


def _result(classifier: _Classifier[ZeroShot] | _Classifier[FewShot] | None, pairs: _Pairs | None) -> dict[str, float]:
    """Metrics of a classification task; of retrieval, where there is no classifier."""
    if classifier is not None:
        metrics = classifier.scorer.result()
        return {**metrics, "main_metric": metrics["acc1"]}
    assert pairs is not None
    metrics = pairs.result()
    main = (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"]) / 2
    return {**metrics, "mean_recall@1": main, "main_metric": main}


def _view(model: View, spec: EvaluationSet) -> View:
    """How the set's pictures are cut and scaled; model: how the model's training pictures are."""
    match spec.view:
        case "model":
            return model
        case "crop":
            return replace(model, resize_mode="shortest", margin=0.875)
        case "squash":
            return replace(model, resize_mode="squash", margin=1.0)


def _numbered(classes: ClassNames) -> dict[str, int]:
    return {name: i for i, name in enumerate(classes.ids)}


def _numbers(batch: Iterable[Example], column: str | None, numbers: dict[str, int]) -> list[int]:
    """The number of each example's class; -1 where it has none of them."""
    labels = (example.label if column is None else example.columns.get(column) for example in batch)
    return [numbers.get(label or "", -1) for label in labels]
