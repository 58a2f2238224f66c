"""Two `jest train` on one run directory."""

import signal
import sys
from pathlib import Path

import pytest

from jest_core import run_file
from pipelines.base import checkpoints
from pipelines.training import selection_log
from tests.commands import Command, write

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

SHORT_LEASE = "from pipelines.base import owner; owner.LEASE = 3.0; from pipelines.__main__ import main; main()"


def files(folder: Path) -> dict[str, int]:
    """All files of a run directory but the owner's, and when each was written."""
    inside = (path for path in folder.rglob("*") if path.is_file() and "owner" not in path.parts)
    return {str(path): path.stat().st_mtime_ns for path in inside}


def test_a_second_command_is_refused_and_follows_one_that_is_stopped_which_then_writes_nothing(
    make_scored_run, tmp_path
):
    settings = ["training.examples_trained=960", "training.checkpoint_every_steps=1"]
    run = run_file.load(run_file.dump(make_scored_run("joint")), settings)
    directory = Path(run.path(run.run_dir))
    words = [sys.executable, "-c", SHORT_LEASE, "train", str(write(run, tmp_path))]
    with Command(tmp_path / "first", *words) as first:
        first.wait_until((directory / "owner").exists)
        with Command(tmp_path / "refused", *words) as second:
            assert second.exit_status() == 1
            assert f"process {first.process.pid} (`" in second.output
        first.wait_for_step(run)
        first.process.send_signal(signal.SIGSTOP)
        with Command(tmp_path / "second", *words) as second:
            assert second.exit_status() == 0, second.output
            assert "looks for 3 s whether" in second.output
        before = files(directory)
        first.process.send_signal(signal.SIGCONT)
        assert first.exit_status() == 1, first.output
        assert "was taken over by" in first.output.splitlines()[-2]
        assert files(directory) == before
    assert checkpoints.steps(str(directory))[-1] == run.n_steps
    assert selection_log.read(str(directory))["step"].to_pylist()[-1] == run.n_steps - 1
