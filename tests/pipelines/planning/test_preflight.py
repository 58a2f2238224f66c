"""Checks of a run in each state that it can be in: nothing of them fails that a later stage would make."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jest_core.models import configurations
from pipelines.base import cluster, manifests, storage
from pipelines.planning import machines, preflight, sizes
from tests.conftest import MakeRun

INGEST = ["ingest={urls: 'metadata/*.parquet', shards: fetched}", "data.shards=fetched/*.tar"]


def checks(run, manifest=None) -> dict[str, preflight.Check]:
    return {check.name: check for check in preflight.run_checks(run, sizes.pairs(run), manifest)}


def write_metadata(run, **columns) -> None:
    table = pa.table({"url": ["http://a.example/1.jpg"], "caption": ["a cat"], **columns})
    pq.write_table(table, sink := io.BytesIO())
    storage.write_bytes(run.path("metadata/part-00000.parquet"), sink.getvalue())


def test_before_ingest_shards_are_not_there_yet(make_run: MakeRun):
    run = make_run("joint", *INGEST)
    write_metadata(run)
    found = checks(run)
    assert found["metadata"].ok
    assert found["shards"].ok is None
    assert found["shards"].detail.endswith("`jest ingest` fetches them")
    assert not [check for check in found.values() if check.ok is False]


def test_after_ingest_missing_shards_are_an_error(make_run: MakeRun):
    run = make_run("joint", *INGEST)
    write_metadata(run)
    manifests.finish(run.path("fetched"), {"stage": "ingest", "complete": True, "config": {}})
    found = checks(run)
    assert found["metadata"].detail == "fetched"
    assert found["shards"].ok is False


def test_metadata_that_is_missing_or_has_other_columns_fails(make_run: MakeRun):
    run = make_run("joint", *INGEST)
    assert checks(run)["metadata"].ok is False
    write_metadata(run)
    other = make_run("joint", INGEST[0].replace("}", ", columns: {url: image_link}}"), INGEST[1])
    found = checks(other)["metadata"]
    assert found.ok is False
    assert "image_link" in found.detail


def test_a_run_that_refines_waits_for_what_it_refines(make_run: MakeRun):
    run = make_run("joint", "data.shards=fetched/*.tar", "data.refines=wide", "data.rules=[]")
    found = checks(run)["shards"]
    assert found.ok is None
    assert "wide, which this run refines" in found.detail


def test_a_log_that_is_to_be_replayed_may_be_written_later(make_run: MakeRun):
    found = checks(make_run("joint", "data.replay=other", "selection.method=uniform", "reference=null"))
    assert found["replay"].ok is None
    assert "train the run of data.replay first" in found["replay"].detail


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "weights.pt"])
def test_a_folder_of_hugging_face_or_a_file_is_a_reference(make_run: MakeRun, weights):
    run = make_run("joint", "reference.checkpoint=stock")
    assert checks(run)["reference"].ok is None
    storage.write_bytes(run.path(f"stock/{weights}"), b"x")
    assert checks(run)["reference"].detail == run.path(f"stock/{weights}")
    assert checks(make_run("joint", f"reference.checkpoint=stock/{weights}"))["reference"].ok
    assert checks(make_run("joint", "reference.checkpoint=stock/other.pt"))["reference"].ok is None


def test_a_reference_that_would_see_other_pictures_fails_before_anything_is_fetched(make_run: MakeRun, tmp_path: Path):
    run = make_run("joint", "reference.checkpoint=stock")
    config = {"model_cfg": configurations.configuration("jest-tiny"), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    storage.write_bytes(run.path("stock/open_clip_model.safetensors"), b"x")
    storage.write_bytes(run.path("stock/open_clip_config.json"), json.dumps(config).encode())
    found = checks(run)["reference"]
    assert found.ok is False
    assert "set reference.model.image_mean to [0.1, 0.2, 0.3]" in found.detail
    named = make_run("joint", "reference.checkpoint=stock", "reference.model={name: 'local-dir:stock'}")
    assert checks(named)["reference"].ok


def test_a_manifest_is_compared_at_its_largest(make_run: MakeRun):
    groups = (machines.Group("data", 4, 0, 0, 0, 1), machines.Group("gpus", 8, 2, 0, 0, 2))
    manifest = machines.Machines("cluster.yaml", groups)
    gpus = [f"training.{key}" for key in ("gpus_per_learner=1", "sub_batch_size=32", "n_learners=4")]
    streams = ["data.n_streams=4"]
    fits = checks(make_run("joint", *gpus, *streams), manifest)["cluster"]
    assert fits.ok, fits.detail
    assert fits.detail.endswith("it starts with fewer nodes, and grows")
    small = machines.Machines("cluster.yaml", groups[:1])
    short = checks(make_run("joint", *gpus, *streams), small)["cluster"]
    assert short.ok is False
    assert "at its largest, GPU 4, and has 0; CPU 5, and has 4" in short.detail
    split = machines.Machines("cluster.yaml", (machines.Group("gpus", 8, 3, 0, 2, 2),))
    wide = make_run("joint", "training.gpus_per_learner=2", "training.n_learners=2", "data.n_streams=4")
    assert checks(wide, split)["cluster"].ok
    three = machines.Machines("cluster.yaml", (machines.Group("gpus", 8, 1, 0, 4, 4),))
    refused = checks(wide, three)["cluster"]
    assert "2 learners of 2 GPUs do not fit on the nodes of cluster.yaml, which have room for 0" in refused.detail


def test_learners_whose_number_follows_the_cluster_fail_only_below_their_least(make_run: MakeRun):
    """Nodes as of deploy/kubernetes/gpus-8: one of 8 GPUs."""
    nodes = (machines.Group("data", 14, 0, 0, 1, 16), machines.Group("learners", 16, 8, 0, 0, 1))
    manifest = machines.Machines("cluster.yaml", nodes)
    words = ["training.gpus_per_learner=1", "training.sub_batch_size=64", "data.n_streams=4"]

    def found(least: int, most: int, each: machines.Machines = manifest) -> preflight.Check:
        run = make_run("joint", *words, f"training.n_learners={{min: {least}, max: {most}}}")
        return checks(run, each)["cluster"]

    assert found(8, 64).ok
    assert found(8, 64).detail.startswith("cluster.yaml has room for 8 learners, of 8 to 64")
    assert found(2, 8).detail.startswith("cluster.yaml has what the learners ask for")
    assert found(16, 64).ok is False
    assert "GPU 16, and has 8" in found(16, 64).detail
    halves = machines.Machines("cluster.yaml", (machines.Group("learners", 8, 8, 0, 2, 2),))
    assert found(2, 16, halves).detail.startswith("cluster.yaml has room for 8 learners")  # of 2 CPUs each


def test_machines_that_a_file_does_not_describe_are_not_known(make_run: MakeRun):
    gpus = machines.Group("gpus", 0, 0, 0, 0, 8, known=False)
    manifest = machines.Machines("cluster.yaml", (machines.Group("data", 16, 0, 0, 1, 32), gpus), limit=41)
    found = checks(make_run("joint", "training.gpus_per_learner=1"), manifest)["cluster"]
    assert found.ok is None
    assert "GPU 1, and has 0, without the machines of gpus" in found.detail
    assert checks(make_run("joint"), manifest)["cluster"].ok


def test_a_cluster_that_is_too_small_fails_only_if_nothing_adds_nodes_to_it(
    make_run: MakeRun, ray_session, monkeypatch
):
    """The cluster of the session stands for the one of RAY_ADDRESS."""
    monkeypatch.setattr(preflight.cluster, "is_local", lambda: False)
    monkeypatch.setattr(cluster, "grows", lambda: False)  # test_autoscaler.py asks clusters of either kind
    run = make_run("joint", "training.gpus_per_learner=1")
    found = checks(run)["cluster"]
    assert found.ok is False
    assert "GPU 1, and has 0, and nothing adds nodes to it" in found.detail
    monkeypatch.setattr(cluster, "grows", lambda: True)
    waits = checks(run)["cluster"]
    assert waits.ok is None
    assert "its autoscaler may add nodes" in waits.detail
    follows = checks(make_run("joint", "training.n_learners={min: 1, max: 64}", "training.sub_batch_size=64"))[
        "cluster"
    ]
    assert follows.ok, follows.detail
    assert "of 1 to 64" in follows.detail
