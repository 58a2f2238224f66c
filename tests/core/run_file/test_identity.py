"""Which fields identify a run, so that another value refuses a resume, and how those of earlier versions are read."""

import pytest

from jest_core import run_file
from jest_core.run_file.parts import CIRCUMSTANCE, Part
from tests.core.run_file.test_load import TEXT

CHANGES = {  # one of each kind of field that may change when a run is resumed
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
    "data.max_empty_captions",
    "data.read_cpus",
    "data.local_cache",
    "data.local_cache_gb",
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
def test_settings_of_hardware_and_paths_do_not_change_the_identity(field: str):
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
def test_settings_that_change_the_result_change_the_identity(field: str, value: object):
    old, new = (run_file.identity(run_file.load(TEXT, more)) for more in ([], [nested(field, value)]))
    assert [key for key in old if old[key] != new[key]] == [".".join(field.split(".")[:2])]


def test_an_identity_saved_by_an_earlier_version_is_read_in_todays_fields():
    run = run_file.load(TEXT)
    saved = run_file.identity(run)
    earlier = {key: value for key, value in saved.items() if key not in ("selection.gain", "training.eps")}
    earlier["reference.model"] = {"name": saved["reference.model"]["name"]}
    earlier |= {"reference.n_actors": 5, "data.max_bad_share": 0.2, "subset": None}
    assert run_file.in_todays_fields(earlier, run) == saved


def test_a_part_missing_in_an_earlier_version_gets_its_default():
    saved = run_file.identity(run_file.load(TEXT))
    earlier = {key: value for key, value in saved.items() if not key.startswith("reference.")}
    read = run_file.in_todays_fields(earlier, run_file.load(TEXT))
    assert read == earlier | {"reference": None}


def test_an_identity_of_a_later_version_is_compared_unchanged():
    run = run_file.load(TEXT)
    later = run_file.identity(run) | {"selection.temperature": 0.1}
    assert run_file.in_todays_fields(later, run) == later


def test_fields_outside_the_identity_are_those_listed_here():
    """A new one belongs in the list above only if a run may be resumed with any other value of it."""
    assert marked(run_file.Run) == CIRCUMSTANCES


def marked(part: type[Part], prefix: str = "") -> set[str]:
    names = set()
    for name, field in part.model_fields.items():
        if CIRCUMSTANCE in field.metadata:
            names.add(prefix + name)
        else:
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            parts = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Part)]
            names |= {each for kind in parts for each in marked(kind, f"{prefix}{name}.")}
    return names


def nested(field: str, value: object) -> dict[str, object]:
    first, _, rest = field.partition(".")
    return {first: nested(rest, value) if rest else value}
