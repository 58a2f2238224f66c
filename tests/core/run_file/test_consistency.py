import re

import pytest

from jest_core import run_file
from tests.core.run_file.test_load import TEXT


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.n_chunks=5", "sub_batch_size 32 is not a multiple of selection.n_chunks 5"),
        ("training.examples_trained=100", "use 96 or 128"),
        ("training.n_learners=3", "not a multiple of training.n_learners 3"),
        ("data.n_streams=5", "super-batch of 64 is not a multiple of data.n_streams 5"),
        ("selection.filter_ratio=0.7", "not a multiple of data.n_streams"),
        ("reference=null", "has no `reference` part"),
        ("selection.filter_ratio=0", "selects everything: set selection.method uniform"),
        ("data.decode=late", "set selection.score_image_size"),
        ("training.low_resolution={share: 0.5}", "names no resolution; give its image_size or its patch_size"),
        ("training.low_resolution={patch_size: 16, share: 0.01}", "less than one example"),
        ("training.cooldown_steps=2", "a cosine ends at zero by itself"),
    ],
)
def test_each_error_names_fields_values_and_a_remedy(override: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_file.load(TEXT, [override])


def test_a_low_resolution_share_must_divide_over_the_learners():
    both = ["training.low_resolution={patch_size: 16, share: 0.3}", "training.n_learners=4"]
    with pytest.raises(ValueError, match=r"share 0\.3 of training\.sub_batch_size 32, 10 examples, .*n_learners 4"):
        run_file.load(TEXT, both)
    assert run_file.load(TEXT, both[:1]).n_low_resolution == 10


def test_a_range_of_learners_has_the_numbers_that_divide():
    run = run_file.load(TEXT, ["training.n_learners={min: 2, max: 8}"])
    assert run.learner_numbers == [2, 4, 8]
    assert run.training.max_learners == 8
    mixed = "training.low_resolution={patch_size: 16, share: 0.3}"  # 10 examples
    assert run_file.load(TEXT, ["training.n_learners={min: 1, max: 2}", mixed]).learner_numbers == [1, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "{min: 1, max: 6}",
            "6 learners do not divide training.sub_batch_size 32, the super-batch of 64; numbers that ",
        ),
        ("{min: 1, max: 6}", "that do are 1, 2, 4: set max to 4"),
        ("{min: 5, max: 7}", "none of these numbers of learners divides training.sub_batch_size 32"),
        ("{min: 4, max: 2}", "training.n_learners {min: 4, max: 2} has a min above its max"),
        ("{min: 2}", "training.n_learners.max is missing"),
        ("{min: 0, max: 2}", "training.n_learners.min = 0: Input should be greater than 0"),
        ("many", "or a mapping of keys to values"),
    ],
)
def test_a_range_of_learners_that_cannot_be_is_refused(override: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_file.load(TEXT, [f"training.n_learners={override}"])


@pytest.mark.parametrize("more", [[], ["training.keep_last_checkpoints=2", "training.checkpoint_every_steps=4"]])
def test_kept_checkpoints_must_be_among_those_written(more):
    with pytest.raises(ValueError, match="keep_checkpoint_every_steps 6 needs"):
        run_file.load(TEXT, ["training.keep_checkpoint_every_steps=6", *more])


def test_warm_up_and_cool_down_must_fit_into_the_run():
    with pytest.raises(ValueError, match="cooldown_steps 99 are more than the 6 steps"):
        run_file.load(TEXT, ["training.schedule=constant", "training.cooldown_steps=99"])


def test_easy_reference_scores_are_not_compared():
    with pytest.raises(ValueError, match="criterion easy uses none"):
        run_file.load(TEXT, ["selection.criterion=easy", "selection.agreement_every_steps=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.shard_weights=true", "training.compile=true"], "training.shard_weights gathers weights"),
        (["training.loss=softmax"], "set selection.loss to softmax too"),
        (["data.replay=other"], "set selection.method to uniform and data.decode to eager"),
        (["ingest={urls: x, shards: pool, encode_format: png, encode_quality: 90}"], "of png is its compression"),
        (["ingest={urls: x, shards: elsewhere}"], "has nothing of ingest.shards elsewhere"),
        (["data.weights=[1.0, 2.0]"], "data.weights has 2 numbers for 1 sources"),
        (["evaluation={sets: [{name: a, shards: x, tasks: [y]}, {name: a, shards: x, tasks: [y]}]}"], "a name twice"),
        (["training.initial_checkpoint=x", "model.pretrained=y"], "not with both"),
        (["reference.model.pretrained=y"], "2 of them are given"),
        (["reference.checkpoint=null"], "0 of them are given"),
        (["reference.scorers=[{name: cosine, scorer: fasttext}]"], "the names cosine are taken"),
    ],
)
def test_contradictory_values_are_refused(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_file.load(TEXT, overrides)


def test_all_errors_are_reported_at_once():
    with pytest.raises(ValueError, match="n_chunks 5") as error:
        run_file.load(TEXT, ["selection.n_chunks=5", "training.n_learners=3", "reference=null"])
    assert len(str(error.value).splitlines()) == 1 + 4
