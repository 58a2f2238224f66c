"""The score cache after SIGKILL at random points, and through a storage that fails, equals one made in peace."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from jest_core import config as run_files
from jest_core import towers
from pipelines import catalogue, checkpoints, storage
from tests.conftest import POOL, RUN
from tests.faults import FaultyProxy

pytestmark = pytest.mark.timeout(1800)
N_SHARDS, N_KILLS = 100, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hundred small shards and a reference, for runs in processes of their own."""
    folder = tmp_path_factory.mktemp("survives")
    table = pq.read_table(POOL / "00000.parquet")
    (folder / "shards").mkdir()
    for i in range(N_SHARDS):
        pq.write_table(table.slice(20 * i, 20), folder / "shards" / f"{i:05d}.parquet")
    model = towers.create("jest-tiny", seed=5).model
    checkpoints.write(str(folder / "reference"), 1, {"state_dict": model.state_dict()})
    return folder


def run_in(folder: Path, scores: str, *overrides: str) -> Path:
    """A run file over the folder's shards."""
    run = run_files.load(
        RUN.format(root=folder, name="joint", shards=folder / "shards"), [f"reference.scores={scores}", *overrides]
    )
    path = folder / f"{Path(scores).name}.yaml"
    path.write_text(run_files.dump(run))
    return path


def command(stage: str, run_file: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines", stage, str(run_file)]


def finish(stage: str, run_file: Path, **environment: str) -> str:
    done = subprocess.run(
        command(stage, run_file), capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill(process: subprocess.Popen) -> None:
    """The whole session at once, as when a machine goes: driver, Ray, its workers."""
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


def parts(directory: str) -> dict[str, bytes]:
    """All that is in the folder: what a kill leaves half written must be gone too."""
    return {name: storage.read_bytes(f"{directory}/parts/{name}") for name in storage.names(f"{directory}/parts")}


@pytest.mark.endurance
def test_twenty_kills_at_random_points_cost_nothing(folder):
    quiet, killed = run_in(folder, "quiet"), run_in(folder, "killed")
    finish("catalogue", quiet)
    began = time.monotonic()
    finish("reference-scores", quiet)
    whole_seconds = time.monotonic() - began
    expected = parts(str(folder / "quiet"))
    assert len(expected) == N_SHARDS
    draw, reached, directory = random.Random(0), [], str(folder / "killed")
    while len(reached) < N_KILLS:
        process = subprocess.Popen(
            command("reference-scores", killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait = time.monotonic() + draw.uniform(0.45, 0.8) * whole_seconds
        while time.monotonic() < wait and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is None:
            kill(process)
            reached.append(len(storage.names(f"{directory}/parts", ".parquet")))
        else:
            assert process.returncode == 0
            assert parts(directory) == expected
            storage.remove_tree(directory)  # and once more from the beginning
    finish("reference-scores", killed)
    print(f"parts that were there after each of {N_KILLS} kills: {reached}")
    assert parts(directory) == expected
    manifests = [storage.read_json(f"{folder}/{name}/manifest.json") for name in ("quiet", "killed")]
    assert manifests[0] == manifests[1]
    assert not storage.exists(f"{directory}/fragments")
    assert any(0 < n < N_SHARDS for n in reached)


@pytest.mark.long
def test_a_storage_that_fails_one_request_in_ten_loses_nothing(folder, s3_server, s3):
    root = f"{s3}/{folder.name}"
    for path in sorted((folder / "shards").iterdir())[:40]:
        storage.write_bytes(f"{root}/shards/{path.name}", path.read_bytes())
    storage.write_bytes(
        f"{root}/reference/checkpoints/step_00000001.pt",
        (folder / "reference" / "checkpoints" / "step_00000001.pt").read_bytes(),
    )
    settings = [f"root={root}", f"data.shards={root}/shards/*.parquet"]
    quiet, faulty = run_in(folder, "s3-quiet", *settings), run_in(folder, "s3-faulty", *settings)
    finish("catalogue", quiet)
    finish("reference-scores", quiet)
    proxy = FaultyProxy(s3_server.url, {"503": 0.03, "500": 0.02, "slow": 0.03, "reset": 0.02})
    try:
        said = finish("reference-scores", faulty, AWS_ENDPOINT_URL=proxy.url)
    finally:
        proxy.close()
    print(dict(proxy.counts), said)
    assert min(proxy.counts[name] for name in ("503", "500", "slow", "reset")) >= 3
    assert parts(f"{root}/s3-faulty") == parts(f"{root}/s3-quiet")
    catalogue.open_catalogue(f"{root}/catalogue")
