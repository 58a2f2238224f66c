import re
from collections.abc import Iterator
from importlib.resources import files

import pytest

from jest_core import run_file
from tests.conftest import RUN

TEXT = RUN.format(root="/data", name="joint", shards="pool")


def test_a_dumped_run_loads_as_itself():
    run = run_file.load(TEXT)
    assert run_file.load(run_file.dump(run)) == run


def test_derived_sizes():
    run = run_file.load(
        TEXT,
        [
            "training.sub_batch_size=32768",
            "selection.filter_ratio=0.8",
            "training.examples_trained=65536",
            "selection.n_chunks=16",
        ],
    )
    assert (run.super_batch_size, run.sub_batch_size, run.n_steps) == (163840, 32768, 2)
    assert run_file.load(TEXT, ["selection.method=uniform"]).super_batch_size == 32


def test_relative_paths_are_joined_to_root():
    assert run_file.join("/a", "b/c") == "/a/b/c"
    assert run_file.join("s3://bucket/a/", "b") == "s3://bucket/a/b"
    assert run_file.join("/a", "s3://bucket/b") == "s3://bucket/b"
    assert run_file.join("s3://bucket", "/b") == "/b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.n_chunk=8", "selection.n_chunk is not a key of a run file"),
        ("aws_secret_access_key=x", "aws_secret_access_key is not a key of a run file"),
        ("selection.filter_ratio=1.5", "selection.filter_ratio = 1.5"),
        ("selection.method=jont", "selection.method = 'jont'"),
        ("data.rules=[{rule: nonsense}]", "data.rules.0"),
        ("training.low_resolution={patch_size: 16, share: 1.5}", "training.low_resolution.share = 1.5"),
        ("seed", "has no '='"),
    ],
)
def test_errors_name_field_value_and_remedy(override: str, message: str):
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("[", r"\[")):
        run_file.load(TEXT, [override])


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="training is missing"):
        run_file.load(
            "\n".join(line for line in TEXT.splitlines() if not line.startswith(("training", "data", "  ")))
            + "\ndata: {}"
        )


@pytest.mark.parametrize(
    "path",
    sorted(p for d in (files("jest_deploy") / "runs").iterdir() if d.is_dir() for p in d.iterdir()),
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_every_run_file_loads(path):
    run_file.load(path.read_text(), source=str(path))


def test_an_overlay_changes_only_the_keys_that_it_has():
    changes = {"training": {"sub_batch_size": 16, "augmentation": {"colour": 0.5}}, "model": {"name": "other"}}
    whole = run_file.load(TEXT, [changes, "seed=3"])
    values = run_file.load(TEXT).model_dump()
    values["training"] |= {"sub_batch_size": 16, "augmentation": {"shift_pixels": 0, "colour": 0.5}}
    values["model"]["name"], values["seed"] = "other", 3
    assert whole.model_dump() == values
    assert run_file.load(TEXT, [{"seed": 4}, "seed=3"]).seed == 3  # applied in their order
    with pytest.raises(ValueError, match=r"training\.size is not a key"):
        run_file.load(TEXT, [{"training": {"size": 3}}])


def test_an_override_can_fill_a_part_that_is_null():
    saved = run_file.dump(run_file.load(TEXT))
    override = "training.low_resolution.patch_size=16"
    assert run_file.load(saved, [override]) == run_file.load(
        saved, [{"training": {"low_resolution": {"patch_size": 16}}}]
    )


SIZES = """
ingest.rows_per_shard ingest.image_size ingest.n_tasks ingest.threads data.n_streams data.window_rows
model.name reference.model.name reference.batch_size reference.n_actors reference.gpus_per_actor
selection.score_patch_size selection.agreement_every_steps training.sub_batch_size training.examples_trained
training.n_learners training.gpus_per_learner training.low_resolution.patch_size training.warmup_steps
training.score_batch_size training.checkpoint_every_steps training.keep_checkpoint_every_steps evaluation.gpus
"""


def test_the_rehearsal_changes_sizes_only():
    runs = files("jest_deploy") / "runs"
    changes = run_file.parse((runs / "rehearsal.yaml").read_text(), "rehearsal")
    text = (runs / "laion2b" / "flexi.yaml").read_text()
    before, after = run_file.load(text).model_dump(), run_file.load(text, [changes]).model_dump()
    assert sorted(_differences(before, after)) == sorted(SIZES.split())


def _differences(before: dict, after: dict, prefix: str = "") -> Iterator[str]:
    for key, value in before.items():
        if isinstance(value, dict) and isinstance(after[key], dict):
            yield from _differences(value, after[key], f"{prefix}{key}.")
        elif value != after[key]:
            yield prefix + key


FLOATS = """
data.max_bad_share selection.filter_ratio selection.gain training.gpus_per_learner training.learning_rate training.beta1
training.beta2 training.eps training.weight_decay training.gradient_clip training.augmentation.colour
training.low_resolution.share training.checkpoint_every_minutes training.hang_minutes training.max_loss
reference.gpus_per_actor reference.logit_bias data.weights.0 model.image_mean.1
"""


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999", "'nan'", "'Infinity'"])
def test_no_number_of_a_run_file_is_infinite(value: str):
    for key in FLOATS.split():
        place, _, last = key.rpartition(".")
        many = {"0": f"{place}=[{value}]", "1": f"{place}=[0, {value}, 0]"}
        with pytest.raises(ValueError, match=rf"{key} = .*Input should be a finite number"):
            run_file.load(TEXT, [many.get(last, f"{key}={value}")])


@pytest.mark.parametrize(
    "override", ["seed=yes", "training.n_learners=true", "selection.gain=on", "data.window_rows=no"]
)
def test_a_truth_value_is_no_number(override: str):
    with pytest.raises(ValueError, match=f"{override.split('=')[0]} = (True|False): Input should be a number"):
        run_file.load(TEXT, [override])


@pytest.mark.parametrize("key", ["run_dir", "data.catalogue", "reference.scores", "subset.directory"])
@pytest.mark.parametrize(
    ("root", "place"),
    [("/data", place) for place in ("", ".", "/", "..", "a/..", "/data/", "../data", "file:///data")]
    + [("s3://b/a", place) for place in ("", "s3://b", "s3://b/", "s3://b/a/", "..")],
)
def test_a_directory_that_is_written_is_below_or_beside_root(key: str, root: str, place: str):
    with pytest.raises(ValueError, match=rf"{key} '{re.escape(place)}' is root .*: name one of its own"):
        run_file.load(TEXT, [f"root={root}", f"{key}='{place}'"])


@pytest.mark.parametrize("place", ["../../../x", "../database", "/x", "s3://b/runs", "a::b", "data", "..."])
def test_a_directory_may_be_anywhere_else(place: str):
    assert run_file.load(TEXT, [f"run_dir='{place}'"]).run_dir == place


def test_two_commands_do_not_write_into_one_directory():
    with pytest.raises(ValueError, match=r"run_dir 'scores/\.\./catalogue/' is data\.catalogue too: give each"):
        run_file.load(TEXT, ["run_dir=scores/../catalogue/"])
    with pytest.raises(ValueError, match=r"data\.catalogue '/data/scores' is reference\.scores too"):
        run_file.load(TEXT, ["data.catalogue=/data/scores"])


def test_the_file_that_a_run_saved_loads_though_it_would_be_refused_today():
    saved = run_file.dump(run_file.load(TEXT)).replace("run_dir: joint", "run_dir: .")
    assert run_file.load(saved, saved=True).run_dir == "."


def test_a_seed_has_63_bits():
    assert run_file.load(TEXT, [f"seed={2**63 - 1}"]).seed == 2**63 - 1
    with pytest.raises(ValueError, match="more than 63 bits; use one of at most"):
        run_file.load(TEXT, [f"seed={2**63}"])
