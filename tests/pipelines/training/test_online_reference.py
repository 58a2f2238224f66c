"""A run with reference.online resumes only with the reference weights that scored its first steps."""

import pytest

from jest_core import run_file
from jest_core.models import towers
from pipelines.base import checkpoints, storage
from pipelines.training import online_reference, selection_log, train


def write_reference(run, step: int, seed: int) -> str:
    """Write a checkpoint into the run directory of reference.checkpoint; its path."""
    model = towers.create("jest-tiny", seed=seed).model
    directory = run.path(run.reference.checkpoint)
    checkpoints.write(directory, step, {"state_dict": model.state_dict(), "jest": {"step": step}})
    return checkpoints.path_of(directory, step)


def test_the_newest_checkpoint_of_the_reference_is_recorded(make_run):
    run = make_run("joint", "reference.online=true")
    first = online_reference.load(run) if write_reference(run, 1, seed=5) else None
    path = write_reference(run, 2, seed=6)
    second = online_reference.load(run)
    assert second.record == {"checkpoint": path, "weights": towers.weights_hash(second.towers.model)}
    assert first.short_hash != second.short_hash
    named = run_file.load(run_file.dump(run), ["reference.checkpoint=reference/checkpoints/step_00000001.pt"])
    assert online_reference.load(named).record == first.record
    # without reference.online a run reads a score cache, which has a fingerprint
    assert online_reference.load(make_run("joint")) is None


def test_other_reference_weights_are_refused_and_the_same_in_another_file_are_not(make_run):
    run = make_run("joint", "reference.online=true")
    write_reference(run, 1, seed=5)
    first = online_reference.load(run)
    state = {"step": 4, "seconds": 1.0, "log_parts": [], "reference": first.record}
    write_reference(run, 2, seed=5)
    online_reference.refuse_other(run, state, online_reference.load(run))
    write_reference(run, 3, seed=6)
    other = online_reference.load(run)
    with pytest.raises(ValueError, match=r"up to 4 .*step_00000001\.pt.* is now .*step_00000003\.pt.* restore the ear"):
        online_reference.refuse_other(run, state, other)
    del state["reference"]  # as saved by a version that recorded no reference
    online_reference.refuse_other(run, state, other)


@pytest.mark.slow
def test_a_resume_with_another_reference_is_refused_until_the_first_is_restored(make_scored_run):
    run = make_scored_run("joint", "reference.online=true")
    undisturbed = run_file.load(run_file.dump(run), ["run_dir=undisturbed"])
    for each in (run, undisturbed):
        train.run_stage(each, in_process=True)
    directory = run.path("joint")
    for name in (checkpoints.path_of(directory, 6), f"{directory}/manifest.json"):
        storage.remove(name)
    newer = write_reference(run, 2, seed=6)
    with pytest.raises(ValueError, match=r"step_00000001\.pt .*with other weights .*training\.initial_checkpoint"):
        train.run_stage(run, in_process=True)
    assert checkpoints.steps(directory) == [2, 4]
    storage.remove(newer)
    train.run_stage(run, in_process=True)
    assert selection_log.read(directory).equals(selection_log.read(undisturbed.path("undisturbed")))

    storage.remove(f"{directory}/manifest.json")
    storage.remove(checkpoints.path_of(directory, 6))
    earlier = checkpoints.read(directory)  # as saved by a version that recorded no reference
    assert earlier["jest"].pop("reference")["checkpoint"].endswith("reference/checkpoints/step_00000001.pt")
    checkpoints.write(directory, 4, earlier)
    write_reference(run, 2, seed=6)
    assert train.run_stage(run, in_process=True)["steps"] == 6
