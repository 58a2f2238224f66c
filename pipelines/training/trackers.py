"""Where the lines of metrics.jsonl also go while a run trains: gauges for Prometheus, always; and the trackers of
training.report_to, TensorBoard, Weights & Biases and MLflow, under the same names."""

import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Protocol

from jest_core import choices, run_file
from jest_core.run_file import Run

from ..base import storage

_UPLOAD_SECONDS, _UPLOAD_BYTES = 60.0, 8 << 20
_MLFLOW_CHARACTERS = 500  # of a parameter
_REPEAT_SECONDS = 1.0  # Ray exports gauges once in 10 s, and at most once a second
_IDENTITIES = "trackers.json"  # of a run directory: the run's name in each tracker, so that a resumed run goes on there


class Tracker(Protocol):
    """One place that metrics go to. What it raises ends the tracker, and no run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class Trackers:
    """All trackers of a run, opened by its first learner after `step` updates; a thread writes to them.

    tell: prints a message to the user: which tracker failed and why, while the run goes on without it.
    """

    def __init__(self, run: Run, step: int, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._open: dict[str, Tracker] = {"Prometheus": Gauges(PurePosixPath(run.run_dir).name)}
        for name in run.training.report_to:
            if (tracker := self._guarded(name, partial(_opened, name, run, step))) is not None:
                self._open[name] = tracker
        self._thread = ThreadPoolExecutor(1, "trackers")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """metrics: a line of metrics.jsonl, or what an evaluation found; what is no number is left out."""
        numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, (int, float))}
        self._thread.submit(self._log, step, numbers)

    def close(self, *, failed: bool) -> None:
        """Once all was written."""
        self._thread.shutdown()
        for name, tracker in self._open.items():
            self._guarded(name, partial(tracker.close, failed=failed))

    def _log(self, step: int, metrics: Mapping[str, float]) -> None:
        def logged(tracker: Tracker) -> bool:
            tracker.log(step, metrics)
            return True

        self._open = {name: each for name, each in self._open.items() if self._guarded(name, partial(logged, each))}

    def _guarded(self, name: str, work: Callable[[], Any]) -> Any:
        """Returns what the work returns; None where it raised, and the run goes on without that tracker."""
        try:
            return work()
        except Exception as error:  # of any of their many kinds
            self._tell(f"goes on without {name}: {type(error).__name__}: {error}")
            return None


def _opened(name: choices.Tracker, run: Run, step: int) -> Tracker:
    path = f"{run.path(run.run_dir)}/{_IDENTITIES}"
    before: dict[str, str] = storage.read_json(path) if storage.exists(path) else {}
    identities = dict(before)
    tracker = _KINDS[name](run, step, identities)
    if identities != before:
        storage.write_json(path, identities)
    return tracker


def gauge_name(key: str) -> str:
    """The Prometheus name of a key of metrics.jsonl: train/loss -> jest_train_loss, jest/wait_time -> jest_wait_time.

    Ray's endpoint puts ray_ before it.
    """
    return "jest_" + re.sub(r"[^A-Za-z0-9_]", "_", key.removeprefix("jest/"))


class Gauges:
    """Gauges on the metrics endpoint of the learner's Ray node, labelled by run; it needs ray[default].

    Ray drops a gauge that nobody sets again within twice its report interval (20 s;
    https://github.com/ray-project/ray/pull/64633), and a step or the time between two evaluations can be longer: a
    thread sets all of them again until they are closed.
    """

    def __init__(self, run_name: str) -> None:
        self._run, self._gauges, self._values = run_name, dict[str, Any](), dict[str, float]()
        self._closed = threading.Event()
        threading.Thread(target=self._repeat, name="gauges", daemon=True).start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from ray.util.metrics import Gauge

        for key in {**metrics, "step": step}.keys() - self._gauges.keys():
            self._gauges[key] = Gauge(gauge_name(key), description=f"{key} of metrics.jsonl", tag_keys=("run",))
        self._values = {**self._values, **metrics, "step": step}  # a new one: the thread may be reading the old one
        self._set()

    def close(self, *, failed: bool) -> None:
        self._closed.set()

    def _repeat(self) -> None:
        while not self._closed.wait(_REPEAT_SECONDS):
            self._set()

    def _set(self) -> None:
        for key, value in self._values.items():
            self._gauges[key].set(value, tags={"run": self._run})


class _TensorBoard:
    """Event files in RUN_DIR/tensorboard. On storage that appends to no file the newest is written whole once a minute;
    after 8 MB another is begun."""

    def __init__(self, run: Run, step: int, identities: dict[str, str]) -> None:
        self._directory = f"{run.path(run.run_dir)}/tensorboard"
        self._remote = "://" in self._directory
        # steps after the checkpoint from which the run goes on were reported before, and are reported again
        self._begin(purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        if self._remote and time.monotonic() - self._written >= _UPLOAD_SECONDS:
            self._writer.flush()
            if self._upload() > _UPLOAD_BYTES:
                self.close(failed=False)
                self._begin()

    def close(self, *, failed: bool) -> None:
        self._writer.close()
        if self._remote:
            self._upload()
            shutil.rmtree(self._local)

    def _begin(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._local = tempfile.mkdtemp(prefix="jest-tensorboard-") if self._remote else self._directory
        self._writer, self._written = SummaryWriter(self._local, purge_step=purge_step), time.monotonic()

    def _upload(self) -> int:
        """Bytes of the event file."""
        (name,) = storage.names(self._local)
        data = storage.read_bytes(f"{self._local}/{name}")
        storage.write_bytes(f"{self._directory}/{name}", data)
        self._written = time.monotonic()
        return len(data)


class _WandB:
    """A run of the project WANDB_PROJECT, or `jest`; WANDB_MODE=offline writes to RUN_DIR/wandb where that is local."""

    def __init__(self, run: Run, step: int, identities: dict[str, str]) -> None:
        import wandb

        directory = run.path(run.run_dir)
        identities.setdefault("wandb", uuid.uuid4().hex)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jest"),
            id=identities["wandb"],
            name=PurePosixPath(run.run_dir).name,
            resume="allow",
            config=run_file.identity(run),
            dir=tempfile.mkdtemp(prefix="jest-wandb-") if "://" in directory else directory,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)  # steps that it has, it leaves as they are

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, or `jest`, at MLFLOW_TRACKING_URI."""

    def __init__(self, run: Run, step: int, identities: dict[str, str]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if "mlflow" not in identities:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jest")
            existing = self._client.get_experiment_by_name(name)
            experiment = existing.experiment_id if existing else self._client.create_experiment(name)
            created = self._client.create_run(experiment, run_name=PurePosixPath(run.run_dir).name)
            identities["mlflow"] = created.info.run_id
            for key, value in run_file.identity(run).items():
                self._client.log_param(identities["mlflow"], key, str(value)[:_MLFLOW_CHARACTERS])
        self._id = identities["mlflow"]
        self._client.update_run(self._id, "RUNNING")
        self._tag_changes(run)
        logged = self._client.get_metric_history(self._id, "train/loss")
        self._last = max((metric.step for metric in logged), default=0)

    def _tag_changes(self, run: Run) -> None:
        """MLflow never changes a parameter: the new value of a run that was made longer becomes a tag of that name."""
        begun = self._client.get_run(self._id).data
        for key, value in run_file.identity(run).items():
            text = str(value)[:_MLFLOW_CHARACTERS]
            if begun.tags.get(key, begun.params.get(key)) != text:
                self._client.set_tag(self._id, key, text)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if step > self._last or not any(key.startswith("train/") for key in metrics):
            now = int(1000 * time.time())
            named = [Metric(key.replace("@", "_at_"), value, now, step) for key, value in metrics.items()]
            self._client.log_batch(self._id, metrics=named)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


_KINDS: dict[choices.Tracker, Callable[[Run, int, dict[str, str]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
