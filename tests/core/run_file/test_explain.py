"""Errors of single values: field, value, remedy, each on a line."""

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jest_core import run_file
from jest_core.run_file.explain import first_sentence, parts_of
from tests.core.run_file.test_load import TEXT


def lines(override: str) -> list[str]:
    with pytest.raises(ValueError, match=r"^run file:\n") as error:
        run_file.load(TEXT, [override])
    found = [line.removeprefix("  ") for line in str(error.value).splitlines()[1:]]
    return [line for line in found if not line.startswith("all keys are in ")]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("selection.n_chunk=8", "selection.n_chunk is not a key of a run file; did you mean n_chunks?"),
        ("evaluaton={}", "evaluaton is not a key of a run file; did you mean evaluation?"),
        ("n_chunks=8", "n_chunks is not a key of a run file; did you mean selection.n_chunks?"),
        ("training.loss_type=x", "training.loss_type is not a key of a run file; did you mean loss_tile?"),
        (
            "data.score_image_size=32",
            "data.score_image_size is not a key of a run file; did you mean reference.score_image_size or "
            "selection.score_image_size?",
        ),
        (
            "aws_secret_access_key=x",
            "aws_secret_access_key is not a key of a run file; remove it, or correct its spelling",
        ),
        (
            "data.rules=[{rule: size, min_sid: 3}]",
            "data.rules.0.min_sid is not a key of a run file; did you mean min_side?",
        ),
        (
            "data.rules=[{rule: basic_filter}, {rule: size, size: 3}]",
            "data.rules.1.size is not a key of a run file; remove it, or correct its spelling",
        ),
        (
            "subset={directory: d, learner: {model: {name: x}, scores: y, scorer: []}}",
            "subset.learner.scorer is not a key of a run file; did you mean scorers?",
        ),
    ],
)
def test_an_unknown_key_suggests_a_similar_key_of_the_same_part(override: str, line: str):
    assert lines(override) == [line]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "selection.method=jont",
            "selection.method = 'jont' is none of uniform, independent, joint; did you mean joint?",
        ),
        ("selection.draw=[1]", "selection.draw = [1] is none of sample, top_k"),
        (
            "training.report_to=[mlflow, wandbb]",
            "training.report_to.1 = 'wandbb' is none of tensorboard, wandb, mlflow; did you mean wandb?",
        ),
        (
            "data.rules=[{rule: basic_filtr}]",
            "data.rules.0.rule = 'basic_filtr' is none of status, unsafe, nsfw, watermark, deny, size, caption, "
            "language, similarity, score, subset, duplicate, basic_filter; did you mean basic_filter?",
        ),
        (
            "ingest={urls: x, shards: pool, rules: [{rule: basic_filter}]}",
            "ingest.rules.0.rule = 'basic_filter' is none of status, unsafe, nsfw, watermark, deny, size, caption, "
            "language, similarity, score, subset, duplicate",
        ),
        ("data.rules=[{below: 1}]", "data.rules.0 = {'below': 1} names no rule; write {rule: NAME, ...}"),
    ],
)
def test_an_invalid_choice_lists_the_valid_ones(override: str, line: str):
    assert lines(override) == [line]


@pytest.mark.parametrize(
    ("override", "starts", "ends"),
    [
        ("seed=-1", "seed = -1: Input should be greater than or equal to 0 (Seed of all", "augmentation.)"),
        (
            "training.sub_batch_size=null",
            "training.sub_batch_size = None: Input should be a valid integer (Batch",
            ".)",
        ),
        ("data.shards=7", "data.shards = 7: Input should be a valid string or a valid list (Image shards: ", ".)"),
        ("data.shards=[x, 7]", "data.shards.1 = 7: Input should be text: put it in quotes (Image shards", ".)"),
        (
            "data.columns={caption: 7}",
            "data.columns.caption = 7: Input should be text: put it in quotes (Names of",
            ".)",
        ),
        ("model.image_mean=[1, 2]", "model.image_mean.2 is missing; a run file is complete: add it. Mean of", "0..1."),
        (
            "evaluation={sets: [{name: a, shards: x, tasks: [b], few_shot: {n_shots: 1}}]}",
            "evaluation.sets.0.few_shot.pool is missing; a run file is complete: add it, such as `pool: {shards: ",
            "Labelled pictures from which the shots are drawn.",
        ),
        ("data.rules=[{rule: score}]", "data.rules.0 = {'rule': 'score'}: the rule `score` needs one of ", "not both"),
    ],
)
def test_a_wrong_value_is_explained_by_the_fields_description(override: str, starts: str, ends: str):
    (line,) = lines(override)
    assert line.startswith(starts)
    assert line.endswith(ends)


def test_each_missing_key_comes_with_a_value_to_start_from_and_these_make_a_run():
    """Write what the message says, until nothing is missing."""
    values: dict[str, Any] = {"data": {"shards": "shards/*.tar"}}
    for _ in range(3):
        with contextlib.suppress(ValueError):
            assert run_file.load(yaml.safe_dump(values)).n_steps == 1000
            return
        with pytest.raises(ValueError, match=r"missing|no `reference` part") as error:
            run_file.load(yaml.safe_dump(values))
        for key, written in re.findall(r"(?:  (\S+) is missing.*?|), such as `(.*?)`", str(error.value)):
            part = values["data"] if key.startswith("data.") else values
            part |= yaml.safe_load(written)
        if " is missing" in str(error.value):
            complete = str(error.value).rpartition("a complete file is ")[2]
            assert run_file.load(Path(complete).read_text())
    pytest.fail(str(error.value))


def test_of_many_wrong_values_the_first_are_shown():
    text = TEXT + "".join(f"key{i}: 1\n" for i in range(1000))
    with pytest.raises(ValueError, match="key0 is not a key") as error:
        run_file.load(text)
    assert len(str(error.value)) < 4000
    assert str(error.value).endswith("\n  ... and 970 more")


def test_a_long_value_is_truncated():
    (line,) = lines(f"seed={'x' * 1000}")
    assert len(line) < 400


def test_each_wrong_value_is_reported_on_a_line():
    assert len(lines("data.rules=[{rule: size, a: 1, b: 2}, {rule: caption, min_words: -1}]")) == 3


def test_the_first_sentence_of_a_description():
    assert first_sentence("Share: 1 - b / B. At 0.8\nmore.") == "Share: 1 - b / B."
    assert first_sentence("In two\nlines, with 0.5. as it is") == "In two lines, with 0.5. as it is"
    assert first_sentence(None) == ""


def test_the_parts_of_a_type():
    assert parts_of(run_file.Run.model_fields["data"].annotation) == [run_file.Data]
    assert parts_of(run_file.Evaluation.model_fields["sets"].annotation) == [run_file.EvaluationSet]
    assert parts_of(str | None) == []
