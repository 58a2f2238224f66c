"""A Ray on this machine that one process starts for itself, and of which no process, socket or file stays behind."""

import contextlib
import logging
import os
import shutil
import signal
import threading
from pathlib import Path

import psutil

from . import tokens

_GIB = 1 << 30
_FOLDER = "jest-ray-"  # and the process id: the folder of its sockets and logs
_PATIENCE = 5.0  # seconds that Ray's processes get to end by themselves


def start(*, shown: bool) -> None:
    """Start it, and join it. shown: whether Ray's messages and the output of its workers are shown."""
    import ray

    os.environ.setdefault(
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
    )  # one process less, which watches for preempted nodes
    _remove_stale_folders()
    tokens.of_a_local_ray()
    cores = os.cpu_count() or 1
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        "local",  # never join a Ray that another program has started on this machine
        # more CPUs than there are: an actor pool that reserves all CPUs would leave none to the tasks that read for it,
        # and the pipeline would never start
        num_cpus=max(8, 2 * cores),
        include_dashboard=False,
        object_store_memory=local_object_store_bytes(),
        log_to_driver=shown,
        logging_level=logging.INFO if shown else logging.ERROR,
        _temp_dir=str(_folder()),
    )
    if on_sigterm is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has replaced the handler


def leave() -> None:
    """Leave it, and end all of its processes."""
    import ray

    processes = _own_processes()
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_PATIENCE)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_PATIENCE)
    _remove(_folder())


def is_own() -> bool:
    """Whether a local Ray that this process has started is running."""
    return _folder().exists()


def kill(name: str) -> None:
    """SIGKILL the processes of the local Ray that this process started whose command line contains `name`."""
    for process in _own_processes():
        if name in " ".join(_command(process)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _own_processes() -> list[psutil.Process]:
    """The servers of the local Ray that this process started, and the processes that those started."""
    folder, processes = str(_folder()), []
    for process in psutil.Process().children():
        if folder in " ".join(_command(process)):
            processes.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                processes += process.children(recursive=True)
    return processes


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _folder() -> Path:
    """The folder of the local Ray that this process starts. Short, because the paths of sockets have to be."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"{_FOLDER}{os.getpid()}"


def _remove(folder: Path) -> None:
    """Remove the folder of a local Ray whose command has ended, and end what is left of its processes: those that lost
    their parent, and hang."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if _is_left_of(folder, process):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _is_left_of(folder: Path, process: psutil.Process) -> bool:
    """Whether a process of that Ray has outlived the one that started it. The command line of a worker is its title;
    its logs are in the folder."""
    words = process.cmdline() or [""]
    if words[0].startswith("ray::"):
        return any(file.path.startswith(f"{folder}/") for file in process.open_files())
    return f"{folder}/" in " ".join(words) and process.ppid() == 1


def _remove_stale_folders() -> None:
    """Remove what is left of processes that were killed."""
    for folder in _folder().parent.glob(f"{_FOLDER}*"):
        pid = folder.name.removeprefix(_FOLDER)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(folder)


def local_object_store_bytes() -> int:
    """Size of the object store of a local Ray."""
    return int(min(2 * _GIB, 0.15 * psutil.virtual_memory().available))
