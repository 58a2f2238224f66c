"""Real Ray as KubeRay starts the pods of deploy/kubernetes: probes, the token, a job, metrics, pods that have to go."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from jest_core import run_file
from jest_core.models import towers
from jest_core.run_file import Run
from pipelines.base import checkpoints
from tests.conftest import RUN

from .kuberay import ROOT, cluster_spec, groups, ray_container, yours
from .pods_here import Pods, can_run, get, pods_here, wait_for
from .test_prometheus import expressions

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not can_run(), reason="needs root, and Debian's iproute2 and util-linux"),
]
TOKEN = "a-token-of-this-test"
STORE = {"object-store-memory": "100000000"}
SMALL = {"head": STORE, "data": STORE | {"num-cpus": "4"}, "learners": STORE}
# No GPU is here, nothing fires, and a uniform run selects nothing: tests/pipelines/training/test_trackers.py has that
NOT_HERE = "gpu|gram|ALERTS|learnability|(score|reference|select|log|exchange)_time"
WHERE = """
import ray
ray.init()
@ray.remote
class Learner:
    def where(self): return ray.util.get_node_ip_address()
@ray.remote(num_cpus=1)
def task():
    import time; time.sleep(0.3)
    return ray.util.get_node_ip_address()
print("PLACES", sorted(set(ray.get([task.remote() for _ in range(2)]))))
print("LEARNER", ray.get(Learner.options(num_cpus=1, num_gpus=1).remote().where.remote()))
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict[str, Any]:
    return cluster_spec(yours(tmp_path_factory.mktemp("manifests"), "small", "job"))


@pytest.fixture(scope="module")
def cluster(spec) -> Iterator[Pods]:
    """A head, a data worker and a learner's node; each is ready before the next test."""
    with pods_here(TOKEN, SMALL) as pods:
        for name, group in zip(("head", "data", "learners"), groups(spec).values(), strict=True):
            pods.start(name, group)
            _wait_until_ready(pods, name, group)
        yield pods


def _wait_until_ready(pods: Pods, name: str, group: dict[str, Any]) -> None:
    """What KubeRay >= 1.6 probes where it knows rayVersion, without a token."""

    def is_ready() -> bool:
        pods.restart_if_ended(name, group)
        return get(f"http://{pods.address(name)}:52365/api/healthz")[0] == 200

    wait_for(is_ready, 120, lambda: (pods.logs / f"{name}.log").read_text())


def _ray(pods: Pods, spec: dict[str, Any], *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`ray` where the operator's pods call it."""
    return pods.run("data", groups(spec)["data"], "ray", *words, **environment)


def _submit(pods: Pods, spec: dict[str, Any], name: str, *entrypoint: str) -> None:
    """What the pod that submits a RayJob runs."""
    words = ["--address", f"http://{pods.address('head')}:8265", "--submission-id", name, "--no-wait", "--"]
    done = _ray(pods, spec, "job", "submit", *words, *entrypoint)
    assert done.returncode == 0, done.stdout + done.stderr


def _log(pods: Pods, name: str) -> str:
    url = f"http://{pods.address('head')}:8265/api/jobs/{name}/logs"
    return str(json.loads(get(url, TOKEN)[1] or '{"logs": ""}')["logs"])


def test_only_who_has_the_token_gets_in(cluster: Pods, spec):
    dashboard = f"http://{cluster.address('head')}:8265"
    # what the pod that submits a job waits for, without a token
    wait_for(
        lambda: get(f"{dashboard}/api/gcs_healthz")[0] == 200, 120, lambda: (cluster.logs / "head.log").read_text()
    )
    assert get(f"{dashboard}/api/jobs/")[0] == 401
    assert get(f"{dashboard}/api/jobs/", "wrong")[0] == 403
    wait_for(
        lambda: get(f"{dashboard}/api/jobs/", TOKEN)[0] == 200, 120, lambda: (cluster.logs / "head.log").read_text()
    )
    waits = ["health-check", "--address", f"{cluster.address('head')}:6379"]  # KubeRay's init container
    assert _ray(cluster, spec, *waits).returncode == 0
    assert _ray(cluster, spec, *waits, RAY_AUTH_TOKEN="wrong").returncode != 0


def test_tasks_prefer_data_workers_and_learners_find_their_gpus(cluster: Pods, spec, tmp_path):
    (tmp_path / "where.py").write_text(WHERE)
    dashboard = f"http://{cluster.address('head')}:8265"
    _submit(cluster, spec, "where", "python", str(tmp_path / "where.py"))
    log = _ray(cluster, spec, "job", "logs", "--address", dashboard, "--follow", "where").stdout
    assert f"PLACES ['{cluster.address('data')}']" in log, log
    assert f"LEARNER {cluster.address('learners')}" in log, log


@pytest.fixture(scope="module")
def training(cluster: Pods, spec, shards: Path, tmp_path_factory) -> Run:
    """A run that trains, as a job submitted as KubeRay does; it has a checkpoint, and would go on for hours."""
    folder = tmp_path_factory.mktemp("run")
    overrides = ["selection={method: uniform}", "training.examples_trained=320000", "reference=null"]
    run = run_file.load(RUN.format(root=folder, name="uniform", shards=shards), overrides)
    (folder / "run.yaml").write_text(run_file.dump(run))
    _submit(
        cluster,
        spec,
        "run",
        "env",
        "JEST_SUBMISSION=1",
        "jest",
        "stages",
        "catalogue",
        "train",
        str(folder / "run.yaml"),
    )
    wait_for(lambda: checkpoints.steps(run.path(run.run_dir)), 240, lambda: _log(cluster, "run"))
    return run


def test_prometheus_on_the_head_has_what_the_dashboard_and_the_alerts_ask_for(cluster: Pods, spec, training: Run):
    config = ROOT / "deploy/prometheus/prometheus.yml"
    often = config.read_text().replace("scrape_interval: 15s", "scrape_interval: 2s")
    (cluster.logs / "prometheus.yml").write_text(often)
    shutil.copy(config.parent / "alerts.yml", cluster.logs)
    server = cluster.start_in(
        "head",
        "prometheus",
        f"--config.file={cluster.logs}/prometheus.yml",
        f"--storage.tsdb.path={cluster.logs}/tsdb",
        "--web.listen-address=:9090",
    )
    url = f"http://{cluster.address('head')}:9090/api/v1"
    missing = {e for e in expressions() if not re.search(NOT_HERE, e)}
    assert len(missing) > 25

    def found() -> bool:
        nonlocal missing
        missing = {e for e in missing if not _result(f"{url}/query?query={quote(e)}")}
        return not missing

    try:
        wait_for(found, 90, lambda: f"nothing answers {sorted(missing)}")
        rules = [rule for group in json.loads(get(f"{url}/rules")[1])["data"]["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
        targets = json.loads(get(f"{url}/targets")[1])["data"]["activeTargets"]
        assert [target["health"] for target in targets] == ["up"] * len(targets)
        assert len(targets) >= 3  # a node each
    finally:
        server.kill()
        server.wait()


def _result(url: str) -> list[Any]:
    return list(json.loads(get(url)[1] or '{"data": {"result": []}}')["data"]["result"])


def test_a_head_that_has_to_go_lets_its_job_write_a_checkpoint(cluster: Pods, spec, training: Run):
    directory, head = training.path(training.run_dir), groups(spec)["headgroup"]
    before = checkpoints.steps(directory)[-1]
    started = time.monotonic()
    hook = cluster.run("head", head, *ray_container(head)["lifecycle"]["preStop"]["exec"]["command"])
    assert hook.returncode == 0, hook.stderr
    assert time.monotonic() - started < head["template"]["spec"]["terminationGracePeriodSeconds"] / 5
    assert checkpoints.steps(directory)[-1] >= before
    url = f"http://{cluster.address('head')}:8265/api/jobs/run"
    wait_for(lambda: json.loads(get(url, TOKEN)[1])["status"] != "RUNNING", 20, lambda: _log(cluster, "run"))
    status = json.loads(get(url, TOKEN)[1])
    assert (status["status"], status["driver_exit_code"]) == ("FAILED", 143), status  # so that KubeRay tries again
    assert "checkpoint" in _log(cluster, "run")


def test_a_stage_that_asks_for_gpus_comes_to_their_node(cluster: Pods, spec, shards: Path, tmp_path):
    """There is no GPU here: that is what it says, from the node that has them for Ray."""
    run = run_file.load(RUN.format(root=tmp_path, name="joint", shards=shards), ["reference.gpus_per_actor=1"])
    weights = towers.create("jest-tiny", seed=5).model.state_dict()
    checkpoints.write(run.path("reference"), 1, {"epoch": 1, "state_dict": weights, "jest": {"step": 1}})
    (tmp_path / "run.yaml").write_text(run_file.dump(run))
    _submit(cluster, spec, "scores", "jest", "stages", "catalogue", "reference-scores", str(tmp_path / "run.yaml"))
    url = f"http://{cluster.address('head')}:8265/api/jobs/scores"
    wait_for(lambda: json.loads(get(url, TOKEN)[1])["status"] == "FAILED", 240, lambda: _log(cluster, "scores"))
    assert re.search("CUDA|NVIDIA driver", _log(cluster, "scores")), _log(cluster, "scores")


def test_a_pod_that_has_to_go_leaves_the_cluster_in_time(cluster: Pods, spec):
    assert cluster.first_process("learners").name() == "ray"  # not a shell, which would keep SIGTERM to itself
    grace = groups(spec)["learners"]["template"]["spec"]["terminationGracePeriodSeconds"]
    seconds = cluster.delete("learners", grace)
    assert seconds < 30  # it was idle: nothing to wait for
