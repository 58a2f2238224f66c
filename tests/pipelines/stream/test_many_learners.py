"""Learners that share a cluster for reading, of which a node is lost, on real nodes of Ray."""

import os
import subprocess
import sys

import pytest

from pipelines.data import catalogue
from tests.benchmarks.bench_cluster import simulated


@pytest.mark.long
def test_learners_that_share_a_cluster_get_the_stream_of_one_while_a_node_is_lost(make_run):
    overrides = ["selection.method=uniform", "training.sub_batch_size=48", "training.examples_trained=480"]
    run = make_run("uniform", *overrides, "data.n_streams=6", "data.window_rows=20")
    catalogue.run_stage(run)
    alone = simulated(run, nodes=1, cpus=2, store_bytes=100 << 20, n_learners=1, step_seconds=0, lose=False)
    shared = simulated(run, nodes=3, cpus=2, store_bytes=100 << 20, n_learners=6, step_seconds=0.5, lose=True)
    assert shared["hash"] == alone["hash"]
    assert len(set(alone["hash"])) == 10
    assert shared["spilled_bytes"] == alone["spilled_bytes"] == 0


COMING = """
import time
import pyarrow as pa, ray
from ray.cluster_utils import Cluster
from ray.experimental import get_object_locations
from pipelines.stream import read_ahead

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
cluster.add_node(num_cpus=2)
ray.init(cluster.address, log_to_driver=False)
here = ray.get_runtime_context().get_node_id()
read = lambda item: pa.table({"number": [item["number"]], "bytes": [bytes(1_000_000)]})
share = read_ahead.Share(0, 1, None)
windows = read_ahead.read_ahead(iter(range(20)), lambda i: {"number": i}, lambda _: 1, 1_000_000, 20, read, share)
assert next(windows)[0] == 0
submitted = windows.gi_frame.f_locals["reader"]._submitted

def are_here():
    return [here in get_object_locations([one])[one]["node_ids"] for _, one in list(submitted)]

deadline = time.monotonic() + 60
ray.wait([one for _, one in submitted], num_returns=len(submitted), fetch_local=False)
assert not any(are_here())
assert next(windows)[0] == 1
while sum(are_here()) < read_ahead._COMING - 1 and time.monotonic() < deadline:
    time.sleep(0.1)
time.sleep(1)
print(are_here()[:6])
assert [number for number, _ in windows] == list(range(2, 20))
"""


@pytest.mark.long
def test_the_windows_that_come_next_are_sent_to_the_learner_before_it_asks():
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", COMING]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[True, True, True, False, False, False]"
