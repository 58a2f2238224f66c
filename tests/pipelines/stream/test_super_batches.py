import pickle
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tenacity import stop_after_attempt

from jest_core import run_file
from jest_core.models import configurations, towers
from pipelines.base import storage
from pipelines.data import catalogue
from pipelines.stream import super_batches, windows
from pipelines.stream.source import open_source

SIZE = towers.create("jest-tiny", seed=0).view.image_size

pytestmark = pytest.mark.usefixtures("ray_session")


def uids_of(run, rank: int, n_learners: int, first_step: int = 0) -> list[list[tuple[int, int]]]:
    """(high half of the uid, occurrence) of each slot of each super-batch share."""
    source = open_source(run)
    shares = super_batches.stream(run, source, SIZE, rank=rank, n_learners=n_learners, first_step=first_step)
    return [list(zip(s.rows["uid_high"].to_pylist(), s.rows["occurrence"].to_pylist(), strict=True)) for s in shares]


@pytest.fixture
def run(make_run):
    run = make_run("uniform", "selection.method=uniform", "training.sub_batch_size=48", "training.examples_trained=672")
    catalogue.run_stage(run)
    return run


def test_the_same_super_batches_on_any_number_of_learners(run):
    whole = uids_of(run, 0, 1)
    assert len(whole) == 14
    for n_learners in (2, 3):
        shares = [uids_of(run, rank, n_learners) for rank in range(n_learners)]
        together = [[x for share in shares for x in share[k]] for k in range(14)]
        assert together == whole


def test_an_epoch_has_each_kept_row_once_and_is_followed_by_the_next(run):
    n_kept = catalogue.open_catalogue(run.path("catalogue")).manifest["counts"]["kept"]
    slots = [x for batch in uids_of(run, 0, 1) for x in batch]
    first_epoch = [x for x in slots if x[1] == 0]
    assert len(slots) == 672 > n_kept
    assert len(first_epoch) == len(set(first_epoch)) == n_kept
    assert {x[1] for x in slots} == {0, 1}


def test_a_resumed_stream_continues_at_the_same_example(run):
    assert uids_of(run, 1, 2, first_step=9) == uids_of(run, 1, 2)[9:]


def test_captions_and_pictures_arrive_unchanged(run):
    pair = towers.create("jest-tiny", seed=0)
    source = open_source(run)
    batch = next(super_batches.stream(run, source, SIZE, rank=0, n_learners=1, first_step=0))
    paths = source.catalogue.shards["path"].to_pylist()
    for slot in (0, 17, 47):
        row = batch.rows.slice(slot, 1).to_pylist()[0]
        expected = pq.read_table(paths[row["shard"]]).slice(row["row"], 1).to_pylist()[0]
        assert expected["uid"] == f"{row['uid_high']:016x}{row['uid_low']:016x}"
        assert (expected["caption"], expected["webp"]) == (row["caption"], row["image"])
        pixels, _ = pair.view.batch([expected["webp"]])
        assert (batch.pixels[slot].numpy() == pixels[0]).all()
        assert batch.tokens[slot].tolist() == pair.tokens([expected["caption"]])[0].tolist()


def test_a_row_that_fails_later_keeps_its_slot_and_is_masked(make_run, shards, tmp_path):
    """An image damaged after cataloguing makes its slot invalid; the rest of the stream does not shift."""
    source = tmp_path / "damaged"
    source.mkdir()
    for path in sorted(shards.iterdir()):
        (source / path.name).write_bytes(path.read_bytes())
    overrides = ["selection.method=uniform", "training.sub_batch_size=48", "training.examples_trained=48"]
    run = make_run("uniform", *overrides, source=str(source))
    catalogue.run_stage(run)
    before = uids_of(run, 0, 1)
    first = next(super_batches.stream(run, open_source(run), SIZE, rank=0, n_learners=1, first_step=0))
    shard, row = first.rows["shard"][5].as_py(), first.rows["row"][5].as_py()
    path = source / f"{shard:05d}.parquet"
    table = pq.read_table(path)
    images = table["webp"].to_pylist()
    images[row] = images[row][:20]
    index = table.schema.get_field_index("webp")
    pq.write_table(table.set_column(index, "webp", pa.array(images, pa.binary())), path, row_group_size=50)
    batch = next(super_batches.stream(run, open_source(run), SIZE, rank=0, n_learners=1, first_step=0))
    assert uids_of(run, 0, 1) == before
    assert batch.valid.tolist() == [slot != 5 for slot in range(48)]


def test_a_shard_that_changed_under_the_run_is_an_error(make_run, shards, tmp_path):
    source = tmp_path / "changing"
    source.mkdir()
    for path in sorted(shards.iterdir()):
        (source / path.name).write_bytes(path.read_bytes())
    run = make_run("uniform", "selection.method=uniform", source=str(source))
    catalogue.run_stage(run)
    for i in range(4):
        table = pq.read_table(source / f"{i:05d}.parquet")
        pq.write_table(table.take(list(reversed(range(len(table))))), source / f"{i:05d}.parquet", row_group_size=50)
    with pytest.raises(Exception, match="changed since it was catalogued"):
        uids_of(run, 0, 1)


@pytest.fixture
def on_s3(make_run, s3, shards, tmp_path):
    """A uniform run whose shards and catalogue are on S3."""
    root = f"{s3}/{tmp_path.name}"
    for path in shards.iterdir():
        storage.write_bytes(f"{root}/shards/{path.name}", path.read_bytes())
    overrides = ["selection.method=uniform", "training.sub_batch_size=48", "training.examples_trained=672"]
    # windows so small that most of the stream is not read yet when the test interferes
    run = make_run("uniform", *overrides, "data.window_rows=20", root=root, source="shards")
    catalogue.run_stage(run)
    return run


def test_a_storage_outage_of_seconds_loses_no_example(on_s3, s3_server):
    """The server is killed while the stream is read, and started again three seconds later."""
    expected = uids_of(on_s3, 0, 1)
    source = open_source(on_s3)
    shares = super_batches.stream(on_s3, source, SIZE, rank=0, n_learners=1, first_step=0)
    received = [next(shares)]
    s3_server.kill()
    back = threading.Timer(3, s3_server.start)
    back.start()
    try:
        received += list(shares)
    finally:
        back.join()
    names = ("uid_high", "occurrence")
    assert [list(zip(*(s.rows[n].to_pylist() for n in names), strict=True)) for s in received] == expected
    assert all(s.valid.all() for s in received)


def test_a_task_that_reads_imports_no_pytorch(scored, tmp_path):
    source, inputs = open_source(scored), configurations.inputs_of(scored.model)
    window = next(source.order.windows(0, 0))
    arguments = windows.item_of(source.catalogue, window), {"run_text": run_file.dump(scored), "inputs": inputs}
    (tmp_path / "arguments").write_bytes(pickle.dumps(arguments))
    code = (
        "import pickle, sys; from pipelines.stream import windows; item, settings = pickle.load(sys.stdin.buffer);"
        "table = windows.of_window(item, **settings); print(table.num_rows, {'torch', 'open_clip'} & {*sys.modules})"
    )
    with (tmp_path / "arguments").open("rb") as pickled:
        out = subprocess.run([sys.executable, "-c", code], stdin=pickled, capture_output=True, text=True, check=True)
    assert out.stdout == f"{len(window)} set()\n"


def test_a_lasting_storage_outage_is_fatal_and_not_a_bad_row(on_s3, s3_server):
    source = open_source(on_s3)
    piece = next(source.order.windows(0, 0)).pieces[0]
    impatient = windows._of_piece.retry_with(stop=stop_after_attempt(2))
    s3_server.kill()
    try:
        with pytest.raises(Exception, match=r"(?i)connect") as raised:
            impatient(
                on_s3, piece, source.catalogue.place(piece.shard), 0, configurations.inputs_of(on_s3.model).tokenizer
            )
        assert not isinstance(raised.value, ValueError)
    finally:
        s3_server.start()


def test_a_shard_deleted_under_the_run_is_named(on_s3):
    path = f"{on_s3.path('')}shards/00001.parquet"
    storage.remove(path)
    with pytest.raises(Exception, match=r"shards/00001\.parquet"):
        uids_of(on_s3, 0, 1)
