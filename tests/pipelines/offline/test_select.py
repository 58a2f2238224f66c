"""`jest select`: selection over a whole catalogue, from the score caches of a learner and a reference."""

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from jest_core import run_file, tables
from jest_core.models import towers
from jest_core.selection import Embeddings, algorithm
from pipelines.base import checkpoints, storage
from pipelines.data import catalogue
from pipelines.data.catalogue import open_catalogue
from pipelines.offline import select
from pipelines.scores import score_cache


@pytest.fixture
def make_subset_run(scored, tmp_path):
    model = towers.create("jest-tiny", seed=8).model
    checkpoints.write(str(tmp_path / "learner"), 1, {"state_dict": model.state_dict()})

    def make(*overrides):
        learner = f"{{model: {{name: jest-tiny}}, checkpoint: {tmp_path}/learner, scores: {tmp_path}/learner-scores}}"
        part = f"subset={{directory: {tmp_path}/subset, cpus_per_task: 1, learner: {learner}}}"
        return run_file.load(
            run_file.dump(scored), [part, "training.sub_batch_size=120", "training.examples_trained=120", *overrides]
        )

    return make


def rows_of(run, directory):
    parts = [storage.open_parquet(score_cache.part_path(directory, i)).read() for i in range(4)]
    parts = [score_cache.with_lists(part) for part in parts]
    return {
        (i, row["row"]): row
        for i, part in enumerate(parts)
        for row in part.filter(pc.equal(part["status"], "ok")).to_pylist()
    }


def read(run):
    directory = run.path(run.subset.directory)
    names = storage.names(f"{directory}/parts", ".parquet")
    return [storage.open_parquet(f"{directory}/parts/{name}").read() for name in names]


def test_offline_selection_equals_select_on_each_super_batch(make_subset_run):
    run = make_subset_run()
    manifest = select.run_stage(run)
    listing = open_catalogue(run.path("catalogue"))
    batches = select.plan(listing, run.super_batch_size, run.seed)
    planned = np.concatenate(batches)
    assert len(np.unique(planned, axis=0)) == len(planned) == 12  # each row group once
    parts = read(run)
    assert len(parts) == len(batches) == 2  # 599 pairs, 240 at once
    assert manifest["n_selected"] == sum(map(len, parts))
    cached = {
        "learner": rows_of(run, run.path(run.subset.learner.scores)),
        "reference": rows_of(run, run.path("scores")),
    }
    for number, (groups, part) in enumerate(zip(batches, parts, strict=True)):
        places = [
            (s, row)
            for s, g in groups.tolist()
            for row in range(50 * g, 50 * g + 50)
            if (s, row) in cached["reference"]
        ]
        models = {}
        for name, rows in cached.items():
            sides = [torch.tensor([rows[p][f"{side}_embedding"] for p in places]) for side in ("image", "text")]
            models[name] = Embeddings(*sides, 10.0, -10.0)
        chosen = algorithm.select(
            models["learner"],
            models["reference"],
            sub_batch_size=round(len(places) * 0.5 / 4) * 4,
            n_chunks=4,
            uids=[cached["reference"][p]["uid"] for p in places],
            seed=0,
            step=number,
        )
        picked = [places[i] for i in chosen.indices.tolist()]
        assert list(zip(part["shard"].to_pylist(), part["row"].to_pylist(), strict=True)) == picked
        assert part["chunk"].to_pylist() == chosen.chunk.tolist()
        assert part.schema == tables.SELECTION


@pytest.mark.parametrize("baseline", ["selection.criterion=easy", "selection.criterion=learnability"])
def test_independent_filters_select_the_best_of_each_super_batch(make_subset_run, baseline):
    run = make_subset_run("selection.method=independent", "selection.draw=top_k", baseline)
    select.run_stage(run)
    reference, criterion = rows_of(run, run.path("scores")), run.selection.criterion
    learner = rows_of(run, run.path(run.subset.learner.scores)) if criterion == "learnability" else {}
    assert storage.exists(run.path(run.subset.learner.scores)) == (criterion == "learnability")
    batches = select.plan(open_catalogue(run.path("catalogue")), run.super_batch_size, run.seed)
    for groups, part in zip(batches, read(run), strict=True):
        places = [p for s, g in groups.tolist() for row in range(50 * g, 50 * g + 50) if (p := (s, row)) in reference]
        scores = {p: -reference[p]["matched_pair_loss"] for p in places}
        if learner:
            scores = {p: scores[p] + learner[p]["matched_pair_loss"] for p in places}
        picked = set(zip(part["shard"].to_pylist(), part["row"].to_pylist(), strict=True))
        assert min(scores[p] for p in picked) >= max(scores[p] for p in places if p not in picked) - 1e-3


def test_a_second_run_adds_missing_parts_and_the_subset_rule_reads_the_result(make_subset_run, tmp_path):
    run = make_subset_run()
    whole = select.run_stage(run)
    first = read(run)
    directory = run.path(run.subset.directory)
    assert select.run_stage(run) == whole
    storage.write_json(f"{directory}/manifest.json", {"stage": "select", "complete": False, "config": whole["config"]})
    storage.remove(f"{directory}/parts/000001.parquet")
    assert select.run_stage(run) == whole
    assert all(a.equals(b) for a, b in zip(first, read(run), strict=True))
    with pytest.raises(ValueError, match=r"another configuration \(selection"):
        select.run_stage(make_subset_run("selection.gain=2.0"))
    refined = run_file.load(
        run_file.dump(run),
        [
            "data.refines=catalogue",
            f"data.catalogue={tmp_path}/kept",
            f"data.rules=[{{rule: subset, file: {directory}}}]",
        ],
    )
    assert catalogue.run_stage(refined).manifest["counts"]["kept"] == whole["n_selected"]


def test_missing_parts_of_the_run_file_are_named(make_subset_run, scored):
    with pytest.raises(ValueError, match="needs a `subset` part"):
        select.run_stage(scored)
    with pytest.raises(ValueError, match=r"scores with a learner: give subset\.learner"):
        select.run_stage(make_subset_run("subset.learner=null"))
