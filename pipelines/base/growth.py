"""How many tasks of a CPU each to submit at once on a cluster that grows: some wait, and its autoscaler starts nodes.

Ray prefers nodes without GPUs for them, and so do autoscalers, until no more such nodes may be started: then they start
nodes with GPUs, for tasks that use none. So nothing more waits once that has happened.
"""

from . import demand

_MORE = 16  # tasks that wait, at least


class AtOnce:
    """Called: how many may be submitted now."""

    def __init__(self) -> None:
        self._n_gpu_nodes = _n_gpu_nodes()
        self._grows = demand.autoscales()

    def __call__(self) -> int:
        self._grows = self._grows and _n_gpu_nodes() <= self._n_gpu_nodes
        n = n_cpus()
        return n + max(n, _MORE) if self._grows else n


def n_cpus() -> int:
    """CPUs of the cluster that this process has joined, as it is now; one at least."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def _n_gpu_nodes() -> int:
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0))
