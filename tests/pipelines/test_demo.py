"""The whole chain on object storage, with two learners, as `jest demo --smoke --root s3://...` runs it."""

import json

import pytest

from pipelines import comparison, demo, selection_log, storage


@pytest.mark.long
@pytest.mark.timeout(900)
def test_smoke_demo_on_s3_with_two_learners(s3, ray_session, capsys):
    root = f"{s3}/demo"
    demo.run_stage(data="small", root=root, smoke=True, seeds=1, n_learners=2)
    out = capsys.readouterr().out
    for name in ("reference", "uniform-seed0", "independent-seed0", "joint-seed0"):
        run = comparison.read_run(f"{root}/{name}")
        assert run.manifest["complete"]
        assert run.run.training.n_learners == 2
        assert {line["key"] for line in run.results} >= {"fluent-flat/emoji_name", "clipart/retrieval"}
    joint, uniform = (comparison.read_run(f"{root}/{name}-seed0").manifest for name in ("joint", "uniform"))
    assert joint["examples_trained"] == uniform["examples_trained"]
    assert (joint["flops_score"] + joint["flops_train"]) / uniform["flops_train"] == pytest.approx(8 / 3, rel=0.001)
    assert len(selection_log.read(f"{root}/joint-seed0")) > 0
    assert "examples trained" in out
    page = storage.read_bytes(f"{root}/report.html").decode()
    assert "joint-seed0" in page
    assert "<script>" in page
    demo.run_stage(data="small", root=root, smoke=True, seeds=1, n_learners=2)
    assert "already at" in capsys.readouterr().out
    assert json.loads(storage.read_bytes(f"{root}/joint-seed0/manifest.json")) == joint
