"""The command line: exit statuses, errors, help and options."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipelines import __main__ as main
from pipelines import errors
from pipelines.base import cluster
from pipelines.commands import arguments
from tests.conftest import RUN


def jest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | environment,
    )


@pytest.fixture
def run_file(tmp_path, shards):
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(root=tmp_path, name="joint", shards=shards))
    return str(path)


def test_an_error_sets_the_exit_status():
    out = jest("train", "nowhere.yaml")
    assert (out.returncode, out.stderr) == (2, "jest: no run file at nowhere.yaml\n")


def test_ray_does_not_start_by_itself():
    """Importing any module of ours turns it off: a prefetching thread of a stopped run would start another Ray."""
    code = "import pipelines.base.storage, ray._private.auto_init_hook as hook; print(hook.enable_auto_connect)"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ENABLE_AUTO_CONNECT"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout == "False\n"


def test_help_names_every_stage():
    out = jest("--help")
    assert out.returncode == 0
    for stage in ("plan", "catalogue", "reference-scores", "train", "evaluate", "report", "demo"):
        assert stage in out.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no run file at nowhere.yaml"),
        (["train", "RUN", "--set", "selection.n_chunks=5"], "not a multiple of selection.n_chunks 5"),
        (["train", "RUN", "--set", "selection.nchunks=4"], "selection.nchunks is not a key"),
        (["train", "RUN", "--set", "@nowhere.yaml"], "no file at nowhere.yaml"),
        (["train", "RUN", "--set", "@RUN", "--set", "selection.n_chunks=5"], "not a multiple of selection.n_chunks 5"),
        (["catalogue", "RUN", "--set", "data.shards=nothing/*.parquet"], "no shard at"),
        (["reference-scores", "RUN"], "run `jest catalogue` first"),
        (["evaluate", "RUN"], "no `evaluation` part"),
        (["report", "nowhere"], "no finished train"),
    ],
)
def test_errors_print_one_clear_line_and_set_the_exit_status(
    run_file: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["jest", *(a.replace("RUN", run_file) for a in arguments)])
    monkeypatch.setattr(cluster, "disconnect", lambda: None)  # the Ray of this process is that of other tests too
    with pytest.raises(SystemExit) as ended:
        main.main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in printed
    assert "Traceback" not in printed


def test_without_credentials_storage_says_so(run_file: str):
    out = jest("catalogue", run_file, "--set", "root=s3://bucket/x", "--set", "data.shards=a.parquet")
    assert (out.returncode, out.stderr) == (2, "jest: Unable to locate credentials\n")


def test_a_run_file_is_utf_8_text(run_file, tmp_path):
    text, copy = Path(run_file).read_text(), tmp_path / "copy.yaml"
    copy.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())  # as Windows' editors write it
    assert arguments.load(copy, ["seed=3"]) == arguments.load(Path(run_file), ["seed=3"])
    changes = tmp_path / "changes.yaml"
    for file, overrides in ((copy, None), (changes, None), (Path(run_file), [f"@{changes}"])):
        for path in (copy, changes):
            path.write_bytes(b"# caf\xe9\nseed: 1\n")
        with pytest.raises(
            ValueError, match=r"(copy|changes)\.yaml is not UTF-8 text, at its byte 5: save it as UTF-8"
        ):
            arguments.load(file, overrides)
    with copy.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte, of which the disk has nothing
    with pytest.raises(ValueError, match=r"copy\.yaml has 134,217,729 characters, and a run file 33,554,432 at most"):
        arguments.load(copy, None)


def test_version_names_the_package_and_its_main_dependencies():
    out = jest("--version").stdout
    assert re.fullmatch(r"jest \d\S* \(Python 3\.\d+\.\d+\S*, torch \S+, ray \S+, open_clip_torch \S+\)\n", out)


@pytest.mark.parametrize(
    "arguments", [["--traceback", "train", "nowhere.yaml"], ["train", "nowhere.yaml", "--traceback"]]
)
def test_the_traceback_is_shown_with_the_option(arguments: list[str]):
    out = jest(*arguments)
    assert out.returncode == 2
    assert out.stderr.startswith("Traceback")
    assert out.stderr.endswith("\njest: no run file at nowhere.yaml\n")


def report_error(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    return reported(error, capsys)[1]


def reported(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status, and what is printed."""
    try:
        raise error
    except Exception as raised:
        return errors.report(raised), capsys.readouterr().err


def test_the_traceback_of_an_unexpected_error_is_saved(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    printed = report_error(KeyError("x"), capsys)
    assert printed.startswith("jest: unexpected KeyError: 'x'\n  traceback saved to ")
    (saved,) = tmp_path.iterdir()
    assert str(saved) in printed
    assert "raise error" in saved.read_text()
    assert report_error(ValueError("a wrong setting"), capsys) == "jest: a wrong setting\n"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert "raise error" in report_error(KeyError("x"), capsys)
    assert [*tmp_path.iterdir()] == [saved]


def test_the_traceback_is_shown_with_the_environment_variable(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("JEST_TRACEBACK", "1")
    assert re.fullmatch(
        rf"(?s)Traceback .*raise error.*\njest: unexpected KeyError: 'x'\n  {AGAIN}\n",
        report_error(KeyError("x"), capsys),
    )
    monkeypatch.setenv("JEST_TRACEBACK", "0")
    assert report_error(ValueError("a wrong setting"), capsys) == "jest: a wrong setting\n"
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("ray_session")
def test_an_error_in_a_ray_data_task_is_shown_without_rays_wrapper(run_file, shards, tmp_path):
    """Ray wraps our error in one of its own, whose message does not name the cause. The first shard is read before."""
    (tmp_path / "both").mkdir()
    shutil.copy(f"{shards}/00000.parquet", tmp_path / "both" / "00000.parquet")
    (tmp_path / "both" / "broken.parquet").write_bytes(b"no Parquet file at all")
    out = jest("catalogue", run_file, "--set", f"data.shards={tmp_path}/both")
    assert out.returncode == 2
    assert re.fullmatch(r"jest: \S+broken.parquet is damaged, or is not Parquet: .*\n", out.stderr)


def test_of_failed_learners_the_root_cause_is_shown(capsys):
    failures = {
        0: "Traceback ...\nRuntimeError: [gloo] Connection closed by peer [10.0.0.2]",
        1: "pyarrow.lib.ArrowInvalid: magic\nValueError: shard 7 is damaged\nray.exceptions.RayError: task",
    }
    failed = RuntimeError("training failed")
    failed.__cause__ = WorkerGroupError("workers failed", {rank: Exception(text) for rank, text in failures.items()})
    last = "correct this first: the same command would fail again"
    assert report_error(failed, capsys) == f"jest: training failed\n  ValueError: shard 7 is damaged\n  {last}\n"


AGAIN = "the same command may be tried again, and goes on from what is done"
IN_VAIN = "correct this first: the same command would fail again"
KILLED = "a process was killed: the system had no memory left for it, or its machine went away"


def of_learners(failure: Exception) -> Exception:
    """As `jest train` raises it: of a learner in this process, or of Ray Train's workers."""
    error = RuntimeError("the learners failed; /run keeps what they finished")
    error.__cause__ = failure
    return error


def in_worker(error: Exception) -> Exception:
    try:
        raise error
    except Exception as raised:
        return WorkerGroupError("rank 0", {0: UserExceptionWithTraceback(raised, traceback.format_exc())})


MISSING, FULL = ModuleNotFoundError("No module named 'x'"), OSError(28, "No space left on device")
NO_MEMORY = OutOfMemoryError("Task was killed due to the node running low on memory.\nSee docs")
DIED = WorkerGroupError("rank 0", {0: WorkerHealthCheckFailedError("failed", ActorDiedError())})
SAVED = "traceback saved to "


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ValueError("seed = -1"), 2, ["seed = -1"]),
        (PermissionError(13, "Permission denied", "/x"), 2, ["[Errno 13] Permission denied: '/x'"]),
        (NotADirectoryError(20, "Not a directory", "/x"), 2, ["[Errno 20] Not a directory: '/x'"]),
        (NoCredentialsError(), 2, ["Unable to locate credentials"]),
        (FULL, 1, ["[Errno 28] No space left on device", AGAIN]),
        (ConnectionResetError("reset"), 1, ["reset", AGAIN]),
        (EndpointConnectionError(endpoint_url="x"), 1, ['Could not connect to the endpoint URL: "x"', AGAIN]),
        (RuntimeError("it hangs; the same command goes on"), 1, ["it hangs; the same command goes on"]),
        (MemoryError("64 GB"), 1, ["unexpected MemoryError: 64 GB", SAVED, AGAIN]),
        *((killed, 1, [KILLED, AGAIN]) for killed in (ActorDiedError(), WorkerCrashedError(), NO_MEMORY)),
        (of_learners(MISSING), 2, ["ModuleNotFoundError: No module named 'x'", SAVED, IN_VAIN]),
        (of_learners(in_worker(MISSING)), 2, ["ModuleNotFoundError: No module named 'x'", IN_VAIN]),
        (of_learners(FULL), 1, ["OSError: [Errno 28] No space left", AGAIN]),
        (of_learners(in_worker(FULL)), 1, ["OSError: [Errno 28] No space left", AGAIN]),
        (of_learners(KeyError("x")), 1, ["KeyError: 'x'", SAVED, AGAIN]),
        (of_learners(in_worker(KeyError("x"))), 1, ["KeyError: 'x'", AGAIN]),
        (of_learners(DIED), 1, [KILLED, AGAIN]),
        (of_learners(ControllerError(WorkerGroupStartupTimeoutError(2))), 1, ["The worker group startup", AGAIN]),
    ],
    ids=repr,
)
def test_the_status_says_whether_to_try_again_and_the_last_line_how(
    error, status, lines, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found, printed = reported(error, capsys)
    assert found == status
    if isinstance(error, RuntimeError) and error.__cause__:
        lines = ["the learners failed; /run keeps what they finished", *lines]
    assert printed.startswith("jest: ")
    for line, start in zip(printed.removeprefix("jest: ").splitlines(), lines, strict=True):
        assert line.strip().startswith(start)
    assert not {line for line in printed.splitlines() if "ray." in line}


def test_an_error_of_a_ray_task_has_the_status_of_what_the_task_raised(capsys):
    for failure, status in ((FileNotFoundError("no part 3"), 2), (TimeoutError("no answer"), 1)):
        wrapped = RayTaskError("read", f"Traceback\n{type(failure).__name__}: {failure}", failure)
        found, printed = reported(wrapped.as_instanceof_cause(), capsys)
        assert (found, printed.splitlines()[0]) == (status, f"jest: {failure}")


def test_ctrl_c_before_the_command_begins_says_how_to_go_on(monkeypatch, capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "jest: stopped; the same command goes on from what is done\n"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "run.yaml", "--log-level", "warning", "--traceback"],
        ["--log-level", "warning", "train", "--traceback", "run.yaml"],
    ],
)
def test_global_options_may_follow_the_command(words):
    assert main._global_options_first(words) == ["--log-level", "warning", "--traceback", "train", "run.yaml"]


def test_a_log_level_is_one_of_four():
    assert "set it to debug, info, warning, error" in jest("plan", "nowhere.yaml", JEST_LOG_LEVEL="loud").stderr
    assert "'--log-level'" in jest("plan", "nowhere.yaml", "--log-level=loud").stderr
