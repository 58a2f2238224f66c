"""What machines deliver, and which part limits: by arithmetic that is written out here once more."""

from dataclasses import replace
from importlib.resources import files

import pytest
import yaml

from jest_core import flops, run_file
from pipelines.planning import basis, cost_tables, flow, machines, sizes
from pipelines.planning.assumptions import Assumptions
from pipelines.planning.basis import Basis
from pipelines.planning.machines import Group, Machines
from pipelines.planning.sizes import Pairs
from pipelines.stream import read_ahead
from tests.deploy import kuberay

LAION = files("jest_deploy") / "runs" / "laion2b"
STORED = 25_000 + 3 * 256**2 + 4 * 16 + 4 * 768 + 200  # bytes in the object store


def load(name, *overrides):
    return run_file.load((LAION / f"{name}.yaml").read_text(), ["root=memory://nowhere/laion2b", *overrides])


FLEXI = load("flexi")
DATA, LEARNERS = Group("data", 14, 0, 0, 1, 64), Group("learners", 16, 8, 0, 0, 8)
CLUSTER = Machines("f", (DATA, LEARNERS))


GIVEN = Assumptions(flops_per_second=4e14, urls=10**9)


def training(run=FLEXI, manifest=None, pairs=None, machine=None, **assumed):
    given = Assumptions(**{"flops_per_second": 4e14, "urls": 10**9, **assumed})
    return flow.of_training(Basis(run, pairs, given, machine, manifest), set())


def test_all_cpus_of_the_cluster_read_but_the_learners_own():
    found = training(manifest=CLUSTER)
    assert found.readers.cpus == 64 * 14 + 8 * 16 - 64
    assert (found.readers.takers, found.readers.others, found.readers.receiving) == (8, 64, 8 * 4)
    assert found.readers.crossing == pytest.approx(1 - 8 / 960)
    assert training(load("flexi", "data.read_cpus=100"), CLUSTER).readers.cpus == 100
    assert training(load("flexi", "data.read_cpus=10"), CLUSTER).readers.cpus == 64  # one for each learner
    given = training(manifest=CLUSTER, cpus=96)
    assert (given.readers.cpus, given.readers.receiving, given.readers.others) == (96, 8 * 4, 64)
    assert given.readers.crossing == pytest.approx(1 - 8 / 96)
    assert training().readers.cpus is None
    unknown = Machines("f", (DATA, Group("learners", 0, 0, 0, 0, 8, known=False)))
    assert training(manifest=unknown).readers.cpus is None
    few = training(load("flexi", "training.n_learners=8"), CLUSTER)
    assert few.readers.takers == 1  # machines with GPUs that no learner needs are not started to read
    assert few.readers.cpus == 64 * 14 + 16 - 8


def test_the_reference_scores_with_all_cpus():
    found = flow.of_scoring(Basis(load("flexi", "data.read_cpus=100"), None, GIVEN, manifest=CLUSTER), set())
    assert found.readers.cpus == 64 * 14 + 8 * 16 - 64


def test_machines_are_limited_together():
    found = Machines("f", (DATA, LEARNERS), limit=20).placed(64, GPU=1, CPU=1)
    assert {each.group.name: each.n for each in found} == {"data": 12, "learners": 8}
    alone = Machines("f", (Group("all", 10, 0, 0, 0, 4),)).placed(6, GPU=0, CPU=1)
    assert [(each.n, each.workers, each.cpus_left) for each in alone] == [(4, 1.5, 8.5)]


@pytest.mark.parametrize(
    ("assumed", "limit", "rate"),
    [
        ({"read_cpu_ms": 0.01, "receive_ms": 0.001}, "computing", None),
        ({"read_cpu_ms": 2.0, "receive_ms": 0.01, "send_ms": 0.0}, "reading", 960 / 2e-3),
        ({"receive_ms": 1.0}, "Ray's transfer to the learners' machines", 32 * 1e3 / (STORED / 1e6 * (1 - 8 / 960))),
        ({"receive_ms": 1.0, "receive_threads": 2}, "Ray's transfer", 16 * 1e3 / (STORED / 1e6 * (1 - 8 / 960))),
        (
            {"learner_gbits": 10, "receive_ms": 0.01},
            "the network of the learners'",
            8 * 1.25e9 / STORED / (1 - 8 / 960),
        ),
        (
            {"data_gbits": 1, "receive_ms": 0.01},
            "the network of the data machines",
            64 * 1.25e8 / STORED / (1 - 8 / 960),
        ),
        ({"storage_gbits": 8, "receive_ms": 0.01}, "the storage", 1e9 / (25_000 + 4 * 768 + 64)),
        ({"copy_ms": 5, "receive_ms": 0.01}, "the learners' copies", 64 * 1e3 / (5 * STORED / 1e6)),
    ],
)
def test_the_slowest_part_limits(assumed, limit, rate):
    found = training(manifest=CLUSTER, **assumed)
    seen, computing = FLEXI.n_steps * FLEXI.super_batch_size, FLEXI.n_steps * flops.step_flops(FLEXI).total / 4e14 / 64
    assert found.limit.startswith(limit)
    assert found.words().startswith(f"limited by {limit}")
    assert found.computing == pytest.approx(computing)
    assert found.seconds == pytest.approx(seen / rate if rate else computing)
    assert found.needs["CPUs that read"] == pytest.approx(found.cpus_needed)


def test_stores_that_hold_too_few_windows_limit_reading():
    """0.4 of them, in windows of 1,024 examples: fewer windows than CPUs read at once."""
    small = Machines("f", (Group("data", 14, 0, 0, 1, 64, store_bytes=10**9), LEARNERS))
    found = training(manifest=small, receive_ms=0.01)
    windows = 0.4 * 64e9 / (1024 * STORED)
    assert windows < 960
    assert found.limit.startswith("Ray's object stores")
    assert found.limits[found.limit] == pytest.approx(found.limits["reading"] * windows / 960)


def test_stores_deliver_a_quarter_to_learners_of_whom_four_share_a_stream():
    small = Machines("f", (Group("data", 14, 0, 0, 1, 64, store_bytes=10**9), LEARNERS))

    def rate(streams, **assumed):
        found = training(load("flexi", f"data.n_streams={streams}"), small, send_ms=0.0, **assumed)
        return found.limits["Ray's object stores, which hold too few windows"]

    assert rate(16) == pytest.approx(rate(256) / 4)


def test_a_window_has_whole_row_groups_in_every_part_of_the_plan():
    large = Pairs(n_slots=10**9, n_rows=2 * 10**9, n_row_groups=10**5, mean_bytes=25_000)
    assert training(pairs=large).example.window_bytes == 10_000 * STORED
    streams = FLEXI.data.n_streams
    assert sizes.window_bytes(FLEXI, large) == pytest.approx(streams * 10_000 * STORED / (1 - read_ahead.STORE_SHARE))
    small = replace(large, n_row_groups=10**7)
    assert training(pairs=small).example.window_bytes == 1024 * STORED


def test_without_machines_the_cpus_that_would_do_are_named():
    found = training()
    assert found.seconds == found.computing
    assert "reading not known" in found.words()
    assert f"{found.cpus_needed:,.0f} CPUs would do" in found.words()


def test_the_laion_run_needs_at_most_16_cpus_for_a_gpu(tmp_path):
    """FlexiJEST++ on the cluster of kubernetes/gpus-64, at 4e14 FLOPs a second of each GPU."""
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump_all(kuberay.render(kuberay.MANIFESTS / "gpus-64")))
    manifest = machines.read(str(tmp_path / "cluster.yaml"))
    found = training(manifest=manifest)
    assert found.readers.cpus == 960
    assert found.readers.store_bytes == pytest.approx(64 * 2**34 + 8 * 2**36 + 0.3 * 20 * 2**30)
    assert found.cpus_needed / 64 < 16
    assert found.taken == pytest.approx(163_840 / (flops.step_flops(FLEXI).total / 4e14 / 64))


def test_both_stages_that_read_have_a_column(capsys):
    from rich.console import Console

    given = Basis(FLEXI, None, Assumptions(flops_per_second=4e14, urls=10**9), manifest=CLUSTER)
    assert basis.n_pairs(given, set()) == pytest.approx(0.68e9)
    found = flow.flows(given, set())
    assert list(found) == ["reference-scores", "train"]
    scoring = found["reference-scores"]
    assert scoring.example.store_bytes == 3 * 256**2 + 4 * 16 + 200
    assert scoring.taken == pytest.approx(4e14 * 64 / flops.forward_flops(FLEXI.reference.model).total)
    Console(width=160).print(cost_tables._reading(found))
    printed = capsys.readouterr().out
    for words in (
        "needs CPUs that read, for each worker",
        "kB a picture: in Ray's object stores",
        "train: limited by Ray's",
    ):
        assert words in printed


@pytest.mark.parametrize(("value", "words"), [(414_321, "410,000"), (76, "76"), (1_234, "1,200"), (99_999, "100,000")])
def test_rates_have_two_digits_that_count(value, words):
    assert flow.rounded(value) == words
