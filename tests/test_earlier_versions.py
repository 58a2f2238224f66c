"""Files of earlier versions can still be read and runs resumed.

earlier/2026-11-27.zip has shards, a catalogue, a score cache and a finished run of four steps below s3://jest/earlier,
as written by the version of that day, whose packages were two flat folders.
"""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from jest_core import run_file
from pipelines.base import checkpoints, manifests, storage
from pipelines.data import catalogue
from pipelines.reports import report
from pipelines.training import metrics_line, selection_log, train

EARLIER = Path(__file__).parent / "earlier" / "2026-11-27.zip"


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_read_extended_and_reported(s3, ray_session, tmp_path):
    with zipfile.ZipFile(EARLIER) as archive:
        for name in archive.namelist():
            storage.write_bytes(f"{s3}/earlier/{name}", archive.read(name))
    text = storage.read_bytes(f"{s3}/earlier/run.yaml").decode()
    run = run_file.load(text)
    directory = run.path(run.run_dir)
    fingerprint = manifests.read(run.path("catalogue"))["fingerprint"]
    assert catalogue.run_stage(run).manifest["fingerprint"] == fingerprint
    assert train.run_stage(run, in_process=True)["steps"] == 4
    picks = selection_log.read(directory)
    assert len(picks.filter(picks["selected"])) == 4 * 16

    longer = run_file.load(text, ["training.examples_trained=128", "reference.n_actors=null"])
    assert train.run_stage(longer, in_process=True)["steps"] == 8
    assert checkpoints.steps(directory) == [8]
    logged = selection_log.read(directory)
    assert logged.filter(np.array(logged["step"]) < 4).equals(picks)
    assert selection_log.read_steps(directory)["step"].to_pylist() == list(range(8))
    assert [line["step"] for line in metrics_line.read(directory)] == list(range(1, 9))

    report.write_report([directory], str(tmp_path / "report.html"))
    assert "learnability" in (tmp_path / "report.html").read_text()
