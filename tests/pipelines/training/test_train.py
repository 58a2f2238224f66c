"""Whole runs of Ray Train on real shards: they resume exactly, and two learners train like one."""

import io
import resource
import shutil
from functools import partial

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from tenacity import wait_none

from jest_core import run_file
from jest_core.models import towers
from pipelines.base import checkpoints, manifests, storage
from pipelines.scores import score_cache
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from pipelines.training import metrics_line, selection_log, train


@pytest.fixture
def prepared(make_scored_run):
    return make_scored_run("joint")


def copy(source: str, target: str) -> None:
    storage.write_bytes(target, storage.read_bytes(source))


def other_dir(run, name: str, *overrides: str):
    return run_file.load(run_file.dump(run), [f"run_dir={name}", *overrides])


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(prepared, capsys):
    run = prepared
    manifest = train.run_stage(run)
    directory = run.path("joint")
    assert manifest["examples_trained"] == 192
    assert manifest["examples_seen"] == 384
    assert checkpoints.steps(directory) == [2, 4, 6]

    picks, steps = selection_log.read(directory), selection_log.read_steps(directory)
    selected = picks.filter(picks["selected"])
    assert steps["step"].to_pylist() == list(range(6))
    for step in range(6):
        rows = selected.filter(np.array(selected["step"]) == step)
        assert len(set(rows["position"].to_pylist())) == len(rows) == 32
        assert sorted(set(rows["chunk"].to_pylist())) == [0, 1, 2, 3]
    refused = picks.filter(np.array([not s for s in picks["selected"].to_pylist()]))
    assert len(refused) == 6 * 16
    assert np.isfinite(refused["learner_loss"].to_numpy()).all()
    assert (steps["sub_batch_matched_score"].to_numpy() > steps["super_batch_matched_score"].to_numpy()).mean() > 0.5

    metrics = metrics_line.read(directory)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["jest/samples_seen"] == 384
    assert all(np.isfinite(line["train/loss"]) for line in metrics)

    model = open_clip.create_model("jest-tiny", pretrained=checkpoints.path_of(directory, 6))
    final = towers.weights_hash(model)

    # as after a crash past step 4, with a part of the log that no checkpoint has committed; and with a bit flipped in
    # the newest checkpoint, and lines of metrics.jsonl lost
    resumed = other_dir(run, "resumed")
    again = resumed.path("resumed")
    for name in ("run.yaml", *[f"checkpoints/{n}" for n in storage.names(f"{directory}/checkpoints")[:2]]):
        copy(f"{directory}/{name}", f"{again}/{name}")
    for name in storage.names(f"{directory}/selection"):
        copy(f"{directory}/selection/{name}", f"{again}/selection/{name}")
    storage.write_bytes(f"{again}/selection/00000004-00000005.parquet", b"cut short")
    storage.write_bytes(f"{again}/selection/00000004-00000004.parquet", b"of a checkpoint by time that was not written")
    damaged = bytearray(storage.read_bytes(checkpoints.path_of(directory, 6)))
    damaged[len(damaged) // 3] ^= 1
    storage.write_bytes(checkpoints.path_of(again, 6), bytes(damaged))
    lines = storage.read_bytes(f"{directory}/metrics.jsonl").splitlines(keepends=True)
    storage.write_bytes(f"{again}/metrics.jsonl", b"".join([lines[0], b"torn\n", *lines[2:5]]))
    capsys.readouterr()
    train.run_stage(resumed)
    said = capsys.readouterr().out
    assert "the run goes on from the checkpoint after step 4" in said
    assert "metrics.jsonl has lost the lines of 1 of 4 steps (the first is step 2)" in said
    assert storage.names(f"{again}/checkpoints", ".damaged") == ["step_00000006.pt.damaged"]
    assert storage.names(f"{again}/selection") == storage.names(f"{directory}/selection")
    assert selection_log.read(again).equals(picks)
    assert selection_log.read_steps(again).equals(steps)
    towers.load_weights(pair := towers.create("jest-tiny", seed=9), checkpoints.read(again))
    assert towers.weights_hash(pair.model) == final
    assert [line["step"] for line in metrics_line.read(again)] == [1, 2, 3, 4, 5, 6]


SHORT = ["training.examples_trained=64"]
FLEXI = ["selection.agreement_every_steps=2", "training.micro_batch_size=6", "training.activation_checkpointing=true"]
SETTINGS = {
    "plain": SHORT,
    "patches": [*SHORT, *FLEXI, "selection.score_patch_size=16", "training.low_resolution={patch_size: 16}"],
    "pictures decoded late": [
        *SHORT,
        *FLEXI,
        "data.decode=late",
        "selection.score_image_size=16",
        "training.low_resolution={image_size: 16, share: 0.25}",
    ],
}


def _train_all(settings, others: list[str]) -> None:
    """In a worker of Ray Train: train the run that it was started for, and then other runs."""
    train.learn_as_worker(settings)
    for other in others:
        train.learn_as_worker(settings | {"run": other})


@pytest.fixture(scope="module")
def one_and_two(scored, tmp_path_factory):
    """For each of SETTINGS, finished runs on one and on two learners. Ray Train starts the two only once, as that takes
    longer than all of their training here."""
    root = tmp_path_factory.mktemp("one-and-two")
    shutil.copytree(scored.root, root, dirs_exist_ok=True)
    run = run_file.load(run_file.dump(scored), [f"root={root}"])
    runs = {
        name: (
            other_dir(run, f"{name}/one", *settings),
            other_dir(run, f"{name}/two", *settings, "training.n_learners=2"),
        )
        for name, settings in SETTINGS.items()
    }
    for one, _ in runs.values():
        train.run_stage(one)
    first, *others = (two for _, two in runs.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learn_as_worker", partial(_train_all, others=[run_file.dump(two) for two in others]))
        train.run_stage(first)
    return runs


@pytest.mark.slow
def test_two_learners_draw_the_same_first_sub_batch_and_train_alike(one_and_two):
    runs = one_and_two["plain"]
    logs = [selection_log.read(each.path(each.run_dir)) for each in runs]
    first = [log.filter(np.array(log["step"]) == 0) for log in logs]
    assert first[0]["uid"].to_pylist() == first[1]["uid"].to_pylist()
    assert first[0]["chunk"].to_pylist() == first[1]["chunk"].to_pylist()
    losses = [[line["train/loss"] for line in metrics_line.read(each.path(each.run_dir))] for each in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    weights = [checkpoints.read(checkpoints.path_of(each.path(each.run_dir), 2))["state_dict"] for each in runs]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_learner_may_start_from_a_stock_checkpoint(prepared, tmp_path):
    stock = open_clip.create_model("jest-tiny")
    torch.save({"epoch": 1, "state_dict": stock.state_dict()}, tmp_path / "epoch_1.pt")
    run = other_dir(
        prepared,
        "continued",
        "training.initial_checkpoint=epoch_1.pt",
        "training.examples_trained=64",
        "training.learning_rate=1.0e-9",
        "selection.score_patch_size=16",
        "training.low_resolution={patch_size: 16}",
    )
    train.run_stage(run)
    for name, value in checkpoints.read(run.path("continued"))["state_dict"].items():
        torch.testing.assert_close(value, stock.state_dict()[name], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patches", "pictures decoded late"])
def test_flexijest_on_two_learners_equals_flexijest_on_one(one_and_two, name: str):
    one, two = one_and_two[name]
    manifest, whole = (manifests.read(run.path(run.run_dir)) for run in (one, one_and_two["plain"][0]))
    assert manifest["flops_score"] < 0.75 * whole["flops_score"]
    metrics = [metrics_line.read(each.path(each.run_dir)) for each in (one, two)]
    for a, b in zip(*metrics, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    assert ["jest/score_spearman" in line for line in metrics[0]] == [True, False]
    first, other = (lines[0] for lines in metrics)
    assert first["jest/selection_overlap"] == other["jest/selection_overlap"] >= 0.5
    assert first["jest/score_spearman"] == pytest.approx(other["jest/score_spearman"], abs=1e-3)
    assert 0.1 < first["jest/score_spearman"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "why", "in_process"),
    [
        (["selection.method=uniform", "training.learning_rate=1e30"], "loss nan", True),
        (["training.learning_rate=1e30"], "examples have NaN or infinite embeddings", True),
        (["training.max_loss=1", "training.max_failures=1"], "is above training.max_loss 1;", False),
    ],
)
def test_a_run_that_diverges_stops_and_names_the_examples(prepared, more: list[str], why: str, in_process: bool):
    run = other_dir(prepared, "diverged", "training.checkpoint_every_steps=1", *more)
    with pytest.raises(ValueError, match=why) as raised:
        train.run_stage(run, in_process=in_process)
    directory = run.path("diverged")
    (name,) = storage.names(f"{directory}/failed")
    step = int(name.split("-")[1])
    assert f"step {step}: " in str(raised.value)
    assert checkpoints.steps(directory) == list(range(1, step + 1))  # no checkpoint includes the failed step
    led_to_it = f"the checkpoint after step {step} has the weights that led to it"
    assert (led_to_it in str(raised.value)) == (step > 0)
    saved = pq.read_table(f"{directory}/failed/{name}")
    batches = super_batches.stream(run, open_source(run), 32, rank=0, n_learners=1, first_step=step)
    assert saved["uid"].to_pylist() == next(batches).identities()["uid"].to_pylist()


@pytest.mark.slow
def test_a_diverged_step_never_replaces_the_last_sound_checkpoint(prepared):
    """Weights that a step has made turn out to be unsound at the next step, when their checkpoint is there already."""
    settings = ["selection.method=uniform", "training.checkpoint_every_steps=1", "training.keep_last_checkpoints=1"]
    sound = other_dir(prepared, "sound", *settings, "training.examples_trained=96")
    train.run_stage(sound, in_process=True)
    assert checkpoints.steps(sound.path("sound")) == [3]  # at the end no more are kept than asked for
    too_fast = ["training.learning_rate=10", "training.warmup_steps=100", "training.max_loss=12"]
    run = other_dir(prepared, "diverged", *settings, *too_fast)
    with pytest.raises(
        RuntimeError, match=r"loss \S+ is above training\.max_loss 12;.* has the weights that led to it"
    ):
        train.run_stage(run, in_process=True)
    *sound_before, led_to_it = checkpoints.steps(run.path("diverged"))
    assert sound_before == [led_to_it - 1]


def test_a_run_without_its_inputs_says_what_to_run_first(make_run):
    with pytest.raises(FileNotFoundError, match="run `jest catalogue` first"):
        train.run_stage(make_run("joint"))


@pytest.mark.slow
def test_a_run_with_an_online_reference_selects_like_its_score_cache(prepared):
    cached = other_dir(prepared, "cached", "training.examples_trained=64")
    online = other_dir(prepared, "online", "training.examples_trained=64", "reference.online=true")
    chosen, scores = [], []
    for run in (cached, online):
        train.run_stage(run)
        picks, steps = (read(run.path(run.run_dir)) for read in (selection_log.read, selection_log.read_steps))
        chosen.append(set(zip(picks["step"].to_numpy()[: 32 + 16], picks["uid"].to_pylist()[:32], strict=False)))
        scores.append(steps["sub_batch_score"][0].as_py())
    overlap = len(chosen[0] & chosen[1]) / len(chosen[0])
    print(
        f"overlap of the first sub-batches {overlap:.3f}; learnability {scores[0]:.5f} cached, {scores[1]:.5f} online"
    )
    assert overlap >= 0.9
    assert scores[0] == pytest.approx(scores[1], rel=0.02)
    lines = [metrics_line.read(run.path(run.run_dir))[0] for run in (cached, online)]
    assert lines[1]["jest/flops"] > lines[0]["jest/flops"]
    assert "jest/reference_time" in lines[1]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_without_partial_files(prepared, monkeypatch):
    """A limit of 1 MB a file stands for a full disk. Each write is tried eight times."""
    monkeypatch.setattr(storage, "_BACKOFF", wait_none())
    undisturbed, full = other_dir(prepared, "undisturbed"), other_dir(prepared, "full")
    train.run_stage(undisturbed, in_process=True)
    directory = full.path("full")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(RuntimeError) as raised:
            train.run_stage(full, in_process=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{directory} keeps what they finished" in str(raised.value)
    assert "File too large" in str(raised.value.__cause__)
    assert not checkpoints.steps(directory)
    assert not [name for name in storage.names(f"{directory}/checkpoints") if name.endswith(".tmp")]
    train.run_stage(full, in_process=True)
    assert selection_log.read(directory).equals(selection_log.read(undisturbed.path("undisturbed")))


@pytest.mark.slow
def test_a_truncated_score_cache_ends_the_run_and_is_named(prepared):
    part = score_cache.part_path(prepared.path("scores"), 2)
    whole = pq.ParquetFile(io.BytesIO(storage.read_bytes(part)))
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, whole.schema_arrow) as writer:
        writer.write_table(whole.read_row_group(0))
    storage.write_bytes(part, sink.getvalue())
    with pytest.raises((RuntimeError, ValueError)) as raised:
        train.run_stage(prepared, in_process=True)
    message = f"{raised.value} {raised.value.__cause__}"
    assert part in message
    assert "jest reference-scores" in message


@pytest.mark.long
@pytest.mark.timeout(600)
def test_compiled_towers_select_and_train_like_uncompiled_ones(make_scored_run):
    """With FlexiJEST's two resolutions: scored in patches of 16, trained in the model's patches of 8."""
    logs = {}
    for name in ("plain", "compiled"):
        sizes = ["training.examples_trained=32", "training.warmup_steps=0", "selection.score_patch_size=16"]
        run = make_scored_run(name, *sizes, f"training.compile={str(name == 'compiled').lower()}")
        train.run_stage(run)
        logs[name] = selection_log.read(run.path(run.run_dir)), metrics_line.read(run.path(run.run_dir))
    (plain, (line,)), (compiled, (other,)) = logs["plain"], logs["compiled"]
    assert compiled.select(["uid", "selected", "chunk"]).equals(plain.select(["uid", "selected", "chunk"]))
    assert other["train/loss"] == pytest.approx(line["train/loss"], rel=1e-4)
    assert other["jest/gradient_norm"] == pytest.approx(line["jest/gradient_norm"], rel=1e-3)
