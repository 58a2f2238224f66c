"""What is missing of evaluation sets is found before hours of training, and not at their end."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import stages
from pipelines.evaluation import first_look
from tests.pipelines.evaluation.conftest import SETS, run_of


def test_sets_that_are_there_are_looked_at(pictures):
    first_look.refuse_missing(run_of(pictures))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{name: a, format: folder, shards: imagenet/val, tasks: [zero_shot]}", "a is not there .*imagenet/val has no"),
        ("{name: a, format: webdataset, shards: wds, split: val, tasks: [zero_shot]}", "a is not there .*nshards"),
        ("{name: a, format: karpathy, shards: coco.json, tasks: [retrieval]}", "a is not there .*coco.json"),
        ("{name: a, format: karpathy, shards: captions.json, split: val, tasks: [retrieval]}", "a: it has no pictures"),
        ("{name: a, format: karpathy, shards: captions.json, images: other, tasks: [retrieval]}", "a is not there"),
        ("{name: a, shards: 'eval/*.parquet', tasks: [retrieval]}", "a is not there .*no shard at"),
        (
            "{name: a, format: folder, shards: folder, tasks: [animals]}",
            "a: task 'animals' is not in evaluation.classes, which has",
        ),
        ("{name: a, format: folder, shards: folder, tasks: [few_shot]}", "a: its task few_shot has no few_shot.pool"),
        (
            "{name: a, format: folder, shards: folder, tasks: [few_shot],"
            " few_shot: {pool: {format: folder, shards: imagenet/train}}}",
            "a is not there .*imagenet/train has no",
        ),
        ("{name: a, format: karpathy, shards: captions.json, tasks: [zero_shot]}", "a: .*brings no classes"),
        ("{name: a, format: folder, shards: folder, tasks: [retrieval]}", "a: its task retrieval needs captions"),
    ],
)
def test_what_is_missing_is_named(pictures, spec, message):
    with pytest.raises((FileNotFoundError, ValueError), match=f"evaluation.sets: {message}"):
        first_look.refuse_missing(run_of(pictures, [spec]))


def test_a_picture_that_the_json_names_has_to_be_there(pictures, tmp_path):
    shutil.copy(pictures / "captions.json", tmp_path)
    spec = "{name: coco, format: karpathy, shards: captions.json, tasks: [retrieval]}"
    with pytest.raises(FileNotFoundError, match=r"coco is not there .*000000000001\.png"):
        first_look.refuse_missing(run_of(tmp_path, [spec]))


def test_the_first_picture_of_a_set_may_be_missing(tmp_path):
    def shard(*pictures: bytes | None) -> None:
        table = {"jpg": pa.array(pictures, pa.binary()), "caption": ["a cat"] * len(pictures)}
        pq.write_table(pa.table(table), tmp_path / "0.parquet")

    run = run_of(tmp_path, ["{name: a, shards: 0.parquet, tasks: [retrieval]}"])
    shard(None, None, b"a picture")
    first_look.refuse_missing(run)
    shard(None, None)
    with pytest.raises(ValueError, match="a: it has no pictures"):
        first_look.refuse_missing(run)


def test_a_chain_that_evaluates_does_not_start_without_its_sets(tmp_path):
    run = run_of(tmp_path, ["{name: imagenet, format: folder, shards: val, tasks: [zero_shot]}"])
    with pytest.raises(FileNotFoundError, match="imagenet is not there"):
        stages.run_stages(run, ["catalogue", "train", "evaluate"])
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="no shard at"):  # without `evaluate` the catalogue starts
        stages.run_stages(run, ["catalogue", "train"])


def test_training_that_evaluates_in_its_loop_refuses_and_other_training_warns(tmp_path, capsys, monkeypatch):
    run = run_of(tmp_path, ["{name: imagenet, format: folder, shards: val, tasks: [zero_shot]}"])
    first_look.before_training(run, "train")
    assert "could not evaluate this run: evaluation.sets: imagenet is not there" in "".join(capsys.readouterr())
    assert run.evaluation is not None
    monkeypatch.setattr(first_look.sets, "examples", unreadable)  # an error that nobody foresaw
    first_look.before_training(run, "train")
    assert "could not evaluate this run: no such codec" in "".join(capsys.readouterr())
    monkeypatch.undo()
    evaluation = run.evaluation.model_copy(update={"every_steps": 2})
    with pytest.raises(FileNotFoundError, match="imagenet is not there"):
        first_look.before_training(run.model_copy(update={"evaluation": evaluation}), "train")


def unreadable(*_):
    raise AttributeError("no such codec")


@pytest.mark.parametrize("spec", SETS)
def test_each_layout_is_looked_at_alone(pictures, spec):
    first_look.refuse_missing(run_of(pictures, [spec]))
