"""An error that ends a command -> the line that its user reads; its traceback is shown where asked for, or saved."""

import os
import re
import sys
import tempfile
import traceback

# What a learner raises when another one has failed, and its collective finds nobody
_LOST_ANOTHER = re.compile(r"(?i)gloo|nccl|DistBackendError|connection (closed|reset)|broken pipe")


def report(error: Exception) -> None:
    """One line on stderr, the last one. The traceback comes before it where JEST_TRACEBACK asks for it; else that of an
    error which is none of a file, a setting or a machine is saved, and the line names the file."""
    whole = "".join(traceback.format_exception(error))
    if asked := os.environ.get("JEST_TRACEBACK", "0") not in ("", "0"):
        print(whole, file=sys.stderr)
    if _is_expected(error):
        raised = getattr(error, "cause", error)  # what a Ray task raised, without the stack of its worker
        why = f"\n  {_reason(error.__cause__)}" if error.__cause__ and raised is error else ""
        if type(raised).__name__ == "UserCodeException":  # of a task of Ray Data, whose error it has as text alone
            raised = re.sub(r"^(ValueError|\w*\.?OSError|RuntimeError|FileNotFoundError): ", "", _reason(error))
        print(f"jest: {raised}{why}", file=sys.stderr)
        return
    line = f"jest: unexpected {type(error).__name__}: {error}"
    print(line if asked else f"{line}\n  {_saved(whole)}", file=sys.stderr)


def _saved(whole: str) -> str:
    """Where the traceback is, to be read; the traceback itself where it cannot be saved."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="jest-traceback-", suffix=".txt", delete=False) as file:
            file.write(whole)
    except OSError:
        return whole
    return f"traceback saved to {file.name}; JEST_TRACEBACK=1 shows it here; please report it if jest is at fault"


def _is_expected(error: Exception) -> bool:
    """Of the user's files, settings or machines; the libraries of object storage and Ray have roots of their own."""
    roots = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, (ValueError, OSError, RuntimeError)) or not roots.isdisjoint({"botocore", "ray"})


def _reason(error: BaseException) -> str:
    """The error of the code that failed on a worker, which Ray passes on as text."""
    failures = getattr(error, "worker_failures", {})  # of Ray Train: rank -> what that learner raised
    reasons = [_last_error(str(failure)) for failure in [*failures.values(), error]]
    return next((reason for reason in reasons if not _LOST_ANOTHER.search(reason)), reasons[0])


def _last_error(trace: str) -> str:
    """The last line that names an error which is not one of Ray's, as those are raised from it; else the last line."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()] or ["no message"]
    named = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception): ", line)]
    return named[-1] if named else lines[-1]
