"""A run on Ray nodes in network namespaces of this machine, one of which loses its network for a while."""

import sys
from collections.abc import Iterator

import pytest

from jest_core import run_file
from pipelines.base import checkpoints
from pipelines.training import selection_log, train
from tests.hosts import Hosts, opened, wait_until


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with opened(3) as hosts:
        yield hosts


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_survives_a_node_cut_off_from_the_network(make_scored_run, tmp_path, hosts: Hosts):
    for i, n_cpus in enumerate((0, 3, 3)):
        hosts.start_ray(i, n_cpus)
    sizes = ["training.n_learners=2", "training.examples_trained=1280", "training.checkpoint_every_steps=5"]
    (tmp_path / "cut.yaml").write_text(run_file.dump(make_scored_run("cut", *sizes)))
    command = [sys.executable, "-m", "pipelines", "train", str(tmp_path / "cut.yaml")]
    cut = hosts.start(0, *command, RAY_ADDRESS=f"{hosts.address(0)}:6379")
    wait_until(lambda: len(hosts.learners()) == 2, cut)
    before = hosts.learners()
    wait_until(lambda: bool(checkpoints.steps(str(tmp_path / "cut"))), cut)
    host = next(iter(before.values()))
    hosts.link(host, "down")
    # the learners are started again on another node
    wait_until(lambda: any(pid not in before for pid in hosts.learners()), cut)
    hosts.link(host, "up")  # learners on the node that was cut off may still run, and write to the same files
    output, _ = cut.communicate(timeout=300)
    assert cut.returncode == 0, output

    train.run_stage(make_scored_run("undisturbed", *sizes))  # on the Ray of ray_session, whose network is not cut
    log = selection_log.read(str(tmp_path / "cut"))
    assert log.equals(selection_log.read(str(tmp_path / "undisturbed")))
