"""Learners that share a cluster for reading, of which a node is lost, on real nodes of Ray."""

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
