"""Nodes of the cluster that are taken away with notice: drained by an autoscaler, by `ray drain-node`, or by a SIGTERM
to their `ray start --block`, as Kubernetes sends it to a pod."""

import contextlib
from collections.abc import Collection

from ..base import cluster

# Of ray.nodes(), DeathReason: ended by SIGTERM, and drained by the autoscaler or for a preemption
_PLANNED = {1, 3, 4}


def leaving() -> set[str]:
    """Ids of the nodes that still run and are to go; none of a local Ray, or while its head does not answer."""
    if cluster.is_local():
        return set()
    from ray._private.state import state  # what Ray Train asks too; Ray has no public call for it

    with contextlib.suppress(Exception):  # the next look asks again; Ray itself ends what has lost the head
        return set(state.get_draining_nodes())
    return set()


def here() -> str:
    """Id of the node of this process."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def were_taken(nodes: Collection[str]) -> bool:
    """Whether one of these nodes has gone with notice, or is about to."""
    import ray

    if cluster.is_local():
        return False
    gone = {node["NodeID"] for node in ray.nodes() if not node["Alive"] and node.get("DeathReason") in _PLANNED}
    return bool((gone | leaving()) & set(nodes))
