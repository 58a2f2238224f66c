"""A failure that would come again, remembered in the run directory for the retries of one submission.

Some schedulers start a job again whatever its exit status was; a RayJob brings up a whole cluster for that. Where they
set JEST_SUBMISSION, to a value that retries share and another submission has not, `jest stages` writes down what failed
in vain, and a retry with the same run file ends at once.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TypedDict

from jest_core import run_file
from jest_core.run_file import Run

from . import errors
from .base import storage

VARIABLE = "JEST_SUBMISSION"
NAME = "failed_in_vain.json"
# A credential may be renewed from outside, a node replaced
_NOT_REMEMBERED = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "Unfit"}
_LOST = "writes nothing more there"  # what storage.Lost says; as the learners' failure it is text alone


class Failure(TypedDict):
    """failed_in_vain.json. run: SHA-256 of the resolved run file. jest: the version. when: UTC."""

    submission: str
    run: str
    stages: list[str]
    jest: str
    when: str
    error: str


@contextlib.contextmanager
def remembered(run: Run, stages: Sequence[str], *, retry: bool = False) -> Iterator[None]:
    """Remember how the block fails, if it would fail again. Raises ValueError where it did, in this submission.

    retry: forget that.
    """
    path, submission = f"{run.path(run.run_dir)}/{NAME}", os.environ.get(VARIABLE, "")
    this = Failure(
        submission=submission,
        run=storage.fingerprint(run_file.dump(run)),
        stages=list(stages),
        jest=metadata.version("jest"),
        when=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        error="",
    )
    if (before := _read(path)) is not None:
        if submission and not retry and _same(before, this):
            raise ValueError(
                f"the same stages of the same run file failed at {before['when']}, and would fail again: "
                f"{before['error']}\n  This retry of submission {submission} does nothing. Correct the run file; or "
                f"what the error names, and then set another value of {VARIABLE}, give --retry, or remove {path}"
            )
        with contextlib.suppress(Exception):  # of storage that cannot be written: the stages say so
            storage.remove(path)
    try:
        yield
    except Exception as error:
        if submission and _is_for_good(error):
            with contextlib.suppress(Exception):  # the error itself matters more
                storage.write_json(path, {**this, "error": errors.message(error)})
        raise


def _is_for_good(error: Exception) -> bool:
    """Whether only another run file, or other data, mends it. Another process that has taken over the run directory is
    the next try of the same submission."""
    if errors.status_of(error) != errors.IN_VAIN or _LOST in str(error):
        return False
    return not errors.kinds(error) & _NOT_REMEMBERED


def _read(path: str) -> Failure | None:
    with contextlib.suppress(Exception):  # not there, or not readable: nothing is remembered
        failure: Failure = storage.read_json(path)
        return failure if isinstance(failure, dict) and Failure.__required_keys__ <= failure.keys() else None
    return None


def _same(before: Failure, this: Failure) -> bool:
    return all(before[key] == this[key] for key in ("submission", "run", "stages", "jest"))
