import json
import re

import pytest

from jest_core.run_file import Run
from pipelines import in_vain
from pipelines.base import node_checks, owner, storage
from pipelines.in_vain import NAME, VARIABLE, remembered


@pytest.fixture
def submission(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "a")


def _fail(run: Run, error: Exception, *, stages: tuple[str, ...] = ("train",), retry: bool = False) -> None:
    with pytest.raises(type(error), match=re.escape(str(error))), remembered(run, stages, retry=retry):
        raise error


def test_a_retry_of_what_failed_in_vain_does_nothing_and_says_why(make_run, submission):
    run = make_run("joint")
    _fail(run, FileNotFoundError("no shard at there/*.parquet"))
    tried = False
    with (
        pytest.raises(ValueError, match=r"(?s)fail again: no shard at .*--retry") as raised,
        remembered(run, ["train"]),
    ):
        tried = True
    assert not tried
    assert storage.exists(f"{run.path('joint')}/{NAME}")
    with pytest.raises(ValueError, match="would fail again") as again, remembered(run, ["train"]):
        pass
    assert str(again.value) == str(raised.value)  # the refusal itself is not remembered


@pytest.mark.parametrize(
    "changed", ["run file", "stages", "submission", "version", "retry", "no submission", "removed"]
)
def test_anything_else_than_that_retry_is_tried(make_run, submission, monkeypatch, changed):
    run, stages, retry = make_run("joint"), ["train"], changed == "retry"
    _fail(run, ValueError("wrong"))
    path = f"{run.path('joint')}/{NAME}"
    match changed:
        case "run file":
            run = make_run("joint", "training.learning_rate=2.0e-3")
        case "stages":
            stages = ["catalogue", "train"]
        case "submission":
            monkeypatch.setenv(VARIABLE, "b")
        case "version":
            monkeypatch.setattr(in_vain.metadata, "version", lambda _: "9.9")
        case "no submission":
            monkeypatch.delenv(VARIABLE)
        case "removed":
            storage.remove(path)
    with remembered(run, stages, retry=retry):
        tried = True
    assert tried
    assert not storage.exists(path)


@pytest.mark.parametrize("error", [RuntimeError("killed"), OSError("lost"), PermissionError("an expired credential")])
def test_what_may_be_mended_from_outside_is_not_remembered(make_run, submission, error):
    run = make_run("joint")
    _fail(run, error)
    assert not storage.exists(f"{run.path('joint')}/{NAME}")


def test_nodes_that_lack_something_are_not_remembered(make_run, submission):
    run = make_run("joint")
    _fail(run, node_checks.Unfit("gpu-3 has no C compiler"))
    assert not storage.exists(f"{run.path('joint')}/{NAME}")


def test_the_next_try_that_has_taken_over_is_not_refused(make_run, submission):
    """The learners of the one before say that the directory is lost, and nothing else would make them go on."""
    run = make_run("joint")
    directory = run.path(run.run_dir)
    with owner.owned(directory) as before:
        token = before.token
    with owner.owned(directory), pytest.raises(storage.Lost, match="was taken over by") as lost:
        token.check()
    _fail(run, ValueError(f"the run stopped: {lost.value}"))
    assert not storage.exists(f"{directory}/{NAME}")


def test_without_a_submission_nothing_is_remembered(make_run, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    run = make_run("joint")
    _fail(run, ValueError("wrong"))
    assert not storage.exists(f"{run.path('joint')}/{NAME}")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"submission": "a"}'])
def test_a_damaged_record_is_none(make_run, submission, content):
    run = make_run("joint")
    storage.write_bytes(f"{run.path('joint')}/{NAME}", content)
    with remembered(run, ["train"]):
        tried = True
    assert tried


def test_the_directory_can_be_begun_afterwards(make_run, submission):
    """By train, which refuses a directory of another run."""
    from pipelines.training import run_directory

    run = make_run("joint")
    _fail(run, ValueError("wrong"))
    assert json.loads(storage.read_bytes(f"{run.path('joint')}/{NAME}"))["error"] == "wrong"
    assert run_directory.refuse_other(run) is None
