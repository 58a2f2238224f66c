"""Runs whose nodes are taken away, with notice and without, on Ray nodes in network namespaces of this machine."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import checkpoints
from pipelines.training import selection_log, train
from tests.hosts import BIN, Hosts, opened, wait_until

# columns of the log that a uniform run fills; its scores are NaN
IDENTITY = ["step", "position", "uid", "occurrence", "shard", "row"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with opened(4) as hosts:
        hosts.environment["RAY_health_check_failure_threshold"] = "30"  # no network is cut here
        hosts.start_ray(0, 0)
        yield hosts


def _train(hosts: Hosts, run: Run, folder: Path) -> subprocess.Popen[str]:
    path = folder / f"{run.run_dir}.yaml"
    path.write_text(run_file.dump(run))
    command = [sys.executable, "-m", "pipelines", "train", str(path)]
    return hosts.start(0, *command, RAY_ADDRESS=f"{hosts.address(0)}:6379")


def _steps(run: Run) -> list[int]:
    return checkpoints.steps(run.path(run.run_dir))


def _node_id(hosts: Hosts, i: int) -> str:
    code = f"import ray, json; ray.init('{hosts.address(0)}:6379', log_to_driver=False); print(json.dumps(ray.nodes()))"
    output, _ = hosts.start(0, sys.executable, "-c", code).communicate(timeout=60)
    nodes = json.loads(output.splitlines()[-1])
    return next(node["NodeID"] for node in nodes if node["NodeManagerAddress"] == hosts.address(i) and node["Alive"])


def test_learners_leave_a_node_that_is_drained_with_a_checkpoint(make_scored_run, tmp_path, hosts: Hosts):
    """First a pod's SIGTERM, then a drain by its name; neither counts as a failure, and no checkpoint is due before."""
    sizes = ["training.n_learners=2", "training.examples_trained=12800", "training.checkpoint_every_steps=1000"]
    run = make_scored_run("drained", *sizes, "training.max_failures=0")
    hosts.environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "90"  # of the pod
    pod = hosts.start_pod(1, 3)
    training = _train(hosts, run, tmp_path)
    wait_until(lambda: len(hosts.learners()) == 2, training)
    hosts.start_ray(2, 3)

    began = time.monotonic()
    pod.send_signal(signal.SIGTERM)
    wait_until(lambda: len(_steps(run)) == 1, training, 80)
    print(f"checkpoint {time.monotonic() - began:.1f} s after SIGTERM")
    assert pod.wait(80) == 1
    print(f"the pod has ended {time.monotonic() - began:.1f} s after SIGTERM")
    wait_until(lambda: set(hosts.learners().values()) == {2}, training)
    hosts.start_ray(3, 3)

    began, drain = time.monotonic(), [str(BIN / "ray"), "drain-node", "--address", f"{hosts.address(0)}:6379"]
    drain += ["--node-id", _node_id(hosts, 2), "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    drained = hosts.start(2, *drain, "--deadline-remaining-seconds", "90")
    assert drained.wait(60) == 0, drained.communicate()
    wait_until(lambda: len(_steps(run)) == 2, training, 80)
    print(f"checkpoint {time.monotonic() - began:.1f} s after the drain began")
    output, _ = training.communicate(timeout=900)
    assert training.returncode == 0, output
    assert output.count("a node with learners is drained") == 2
    assert "did not finish draining" not in pod.communicate()[0]  # whose processes may hold this pipe for a while

    undisturbed = make_scored_run("undisturbed", *sizes)
    train.run_stage(undisturbed)
    log = selection_log.read(run.path(run.run_dir))
    assert log.equals(selection_log.read(undisturbed.path(undisturbed.run_dir)))


def test_a_run_goes_on_with_fewer_learners_and_grows_again(make_scored_run, tmp_path, hosts: Hosts):
    """A uniform run, whose log shows its stream: selections of other numbers of learners differ by rounding."""
    sizes = ["selection.method=uniform", "training.examples_trained=3200", "training.checkpoint_every_steps=10"]
    learners = ["training.n_learners={min: 1, max: 2, wait_minutes: 0.1}", "training.max_failures=1"]
    run = make_scored_run("fewer", *sizes, *learners)
    for i in (1, 2):
        hosts.start_ray(i, 3)
    training = _train(hosts, run, tmp_path)
    wait_until(lambda: len(hosts.learners()) == 2 and bool(_steps(run)), training)
    before, began = hosts.learners(), time.monotonic()
    hosts.kill(next(iter(before.values())))
    wait_until(lambda: len(hosts.learners().keys() - before) == 1, training)
    print(f"one learner {time.monotonic() - began:.1f} s after a node was lost")
    began = time.monotonic()
    hosts.start_ray(3, 3)
    wait_until(lambda: len(hosts.learners().keys() - before) == 2, training)
    print(f"two learners {time.monotonic() - began:.1f} s after a node began to start")
    output, _ = training.communicate(timeout=200)
    assert training.returncode == 0, output
    assert "goes on with 1 of 2 learners" in output
    assert "the cluster has room for 2 learners" in output

    undisturbed = make_scored_run("undisturbed", *sizes)
    train.run_stage(undisturbed)
    logs = [selection_log.read(each.path(each.run_dir)).select(IDENTITY) for each in (run, undisturbed)]
    assert logs[0].equals(logs[1])
