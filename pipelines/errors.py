"""An error that ends a command -> the lines that its user reads, and the exit status; its traceback, shown or saved."""

import builtins
import os
import re
import sys
import tempfile
import traceback

AGAIN, IN_VAIN = 1, 2  # exit statuses: the same command may be tried again, or would fail again
# A setting, a file, a permission or a package, which is the same when the command comes again; the last are botocore's
_WRONG = {"ValueError", "ImportError", "FileNotFoundError", "FileExistsError", "PermissionError"}
_WRONG |= {
    "Damaged",  # ours, as text: what a worker raised has no base classes there
    "Diverged",
    "IsADirectoryError",
    "NotADirectoryError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
}
_OURS = r"(?:jest_)?(?:pipelines|core)\.[\w.]+"  # names of our own classes of errors
# What a learner raises when another one has failed, and its collective finds nobody
_LOST_ANOTHER = re.compile(r"(?i)gloo|nccl|DistBackendError|connection (closed|reset)|broken pipe")
# What Ray says, in many lines, of a process that ended without an error of its own
_KILLED = re.compile(
    r"(?i)actor (died|is dead)|worker (process )?(died|has died|crashed)|node .*(died|dead)|OutOfMemory|low on memory"
)


def report(error: Exception) -> int:
    """Lines on stderr, the last ones: what is wrong, why, and how to go on; returns the exit status.

    The traceback comes before them where JEST_TRACEBACK asks for it; else that of an error which is none of a file, a
    setting or a machine is saved, and a line names the file."""
    whole = "".join(traceback.format_exception(error))
    if asked := os.environ.get("JEST_TRACEBACK", "0") not in ("", "0"):
        print(whole, file=sys.stderr)
    status = status_of(error)
    lines, foreseen = _lines(error, status)
    if not (foreseen or asked):
        lines.insert(-1 if status == IN_VAIN else len(lines), _saved(whole))
    if status == AGAIN and "same command" not in lines[0]:
        lines.append("the same command may be tried again, and goes on from what is done")
    print("jest: " + "\n  ".join(lines), file=sys.stderr)
    return status


def status_of(error: Exception) -> int:
    """The exit status that it ends a command with."""
    return IN_VAIN if _WRONG & kinds(error) else AGAIN


def message(error: Exception) -> str:
    """What is wrong, and why, as `report` shows it."""
    return "; ".join(_lines(error, status_of(error))[0])


def _lines(error: Exception, status: int) -> tuple[list[str], bool]:
    """What is wrong, and why; and whether it is of the user's files, settings or machines."""
    raised, cause, foreseen = getattr(error, "cause", error), error.__cause__, _is_expected(error)
    if not foreseen:
        lines = [f"unexpected {type(error).__name__}: {error}"]
    elif _is_rays(raised):
        lines = [re.sub(rf"^({_OURS}|ValueError|\w*\.?OSError|RuntimeError|FileNotFoundError): ", "", _reason(error))]
    elif cause is None or raised is not error or str(cause) in str(error):  # else its cause is the stack of a worker
        lines = [str(raised)]
    else:
        lines, foreseen = [str(error), _reason(cause)], _is_expected(cause)
        if type(error) is RuntimeError and status == IN_VAIN:
            lines.append("correct this first: the same command would fail again")
    return lines, foreseen


def kinds(error: BaseException) -> set[str]:
    """Names of an error's class and of those that it inherits from; of what a worker raised, where it wraps that."""
    if type(error) is RuntimeError and error.__cause__ is not None:
        return kinds(error.__cause__)
    raised = getattr(error, "cause", error)  # of a Ray task
    if _is_rays(raised):
        name = _reason(error).partition(":")[0].rpartition(".")[2]
        return {name} | {each.__name__ for each in getattr(getattr(builtins, name, None), "__mro__", ())}
    return {each.__name__ for each in type(raised).__mro__}


def _saved(whole: str) -> str:
    """Where the traceback is, to be read; the traceback itself where it cannot be saved."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="jest-traceback-", suffix=".txt", delete=False) as file:
            file.write(whole)
    except OSError:
        return whole
    return f"traceback saved to {file.name}; JEST_TRACEBACK=1 shows it here; please report it if jest is at fault"


def _is_expected(error: BaseException) -> bool:
    """Of the user's files, settings or machines; the libraries of object storage and Ray have roots of their own."""
    return isinstance(error, (ValueError, OSError, RuntimeError)) or bool({"botocore", "ray"} & _roots(error))


def _is_rays(error: BaseException) -> bool:
    """Whether it is an error of Ray's own, which has what a worker raised as text alone."""
    return "ray" in _roots(error)


def _roots(error: BaseException) -> set[str]:
    return {kind.__module__.partition(".")[0] for kind in type(error).__mro__}


def _reason(error: BaseException) -> str:
    """The error of the code that failed, here or on a worker, from which Ray passes it on as text."""
    failures = getattr(error, "worker_failures", {})  # of Ray Train: rank -> what that learner raised
    if not (failures or _is_rays(error)):
        return f"{type(error).__name__}: {error}"
    reasons = [_last_error(str(failure)) for failure in [*failures.values(), error]]
    return next((reason for reason in reasons if not _LOST_ANOTHER.search(reason)), reasons[0])


def _last_error(trace: str) -> str:
    """The last line that names an error which is not one of Ray's, as those are raised from it; else what Ray says."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()] or ["no message"]
    named = [line for line in lines if re.match(rf"(?!ray\.)({_OURS}|[\w.]*(Error|Exception)): ", line)]
    if not named and _KILLED.search(trace):
        return "a process was killed: the system had no memory left for it, or its machine went away"
    return named[-1] if named else lines[-1]
