"""Runs report to TensorBoard, W&B, MLflow and Prometheus. Each is read back from its files, or from Ray's endpoint."""

import json
import re
import struct
import time
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import ray

from jest_core import run_file
from pipelines.base import checkpoints, storage
from pipelines.training import metrics_line, trackers, train

pytestmark = pytest.mark.slow


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B and MLflow without a server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path


def tensorboard_history(directory: str, key: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{directory}/tensorboard").Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def mlflow_history(directory: str, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    run_id = storage.read_json(f"{directory}/trackers.json")["mlflow"]
    return [(metric.step, metric.value) for metric in MlflowClient().get_metric_history(run_id, key)]


def records(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file, which has LevelDB's log format: blocks of 32 KiB, records in fragments."""
    at, whole = 7, b""  # after ":W&B", and a version
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: the next block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole


def wandb_history(path: Path) -> list[dict[str, float]]:
    from wandb.proto import wandb_internal_pb2

    history = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return history


def test_each_step_is_reported_once_although_a_crash_repeats_some(make_scored_run, offline):
    run = run_file.load(run_file.dump(make_scored_run("joint")), ["training.report_to=[tensorboard, wandb, mlflow]"])
    directory = run.path("joint")
    train.run_stage(run, in_process=True)
    for name in (checkpoints.path_of(directory, 6), f"{directory}/manifest.json"):
        storage.remove(name)  # as after a crash between step 6 and its checkpoint
    train.run_stage(run, in_process=True)

    losses = [(line["step"], pytest.approx(line["train/loss"])) for line in metrics_line.read(directory)]
    assert tensorboard_history(directory, "train/loss") == losses
    assert mlflow_history(directory, "train/loss") == losses
    offline_runs = sorted((offline / "joint" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(offline_runs) == 2
    assert len({path.name for path in offline_runs}) == 1  # the same run of W&B
    reported = [(line["_step"], line["train/loss"]) for path in offline_runs for line in wandb_history(path)]
    assert reported == losses + losses[4:]  # W&B's server ignores steps that it has already


def test_mlflow_shows_the_budget_of_an_extended_run(make_scored_run, offline):
    from mlflow import MlflowClient

    settings = ["training.schedule=constant", "training.examples_trained=64", "training.report_to=[mlflow]"]
    run = run_file.load(run_file.dump(make_scored_run("joint")), settings)

    def budgets() -> list[str | None]:
        run_data = MlflowClient().get_run(storage.read_json(f"{run.path('joint')}/trackers.json")["mlflow"]).data
        return [values.get("training.examples_trained") for values in (run_data.params, run_data.tags)]

    train.run_stage(run, in_process=True)
    assert budgets() == ["64", None]
    for more in (96, 128):
        train.run_stage(run_file.load(run_file.dump(run), [f"training.examples_trained={more}"]), in_process=True)
        assert budgets() == ["64", str(more)]


def test_a_failing_tracker_does_not_end_the_run(make_scored_run, capsys):
    run = run_file.load(run_file.dump(make_scored_run("joint")), ["training.report_to=[tensorboard]"])
    storage.write_bytes(f"{run.path('joint')}/tensorboard", b"a file where its directory should be")
    assert train.run_stage(run, in_process=True)["steps"] == 6
    assert "goes on without tensorboard" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("n_bytes", "n_files"), [(1 << 20, 1), (0, 3)]
)  # with a limit of 0 bytes each step starts a new file
def test_event_files_are_written_to_object_storage(scored, s3, monkeypatch, n_bytes: int, n_files: int):
    root = f"{s3}/tracked-{n_files}"
    monkeypatch.setattr(trackers, "_UPLOAD_SECONDS", 0.0)
    monkeypatch.setattr(trackers, "_UPLOAD_BYTES", n_bytes)
    run = run_file.load(run_file.dump(scored), [f"root={root}", "training.report_to=[tensorboard]"])
    reports = trackers.Trackers(run, 0, print)
    for step in (1, 2):
        reports.log(step, {"train/loss": 0.5 * step, "note": "no number"})
    reports.close(failed=False)
    assert len(storage.names(f"{root}/joint/tensorboard")) == n_files
    assert tensorboard_history(f"{root}/joint", "train/loss") == [(1, 0.5), (2, 1.0)]


def scraped() -> str:
    """What Prometheus would read from the endpoint of this Ray node."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        return answer.read().decode()


def test_the_panels_of_the_dashboard_show_metrics_that_exist(make_scored_run):
    text = (files("jest_deploy") / "grafana" / "jest.json").read_text()
    expressions = [target["expr"] for panel in json.loads(text)["panels"] for target in panel.get("targets", [])]
    wanted = {name for expr in expressions for name in re.findall(r"\bray_\w+", expr)}
    wanted = {name for name in wanted if not re.search("gpu|gram", name)}  # those: tests/deploy/test_prometheus.py
    assert len(wanted) > 10
    of_jest = {name for name in wanted if name.startswith("ray_jest_")}
    run = make_scored_run("joint")
    train.run_stage(run, in_process=True)
    reports = trackers.Trackers(run, 0, print)
    for line in metrics_line.read(run.path("joint")):
        reports.log(line["step"], line)

    def wait_for(what: set[str]) -> None:
        deadline, missing = time.monotonic() + 60, what
        while missing and time.monotonic() < deadline:
            time.sleep(0.5)
            missing = missing - set(re.findall(r"^(\w+)\{", scraped(), re.MULTILINE))
        assert not missing, sorted(missing)

    wait_for(wanted)
    time.sleep(7)  # Ray would drop a gauge that is set only once within six seconds: see conftest.py
    wait_for(of_jest)
    assert re.findall(r'^ray_jest_step\{.*run="joint".*\} (\S+)', scraped(), re.MULTILINE) == ["6.0"]
    reports.close(failed=False)
