"""What is wrong with values of a run file that do not fit together: each line names fields, values and a remedy."""

from collections.abc import Iterator
from itertools import combinations

from jest_core.run_file.explain import on_one_line, start_of
from jest_core.run_file.paths import holds
from jest_core.run_file.reference import Reference
from jest_core.run_file.schema import Run
from jest_core.run_file.training import LearnerRange


def problems(run: Run) -> list[str]:
    """A line for each problem; none where the run can start."""
    return [
        line for check in (_places, _sizes, _selection, _steps, _data, _resolutions, _models) for line in check(run)
    ]


def _places(run: Run) -> Iterator[str]:
    """Directories that commands write: each is one of its own, which holds neither the others' parent nor a disk."""
    reference, ingest, subset = run.reference, run.ingest, run.subset
    written = {
        "run_dir": run.run_dir,
        "data.catalogue": run.data.catalogue,
        "reference.scores": reference.scores if reference else None,
        "ingest.shards": ingest.shards if ingest else None,
        "subset.directory": subset.directory if subset else None,
    }
    places = {key: (value, run.path(value)) for key, value in written.items() if value is not None}
    for key, (value, path) in places.items():
        if holds(path, run.root):
            yield (
                f"{key} {value!r} is root {run.root}, or a directory above it, where other things are: name one of its "
                f"own, such as runs/joint; for one that is there set root to its parent directory"
            )
    for (key, (value, path)), (other, (_, its_path)) in combinations(places.items(), 2):
        if holds(path, its_path) and holds(its_path, path):
            yield f"{key} {value!r} is {other} too: give each a directory of its own"


def _sizes(run: Run) -> Iterator[str]:
    b, size, training, data, selection = run.sub_batch_size, run.super_batch_size, run.training, run.data, run.selection
    if run.seed >= 1 << 63:
        yield f"seed {run.seed} has more than 63 bits; use one of at most {(1 << 63) - 1}"
    if training.examples_trained % b:
        low = training.examples_trained // b * b or b
        yield (
            f"training.examples_trained {training.examples_trained} is not a multiple of "
            f"training.sub_batch_size {b}; use {low} or {low + b}"
        )
    if isinstance(training.n_learners, LearnerRange):
        yield from _learner_range(run, training.n_learners)
        n_learners = 1  # what divides is asked there
    else:
        n_learners = training.n_learners
    if b % n_learners:
        yield f"training.sub_batch_size {b} is not a multiple of training.n_learners {n_learners}; change one of them"
    if size % data.n_streams or size % n_learners:
        yield (
            f"the super-batch of {size} is not a multiple of data.n_streams {data.n_streams} and of "
            f"training.n_learners {n_learners}; change one of these, or the size of the super-batch by "
            f"training.sub_batch_size {b} or selection.filter_ratio {selection.filter_ratio}"
        )


def _learner_range(run: Run, given: LearnerRange) -> Iterator[str]:
    key = f"training.n_learners {{min: {given.min}, max: {given.max}}}"
    if given.min > given.max:
        yield f"{key} has a min above its max; exchange them"
        return
    low = f" and the {run.n_low_resolution} of training.low_resolution" if run.n_low_resolution else ""
    divide = f"training.sub_batch_size {run.sub_batch_size}, the super-batch of {run.super_batch_size}{low}"
    if not run.learner_numbers:
        yield f"{key}: none of these numbers of learners divides {divide}; change one of them"
    elif given.max not in run.learner_numbers:
        numbers = ", ".join(map(str, run.learner_numbers))
        yield (
            f"{key}: {given.max} learners do not divide {divide}; numbers that do are {numbers}: set max to "
            f"{run.learner_numbers[-1]}"
        )


def _selection(run: Run) -> Iterator[str]:
    b, size, selection, training = run.sub_batch_size, run.super_batch_size, run.selection, run.training
    if selection.selects:
        if not selection.filter_ratio:
            yield "selection.filter_ratio 0 selects everything: set selection.method uniform, or a ratio above 0"
        if b % selection.n_chunks:
            yield (
                f"training.sub_batch_size {b} is not a multiple of selection.n_chunks "
                f"{selection.n_chunks}; change one of them"
            )
        if selection.agreement_every_steps and not run.uses_learner:
            yield (
                f"selection.agreement_every_steps {selection.agreement_every_steps} compares the learner's scores, and "
                f"selection.criterion {selection.criterion} uses none; set selection.agreement_every_steps to 0"
            )
        if round(size * (1 - selection.filter_ratio)) != b:
            yield (
                f"no size of a super-batch gives training.sub_batch_size {b} at selection.filter_ratio "
                f"{selection.filter_ratio}; change one of them"
            )
    if (training.loss, selection.loss) == ("softmax", "sigmoid") and selection.selects:
        yield (
            "training.loss softmax trains no logit_bias, which selection.loss sigmoid needs: set selection.loss to "
            "softmax too"
        )


def _steps(run: Run) -> Iterator[str]:
    training = run.training
    if training.shard_weights and training.compile:
        yield (
            "training.shard_weights gathers weights layer by layer, which training.compile does not support: set one "
            "of them to false"
        )
    if training.cooldown_steps and training.schedule == "cosine":
        yield (
            f"training.cooldown_steps {training.cooldown_steps} is for training.schedule rsqrt and constant; a "
            "cosine ends at zero by itself: set training.cooldown_steps to 0, or another schedule"
        )
    if training.warmup_steps + training.cooldown_steps > run.n_steps and training.cooldown_steps:
        yield (
            f"training.warmup_steps {training.warmup_steps} and training.cooldown_steps {training.cooldown_steps} "
            f"are more than the {run.n_steps} steps of the run; lower one of them, or train more examples"
        )
    if training.keep_checkpoint_every_steps is not None and (
        training.keep_last_checkpoints is None or training.keep_checkpoint_every_steps % training.checkpoint_every_steps
    ):
        yield (
            f"training.keep_checkpoint_every_steps {training.keep_checkpoint_every_steps} needs "
            f"training.keep_last_checkpoints, which is {training.keep_last_checkpoints} (without it all checkpoints "
            "are kept), and has to be a multiple of training.checkpoint_every_steps "
            f"{training.checkpoint_every_steps}; change these"
        )


def _data(run: Run) -> Iterator[str]:
    data, ingest, selection, evaluation = run.data, run.ingest, run.selection, run.evaluation
    if data.replay is not None and (selection.method, data.decode) != ("uniform", "eager"):
        yield (
            f"data.replay {data.replay} trains on what that run selected, and selection.method {selection.method} with "
            f"data.decode {data.decode} selects again: set selection.method to uniform and data.decode to eager, as "
            "`jest train --replay` does"
        )
    if ingest is not None and ingest.encode_format == "png" and ingest.quality > 9:
        yield f"ingest.encode_quality {ingest.quality} of png is its compression: set it to 0 to 9"
    if ingest is not None and not any(
        f"{run.path(pattern)}/".startswith(f"{run.path(ingest.shards)}/") for pattern in data.sources
    ):
        yield (
            f"data.shards {', '.join(data.sources)} has nothing of ingest.shards {ingest.shards}: add it to "
            "data.shards, or remove the `ingest` part"
        )
    if data.weights is not None and len(data.weights) != len(data.sources):
        yield (
            f"data.weights has {len(data.weights)} numbers for {len(data.sources)} sources in data.shards; give one "
            "for each"
        )
    if data.decode == "late" and (selection.score_image_size is None or not selection.selects):
        yield (
            "data.decode late is for runs that score smaller pictures; set selection.score_image_size (and a "
            "selection.method other than uniform), or set data.decode to eager"
        )
    names = [spec.name for spec in evaluation.sets] if evaluation else []
    if len(names) != len(set(names)):
        yield f"evaluation.sets has a name twice ({', '.join(names)}); give each set another name"


def _resolutions(run: Run) -> Iterator[str]:
    b, training = run.sub_batch_size, run.training
    mixed = training.low_resolution
    if mixed is not None and mixed.image_size is None and mixed.patch_size is None:
        yield "training.low_resolution names no resolution; give its image_size or its patch_size, or leave it out"
    if mixed is not None and not run.n_low_resolution:
        yield (
            f"training.low_resolution.share {mixed.share} of training.sub_batch_size {b} is less than one example; "
            "make it larger, or leave training.low_resolution out"
        )
    if mixed is None or isinstance(training.n_learners, LearnerRange):
        return
    if run.n_low_resolution % training.n_learners:
        yield (
            f"training.low_resolution.share {mixed.share} of training.sub_batch_size {b}, {run.n_low_resolution} "
            f"examples, is not a multiple of training.n_learners {training.n_learners}; change the share or the "
            "learners"
        )


def _models(run: Run) -> Iterator[str]:
    training, selection, reference = run.training, run.selection, run.reference
    if training.initial_checkpoint and run.model.pretrained:
        yield (
            f"the learner starts with training.initial_checkpoint {training.initial_checkpoint} or model.pretrained "
            f"{run.model.pretrained}, not with both: remove one of them"
        )
    if reference is not None:
        yield from _reference("reference", reference)
    if run.subset is not None and run.subset.learner is not None:
        yield from _reference("subset.learner", run.subset.learner)
    if run.uses_reference and reference is None:
        yield (
            f"selection.method {selection.method} by selection.criterion {selection.criterion} scores with a "
            "reference, and the run file has no `reference` part; add one, such as "
            f"`reference: {on_one_line(start_of(Reference) | {'checkpoint': 'reference'})}`"
        )


def _reference(part: str, reference: Reference) -> Iterator[str]:
    given = [bool(x) for x in (reference.checkpoint, reference.model.pretrained, reference.features)]
    if sum(given) != 1:
        yield (
            f"{part} gets its weights from one of {part}.checkpoint, {part}.model.pretrained and {part}.features; "
            f"{sum(given)} of them are given: give exactly one"
        )
    if reference.features and (reference.online or reference.scorers):
        yield f"{part}.features are embeddings without a model: remove {part}.online and {part}.scorers"
    if reference.scorers:
        yield from _scorers(part, [scorer.name for scorer in reference.scorers])


def _scorers(part: str, names: list[str]) -> Iterator[str]:
    from jest_core.tables import (
        SCORE_CACHE_COLUMNS,
        TOKEN_COLUMNS,
    )  # and with it Arrow, which few run files need to be checked

    if taken := sorted({n for n in names if names.count(n) > 1 or n in {*SCORE_CACHE_COLUMNS, *TOKEN_COLUMNS.names}}):
        yield (
            f"{part}.scorers: the names {', '.join(taken)} are taken, by another scorer or a column of the score "
            "cache; give each scorer another name"
        )
