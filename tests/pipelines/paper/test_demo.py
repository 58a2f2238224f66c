"""All stages on object storage, as `jest demo --smoke --root s3://...` runs them; then one run with two learners."""

import json

import pytest

from pipelines.base import storage
from pipelines.paper import demo
from pipelines.reports import comparison
from pipelines.training import selection_log, train


@pytest.mark.long
@pytest.mark.timeout(900)
def test_smoke_demo_on_s3_and_two_learners(s3, ray_session, capsys):
    root, options = f"{s3}/demo", {"data": "small", "smoke": True, "seeds": 1, "n_learners": 1}
    demo.run_demo(root=root, **options)
    out = capsys.readouterr().out
    for name in ("reference", "uniform-seed0", "independent-seed0", "joint-seed0"):
        run = comparison.read_run(f"{root}/{name}")
        assert run.manifest["complete"]
        assert run.run.training.n_learners == 1
        assert {line["key"] for line in run.results} >= {"fluent-flat/emoji_name", "clipart/retrieval"}
    joint, uniform = (comparison.read_run(f"{root}/{name}-seed0").manifest for name in ("joint", "uniform"))
    assert joint["examples_trained"] == uniform["examples_trained"]
    assert (joint["flops_score"] + joint["flops_train"]) / uniform["flops_train"] == pytest.approx(8 / 3, rel=0.001)
    assert len(selection_log.read(f"{root}/joint-seed0")) > 0
    assert "examples trained" in out
    page = storage.read_bytes(f"{root}/report.html").decode()
    assert "joint-seed0" in page
    assert "<script>" in page
    demo.run_demo(root=root, **options)
    assert "already at" in capsys.readouterr().out
    assert json.loads(storage.read_bytes(f"{root}/joint-seed0/manifest.json")) == joint

    # --n-learners applies to every run; two learners, as workers of Ray Train on S3, select like one
    runs = demo._load("small", root, smoke=True, n_learners=2, seed=0)
    assert {run.training.n_learners for run in runs.values()} == {2}
    two = runs["joint"].model_copy(update={"run_dir": "two"})
    train.run_stage(two)
    assert comparison.read_run(f"{root}/two").run.training.n_learners == 2
    logs = [selection_log.read(f"{root}/{name}") for name in ("two", "joint-seed0")]
    first, other = ({r["uid"] for r in log.to_pylist() if r["selected"] and r["step"] == 0} for log in logs)
    assert len(first & other) >= 0.9 * len(other) > 0
    assert sorted(set(logs[0]["step"].to_pylist())) == list(range(two.n_steps))
