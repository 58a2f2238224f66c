"""What a Ray cluster has, and what tasks, actors and groups of them it has no room for now.

From the state that Ray keeps for its autoscaler, which is there on every cluster, with or without autoscaler and
dashboard.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_UNITS = {"CPU": "CPU", "GPU": "GPU"}
_OF_NO_INTEREST = ("memory", "object_store_memory", "node:", "accelerator_type:")  # in what a node has

Resources = Mapping[str, float]  # name -> amount
# Ids of this process's placement groups without which it goes on; removed ones too, which are listed for a while
optional: set[str] = set()


@dataclass(frozen=True)
class Demand:
    """Something that waits: `bundles` are each placed on one node, all at once if there are several; n of them wait.
    group: a placement group, no task or actor."""

    bundles: tuple[tuple[tuple[str, float], ...], ...]
    n: int
    group: bool = False

    def fits(self, nodes: Iterable[Resources]) -> bool:
        """Whether one of them finds room on nodes with these resources."""
        rooms = [dict(node) for node in nodes]
        return all(
            _place(dict(bundle), rooms) for bundle in sorted(self.bundles, key=lambda one: -sum(dict(one).values()))
        )

    def __str__(self) -> str:
        shapes = Counter(self.bundles)
        text = " and ".join(f"{n} x ({in_words(dict(shape))})" for shape, n in shapes.items())
        if len(self.bundles) > 1:
            return f"{text} all at once" + (f", {self.n} times" if self.n > 1 else "")
        return f"{self.n} x ({in_words(dict(self.bundles[0]))})"


@dataclass(frozen=True)
class Cluster:
    """A look at the cluster. total, free: of each node. waiting: of any job, but groups of this one alone, and those
    not that it can do without. coming: nodes that its autoscaler has asked for, by type; None where there is no
    autoscaler."""

    total: Sequence[Resources]
    free: Sequence[Resources]
    waiting: Sequence[Demand]  # which do not fit what is free
    coming: Mapping[str, int] | None

    def never(self) -> list[Demand]:
        """What would not fit these nodes if all else ended."""
        return [demand for demand in self.waiting if not demand.fits(self.total)]

    def describe(self) -> str:
        total, free = (_sum(map(_of_interest, nodes)) for nodes in (self.total, self.free))
        return (
            f"{len(self.total)} node(s) with {in_words({'CPU': 0, 'GPU': 0} | total)} in all, of which "
            f"{in_words({name: free.get(name, 0) for name in {'CPU': 0, 'GPU': 0} | total})} are free"
        )


def look() -> Cluster:
    """At the cluster that this process has joined."""
    import ray
    from ray.autoscaler.v2 import sdk
    from ray.core.generated import autoscaler_pb2

    worker: Any = ray._private.worker.global_worker
    messages: Any = autoscaler_pb2
    state = sdk.get_cluster_resource_state(worker.gcs_client)
    nodes = [node for node in state.node_states if node.status != messages.DEAD]
    free = [dict(node.available_resources) for node in nodes]
    asked = [Demand((_bundle(each.request),), each.count) for each in state.pending_resource_requests]
    groups = Counter(
        tuple(sorted(_bundle(bundle) for bundle in group.requests))
        for group in state.pending_gang_resource_requests
        if _is_own(group.details.partition(":")[0], worker.current_job_id.hex())
    )
    asked += [Demand(bundles, n, group=True) for bundles, n in groups.items() if bundles]
    return Cluster(
        total=[dict(node.total_resources) for node in nodes],
        free=free,
        # within a group, tasks wait until it is placed
        waiting=[each for each in asked if not _in_group(each) and not each.fits(free)],
        coming=_coming(),
    )


def autoscales() -> bool:
    """Whether the cluster that this process has joined has an autoscaler, which starts nodes for what waits."""
    return _coming() is not None


def in_words(resources: Resources) -> str:
    """Such as `2 CPUs, 1 GPU`."""
    ordered = sorted(resources.items(), key=lambda one: (one[0] not in _UNITS, one[0]))
    return (
        ", ".join(f"{amount:,g} {name}{'s' if name in _UNITS and amount != 1 else ''}" for name, amount in ordered)
        or "nothing"
    )


def _coming() -> dict[str, int] | None:
    """Nodes that the autoscaler has asked for, by type. Where there is none, nodes have none, or Ray's monitor, which
    runs all the same, reports each as one of its own."""
    from ray._private import ray_constants
    from ray.experimental.internal_kv import _internal_kv_get

    status = _internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    types, coming = _of_version_1(json.loads(status)) if status else _of_version_2(_cluster_status())
    return dict(coming) if any(name and not name.startswith("node_") for name in types) else None


def _of_version_1(status: Mapping[str, Any]) -> tuple[list[str], Counter[str]]:
    """Types of nodes, and how many of each are coming, as the autoscaler of version 1 last reported them."""
    report: dict[str, Any] = status.get("autoscaler_report") or {}
    launches = Counter(report.get("pending_launches") or {})
    types = [*(report.get("node_type_mapping") or {}).values(), *launches]
    return types, launches + Counter(kind for _, kind, *_ in report.get("pending_nodes") or [])


def _of_version_2(status: Any) -> tuple[list[str], Counter[str]]:
    """The same of version 2, which KubeRay and `ray up` start."""
    state, nodes = status.autoscaling_state, status.cluster_resource_state.node_states
    coming = Counter(instance.ray_node_type_name for instance in state.pending_instances)
    for request in state.pending_instance_requests:
        coming[request.ray_node_type_name] += request.count
    return [*(node.ray_node_type_name for node in nodes), *coming], coming


def _cluster_status() -> Any:
    import ray
    from ray.core.generated import autoscaler_pb2

    worker: Any = ray._private.worker.global_worker
    messages: Any = autoscaler_pb2
    status = messages.GetClusterStatusReply()
    status.ParseFromString(worker.gcs_client.get_cluster_status())
    return status


def _bundle(request: Any) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, amount) for name, amount in request.resources_bundle.items() if amount))


def _is_own(group: str, job: str) -> bool:
    """Whether this job needs the placement group of that id, which ends with its job's."""
    return group.endswith(job) and group not in optional


def _in_group(demand: Demand) -> bool:
    return any("_group_" in name for bundle in demand.bundles for name, _ in bundle)


def _of_interest(resources: Resources) -> dict[str, float]:
    return {
        name: amount
        for name, amount in resources.items()
        if not name.startswith(_OF_NO_INTEREST) and "_group_" not in name
    }


def _place(bundle: Resources, rooms: list[dict[str, float]]) -> bool:
    """Take the bundle out of the first room that has it; whether there was one."""
    for room in rooms:
        if all(room.get(name, 0.0) >= amount for name, amount in bundle.items()):
            for name, amount in bundle.items():
                room[name] -= amount
            return True
    return False


def _sum(nodes: Iterable[Resources]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for node in nodes:
        for name, amount in node.items():
            total[name] += amount
    return total
