"""Stages of a run as one job of a Ray cluster, through Ray's job API.

This checkout's code, the user's scorers and the resolved run file travel with the job. Its stages run one after the
other, and each does only what is missing: the same submission again goes on where a job stopped.
"""

import asyncio
import logging
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from tenacity import (
    retry,
    retry_if_exception_message,
    retry_if_exception_type,
    stop_after_attempt,
    wait_fixed,
)

import jest_core
from jest_core import run_file
from jest_core.run_file import Run

from . import errors
from .base import progress, tokens, user_code
from .stages import named, refuse

_POLL_SECONDS = 2.0
# A cluster that has just started answers so, each time after ten seconds of its own
_when_ready = retry(
    retry=retry_if_exception_message(match=".*try again later"),
    wait=wait_fixed(_POLL_SECONDS),
    stop=stop_after_attempt(6),
    reraise=True,
)
# A job goes on for days, and the way to its cluster may be gone for minutes
_patiently = retry(
    retry=retry_if_exception_type(OSError), wait=wait_fixed(10.0), stop=stop_after_attempt(60), reraise=True
)
_SECRET = re.compile("(^|_)(KEY|SECRET|TOKEN|PASSWORD|CREDENTIALS?)(_ID)?$", re.IGNORECASE)


def submit(
    run: Run, stages: list[str], address: str, env: dict[str, str], *, detach: bool = False, again: bool = False
) -> None:
    """Submit the stages, show the job's log, and end as it does: RuntimeError where it fails or is stopped.

    again: although the same failed in vain before. Refuses a second job on a run directory that another job works on.
    """
    _refuse(run, stages, env)
    client, directory = _client(address), run.path(run.run_dir)
    for job in client.list_jobs():
        if job.metadata and job.metadata.get("jest") == directory and not job.status.is_terminal():
            raise ValueError(
                f"job {job.submission_id} works on {directory}: follow it with --logs, or end it with --stop"
            )
    with tempfile.TemporaryDirectory() as folder:
        for name, package in (("jest_core", Path(jest_core.__file__)), ("jest_pipelines", Path(__file__))):
            _copy(package.resolve().parent, Path(folder, name))
        for code in user_code.to_send(each.scorer for each in (run.reference.scorers if run.reference else [])):
            _copy(code, Path(folder, code.name))
        Path(folder, "run.yaml").write_text(run_file.dump(run))
        job = _when_ready(client.submit_job)(
            entrypoint=entrypoint(stages, again=again),
            runtime_env={"working_dir": folder, "env_vars": env},
            metadata={"jest": directory, "stages": " ".join(stages)},
        )
    progress.say("submit", f"job {job}: {' '.join(stages)} of {directory}")
    if detach:
        progress.say("submit", f"jest submit --logs {job} --address {address} follows it; --status and --stop as well")
    else:
        follow(job, address)


def entrypoint(stages: Sequence[str], *, again: bool) -> str:
    """The command of the job."""
    words = ["python", "-m", "jest_pipelines", "stages", *["--retry"] * again, *stages, "run.yaml"]
    return shlex.join(words)


def _copy(code: Path, into: Path) -> None:
    """A module's file, or a package's folder."""
    if code.is_dir():
        shutil.copytree(code, into, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    else:
        shutil.copy(code, into)


def variables(words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, ... -> variables of a job's environment. Raises ValueError where one has no `=`."""
    pairs = [word.partition("=") for word in words]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"--env {bad[0]!r} has no '=': give NAME=VALUE")
    return {name: value for name, _, value in pairs}


def status(job: str, address: str) -> str:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; printed with the message of the cluster."""
    info = _client(address).get_job_info(job)
    progress.console.print(f"submit: job {job}: {info.status.value}. {info.message or ''}", markup=False)
    return str(info.status.value)


def stop(job: str, address: str) -> None:
    """Ask the job to end, and wait until it has. A run that trains writes a checkpoint first, where the cluster gives
    it the time (RAY_JOB_STOP_WAIT_TIME_S)."""
    client = _client(address)
    client.stop_job(job)
    _wait(client, job)
    status(job, address)


def follow(job: str, address: str) -> None:
    """Show the job's log to its end. Raises RuntimeError where it does not succeed, ValueError where it never would."""
    client = _client(address)
    try:
        asyncio.run(_tail(client, job))
    except KeyboardInterrupt:
        progress.say("submit", f"job {job} goes on; jest submit --logs {job} --address {address} follows it again")
        raise
    except (OSError, RuntimeError, aiohttp.ClientError) as error:
        client.get_job_status(job)  # raises where there is no job of that name
        progress.warn("submit", f"the log of job {job} broke off ({error}); waiting for its end")
    _wait(client, job)
    info = client.get_job_info(job)
    if info.status.value != "SUCCEEDED":
        why = (info.message or "no reason given").partition(", last available logs")[0]  # they have been shown
        ended = f"job {job} {info.status.value}: {why}"
        if info.driver_exit_code == errors.IN_VAIN:
            raise ValueError(f"{ended}; correct what its log says first: it would fail again")
        raise RuntimeError(f"{ended}; the same command submits it again, and it goes on from what is done")
    progress.say("submit", f"job {job} SUCCEEDED")


def _wait(client: Any, job: str) -> None:
    """Until the job has ended."""
    while not _patiently(client.get_job_status)(job).is_terminal():
        time.sleep(_POLL_SECONDS)


async def _tail(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _refuse(run: Run, stages: list[str], env: dict[str, str]) -> None:
    refuse(run, named(stages))
    if secrets := [name for name in env if _SECRET.search(name)]:
        raise ValueError(
            f"--env {', '.join(secrets)}: whoever may look at the cluster can read a job's variables; credentials "
            "belong into the environment of its nodes"
        )
    if "://" not in run.root:
        progress.warn("submit", f"root {run.root} is a path: every node of the cluster has to see the same files there")


def _client(address: str) -> Any:
    try:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
        if address.startswith(("http://", "https://")):
            tokens.agree_with_dashboard(address)
        return JobSubmissionClient(address)
    except ImportError as error:
        raise ValueError("`jest submit` speaks to Ray's dashboard: pip install jest[cluster]") from error
    except ConnectionError:
        raise ConnectionError(
            f"no Ray dashboard answers at {address}: correct --address or RAY_API_SERVER_ADDRESS, or forward its port: "
            "kubectl port-forward service/NAME-head-svc 8265, or ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from None
