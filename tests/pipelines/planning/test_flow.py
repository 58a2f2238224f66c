"""What an example takes, what machines deliver of it, and which part limits: by arithmetic that is written out here
once more."""

from dataclasses import replace
from importlib.resources import files

import pytest
import yaml

from jest_core import flops, run_file
from pipelines.planning import basis, calibrate, cost_tables, flow, machines, reading, sizes, unit_costs
from pipelines.planning.assumptions import Assumptions
from pipelines.planning.basis import Basis
from pipelines.planning.calibrate import Machine
from pipelines.planning.machines import Group, Machines
from pipelines.planning.sizes import Pairs
from pipelines.stream import read_ahead
from pipelines.stream.read_costs import ReadCosts
from tests.deploy import kuberay

LAION = files("jest_deploy") / "runs" / "laion2b"
LATE = ("data.decode=late", "selection.score_image_size=128", "selection.score_patch_size=null")
STORED = 25_000 + 3 * 256**2 + 4 * 16 + 4 * 768 + 200  # bytes in the object store


def load(name, *overrides):
    return run_file.load((LAION / f"{name}.yaml").read_text(), ["root=memory://nowhere/laion2b", *overrides])


FLEXI = load("flexi")
WHOLE = unit_costs.decode_ms(FLEXI.data.decoder, 256, 256**2, 256, late=False)
DATA, LEARNERS = Group("data", 14, 0, 0, 1, 64), Group("learners", 16, 8, 0, 0, 8)
CLUSTER = Machines("f", (DATA, LEARNERS))


def training(run=FLEXI, manifest=None, pairs=None, machine=None, **assumed):
    given = Assumptions(**{"flops_per_second": 4e14, "urls": 10**9, **assumed})
    return flow.of_training(Basis(run, pairs, given, machine, manifest), set())


def test_an_example_is_decoded_tokenised_and_stored():
    found = training()
    assert found.example.cpu_ms == pytest.approx(
        {
            "decoding": WHOLE * 1.33,  # 256 by 341 pixels
            "tokens": unit_costs.TOKENS_MS,
            "reading": unit_costs.READ_MS,
            "cached scores": unit_costs.SCORES_MS * 768,
            "object store": unit_costs.STORE_MS * STORED / 1e6,
        }
    )
    assert found.example.store_bytes == STORED
    assert found.example.storage_bytes == 25_000 + 4 * 768 + 64
    assert found.example.requests == pytest.approx(6 / 1024)
    siglip = training(load("siglip")).example
    assert "cached scores" not in siglip.cpu_ms
    assert siglip.storage_bytes == 25_000


def test_sizes_of_pictures_come_from_ingest_the_catalogue_or_the_user():
    def decoding(*overrides, **assumed):
        return training(load("flexi", *overrides), **assumed).example.cpu_ms["decoding"]

    whole, resized = WHOLE, unit_costs.decode_ms(FLEXI.data.decoder, 512, 512**2, 256, late=False)
    assert decoding("ingest.resize_mode=center_crop") == pytest.approx(whole)
    assert decoding("ingest.image_size=512") == pytest.approx(1.33 * resized)
    assert decoding(picture_size=512, picture_aspect=1.0) == pytest.approx(resized)
    assert decoding("ingest=null") == pytest.approx(1.33 * resized)
    pairs = Pairs(n_slots=10**9, n_rows=2 * 10**9, n_row_groups=10**6, mean_bytes=9_000)
    found = training(pairs=pairs).example
    assert found.store_bytes == STORED - 16_000
    assert found.storage_bytes == 2 * (9_000 + 4 * 768 + 64)  # dropped rows are read with the others
    assert found.requests == pytest.approx(6 / 1000)  # each row group once for the 1,000 slots that it has


def test_late_decoding_is_small_and_the_learners_decode_the_selected_again():
    found = training(load("flexi", *LATE)).example
    assert found.cpu_ms["decoding"] < 0.8 * training().example.cpu_ms["decoding"]
    assert found.store_bytes == STORED - 3 * 256**2 + 3 * 128**2
    assert found.again_ms == pytest.approx(0.2 * WHOLE * 1.33)


def test_the_time_by_the_decoder_is_that_of_the_nearest_measured_picture():
    for point in unit_costs.DECODING:
        found = unit_costs.decode_ms(point.decoder, point.picture, point.picture**2, point.view, point.late)
        assert found == pytest.approx(point.ms)
    assert unit_costs.decode_ms("pillow", 1024, 1024**2, 256, late=False) == pytest.approx(4 * 3.6)
    kinds = {(point.decoder, point.kind) for point in unit_costs.DECODING}
    for decoder in {decoder for decoder, _ in kinds}:  # so that each picture has a nearest
        assert {(decoder, kind) for kind in ("late", "whole", "resized")} <= kinds


def measured(**reading):
    costs = {"cpu_ms": {"decoding": 2.0, "tokens": 0.1, "reading": 0.3}, "clock_ms": 3.0, "encoded_bytes": 9_000}
    return Machine(
        name="m",
        model=FLEXI.model.name,
        flops_per_second=dict.fromkeys(("score", "select", "train"), 4e14),
        seconds_per_example=2e-6,
        first_step_seconds=0.0,
        checkpoint_seconds=0.0,
        start_seconds=0.0,
        wait_seconds_per_example=1e-6,
        reading=ReadCosts(**costs | reading),
    )


SCORES_MS = unit_costs.SCORES_MS * 768
STORE_MS = unit_costs.STORE_MS * (STORED - 16_000) / 1e6  # of pictures as large as the measured ones
AS_FLEXI = {"decoder": FLEXI.data.decoder, "image_size": 256, "late": False, "stored_tokens": True, "width": 768}
AS_LATE = AS_FLEXI | {"image_size": 128, "late": True}


def test_a_measured_machine_and_a_given_time_take_the_place_of_the_table():
    machine = measured(**AS_FLEXI)
    found = training(machine=machine, cpus=100)
    parts = {"decoding": 2.0, "tokens": 0.1, "reading": 0.3 - SCORES_MS, "cached scores": SCORES_MS}
    assert found.example.cpu_ms == pytest.approx({**parts, "object store": STORE_MS})
    assert found.example.storage_bytes == 9_000 + 4 * 768 + 64
    assert training(machine=machine, read_cpu_ms=1.5).example.cpu_ms == {"all of it": 1.5}
    # what the measured machine waited for its own data is in no hours where the CPUs that read are known
    unknown = training(machine=machine)
    waited = FLEXI.n_steps * FLEXI.super_batch_size / 64 * 1e-6
    assert unknown.computing - found.computing == pytest.approx(waited)
    assert calibrate.predict(FLEXI, machine).total == pytest.approx(unknown.computing)


@pytest.mark.parametrize(
    ("costs", "run", "decoding", "tokens"),
    [
        (AS_LATE, load("flexi", *LATE), 2.0, 0.1),
        (AS_LATE, FLEXI, WHOLE * 1.33, 0.1),
        (AS_LATE | {"image_size": 64}, load("flexi", *LATE), None, 0.1),
        (AS_FLEXI, load("flexi", "data.decoder=pillow"), None, 0.1),
        (AS_FLEXI, load("siglip"), 2.0, unit_costs.TOKENS_MS),  # whose tokens do not come with scores
        (AS_FLEXI | {"stored_tokens": False}, load("siglip"), 2.0, 0.1),
        ({}, FLEXI, WHOLE * 1.33, 0.1),  # a file of an earlier version
    ],
)
def test_each_part_is_the_measured_one_only_where_the_run_reads_so(costs, run, decoding, tokens):
    found, table = (training(run, machine=machine).example for machine in (measured(**costs), None))
    assert found.cpu_ms["decoding"] == pytest.approx(decoding or table.cpu_ms["decoding"])
    assert found.cpu_ms["tokens"] == tokens
    assert found.store_bytes == table.store_bytes - 16_000
    named = reading.assumed_by(found, Assumptions())
    assert ("picture_size" in named) == (found.again_ms > 0 or decoding != 2.0)
    assert ("tokens_ms" in named) == (tokens != 0.1)
    assert "shard_ms" not in named


def test_a_late_calibration_says_nothing_of_scoring_but_what_reading_costs():
    def example(machine):
        return reading.of_scoring(FLEXI, None, Assumptions(), machine)

    found, table = example(measured(**AS_LATE)), example(None)
    assert found.cpu_ms == pytest.approx(dict(table.cpu_ms) | {"reading": 0.3 - SCORES_MS})
    assert found.store_bytes == table.store_bytes
    assert example(measured(**AS_FLEXI)).cpu_ms["decoding"] == 2.0


def test_the_selected_are_decoded_again_as_they_were_measured():
    assert training(load("flexi", *LATE), machine=measured(**AS_FLEXI)).example.again_ms == pytest.approx(0.2 * 2.0)


def test_learners_that_share_a_stream_read_its_windows_each():
    def times(n, streams):
        return (
            training(load("flexi", f"training.n_learners={n}", f"data.n_streams={streams}")).example.store_bytes
            / STORED
        )

    assert times(64, 256) == times(64, 64) == 1
    assert times(64, 16) == pytest.approx(4)
    assert times(64, 32) == pytest.approx(2)
    slots = range(163_840)
    pairs = {(i * 64 // len(slots), i * 40 // len(slots)) for i in slots}  # a learner and a stream from which it takes
    assert times(64, 40) == pytest.approx(len(pairs) / 40)


def test_all_cpus_of_the_cluster_read_but_the_learners_own():
    found = training(manifest=CLUSTER)
    assert found.readers.cpus == 64 * 14 + 8 * 16 - 64
    assert (found.readers.takers, found.readers.others, found.readers.receiving) == (8, 64, 8 * 4)
    assert found.readers.crossing == pytest.approx(1 - 8 / 960)
    assert training(load("flexi", "data.read_cpus=100"), CLUSTER).readers.cpus == 100
    assert training(manifest=CLUSTER, cpus=96).readers.cpus == 96
    assert training().readers.cpus is None
    unknown = Machines("f", (DATA, Group("learners", 0, 0, 0, 0, 8, known=False)))
    assert training(manifest=unknown).readers.cpus is None
    few = training(load("flexi", "training.n_learners=8"), CLUSTER)
    assert few.readers.takers == 1  # machines with GPUs that no learner needs are not started to read
    assert few.readers.cpus == 64 * 14 + 16 - 8


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


def test_what_a_plan_assumes_of_an_example_is_named():
    example = reading.of_training(FLEXI, None, Assumptions(), None)
    assert {"picture_size", "tokens_ms"} <= reading.assumed_by(example, Assumptions())
    assert "picture_size" not in reading.assumed_by(example, Assumptions(read_cpu_ms=1.0))
    assert example.window_bytes == 1024 * STORED
