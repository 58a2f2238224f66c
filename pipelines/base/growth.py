"""How many tasks of a CPU each to submit at once on a cluster that grows: some wait, and its autoscaler starts nodes.

Ray prefers nodes without GPUs for them, and so do autoscalers, until no more such nodes may be started: then they start
nodes with GPUs, for tasks that use none. So few wait; and once a node with GPUs has come, none, and its CPUs do not
count, so that it is idle and goes.
"""

from typing import Any

from . import demand

_LEAST, _MOST = 16, 64  # tasks that wait


class AtOnce:
    """Called: how many may be submitted now."""

    def __init__(self) -> None:
        self._at_start = {node["NodeID"] for node in _nodes()}
        self._grows = demand.autoscales()

    def __call__(self) -> int:
        nodes = [node for node in _nodes() if node["Resources"].get("CPU")]
        counted = [node for node in nodes if not node["Resources"].get("GPU") or node["NodeID"] in self._at_start]
        if all(node["Resources"].get("GPU") for node in nodes):  # there are no others
            counted = nodes
        self._grows = self._grows and len(counted) == len(nodes)
        n = max(1, int(sum(node["Resources"].get("CPU", 0) for node in counted)))
        return n + min(max(n, _LEAST), _MOST) if self._grows else n


def n_cpus() -> int:
    """CPUs of the cluster that this process has joined, as it is now; one at least."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
