"""The machines of a cluster, by group: from a manifest of KubeRay or a file of Ray's cluster launcher."""

import re
from collections.abc import Callable, Iterator
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
_THREADS = "RAY_object_manager_rpc_threads_num"
_STORE_SHARE = 0.3  # of a machine's memory, that Ray's object store has where nobody says another size,
_STORE_MOST = 200e9  # and no more bytes (ray/_private/ray_constants.py)
_WORKERS = 2  # max_workers of a file of `ray up` that has none


@dataclass(frozen=True)
class Group:
    """Machines of one kind. cpus, gpus: that Ray counts on each; memory_bytes, and store_bytes of Ray's object store,
    are 0 where the file does not say. known: whether it says the others; where not, they are 0. threads: with which Ray
    receives objects, where the file says."""

    name: str
    cpus: float
    gpus: float
    memory_bytes: float
    least: int
    most: int
    known: bool = True
    store_bytes: float = 0.0
    threads: int | None = None

    @property
    def receiving_threads(self) -> int:
        """Those of Ray's object manager (src/ray/raylet/main.cc)."""
        return self.threads or min(max(2, int(self.cpus) // 4), 8)

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus}


@dataclass(frozen=True)
class Placed:
    """Machines of a group that are there when a stage works, and how many of its workers are on each."""

    group: Group
    n: int
    workers: float
    cpus_left: float  # of each


@dataclass(frozen=True)
class Machines:
    """All groups of a cluster, the head's among them. limit: machines of all groups together; None: no other than the
    groups'."""

    source: str
    groups: tuple[Group, ...]
    limit: int | None = None

    @property
    def most(self) -> dict[str, float]:
        """The most that there can be of each of Ray's resources, on the machines that have most of it."""
        return {"CPU": self._most(lambda group: group.cpus), "GPU": self._most(lambda group: group.gpus)}

    @property
    def least(self) -> dict[str, float]:
        return {
            "CPU": sum(group.least * group.cpus for group in self.groups),
            "GPU": sum(group.least * group.gpus for group in self.groups),
        }

    @property
    def unknown(self) -> list[str]:
        """Groups of whose machines the file does not say what they have."""
        return [group.name for group in self.groups if not group.known]

    @property
    def reading_cpus(self) -> float:
        """CPUs of groups without GPUs, at their largest; of all groups where none is without; 0 where not known."""
        if self.unknown:
            return 0.0
        return self._most(lambda group: 0.0 if group.gpus else group.cpus) or self.most["CPU"]

    def places(self, **each: float) -> int:
        """How many workers that ask for these resources fit on the machines, none of them on two."""
        return round(
            self._most(
                lambda group: int(min(have / each[name] for name, have in group.resources.items() if each.get(name)))
            )
        )

    def placed(self, n_workers: int, **each: float) -> list[Placed]:
        """The machines with so many workers that ask for these resources, the groups at their largest; groups with GPUs
        that no worker needs at their smallest.
        """
        kind, room = "GPU" if each.get("GPU") else "CPU", float("inf")
        if self.limit is not None:
            room = max(0, self.limit - sum(group.least for group in self.groups))
        found = []
        for group in sorted(self.groups, key=lambda group: group.resources[kind], reverse=True):
            fits = int(min(group.resources[name] / amount for name, amount in each.items() if amount))
            wanted = -(-n_workers // fits) if fits else 0
            n = group.least + int(min(room, group.most - group.least, max(0, wanted - group.least)))
            if not group.gpus:
                n = group.least + int(min(room, group.most - group.least))
            room -= n - group.least
            here = min(n_workers, n * fits)
            n_workers -= here
            if n:
                found.append(Placed(group, n, here / n, group.cpus - here / n * each.get("CPU", 0.0)))
        return found

    def _most(self, each: Callable[[Group], float]) -> float:
        """The largest sum over the machines of what each has."""
        total, room = 0.0, float("inf")
        if self.limit is not None:
            room = max(0, self.limit - sum(group.least for group in self.groups))
        for group in sorted(self.groups, key=each, reverse=True):
            more = min(group.most - group.least, room)
            total += (group.least + more) * each(group)
            room -= more
        return total


def read(path: str) -> Machines:
    """Raises ValueError where the file has no cluster, or several."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--cluster {path}: no such file")
    try:
        documents = [each for each in yaml.safe_load_all(Path(path).read_text()) if isinstance(each, dict)]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--cluster {path} is not YAML: {error}") from error
    found = [(each, groups) for each in documents if (groups := tuple(_groups(each, path)))]
    if len(found) != 1:
        raise ValueError(
            f"--cluster {path} has {len(found)} clusters, and one is needed: name the manifest of a RayCluster or "
            "RayJob (of an overlay `kubectl kustomize OVERLAY > cluster.yaml`), or a file of `ray up` with its "
            "available_node_types"
        )
    document, groups = found[0]
    if "available_node_types" in document:  # whose max_workers counts no head
        n_heads = int(document.get("head_node_type") in document["available_node_types"])
        return Machines(path, groups, document.get("max_workers", _WORKERS) + n_heads)
    return Machines(path, groups)


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
                begun = re.search(rf"{_THREADS}=(\d+)", " ".join(document.get("worker_start_ray_commands") or []))
                threads = int(begun[1]) if begun else None
                for name, node in types.items():
                    yield _of_nodes(name, node, head == name, document.get("max_workers", _WORKERS), threads)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--cluster {path} is not a manifest as KubeRay or Ray read it: {error!r}") from error


def _of_pods(name: str, group: dict[str, Any], least: int, most: int) -> Group:
    """A group of KubeRay, which counts a pod's limits, or requests, unless rayStartParams name other numbers."""
    container, start = group["template"]["spec"]["containers"][0], group.get("rayStartParams") or {}
    resources = container.get("resources") or {}
    have = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
    gpus = start.get("num-gpus", sum(_quantity(have.get(kind, 0)) for kind in _GPUS))
    cpus = start.get("num-cpus", _quantity(have.get("cpu", 0)))
    memory = _quantity(have.get("memory", 0))
    store = float(start.get("object-store-memory", _default_store(memory)))
    threads = next((int(e["value"]) for e in container.get("env") or [] if e["name"] == _THREADS), None)
    return Group(name, float(cpus), float(gpus), memory, least, most, store_bytes=store, threads=threads)


def _of_nodes(name: str, node: dict[str, Any], is_head: bool, max_workers: int, threads: int | None) -> Group:
    """A node type of Ray's launcher, which finds CPUs and GPUs by the type of machine where `resources` has no CPU.
    max_workers: of the whole cluster. threads: of the commands that start Ray on workers."""
    have = node.get("resources") or {}
    if is_head:
        least = most = 1
    else:
        least, most = node.get("min_workers", 0), min(node.get("max_workers", max_workers), max_workers)
    if "CPU" not in have:
        return Group(name, 0.0, 0.0, 0.0, least, most, known=False)
    memory = float(have.get("memory", 0))
    store = float(have.get("object_store_memory", _default_store(memory)))
    gpus, threads = float(have.get("GPU", 0)), None if is_head else threads
    return Group(name, float(have["CPU"]), gpus, memory, least, most, store_bytes=store, threads=threads)


def _default_store(memory: float) -> float:
    return min(_STORE_SHARE * memory, _STORE_MOST)


def _quantity(value: str | float) -> float:
    """A quantity of Kubernetes: 500m, 16, 64Gi."""
    text = str(value)
    unit = next((unit for unit in sorted(_UNITS, key=len, reverse=True) if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * _UNITS.get(unit, 1.0)
