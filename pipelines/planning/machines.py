"""The machines of a cluster, by group: from a manifest of KubeRay or a file of Ray's cluster launcher."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_UNITS = {
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}
_GPUS = ("nvidia.com/gpu", "amd.com/gpu")


@dataclass(frozen=True)
class Group:
    """Machines of one kind. cpus, gpus: that Ray counts on each; memory_bytes is 0 where the file does not say."""

    name: str
    cpus: float
    gpus: float
    memory_bytes: float
    least: int
    most: int

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus}


@dataclass(frozen=True)
class Machines:
    """All groups of a cluster, the head's among them."""

    source: str
    groups: tuple[Group, ...]

    @property
    def most(self) -> dict[str, float]:
        """Ray's resources with every group at its largest."""
        return self._sum("most")

    @property
    def least(self) -> dict[str, float]:
        return self._sum("least")

    @property
    def reading_cpus(self) -> float:
        """CPUs of groups without GPUs, at their largest; of all groups where none is without."""
        without = sum(group.cpus * group.most for group in self.groups if not group.gpus)
        return without or self.most["CPU"]

    def places(self, **each: float) -> int:
        """How many workers that ask for these resources fit on the machines, none of them on two."""
        return sum(
            group.most * int(min(have / each[name] for name, have in group.resources.items() if each.get(name)))
            for group in self.groups
        )

    def _sum(self, size: str) -> dict[str, float]:
        counts = [getattr(group, size) for group in self.groups]
        return {
            "CPU": sum(n * group.cpus for n, group in zip(counts, self.groups, strict=True)),
            "GPU": sum(n * group.gpus for n, group in zip(counts, self.groups, strict=True)),
        }


def read(path: str) -> Machines:
    """Raises ValueError where the file has no cluster, or several."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--cluster {path}: no such file")
    try:
        documents = [each for each in yaml.safe_load_all(Path(path).read_text()) if isinstance(each, dict)]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--cluster {path} is not YAML: {error}") from error
    found = [groups for each in documents if (groups := tuple(_groups(each, path)))]
    if len(found) != 1:
        raise ValueError(
            f"--cluster {path} has {len(found)} clusters, and one is needed: name the manifest of a RayCluster or "
            "RayJob (of an overlay `kubectl kustomize OVERLAY > cluster.yaml`), or a file of `ray up` with its "
            "available_node_types"
        )
    return Machines(path, found[0])


def _groups(document: dict[str, Any], path: str) -> Iterator[Group]:
    try:
        match document:
            case {"kind": "RayCluster", "spec": spec} | {"kind": "RayJob", "spec": {"rayClusterSpec": spec}}:
                yield _of_pods("head", spec["headGroupSpec"], 1, 1)
                for worker in spec.get("workerGroupSpecs") or []:
                    n, hosts = worker.get("replicas", 0), worker.get("numOfHosts", 1)
                    grows = spec.get("enableInTreeAutoscaling")
                    least, most = (worker.get("minReplicas", n), worker.get("maxReplicas", n)) if grows else (n, n)
                    yield _of_pods(worker["groupName"], worker, least * hosts, most * hosts)
            case {"available_node_types": types}:
                head = document.get("head_node_type")
                for name, node in types.items():
                    yield _of_nodes(name, node, head == name, document.get("max_workers", 2))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--cluster {path} is not a manifest as KubeRay or Ray read it: {error!r}") from error


def _of_pods(name: str, group: dict[str, Any], least: int, most: int) -> Group:
    """A group of KubeRay, which counts a pod's limits, or requests, unless rayStartParams name other numbers."""
    container, start = group["template"]["spec"]["containers"][0], group.get("rayStartParams") or {}
    resources = container.get("resources") or {}
    have = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    gpus = start.get("num-gpus", sum(_quantity(have.get(kind, 0)) for kind in _GPUS))
    cpus = start.get("num-cpus", _quantity(have.get("cpu", 0)))
    return Group(name, float(cpus), float(gpus), _quantity(have.get("memory", 0)), least, most)


def _of_nodes(name: str, node: dict[str, Any], is_head: bool, max_workers: int) -> Group:
    """A node type of Ray's launcher; max_workers: of the whole cluster."""
    have = node.get("resources") or {}
    if is_head:
        least = most = 1
    else:
        least, most = node.get("min_workers", 0), min(node.get("max_workers", max_workers), max_workers)
    return Group(name, float(have.get("CPU", 0)), float(have.get("GPU", 0)), float(have.get("memory", 0)), least, most)


def _quantity(value: str | float) -> float:
    """A quantity of Kubernetes: 500m, 16, 64Gi."""
    text = str(value)
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * _UNITS.get(unit, 1.0)


def grows() -> bool:
    """Whether an autoscaler may add nodes to the cluster that this process has joined; True where Ray does not say.

    Ray's monitor runs everywhere. Where it launches nothing, each node has a type of its own: `node_` and its id.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    if status := _internal_kv_get(DEBUG_AUTOSCALING_STATUS):  # of version 1
        report = json.loads(status).get("autoscaler_report") or {}
        types = [*(report.get("active_nodes") or {}), *(report.get("node_type_mapping") or {}).values()]
    else:
        found = get_cluster_status(ray.get_runtime_context().gcs_address)
        types = [node.ray_node_type_name for node in (*found.active_nodes, *found.idle_nodes)]
    return not types or any(not name.startswith("node_") for name in types)
