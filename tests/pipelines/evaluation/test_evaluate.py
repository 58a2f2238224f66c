import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import webdataset

from jest_core import run_file
from jest_core.models import towers
from pipelines.base import checkpoints, manifests, storage
from pipelines.evaluation import evaluate, results
from pipelines.training import train
from tests.pipelines.evaluation.conftest import SETS, SMALL, run_of


def test_the_same_pictures_score_the_same_in_every_layout(pictures):
    metrics = {line["key"]: line["metrics"] for line in evaluate.run_stage(run_of(pictures))}
    assert metrics["folder/zero_shot"] == pytest.approx(metrics["wds/zero_shot"])
    assert set(metrics["wds/few_shot"]) == {"acc1", "acc1_seed0", "acc1_seed1", "main_metric"}
    # the features of a random tower distinguish colours
    assert metrics["wds/few_shot"]["acc1"] > metrics["wds/zero_shot"]["acc1"]
    captions, shards = metrics["wds-captions/retrieval"], metrics["shards/retrieval"]
    assert shards["text_retrieval_recall@10"] < 0.2
    assert captions["image_retrieval_mean_rank"] == pytest.approx(
        metrics["captions/retrieval"]["image_retrieval_mean_rank"], rel=0.01
    )  # which has all pictures except the one of the other split


def test_results_are_also_written_in_the_formats_of_open_clip_and_clip_benchmark(pictures):
    run = run_of(pictures)
    evaluate.run_stage(run)
    lines = results.read(run.path("run"))
    assert {line["key"] for line in lines} >= {"shards/group", "captions/retrieval", "wds/few_shot"}
    assert all({"key", "dataset", "metrics"} <= set(line) and "main_metric" in line["metrics"] for line in lines)

    name = "benchmark_wds_step_00000002_jest-tiny_en_zeroshot_classification.json"
    result = json.loads((pictures / "run" / "evaluation" / name).read_text())
    assert set(result) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert set(result["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}

    (of_open_clip,) = map(json.loads, (pictures / "run" / "checkpoints" / "results.jsonl").read_text().splitlines())
    assert of_open_clip["epoch"] == 2
    wanted = ["val/wds-zeroshot-val-top1", "val/captions-image_to_text_R@1", "val/captions-text_to_image_mean_rank"]
    assert set(wanted) <= set(of_open_clip)


def test_only_what_changed_is_evaluated_again(pictures, tmp_path, monkeypatch):
    (tmp_path / "run").symlink_to(pictures / "run")
    one = run_of(pictures, SETS[1:2])
    evaluate.run_stage(one)
    before = results.read(one.path("run"))
    monkeypatch.setattr(evaluate, "_of_checkpoint", lambda *_: pytest.fail("evaluated again"))
    assert evaluate.run_stage(one) == before
    monkeypatch.undo()
    squashed = run_of(pictures, [SETS[1].replace("tasks", "view: squash, tasks")])
    evaluate.run_stage(squashed)
    after = results.read(one.path("run"))
    assert [line["protocol"] for line in after] != [line["protocol"] for line in before]
    decoded = run_file.load(run_file.dump(squashed), ["data.decoder=simplejpeg"])
    last = [line for line in evaluate.run_stage(decoded) if line["key"] == "folder/zero_shot"]
    assert [line.get("decoder") for line in last] == ["simplejpeg"]
    assert last[0]["protocol"] not in [line["protocol"] for line in after]


def test_results_are_those_of_what_the_checkpoint_holds_not_of_its_name(pictures, tmp_path):
    run = run_of(pictures, [SETS[1]], str(tmp_path / "run"))
    directory = run.path(run.run_dir)
    path, lines = checkpoints.path_of(directory, 2), tmp_path / "run" / results.FILE
    weights = (pictures / "run/checkpoints/step_00000002.pt").read_bytes()
    storage.write_bytes(path, weights)
    (before,) = evaluate.run_stage(run)
    storage.write_bytes(path, weights)  # a copy is the same
    assert not evaluate.is_missing(run, 2)
    model = towers.create("jest-tiny", seed=4).model
    for content in (  # trained anew with another seed; the same weights at another step; in the format before zip files
        {"epoch": 2, "state_dict": model.state_dict(), "jest": {"step": 2}},
        {"epoch": 1, "state_dict": towers.create("jest-tiny", seed=3).model.state_dict()},
    ):
        checkpoints.write(directory, 2, content)
        assert evaluate.is_missing(run, 2)
    torch.save({"epoch": 2, "state_dict": model.state_dict()}, path, _use_new_zipfile_serialization=False)
    assert evaluate.is_missing(run, 2)
    (after,) = evaluate.run_stage(run)
    assert after["metrics"] != before["metrics"]
    assert not evaluate.is_missing(run, 2)
    # a line of an earlier version does not say what it was made from, and counts as it did there
    lines.write_text(json.dumps({key: value for key, value in after.items() if key != "checkpoint"}) + "\n")
    assert not evaluate.is_missing(run, 2)


def test_watching_continues_until_the_run_has_finished(pictures, tmp_path, monkeypatch):
    """Checkpoints are evaluated as they appear, until the run's manifest says that it is complete."""
    run = run_of(pictures, [SETS[1]], str(tmp_path / "watched"))
    directory = run.path(run.run_dir)
    manifests.begin(directory, "train", {}, dict)
    weights = (pictures / "run/checkpoints/step_00000002.pt").read_bytes()
    monkeypatch.setattr(evaluate, "_PATIENCE", 0.05)
    seen = []

    def train():
        for step in (1, 2):
            storage.write_bytes(checkpoints.path_of(directory, step), weights)
            while step not in {line["step"] for line in results.read(directory)}:
                time.sleep(0.05)
            seen.append(step)
        manifests.finish(directory, {"stage": "train", "complete": True, "config": {}})

    trainer = threading.Thread(target=train)
    trainer.start()
    lines = evaluate.run_stage(run, watch=True)
    trainer.join()
    assert seen == [line["step"] for line in lines] == [1, 2]


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_evaluated(pictures, tmp_path, monkeypatch):
    run = run_of(pictures, [SETS[1]], str(tmp_path / "pruned"))
    directory = run.path(run.run_dir)
    (spec,), listed, lines = evaluate._sets(run), checkpoints.steps, []
    for step in (1, 2):
        path = checkpoints.path_of(directory, step)
        storage.write_bytes(path, b"weights")
        facts = {"step": step, "protocol": evaluate.protocol(run, spec), "checkpoint": evaluate.digest(path)}
        lines += [{"key": f"{spec.name}/{task}", **facts} for task in spec.tasks]
    storage.write_bytes(f"{directory}/{results.FILE}", "\n".join(map(json.dumps, lines)).encode())
    version = storage.version(checkpoints.path_of(directory, 1))

    def steps(directory: str) -> list[int]:
        there = listed(directory)
        storage.remove(checkpoints.path_of(directory, 1))  # the run keeps the last one, and removes it just then
        return there

    monkeypatch.setattr(checkpoints, "steps", steps)
    assert evaluate._todo(run, directory) == []
    storage.write_bytes(checkpoints.path_of(directory, 1), b"weights")
    assert evaluate._is_of_the_run(directory, 1, version)


def test_a_changed_class_file_is_evaluated_again_and_other_sets_are_kept(pictures, tmp_path):
    (tmp_path / "classes.json").write_text((SMALL / "classes.json").read_text())
    run = run_of(pictures, SETS[:1], str(tmp_path / "run"))
    run = run_file.load(run_file.dump(run), [f"evaluation.classes={tmp_path}/classes.json"])
    weights = (pictures / "run/checkpoints/step_00000002.pt").read_bytes()
    storage.write_bytes(checkpoints.path_of(run.path(run.run_dir), 2), weights)
    before = {line["key"]: line for line in evaluate.run_stage(run)}
    classes = json.loads((tmp_path / "classes.json").read_text())
    classes["group"]["templates"] = ["a picture that has nothing to do with {}"]
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    after = {line["key"]: line for line in evaluate.run_stage(run)}
    assert after["shards/group"]["metrics"] != before["shards/group"]["metrics"]
    evaluate.run_stage(run_of(pictures, SETS[1:2], str(tmp_path / "run")))
    assert {line["key"] for line in results.read(run.path(run.run_dir))} == {*after, "folder/zero_shot"}


def test_a_set_of_damaged_pictures_is_refused(pictures, tmp_path):
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "damaged" / name).mkdir(parents=True)
        (tmp_path / "damaged" / name / "0.png").write_bytes(b"not a picture" * i)
    run = run_of(pictures, [f"{{name: x, format: folder, shards: {tmp_path}/damaged, tasks: [zero_shot]}}"], "bad")
    storage.write_bytes(
        checkpoints.path_of(run.path("bad"), 2), (pictures / "run/checkpoints/step_00000002.pt").read_bytes()
    )
    with pytest.raises(ValueError, match="2 of 2 pictures do not decode"):
        evaluate.run_stage(run)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("{name: x, format: folder, shards: nowhere, tasks: [zero_shot]}", "no folders"),
        ("{name: x, format: karpathy, shards: captions.json, split: val, tasks: [retrieval]}", "no picture with a cap"),
        ("{name: x, format: karpathy, shards: captions.json, tasks: [zero_shot]}", "brings no classes"),
        ("{name: x, format: webdataset, shards: wds, tasks: [birds]}", "not in evaluation.classes"),
        ("{name: x, format: webdataset, shards: wds, tasks: [few_shot]}", "no few_shot.pool"),
        ("{name: x, format: webdataset, shards: wds, tasks: [group]}", "no image of any class"),
    ],
)
def test_invalid_evaluation_sets_are_refused_with_the_reason(pictures, spec, why):
    checkpoint = pictures / "bad" / "checkpoints"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "step_00000002.pt").write_bytes((pictures / "run/checkpoints/step_00000002.pt").read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=why):
        evaluate.run_stage(run_of(pictures, [spec], "bad"))


@pytest.mark.slow
@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    row = pq.read_table(SMALL / "eval-fluent-flat" / "00000.parquet").slice(0, 1).to_pylist()[0]
    peaks = []
    for n in (1_000, 20_000):
        root = tmp_path / str(n)
        (root / "wds" / "test").mkdir(parents=True)
        with webdataset.ShardWriter(str(root / "wds" / "test" / "%d.tar"), maxcount=5_000, verbose=0) as writer:
            for i in range(n):
                writer.write({"__key__": f"s{i:07d}", "webp": row["webp"], "cls": i % 3})
            n_shards = writer.shard
        (root / "wds" / "test" / "nshards.txt").write_text(str(n_shards))
        (root / "wds" / "classnames.txt").write_text("cat\ndog\nhorse\n")
        (root / "wds" / "zeroshot_classification_templates.txt").write_text("{c}\n")
        model = towers.create("jest-tiny", seed=3).model
        checkpoints.write(str(root / "run"), 2, {"state_dict": model.state_dict()})
        path = root / "run.yaml"
        run = run_of(root, ["{name: wds, format: webdataset, shards: wds, tasks: [zero_shot]}"])
        path.write_text(run_file.dump(run))
        code = (
            "import resource, sys; from pathlib import Path;"
            "from jest_core import run_file; from pipelines.evaluation import evaluate;"
            "evaluate.run_stage(run_file.load(Path(sys.argv[1]).read_text()));"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, check=True, env=os.environ
        )
        peaks.append(int(ran.stdout.split()[-1]) * 1024)
    grown, all_pixels = peaks[1] - peaks[0], 19_000 * 3 * 32 * 32
    assert grown < 0.5 * all_pixels, f"peaks {peaks}"


@pytest.mark.slow
def test_the_training_loop_evaluates_on_a_schedule(make_scored_run, shards):
    """On two learners with half of the weights each. Steps evaluated by the loop are not evaluated again."""
    sets = f"evaluation={{every_steps: 2, sets: [{{name: own, shards: '{shards}/*.parquet', tasks: [retrieval]}}]}}"
    two = ["training.n_learners=2", "training.shard_weights=true"]
    run = make_scored_run("uniform", "selection.method=uniform", *two, sets)
    train.run_stage(run)
    lines = [json.loads(line) for line in Path(run.path("uniform"), "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "val/own-image_to_text_R@1" in line]
    assert evaluated == [2, 4, 6]
    results_of_loop = results.read(run.path("uniform"))
    assert [line["step"] for line in results_of_loop] == evaluated
    for line, logged in zip(results_of_loop, [lines[step - 1] for step in evaluated], strict=True):
        assert logged["val/own-text_to_image_R@5"] == line["metrics"]["image_retrieval_recall@5"]
    before = Path(run.path("uniform"), results.FILE).stat().st_mtime_ns
    evaluate.run_stage(run, watch=True)
    assert Path(run.path("uniform"), results.FILE).stat().st_mtime_ns == before
    # evaluating a checkpoint gives the scores of the loop
    Path(run.path("uniform"), results.FILE).unlink()
    again = evaluate.run_stage(run)
    assert [line["metrics"] for line in again] == [pytest.approx(line["metrics"], abs=0.02) for line in results_of_loop]
    # an attempt that died between a checkpoint and its evaluation: the next one evaluates it
    resumed = run_file.load(run_file.dump(run), ["run_dir=resumed", "training.n_learners=1"])
    shutil.copytree(run.path("uniform"), resumed.path("resumed"), ignore=shutil.ignore_patterns("*_00000006.pt", "ray"))
    for name in ("manifest.json", results.FILE):
        Path(resumed.path("resumed"), name).unlink()
    train.run_stage(resumed, in_process=True)
    later = results.read(resumed.path("resumed"))
    assert [line["step"] for line in later] == [4, 6]
    assert later[0]["metrics"] == pytest.approx(results_of_loop[1]["metrics"], abs=0.02)
    # a checkpoint that its run has pruned meanwhile has no results, and raises no error
    assert evaluate._of_checkpoint(run, 3) == []
