"""Machines of a cluster by its manifest: KubeRay's, Ray's launcher's."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from ray._private import ray_constants

from pipelines.planning import machines

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


def test_an_object_store_has_a_share_of_the_memory_as_ray_bounds_it(tmp_path):
    assert machines._STORE_SHARE == ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
    assert machines._STORE_MOST == ray_constants.DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES
    sizes = {"small": {}, "large": {"memory": 2e12}, "said": {"memory": 2e12, "object_store_memory": 5e11}}
    types = {name: {"resources": {"CPU": 96, "memory": 1e11} | size} for name, size in sizes.items()}
    found = read(tmp_path, {"available_node_types": types})
    assert [group.store_bytes for group in found.groups] == [3e10, 2e11, 5e11]
    limits = {"cpu": "96", "memory": "2T"}
    pod = {"rayStartParams": {}, "template": {"spec": {"containers": [{"resources": {"limits": limits}}]}}}
    _, workers = read(tmp_path, cluster(**pod)).groups
    assert workers.store_bytes == 2e11


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
    assert {group.threads for group in found.groups if group.gpus} == {16}


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
