"""What the machines that compute lack: an NVIDIA driver as new as PyTorch's CUDA, a C compiler for what is compiled.

Triton compiles a C file at its first use on a GPU, torch.compile C++ on a CPU. Asked before anything starts, because
learners would fail one after the other, minutes later, with a message of neither the machine nor the remedy.
"""

import contextlib
import ctypes
import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from typing import Any

from . import cluster

_DRIVERS = {
    12: "525",
    13: "580",
}  # CUDA's major number -> the first release that runs it
_SECONDS = 60.0  # in which a node answers; one that does not fails by itself
_C = "#include <stdlib.h>\n#include <Python.h>\n"
_CPP = "#include <vector>\n"


class Unfit(ValueError):
    """A machine lacks what the run needs."""


def refuse_unfit(*, gpus: bool, compiled: bool) -> None:
    """Raises Unfit where this machine, or the nodes that the cluster has now, lack what the run needs.

    gpus: it computes on GPUs; those nodes are asked. compiled: by torch.compile.
    """
    if not (gpus or compiled):
        return
    if wrong := answers(lacks, "GPU" if gpus else "CPU", gpus=gpus, compiled=compiled):
        more = f"; and {len(wrong) - 1} more nodes" if len(wrong) > 1 else ""
        raise Unfit(f"{wrong[0]}{more}")


def lacks(*, gpus: bool, compiled: bool) -> str:
    """What this machine lacks, with the remedy; empty if nothing."""
    cuda = _cuda_of_pytorch() if gpus else None
    found = _driver(cuda) if cuda else ""
    if not found and (gpus or compiled):
        found = _compiler("Triton", "CC", ("clang", "gcc", "cc"), "c", _C) if gpus else ""
        found = found or (_compiler("torch.compile", "CXX", ("g++", "c++"), "c++", _CPP) if compiled else "")
    return f"{platform.node()} {found}" if found else ""


def answers(question: Callable[..., str], kind: str, **settings: Any) -> list[str]:
    """What the nodes with this kind of Ray's resources answer, or this machine where Ray is local; no empty answers."""
    found = [question(**settings)] if cluster.is_local() else _of_nodes(question, kind, settings)
    return [text for text in found if text]


def _of_nodes(question: Any, kind: str, settings: dict[str, Any]) -> list[str]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask: Any = ray.remote(num_cpus=0, max_retries=0)(question)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0)]
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(**settings)
        for node in nodes
    ]
    found: list[str] = []
    for each in ray.wait(asked, num_returns=len(asked), timeout=_SECONDS)[0] if asked else []:
        with contextlib.suppress(ray.exceptions.RayError):  # a node that has just gone
            found.append(ray.get(each))
    return found


def _cuda_of_pytorch() -> str | None:
    """The CUDA version that the installed PyTorch was built with; None without CUDA. Imports no PyTorch."""
    spec = importlib.util.find_spec("torch")
    folder = (spec.submodule_search_locations or [""])[0] if spec else ""
    version = f"{folder}/version.py"
    return runpy.run_path(version).get("cuda") if os.path.exists(version) else None


def _driver(cuda: str) -> str:
    major, version = int(cuda.partition(".")[0]), ctypes.c_int()
    needed = f"install release {_DRIVERS.get(major, 'for CUDA ' + cuda)} or newer"
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return (
            f"has no NVIDIA driver (libcuda.so.1): {needed}, in a container run it with NVIDIA's runtime; without a "
            "GPU, set training.gpus_per_learner, reference.gpus_per_actor and evaluation.gpus to 0"
        )
    if version.value // 1000 >= major:
        return ""
    has = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return f"has an NVIDIA driver for CUDA {has}, and PyTorch is built for CUDA {cuda}: {needed} (nvidia-smi shows it)"


def _compiler(what: str, variable: str, names: tuple[str, ...], language: str, source: str) -> str:
    command = os.environ.get(variable) or next(filter(shutil.which, names), None)
    packages = "apt-get install gcc g++ libc6-dev"
    if command is None:
        return f"has no {language.upper()} compiler ({' or '.join(names)}), which {what} needs: {packages}"
    words = [command, "-x", language, "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
    try:
        ran = subprocess.run(words, input=source, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot run the {language.upper()} compiler {command} ({error}), which {what} needs: {packages}"
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no message"])[0]
        if "Python.h" in ran.stderr:  # of the system's Python
            packages = "apt-get install python3-dev"
        return f"has a {language.upper()} compiler that lacks headers ({reason}), which {what} needs: {packages}"
    return ""
