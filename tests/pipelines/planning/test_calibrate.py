"""What a calibration keeps where a part of it fails, or where it is of an earlier version."""

import pytest

from jest_core import run_file
from pipelines.planning import calibrate
from tests.conftest import RUN
from tests.pipelines.training.test_bottleneck import line


def test_rates_are_kept_where_reading_cannot_be_measured(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    run = run_file.load(RUN.format(root=tmp_path, name="joint", shards=tmp_path))
    lines = [line(step, score=0.5, select=0.25, train=0.5, checkpoint=0.0) for step in range(6)]
    monkeypatch.setattr(calibrate.train, "run_stage", lambda run, label: None)
    monkeypatch.setattr(calibrate.metrics_line, "read", lambda directory: lines)

    def fails(run):
        raise OSError("the bucket is gone")

    monkeypatch.setattr(calibrate.read_costs, "measure", fails)
    machine = calibrate.measure_into(run, str(tmp_path / "machine.json"))
    assert machine.reading is None
    assert set(machine.flops_per_second) == {"score", "select", "train"}
    assert calibrate.read(str(tmp_path / "machine.json")) == machine
    assert "without what reading costs" in (said := capsys.readouterr().out)
    assert "the bucket is gone" in said
