"""Which fields decide whether a run may go on, and how an earlier version's are read."""

import pytest

from jest_core import run_file
from jest_core.run_file.parts import CIRCUMSTANCE, Part
from tests.core.run_file.test_load import TEXT

CHANGES = {  # of each kind of field that may change while a run goes on
    "reference.n_actors": 3,
    "reference.gpus_per_actor": 0.5,
    "reference.batch_size": 64,
    "reference.compile": True,
    "data.max_bad_share": 0.5,
    "training.n_learners": 2,
    "training.score_batch_size": 8,
    "training.checkpoint_every_steps": 3,
    "training.report_to": ["tensorboard"],
    "run_dir": "elsewhere",
    "ingest": {"urls": "x", "shards": "pool"},
}


CIRCUMSTANCES = {
    "root",
    "run_dir",
    "ingest",
    "evaluation",
    "subset",
    "data.max_bad_share",
    "reference.batch_size",
    "reference.compile",
    "reference.n_actors",
    "reference.gpus_per_actor",
    "training.n_learners",
    "training.gpus_per_learner",
    "training.shard_weights",
    "training.compile",
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.score_batch_size",
    "training.loss_tile",
    "training.checkpoint_every_steps",
    "training.checkpoint_every_minutes",
    "training.keep_last_checkpoints",
    "training.keep_checkpoint_every_steps",
    "training.hang_minutes",
    "training.max_loss",
    "training.report_to",
    "training.max_failures",
}


@pytest.mark.parametrize("field", CHANGES)
def test_where_and_how_it_is_computed_makes_no_other_run(field: str):
    run = run_file.load(TEXT)
    assert run_file.identity(run_file.load(TEXT, [nested(field, CHANGES[field])])) == run_file.identity(run)


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "seed": 7,
        "data.window_rows": 77,
        "model.context_length": 12,
        "reference.model.context_length": 12,
        "reference.precision": "bf16",
        "selection.gain": 2.0,
        "training.learning_rate": 0.5,
        "training.augmentation.shift_pixels": 1,
    }.items(),
)
def test_what_is_learned_from_what_makes_another_run(field: str, value: object):
    old, new = (run_file.identity(run_file.load(TEXT, more)) for more in ([], [nested(field, value)]))
    assert [key for key in old if old[key] != new[key]] == [".".join(field.split(".")[:2])]


def test_an_earlier_version_had_more_circumstances_and_fewer_fields():
    run = run_file.load(TEXT)
    saved = run_file.identity(run)
    earlier = {key: value for key, value in saved.items() if key not in ("selection.gain", "training.eps")}
    earlier["reference.model"] = {"name": saved["reference.model"]["name"]}
    earlier |= {"reference.n_actors": 5, "data.max_bad_share": 0.2, "subset": None}
    assert run_file.in_todays_fields(earlier, run) == saved


def test_a_part_that_an_earlier_version_did_not_know_has_its_default():
    saved = run_file.identity(run_file.load(TEXT))
    earlier = {key: value for key, value in saved.items() if not key.startswith("reference.")}
    read = run_file.in_todays_fields(earlier, run_file.load(TEXT))
    assert read == earlier | {"reference": None}


def test_what_this_version_cannot_read_is_compared_as_it_is():
    run = run_file.load(TEXT)
    later = run_file.identity(run) | {"selection.temperature": 0.1}
    assert run_file.in_todays_fields(later, run) == later


def test_every_circumstance_is_one_on_purpose():
    """A new one belongs in the list above: a run may go on whatever it is changed to."""
    assert marked(run_file.Run) == CIRCUMSTANCES


def marked(part: type[Part], prefix: str = "") -> set[str]:
    found = set()
    for name, field in part.model_fields.items():
        if CIRCUMSTANCE in field.metadata:
            found.add(prefix + name)
        else:
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            parts = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Part)]
            found |= {each for kind in parts for each in marked(kind, f"{prefix}{name}.")}
    return found


def nested(field: str, value: object) -> dict[str, object]:
    first, _, rest = field.partition(".")
    return {first: nested(rest, value) if rest else value}
