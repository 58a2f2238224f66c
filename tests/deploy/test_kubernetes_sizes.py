"""The pods of deploy/kubernetes fit their machines, and Ray's autoscaler makes of the groups what jest asks for."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as of_cluster
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import autoscaler_pb2

from jest_core import run_file

from .kuberay import ROOT, SIZES, cluster_spec, cpus, groups, only, pods, ray_container, size_bytes, yours

GIB = 2**30
# CPUs and bytes of the machines that the kustomizations name; 680 GB are those of a2-highgpu-8g, and p4d has more
MACHINES = {
    "small": dict.fromkeys(("headgroup", "data", "learners"), (8, 32 * GIB)),
    "gpus-8": {"headgroup": (8, 32 * GIB), "data": (16, 64 * GIB), "learners": (96, 680 * 10**9)},
}
MACHINES["gpus-64"] = MACHINES["gpus-8"]
DAEMONS = 0.8, 1.5 * GIB  # logs, metrics, network, device plugins


def left_for_pods(n_cpus: int, n_bytes: float) -> tuple[float, float]:
    """What a node of that size has for pods, by the formula that GKE publishes, less what daemon sets ask for."""
    reserved_cpus = sum(
        min(max(n_cpus - above, 0), n) * part
        for above, n, part in ((0, 1, 0.06), (1, 1, 0.01), (2, 2, 0.005), (4, n_cpus, 0.0025))
    )
    reserved = 100 * 2**20 + sum(
        min(max(n_bytes - above * GIB, 0), n * GIB) * part
        for above, n, part in ((0, 4, 0.25), (4, 4, 0.2), (8, 8, 0.1), (16, 112, 0.06), (128, 1 << 20, 0.02))
    )
    return n_cpus - reserved_cpus - DAEMONS[0], n_bytes - reserved - DAEMONS[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("manifests")


@pytest.mark.parametrize("size", SIZES)
def test_pods_leave_room_for_a_machines_daemon_sets(folder, size: str):
    for pod in list(pods(yours(folder, size, "job")))[:3]:
        requests = [container["resources"]["requests"] for container in pod["spec"]["containers"]]
        room_cpus, room_bytes = left_for_pods(*MACHINES[size][pod["metadata"]["name"]])
        assert 0.2 * room_cpus < sum(cpus(request["cpu"]) for request in requests) <= room_cpus
        assert 0.2 * room_bytes < sum(size_bytes(request["memory"]) for request in requests) <= room_bytes
        for container in pod["spec"]["containers"]:
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert "cpu" not in container["resources"]["limits"]  # which would throttle, and frees nothing


def test_a_pod_of_a_whole_machine_would_not_fit():
    n_cpus, n_bytes = left_for_pods(16, 64 * GIB)
    assert n_cpus < 15.5
    assert 50 * GIB < n_bytes < 60 * GIB


@pytest.mark.parametrize("size", SIZES)
def test_object_stores_fit_into_their_memory(folder, size: str):
    for group in cluster_spec(yours(folder, size))["workerGroupSpecs"]:
        memory = size_bytes(ray_container(group)["resources"]["limits"]["memory"])
        assert int(group["rayStartParams"]["object-store-memory"]) < 0.35 * memory


def node_types(folder: Path, size: str) -> dict[str, Any]:
    """What Ray's autoscaler, which runs beside the head, reads from the cluster's object."""
    return of_cluster(only(yours(folder, size), "RayCluster"))["available_node_types"]


def launched(types: dict[str, Any], tasks: list[dict[str, float]], learners: list[dict[str, float]]) -> dict[str, int]:
    """How many nodes of each group the autoscaler starts for these tasks, and for learners, which start together."""
    configs = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=kind["min_workers"],
            max_worker_nodes=kind["max_workers"],
            resources=kind["resources"],
            labels=kind["labels"],
        )
        for name, kind in types.items()
    }
    gang = autoscaler_pb2.GangResourceRequest(requests=[ResourceRequestUtil.make(bundle) for bundle in learners])
    wanted = SchedulingRequest(
        node_type_configs=configs,
        disable_launch_config_check=True,
        max_num_nodes=1000,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(task) for task in tasks]),
        gang_resource_requests=[gang] if learners else [],
    )
    reply = ResourceDemandScheduler(None).schedule(wanted)
    assert not reply.infeasible_resource_requests
    assert not reply.infeasible_gang_resource_requests
    return dict(Counter({launch.instance_type: launch.count for launch in reply.to_launch}))


@pytest.mark.parametrize(
    ("size", "runs", "n_nodes"),
    [("small", "datacomp/small", 1), ("gpus-8", "datacomp/medium", 1), ("gpus-64", "laion2b/joint", 8)],
)
def test_gpu_nodes_come_when_learners_ask_and_not_before(folder, size: str, runs: str, n_nodes: int):
    types = node_types(folder, size)
    assert types["learners"]["min_workers"] == 0
    run = run_file.load((ROOT / f"deploy/runs/{runs}.yaml").read_text())
    n_cpus = types["data"]["resources"]["CPU"] * types["data"]["max_workers"]
    assert "learners" not in launched(types, [{"CPU": 1}] * n_cpus, [])  # ingest, catalogue, CPU scoring
    page = (ROOT / "deploy/docs/kubernetes.md").read_text()
    assert f"`{size}` {n_cpus}" in page  # so many tasks at once, and no more: Ray would start GPU nodes for others
    learners = [{"CPU": 1, "GPU": run.training.gpus_per_learner}] * run.training.n_learners
    assert launched(types, [], learners)["learners"] == n_nodes
    assert types["learners"]["resources"]["CPU"] * n_nodes == 2 * len(learners)  # one of each for what reads for it


def test_the_head_runs_no_task(folder):
    for size in SIZES:
        assert node_types(folder, size)["headgroup"]["resources"]["CPU"] == 0
        assert groups(cluster_spec(yours(folder, size)))["headgroup"]["rayStartParams"]["num-cpus"] == "0"
