"""The command line: exit statuses, errors, help and options."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipelines import __main__ as main
from pipelines import errors
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
    assert (out.returncode, out.stderr) == (1, "jest: no run file at nowhere.yaml\n")


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
        (["catalogue", "RUN", "--set", "root=s3://bucket/x", "--set", "data.shards=a.parquet"], "locate credentials"),
    ],
)
def test_errors_print_one_clear_line_and_set_the_exit_status(run_file: str, arguments: list[str], message: str):
    out = jest(*(a.replace("RUN", run_file) for a in arguments))
    assert out.returncode == 1
    assert message in out.stderr
    assert "Traceback" not in out.stderr


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
    with pytest.raises(ValueError, match=r"copy\.yaml has 16,777,217 characters, and a run file 4,194,304 at most"):
        arguments.load(copy, None)


def test_version_names_the_package_and_its_main_dependencies():
    out = jest("--version").stdout
    assert re.fullmatch(r"jest \d\S* \(Python 3\.\d+\.\d+\S*, torch \S+, ray \S+, open_clip_torch \S+\)\n", out)


@pytest.mark.parametrize(
    "arguments", [["--traceback", "train", "nowhere.yaml"], ["train", "nowhere.yaml", "--traceback"]]
)
def test_the_traceback_is_shown_with_the_option(arguments: list[str]):
    out = jest(*arguments)
    assert out.returncode == 1
    assert out.stderr.startswith("Traceback")
    assert out.stderr.endswith("\njest: no run file at nowhere.yaml\n")


def report_error(error: Exception, capsys: pytest.CaptureFixture[str]) -> str:
    try:
        raise error
    except Exception as raised:
        errors.report(raised)
    return capsys.readouterr().err


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
        r"(?s)Traceback .*raise error.*\njest: unexpected KeyError: 'x'\n", report_error(KeyError("x"), capsys)
    )
    monkeypatch.setenv("JEST_TRACEBACK", "0")
    assert report_error(ValueError("a wrong setting"), capsys) == "jest: a wrong setting\n"
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("ray_session")
def test_an_error_in_a_ray_data_task_is_shown_without_rays_wrapper(run_file, tmp_path):
    """Ray wraps our error in one of its own, whose message does not name the cause."""
    (tmp_path / "broken.parquet").write_bytes(b"no Parquet file at all")
    out = jest("catalogue", run_file, "--set", f"data.shards={tmp_path}/broken.parquet")
    assert out.returncode == 1
    assert re.fullmatch(r"jest: \S+broken.parquet is damaged, or is not Parquet: .*\n", out.stderr)


def test_of_failed_learners_the_root_cause_is_shown(capsys):
    class WorkerGroupError(RuntimeError):
        worker_failures = {  # noqa: RUF012
            0: "Traceback ...\nRuntimeError: [gloo] Connection closed by peer [10.0.0.2]",
            1: "pyarrow.lib.ArrowInvalid: magic\nValueError: shard 7 is damaged\nray.exceptions.RayError: task",
        }

    failed = RuntimeError("training failed")
    failed.__cause__ = WorkerGroupError("workers failed")
    assert report_error(failed, capsys) == "jest: training failed\n  ValueError: shard 7 is damaged\n"


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
