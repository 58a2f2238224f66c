"""What this process's Ray job does on the cluster: whether a task of it runs, and how many wait.

Ray's list of what waits for room names no job. Each node, however, tells of its processes whose they are.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

_NO_ACTOR = b"\xff"  # each byte of the actor's id in a process that has none
_AT_ONCE = 32  # nodes that are asked
# Ray Data's, which run a method for each block. Others may run one for ever while they wait, such as Ray Train's.
_ACTORS = "MapWorker"


@dataclass(frozen=True)
class OwnWork:
    """runs: whether a task, or a method of Ray Data's actors, is under way. waits: tasks, actors and calls that are
    not, whatever they wait for."""

    runs: bool
    waits: int


def look() -> OwnWork | None:
    """None where it is not known: grpcio is not installed, or a node does not answer."""
    try:
        return _of(_processes())
    except Exception:  # Ray and gRPC have many; a node may just have gone
        return None


def _processes() -> list[Any]:
    """Those that work for this job, the driver included."""
    import ray
    from ray._private.internal_api import node_stats

    def ask(node: dict[str, Any]) -> Any:
        return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)

    worker: Any = ray._private.worker.global_worker
    job = worker.current_job_id.binary()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        stats = list(pool.map(ask, nodes))
    return [process for each in stats for process in each.core_workers_stats if process.job_id == job]


def _of(processes: list[Any]) -> OwnWork:
    busy = [process for process in processes if process.num_running_tasks]
    actors = {process.actor_id.hex() for process in busy if process.actor_id.strip(_NO_ACTOR)}
    submitted = sum(process.num_pending_tasks for process in processes)
    begun = sum(process.num_running_tasks + process.task_queue_length for process in processes)
    return OwnWork(runs=len(actors) < len(busy) or _is_one_of_data(actors), waits=max(0, submitted - begun))


def _is_one_of_data(actors: set[str]) -> bool:
    from ray._private import state

    return any(_ACTORS in state.actors(actor_id=actor).get("ActorClassName", "") for actor in actors)
