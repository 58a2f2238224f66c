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
