"""A score cache made despite SIGKILL at random points, or with failing storage, equals an undisturbed one."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jest_core import run_file
from jest_core.models import towers
from jest_core.run_file import Run
from pipelines.base import checkpoints, storage
from pipelines.data import catalogue
from pipelines.scores import reference_scores
from tests.commands import Command, bursts, command, finish, write
from tests.conftest import POOL, RUN
from tests.faults import FaultyProxy

pytestmark = [pytest.mark.timeout(1800), pytest.mark.usefixtures("all_cores")]
N_SHARDS = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hundred small shards and a reference, for runs in separate processes."""
    folder = tmp_path_factory.mktemp("survives")
    table = pq.read_table(POOL / "00000.parquet")
    (folder / "shards").mkdir()
    for i in range(N_SHARDS):
        pq.write_table(table.slice(20 * i, 20), folder / "shards" / f"{i:05d}.parquet")
    model = towers.create("jest-tiny", seed=5).model
    checkpoints.write(str(folder / "reference"), 1, {"state_dict": model.state_dict()})
    return folder


def run_in(folder: Path, scores: str, *overrides: str) -> Run:
    """A run over the folder's shards."""
    text = RUN.format(root=folder, name=f"run-{Path(scores).name}", shards=folder / "shards")
    return run_file.load(text, [f"reference.scores={scores}", *overrides])


def parts(directory: str) -> dict[str, bytes]:
    """All files among the parts, by name: a half-written file left by a kill would show too."""
    return {name: storage.read_bytes(f"{directory}/parts/{name}") for name in storage.names(f"{directory}/parts")}


@pytest.mark.chaos
def test_twenty_kills_at_random_points_give_the_same_cache(folder, ray_session, tmp_path):
    """SIGKILL to one embedding process, which Ray starts again, or to all processes, as when a machine is lost."""
    undisturbed, killed = (run_in(folder, name, "reference.n_actors=1") for name in ("undisturbed", "killed"))
    catalogue.run_stage(undisturbed)
    reference_scores.run_stage(undisturbed)
    expected = parts(str(folder / "undisturbed"))
    assert len(expected) == N_SHARDS
    rng, reached, directory = random.Random(0), [], str(folder / "killed")
    todo = bursts({"MapWorker": 12, "all": 8}, rng)

    def start() -> Command:
        return Command(tmp_path / "log", *command("reference-scores", write(killed, tmp_path)))

    def n_parts() -> int:
        return len(storage.names(f"{directory}/parts", ".parquet"))

    def runs_until(happened: Callable[[], bool]) -> bool:
        while scoring.process.poll() is None:
            if happened():
                return True
            time.sleep(0.05)
        return False

    scoring = start()
    while todo:
        after, burst = n_parts() + rng.randint(1, 12), todo.pop()
        while burst and runs_until(lambda after=after: n_parts() >= after):
            time.sleep(rng.uniform(0, 2))
            if burst[-1] == "all":
                if scoring.process.poll() is not None:
                    break
                scoring.kill()
                scoring = start()
            elif not runs_until(partial(scoring.kill_one, "MapWorker", rng)):
                break
            reached.append(n_parts())
            burst.pop()
        if burst:  # scoring ended before the kills: start it again from the beginning
            assert scoring.process.returncode == 0, scoring.output
            assert parts(directory) == expected
            storage.remove_tree(directory)
            scoring = start()
            todo.append(burst)
    with scoring:
        assert scoring.exit_status() == 0, scoring.output
    print(f"parts that were there at each of {len(reached)} kills: {reached}")
    assert parts(directory) == expected
    manifests = [storage.read_json(f"{folder}/{name}/manifest.json") for name in ("undisturbed", "killed")]
    assert manifests[0] == manifests[1]
    assert not storage.exists(f"{directory}/fragments")
    assert sum(0 < n < N_SHARDS for n in reached) >= 15


@pytest.mark.long
def test_a_storage_that_fails_one_request_in_ten_gives_the_same_cache(folder, s3_server, s3, ray_session, tmp_path):
    root = f"{s3}/{folder.name}"
    for path in sorted((folder / "shards").iterdir())[:40]:
        storage.write_bytes(f"{root}/shards/{path.name}", path.read_bytes())
    storage.write_bytes(
        f"{root}/reference/checkpoints/step_00000001.pt",
        (folder / "reference" / "checkpoints" / "step_00000001.pt").read_bytes(),
    )
    settings = [f"root={root}", f"data.shards={root}/shards/*.parquet"]
    undisturbed, faulty = run_in(folder, "s3-undisturbed", *settings), run_in(folder, "s3-faulty", *settings)
    catalogue.run_stage(undisturbed)
    reference_scores.run_stage(undisturbed)
    proxy = FaultyProxy(s3_server.url, {"503": 0.03, "500": 0.02, "slow": 0.03, "reset": 0.02})
    try:
        output = finish(*command("reference-scores", write(faulty, tmp_path)), AWS_ENDPOINT_URL=proxy.url)
    finally:
        proxy.close()
    print(dict(proxy.counts), output)
    assert min(proxy.counts[name] for name in ("503", "500", "slow", "reset")) >= 3
    assert parts(f"{root}/s3-faulty") == parts(f"{root}/s3-undisturbed")
    catalogue.open_catalogue(f"{root}/catalogue")
