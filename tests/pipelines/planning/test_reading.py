"""What an example takes, by arithmetic that is written out here once more."""

import pytest

from pipelines.planning import calibrate, reading, unit_costs
from pipelines.planning.assumptions import Assumptions
from pipelines.planning.calibrate import Machine
from pipelines.planning.sizes import Pairs
from pipelines.stream.read_costs import ReadCosts
from tests.pipelines.planning.test_flow import FLEXI, STORED, load, training

LATE = ("data.decode=late", "selection.score_image_size=128", "selection.score_patch_size=null")
WHOLE = unit_costs.decode_ms(FLEXI.data.decoder, 256, 256**2, 256, late=False)


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


def test_what_a_plan_assumes_of_an_example_is_named():
    example = reading.of_training(FLEXI, None, Assumptions(), None)
    assert {"picture_size", "tokens_ms"} <= reading.assumed_by(example, Assumptions())
    assert "picture_size" not in reading.assumed_by(example, Assumptions(read_cpu_ms=1.0))
    assert example.window_bytes == 1024 * STORED
