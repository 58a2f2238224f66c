"""The files in which the owners of a directory write who they are, and what these say of a process from here."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import psutil
from fsspec.implementations.local import LocalFileSystem

from . import storage

FOLDER = storage.OWNER
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Record(TypedDict):
    """The file of an owner. place: boot and process namespace, within which a process id means something."""

    id: str
    place: list[str]
    pid: int
    started: str  # of the process, in the unit of its system: another process of the same id has another
    host: str
    user: str
    command: str
    job: str  # of Slurm or Ray, where it is part of one
    since: str  # UTC
    lease: float  # seconds
    beats: int
    released: bool


def name_of(number: int) -> str:
    return f"{number:06d}.json"


def number_of(name: str) -> int:
    """The number of an owner's file; 0 of another."""
    stem = name.removesuffix(".json")
    return int(stem) if name.endswith(".json") and stem.isdecimal() else 0


def path_of(directory: str, number: int) -> str:
    return f"{directory}/{FOLDER}/{name_of(number)}"


def latest(directory: str) -> int:
    """The number of the latest owner; 0 where there was none. Not tried again: a write that asks is tried again."""
    return max(map(number_of, storage.names(f"{directory}/{FOLDER}")), default=0)


@storage.retried
def content(directory: str, number: int) -> bytes:
    """An owner's file; empty where it is gone."""
    try:
        return storage.read_bytes(path_of(directory, number)) if number else b""
    except FileNotFoundError:
        return b""


def parsed(content: bytes) -> Record | None:
    """What an owner's file says; None where it is not written yet, or is none."""
    try:
        found: Record = json.loads(content)
        return found if found.keys() >= Record.__annotations__.keys() else None
    except (ValueError, AttributeError):
        return None


@storage.retried
def create_only(path: str, data: bytes) -> None:
    """Write a file unless there is one. Who did it is in the file, as a request that is sent again may find its own."""
    fs, inner = storage.filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        try:
            fs.pipe_file(inner, data, mode="create")
        except Exception:  # each object storage has another kind for the status 412
            if not storage.exists(path):
                raise
        return
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    with contextlib.suppress(FileExistsError), open(inner, "xb", buffering=0) as file:
        try:
            file.write(data)
        except OSError:  # a full disk
            os.remove(inner)
            raise


def of_this_process(lease: float) -> Record:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may have no name for its user
        user = f"user {os.getuid()}"
    ray_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}
    jobs = {"Slurm": os.environ.get("SLURM_JOB_ID"), "Ray": ray_job.get("job_submission_id")}
    return {
        "id": uuid.uuid4().hex,
        "place": _place(),
        "pid": os.getpid(),
        "started": _process_state(os.getpid())[0],
        "host": socket.gethostname(),
        "user": user,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        "job": ", ".join(f"{kind} job {job}" for kind, job in jobs.items() if job),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "lease": lease,
        "beats": 0,
        "released": False,
    }


def described(record: Record) -> str:
    job = f", {record['job']}" if record["job"] else ""
    return (
        f"{record['user']} on {record['host']}, process {record['pid']} (`{record['command']}`{job}), since "
        f"{record['since']}"
    )


def _place() -> list[str]:
    """Which boot of which machine, and which namespace of process ids. Where only the name of a host is known, which
    other machines may have too, the process is part of it: nobody else is in the same place."""
    try:
        return [_BOOT_ID.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [f"{socket.gethostname()} {uuid.getnode():x}", str(psutil.boot_time())]


def _process_state(pid: int) -> tuple[str, str]:
    """When a process started, in a form that no change of the clock changes, and its state; empty where it is gone. Of
    a process that the system does not show to this user, only that: `hidden`."""
    try:
        if _BOOT_ID.exists():
            values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return (values[19], values[0]) if values[0] not in "ZXx" else ("", "")
        process = psutil.Process(pid)
        status = process.status()
        gone = status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return ("", "") if gone else (str(process.create_time()), "T" if status == psutil.STATUS_STOPPED else "")
    except (OSError, psutil.Error):
        return "", "hidden" if _is_anothers(pid) else ""


def _is_anothers(pid: int) -> bool:
    """Whether another user's process has this id: with /proc mounted as hidepid, only a signal finds out."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def state_of(record: Record, own: set[str]) -> str:
    """gone, runs, or unknown: what is known of an owner from here without watching it. own: ids of this process's."""
    if record["released"]:
        return "gone"
    if record["place"] != _place():
        return "unknown"
    started, state = _process_state(record["pid"])
    if state == "hidden":
        return "unknown"
    if started != record["started"] or (record["pid"] == os.getpid() and record["id"] not in own):
        return "gone"
    return "unknown" if state in ("T", "t") else "runs"
