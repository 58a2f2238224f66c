"""`make chaos`: one run is killed again and again, and ends as a quiet one does."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jest_core import config as run_files
from jest_core import towers
from jest_core.config import Run
from pipelines import checkpoints, learner, selection_log, storage
from tests.faults import FaultyProxy

N_KILLS = 20
SEED = int(os.environ.get("JEST_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
VICTIMS = {  # what each process calls itself
    "learner": lambda p: "RayTrainWorker" in " ".join(p.cmdline()),
    "data worker": lambda p: "MapBatches" in " ".join(p.cmdline()),
}


class Driver:
    """`jest train` in a process of its own, started again where it died."""

    def __init__(self, run_file: Path, log: Path, **environment: str) -> None:
        self.command, self.log = [sys.executable, "-m", "pipelines", "train", str(run_file)], log
        self.environment = os.environ | environment
        self.start()

    def start(self) -> None:
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, env=self.environment
            )

    def family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self, victim: str) -> bool:
        """SIGKILL one such process; whether there was one."""
        if victim == "driver":
            family = self.family()
            self.process.kill()
            self.process.wait()
            _, alive = psutil.wait_procs(family, timeout=120)
            assert not alive, f"orphans of a killed driver: {alive}"
            self.start()
            return True
        found = [p for p in self.family() if _is(p, victim)]
        if not found:
            return False
        found[0].send_signal(signal.SIGKILL)
        return True


def _is(process: psutil.Process, victim: str) -> bool:
    try:
        return VICTIMS[victim](process)
    except psutil.Error:
        return False


@pytest.mark.chaos
@pytest.mark.timeout(2400)
def test_a_run_under_twenty_kills_ends_as_a_quiet_one(make_scored_run, tmp_path, s3_server, s3):
    """And under an S3 server that fails one request in fifty, in four ways."""
    print(f"JEST_CHAOS_SEED={SEED}")
    rng = random.Random(SEED)
    run: Run = make_scored_run("joint")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3}/chaos/{path.relative_to(tmp_path)}", path.read_bytes())
    proxy = FaultyProxy(s3_server.url, dict.fromkeys(("503", "500", "slow", "reset"), 0.005), seed=SEED)
    steps = [
        f"root={s3}/chaos",
        "training.examples_trained=12800",
        "training.checkpoint_every_steps=10",
        "training.max_failures=-1",
    ]
    quiet = run_files.load(run_files.dump(run), ["run_dir=quiet", *steps])
    killed = run_files.load(run_files.dump(run), ["run_dir=killed", *steps])
    run_file = tmp_path / "killed.yaml"
    run_file.write_text(run_files.dump(killed))
    driver = Driver(run_file, tmp_path / "driver.log", AWS_ENDPOINT_URL=proxy.url)
    directory, landed = killed.path("killed"), []
    victims = [*["learner"] * 7, *["data worker"] * 7, *["driver"] * 6]
    rng.shuffle(victims)
    for victim in victims:
        reached = (checkpoints.steps(directory) or [0])[-1]
        while (checkpoints.steps(directory) or [0])[-1] <= reached:  # it has to come further between two kills
            assert driver.process.poll() is None, (tmp_path / "driver.log").read_text()
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 1))
        while not driver.kill(victim):
            assert driver.process.poll() is None, f"over after {landed}: make the run longer"
            time.sleep(0.01)
        landed.append(victim)
        print(f"{victim} killed after step {checkpoints.steps(directory)[-1]} of {killed.n_steps}", flush=True)
    family = driver.family()
    assert driver.process.wait(timeout=900) == 0, (tmp_path / "driver.log").read_text()
    assert len(landed) >= N_KILLS
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive
    proxy.close()
    print(f"requests: {dict(proxy.counts)}", flush=True)
    assert min(proxy.counts[name] for name in ("503", "500", "slow", "reset")) >= 3
    kept = {f"{prefix}{name}" for name in selection_log.committed(directory) for prefix in ("", "steps-")}
    assert set(storage.names(f"{directory}/selection")) == kept

    learner.run_stage(quiet, in_process=True)
    for read in (selection_log.read, selection_log.read_steps):
        assert read(directory).equals(read(quiet.path("quiet")))
    losses = [
        [line["train/loss"] for line in selection_log.read_metrics(where)] for where in (directory, quiet.path("quiet"))
    ]
    assert losses[0] == losses[1]
    weights = []
    for each in (quiet, killed):
        towers.load_weights(pair := towers.create("jest-tiny", seed=9), checkpoints.read(each.path(each.run_dir)))
        weights.append(towers.weights_hash(pair.model))
    assert weights[0] == weights[1]
