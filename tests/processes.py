"""Learners as real processes over gloo, without Ray."""

import tempfile
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# They are forked from a process that has imported their tests, and never had Ray: one that is forked from a process
# with Ray shares its connections, and breaks them as soon as it collects something that refers to an object of Ray
set_forkserver_preload(["tests.checked"])


def run_learners(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """function(rank, size, group, *arguments) on `size` processes; their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _run, (function, size, folder, arguments), nprocs=size, start_method="forkserver", join=False
        )
        while not context.join():
            pass
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank: int, function: Callable[..., Any], size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    torch.save(function(rank, size, dist.group.WORLD, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
