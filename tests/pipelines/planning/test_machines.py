"""Machines of a cluster by its manifest: KubeRay's, Ray's launcher's; and whether a cluster grows."""

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.planning import machines
from tests.conftest import free_port

DEPLOY = Path(str(files("jest_deploy")))
POD = {
    "rayStartParams": {},
    "template": {"spec": {"containers": [{"resources": {"limits": {"cpu": "1500m", "memory": "2Gi"}}}]}},
}


def cluster(**workers) -> dict:
    group = {"groupName": "gpus", **POD, **workers}
    head = POD | {"rayStartParams": {"num-cpus": "0"}}
    spec = {"enableInTreeAutoscaling": True, "headGroupSpec": head, "workerGroupSpecs": [group]}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "spec": spec}


def read(tmp_path, *documents) -> machines.Machines:
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return machines.read(str(tmp_path / "cluster.yaml"))


def test_the_groups_of_a_ray_cluster_among_other_documents(tmp_path):
    found = read(tmp_path, {"kind": "NetworkPolicy"}, cluster(minReplicas=0, maxReplicas=3, replicas=1))
    head, workers = found.groups
    assert (head.cpus, head.least, head.most) == (0, 1, 1)
    assert (workers.cpus, workers.memory_bytes, workers.least, workers.most) == (1.5, 2 * 2**30, 0, 3)
    assert found.most == {"CPU": 4.5, "GPU": 0}


def test_a_ray_job_has_the_same_groups_and_without_autoscaling_their_number_is_fixed(tmp_path):
    spec = cluster(minReplicas=0, maxReplicas=3, replicas=2, numOfHosts=2)["spec"]
    job = {"kind": "RayJob", "spec": {"rayClusterSpec": spec | {"enableInTreeAutoscaling": False}}}
    assert [(group.least, group.most) for group in read(tmp_path, job).groups] == [(1, 1), (4, 4)]


def test_node_types_of_rays_launcher(tmp_path):
    types = {
        "head": {"resources": {"CPU": 0}},
        "data": {"min_workers": 1, "max_workers": 50, "resources": {"CPU": 16}},
        "learners": {"resources": {"CPU": 96, "GPU": 8}},
    }
    found = read(tmp_path, {"available_node_types": types, "head_node_type": "head", "max_workers": 10})
    assert [(group.name, group.least, group.most) for group in found.groups] == [
        ("head", 1, 1),
        ("data", 1, 10),
        ("learners", 0, 10),
    ]
    assert found.reading_cpus == 160
    assert found.places(GPU=4, CPU=1) == 18  # one of the ten machines is always of the other kind
    assert found.places(GPU=3, CPU=1) == 18  # two on each machine, and 2 GPUs of it idle
    assert found.most == {"CPU": 9 * 96 + 16, "GPU": 72}


def test_a_node_type_whose_resources_ray_looks_up_is_not_known(tmp_path):
    types = {"head": {}, "data": {"resources": {"CPU": 16}}, "learners": {"resources": {"GPU": 8}}}
    found = read(tmp_path, {"available_node_types": types, "head_node_type": "head"})
    assert found.unknown == ["head", "learners"]
    assert found.most == {"CPU": 32, "GPU": 0}  # of two workers, as Ray takes it where max_workers is not given
    assert found.reading_cpus == 0


@pytest.mark.parametrize("path", sorted((DEPLOY / "launcher").glob("*.yaml")), ids=lambda path: path.name)
def test_the_launcher_files_of_this_project_are_read(path):
    found = machines.read(str(path))
    assert found.most["GPU"] > 0
    assert found.reading_cpus > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: RayService", "has 0 clusters, and one is needed"),
        ("a: [", "is not YAML"),
        ("kind: RayCluster\nspec: {}", "is not a manifest as KubeRay or Ray read it"),
        (yaml.safe_dump_all([cluster(), cluster()]), "has 2 clusters"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        machines.read(str(tmp_path / "cluster.yaml"))
    with pytest.raises(FileNotFoundError, match="--cluster nowhere: no such file"):
        machines.read("nowhere")


ASK = """
import os, time, ray
from pipelines.planning import machines
from ray.experimental.internal_kv import _internal_kv_get
ray.init(os.environ["CLUSTER"], log_to_driver=False, logging_level="ERROR")
while b"node_type_mapping\\": {" not in (_internal_kv_get("__autoscaling_status") or b""):  # it reports every 5 s
    time.sleep(0.5)
print(machines.grows())
"""
FAKE = {
    "cluster_name": "fake",
    "max_workers": 2,
    "provider": {"type": "fake_multinode", "head_node_id": "f" * 51 + "00000", "launch_multiple": True},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpus": {"resources": {"CPU": 2, "GPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{key: [] for key in ("initialization_commands", "setup_commands", "cluster_synced_files", "rsync_exclude")},
    **{key: [] for key in ("rsync_filter", "head_setup_commands", "worker_setup_commands")},
    **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands")},
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "file_mounts_sync_continuously": False,
}


@pytest.mark.long
@pytest.mark.parametrize("scales", [True, False])
def test_a_cluster_grows_if_it_has_an_autoscaler(tmp_path, scales):
    """Ray's own autoscaler with its provider of made-up nodes, and a cluster of `ray start` alone."""
    port, ray = free_port(), str(Path(sys.executable).parent / "ray")
    (tmp_path / "fake.json").write_text(json.dumps(FAKE))
    command = [ray, "start", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", "--block"]
    command += [f"--autoscaling-config={tmp_path / 'fake.json'}"] * scales
    more = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "CLUSTER": f"127.0.0.1:{port}"}
    environment = os.environ | more | {"RAY_TMPDIR": "/tmp"}
    environment.pop("RAY_ADDRESS", None)
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not psutil.Process(head.pid).children():
            assert head.poll() is None
        for _ in range(3):  # until its server listens
            asked = subprocess.run(
                [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=90
            )
            if asked.returncode == 0:
                break
        assert asked.stdout == f"{scales}\n", asked.stderr
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            process.kill()
        head.wait()
