"""What a calibration keeps where a part of it fails, or where it is of an earlier version."""

import json

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


def test_a_machine_file_of_an_earlier_version_is_read(tmp_path, capsys):
    file = tmp_path / "machine.json"
    old = {"name": "m", "model": "x", "flops_per_second": {"train": 1.0}, "seconds_per_example": 1.0}
    old |= dict.fromkeys(("first_step_seconds", "checkpoint_seconds", "start_seconds"), 0.0)
    file.write_text(json.dumps(old))
    assert calibrate.read(str(file)).reading is None
    assert not capsys.readouterr().out
    parts = {"decoding": 2.0, "tokens": 0.1, "reading": 0.3}
    old["reading"] = {"cpu_ms": parts, "clock_ms": 3.0, "encoded_bytes": 9_000, "store_bytes": 78_000}
    file.write_text(json.dumps(old))
    assert calibrate.read(str(file)).reading.encoded_bytes == 9_000
    assert "does not say how it decoded: calibrate again" in capsys.readouterr().out
