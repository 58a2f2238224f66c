"""An error that ends a command -> the line that its user reads; its traceback is shown where asked for, or saved."""

import os
import re
import sys
import tempfile
import traceback


def report(error: Exception) -> None:
    """One line on stderr, the last one. The traceback comes before it where JEST_TRACEBACK asks for it; else that of an
    error which is none of a file, a setting or a machine is saved, and the line names the file."""
    whole = "".join(traceback.format_exception(error))
    if asked := os.environ.get("JEST_TRACEBACK", "0") not in ("", "0"):
        print(whole, file=sys.stderr)
    if _is_expected(error):
        raised = getattr(error, "cause", error)  # what a Ray task raised, without the stack of its worker
        why = f"\n  {_reason(error.__cause__)}" if error.__cause__ and raised is error else ""
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
    """What is at the root of an error of the learners, which Ray passes on as text: the first line that names an error
    that is not Ray's own, else the last line."""
    failures = getattr(error, "worker_failures", {})  # of Ray Train: rank -> what that learner raised
    text = "\n".join(str(e) for e in [*failures.values(), error])
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception): ", line)]
    return named[0] if named else lines[-1]
