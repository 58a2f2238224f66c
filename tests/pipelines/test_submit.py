import pytest

from pipelines import submit


def test_invalid_submissions_are_refused_at_once(make_run):
    run = make_run("joint")
    with pytest.raises(ValueError, match="evaluates: no such stage; the stages are ingest catalogue"):
        submit.submit(run, ["evaluates"], "http://127.0.0.1:1", {})
    with pytest.raises(ValueError, match=r"--env AWS_SECRET_ACCESS_KEY: .* credentials belong into the environment"):
        submit.submit(run, ["train"], "http://127.0.0.1:1", {"AWS_SECRET_ACCESS_KEY": "x"})
    with pytest.raises(ConnectionError):
        submit.submit(run, ["train"], "http://127.0.0.1:1", {"WANDB_MODE": "offline"})


def test_a_retry_that_is_asked_for_is_one_of_the_job():
    assert (
        submit.entrypoint(["train", "report"], again=False) == "python -m jest_pipelines stages train report run.yaml"
    )
    again = submit.entrypoint(["train"], again=True)
    assert again == "python -m jest_pipelines stages --retry train run.yaml"
