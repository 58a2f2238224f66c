"""Runs a function on several learners: real processes that communicate by gloo, without Ray."""

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Learners are forked from a server that never imported Ray. A process forked from one that uses Ray shares its
# connections, and breaks them when it garbage-collects a reference to an object of Ray
multiprocessing.set_forkserver_preload(["tests.learner_server"])


def run_learners(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """function(rank, size, group, *arguments) on `size` processes; their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        learners = mp.start_processes(
            _run, (function, size, folder, arguments), nprocs=size, join=False, daemon=True, start_method="forkserver"
        )
        try:
            while not learners.join():
                pass
        finally:
            for process in learners.processes:
                process.kill()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank: int, function: Callable[..., Any], size: int, folder: str, arguments: tuple[Any, ...]) -> None:
    assert "tests.learner_server" in sys.modules, (
        "the fork server could not import it: is this the root of the checkout?"
    )
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    torch.save(function(rank, size, dist.group.WORLD, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _end_with_the_tests() -> None:
    """Exit when pytest is killed: otherwise a learner and the fork server, its parent, would keep each other alive."""
    tests = multiprocessing.parent_process()
    assert tests is not None
    wait([tests.sentinel])
    os._exit(1)
