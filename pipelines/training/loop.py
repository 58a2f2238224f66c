"""The training loop of one learner: score, select, train, log and checkpoint, step by step.

The run directory is the only state: a learner that is started again goes on from the newest checkpoint there.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from jest_core.collectives import Learners
from jest_core.examples.super_batch import Examples
from jest_core.models import configurations, towers
from jest_core.models.towers import Towers
from jest_core.run_file import Run
from jest_core.selection.arguments import Diverged
from jest_core.training import optim
from jest_core.training.bad_pictures import TooManyBad
from jest_core.training.forward import TrainingPass, replicated
from jest_core.training.step import Learner, StepResult, train_step

from ..base import checkpoints, cluster, storage
from ..base.integrity import Damaged
from ..base.prefetch import prefetch
from ..evaluation import evaluate, results
from ..stream.source import Source, open_source
from . import hardware, online_reference, selection_log, sub_batches
from .heartbeat import EVALUATES, WAITS, Board, Order, Pulse
from .metrics import Journal
from .online_reference import Online


@dataclass(frozen=True)
class Place:
    """Which learner this is: its rank among all, how many there are, and on this node, and its device."""

    rank: int
    n_learners: int
    n_here: int
    device: torch.device


ALONE = Place(0, 1, 1, torch.device("cpu"))


def learn(run: Run, board: Board, place: Place = ALONE) -> None:
    """One learner: from the newest checkpoint to the end of the run."""
    if board.get().failure:  # this is the restart after it, which would only fail there again
        return
    if not run.training.gpus_per_learner:
        torch.set_num_threads(max(1, cluster.n_cores() // place.n_learners))
        cluster.keep_freed_memory()
    loop = _Loop(run, board, place)
    with (
        loop.journal or nullcontext(),
        loop.writer,
        board.pulse(place.rank) as pulse,
        closing(prefetch(loop.super_batches())) as super_batches,
    ):
        loop.evaluate_if_missed(pulse)
        while loop.step < run.n_steps:
            pulse.doing = f"{WAITS} of step {loop.step}"
            super_batch, wait_seconds = _timed_next(super_batches)
            pulse.doing = f"is in step {loop.step}"
            loop.train(super_batch, wait_seconds)
            stops = loop.checkpoint_if_due()
            if evaluate.is_due(run, loop.step) and (not stops or loop.step == run.n_steps):
                loop.evaluate(pulse)
            if stops:
                return


class _Loop:
    """What one learner has between two steps; `step` counts finished updates. The first learner has a journal."""

    def __init__(self, run: Run, board: Board, place: Place) -> None:
        self.run, self.board, self.rank = run, board, place.rank
        self.n_learners, self.directory = place.n_learners, run.path(run.run_dir)
        self.group = dist.group.WORLD if place.n_learners > 1 else None
        self.source = storage.retried(open_source)(run)
        self.reference = online_reference.load(run)
        self.learner = _create(run, self.source, place, self.group, self.reference)
        try:
            state = checkpoints.resume(self.directory, self.learner.towers, self.learner.optimizer)
        except Damaged as error:
            board.fail(str(error))
            raise
        self.step = state["step"]
        self.learners = Learners(self.group)
        sub_batches.refuse_disagreement(self.learners, self.directory, self.step)
        self._refuse_other_reference(state)
        self.log = selection_log.SelectionLog(self.directory, state["log_parts"])
        self.journal: Journal | None = None
        if self.rank == 0:
            for text in checkpoints.set_aside(self.directory, self.step):
                board.tell(text)
            self.log.tidy()
            checkpoints.tidy(self.directory)
            results.remove_after(self.directory, self.step)
            self.journal = Journal(run, board, state)
            board.describe(hardware.of(place.device))
        self.writer = checkpoints.Writer()
        self._committed_at, self._saving_seconds, self._checkpoint_step = time.monotonic(), 0.0, self.step

    def _refuse_other_reference(self, state: checkpoints.State) -> None:
        try:
            online_reference.refuse_other(self.run, state, self.reference)
        except ValueError as error:
            self.board.fail(str(error))
            raise
        if self.reference is not None and len(set(self.learners.counts(self.reference.short_hash))) > 1:
            assert self.run.reference is not None
            named = self.run.reference.checkpoint or self.run.reference.model.pretrained
            raise RuntimeError(
                f"the learners loaded different weights of the reference ({named}), which may "
                "still be written to: start the run again, or name a checkpoint file in reference.checkpoint"
            )

    def super_batches(self) -> Iterator[Examples]:
        """This learner's share of the super-batches from here on."""
        place = {"rank": self.rank, "n_learners": self.n_learners, "first_step": self.step}
        return sub_batches.stream(self.run, self.source, self.learner.towers, **place)

    def train(self, super_batch: Examples, wait_seconds: float) -> None:
        """One step: select, update and log. Raises Diverged where the update is not sound, TooManyBad where the data is
        not."""
        began = time.perf_counter()
        try:
            result = _sound(self.run, train_step(self.learner, super_batch, self.step))
        except (Diverged, TooManyBad) as error:
            failed = f"{self.directory}/failed"
            led_to_it = f"; the checkpoint after step {self.step} has the weights that led to it"
            self.board.fail(
                f"step {self.step}: {error}; {failed} has the examples of its super-batch"
                + led_to_it * (0 < self.step == self._checkpoint_step)
            )
            storage.write_table(f"{failed}/step-{self.step:08d}-{self.rank}.parquet", super_batch.identities())
            raise
        self.step += 1
        if self.journal is not None:
            batch = wait_seconds + time.perf_counter() - began
            times = {"wait": wait_seconds, "checkpoint": self._saving_seconds} | result.seconds | {"batch": batch}
            self.log.add(result)
            self.journal.add(result, self.step, times)

    def checkpoint_if_due(self) -> bool:
        """Checkpoint after so many steps or minutes, at the end, or where the board says so; returns whether the
        learners stop."""
        training, first = self.run.training, self.rank == 0
        minutes = (time.monotonic() - self._committed_at) / 60
        by_time = minutes >= (training.checkpoint_every_minutes or math.inf)
        by_steps = self.step % training.checkpoint_every_steps == 0 or self.step == self.run.n_steps
        ordered = self.board.ordered() if first else Order.go_on
        stops = ordered >= Order.restart or (ordered == Order.restart_at_checkpoint and (by_time or by_steps))
        stops, by_time = self.learners.any(stops, first and by_time)
        began = time.perf_counter()
        # of sharded towers all learners have a share
        if (by_time or stops or by_steps) and (self.journal is not None or self.learner.towers.sharded):
            content = checkpoints.content(self.step, self.learner.towers, self.learner.optimizer)
            copied = checkpoints.copied(content, keep=self.journal is not None)
            if self.journal is not None:
                self._refuse_not_finite(copied)
                self._checkpoint(copied, self.journal)
            self._committed_at, self._checkpoint_step = time.monotonic(), self.step
        self._saving_seconds = time.perf_counter() - began
        return stops

    def _checkpoint(self, copied: checkpoints.Checkpoint, journal: Journal) -> None:
        """Write the copied content while training goes on: log parts and metrics, then the checkpoint that commits
        them.

        Checkpoints that are not kept are removed before: the newest then is one from which at least a step was sound,
        and it stays until that is so of the next. At the end of the run there is no next.
        """
        training, directory, step = self.run.training, self.directory, self.step
        steps_logged, metrics, seconds = self.log.take(), journal.text(), journal.seconds
        config = configurations.open_clip_config(self.learner.towers.name, self.learner.towers.inputs)

        def write() -> None:
            parts = self.log.commit(steps_logged)
            journal.write(metrics)
            state: checkpoints.State = {"step": step, "seconds": seconds, "log_parts": parts}
            state["open_clip_config"] = config
            if self.reference is not None:
                state["reference"] = self.reference.record
            checkpoints.write(directory, step, copied | {"jest": state})

        def prune() -> None:
            checkpoints.prune(directory, training.keep_last_checkpoints, training.keep_checkpoint_every_steps)

        def prune_and_write() -> None:
            storage.retried(prune)()
            storage.retried(write)()
            if step == self.run.n_steps:
                storage.retried(prune)()

        self.writer.submit(prune_and_write)

    def _refuse_not_finite(self, content: checkpoints.Checkpoint) -> None:
        try:
            checkpoints.refuse_not_finite(content["state_dict"])
        except Diverged as error:
            self.board.fail(f"step {self.step - 1}: {error}; no checkpoint is written of them")
            raise

    def evaluate_if_missed(self, pulse: Pulse) -> None:
        """Evaluate the checkpoint from which the run goes on, where it ended before it came to that."""
        run, step = self.run, self.step
        missed = bool(step) and self.rank == 0 and evaluate.is_due(run, step) and evaluate.is_missing(run, step)
        if step and self.learners.any(missed)[0]:
            self.evaluate(pulse)

    def evaluate(self, pulse: Pulse) -> None:
        """After the step's checkpoint, so that an error here loses no step; the other learners wait."""
        pulse.doing = EVALUATES
        whole = _whole(self.run, self.learner.towers, self.rank)
        if self.journal is not None:
            self.writer.wait()
            self.journal.add_evaluation(self.step, evaluate.evaluate_step(self.run, whole, self.step))
            if self.step in checkpoints.steps(self.directory):
                self.writer.submit(partial(storage.retried(self.journal.write), self.journal.text()))
        if self.group is not None:
            dist.barrier(self.group)


def _timed_next(super_batches: Iterator[Examples]) -> tuple[Examples, float]:
    """The next super-batch, and the seconds that the loop waited for it."""
    began = time.perf_counter()
    return next(super_batches), time.perf_counter() - began


def _sound(run: Run, result: StepResult) -> StepResult:
    """The step. Raises Diverged where its loss or gradient is not finite, or the loss above training.max_loss."""
    loss, norm = (result.optimisation[name] for name in ("loss", "gradient_norm"))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(f"loss {loss:.4g}, gradient norm {norm:.4g}")
    if run.training.max_loss is not None and loss > run.training.max_loss:
        raise Diverged(f"loss {loss:.4g} is above training.max_loss {run.training.max_loss:g}")
    return result


def _create(
    run: Run, source: Source, place: Place, group: dist.ProcessGroup | None, reference: Online | None
) -> Learner:
    config = run.training
    pair = towers.build(run.model, seed=run.seed, decoder=run.data.decoder)
    start_from(run, pair)
    layout = torch.contiguous_format if config.shard_weights else torch.channels_last
    pair.model.to(device=place.device, memory_format=layout)
    if config.activation_checkpointing:
        pair.checkpoint_activations()
    if config.compile:
        pair.compile()
    if group is not None and config.shard_weights:
        pair.shard(group)
    optimizer = optim.adamw(
        pair.model,
        learning_rate=config.learning_rate,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    trained = TrainingPass(pair, run, group)
    alone = group is None or pair.sharded
    decoders = max(1, cluster.n_cores() // place.n_here)
    selector = sub_batches.selector(run, source, pair, group, ThreadPoolExecutor(decoders), reference)
    return Learner(**vars(selector), optimizer=optimizer, wrapped=trained if alone else replicated(trained))


def start_from(run: Run, pair: Towers) -> None:
    """Load the initial checkpoint's weights, where the run directory has no checkpoint yet."""
    if run.training.initial_checkpoint is not None and not checkpoints.steps(run.path(run.run_dir)):
        path = checkpoints.file_of(run.path(run.training.initial_checkpoint))
        towers.load_weights(pair, checkpoints.read(path), path)


def _whole(run: Run, pair: Towers, rank: int) -> Towers:
    """The towers that the first learner evaluates: of sharded ones a copy with all weights, gathered from all learners.

    Collective where the towers are sharded; the other learners return theirs.
    """
    if not pair.sharded:
        return pair
    state = checkpoints.copied(pair.model.state_dict(), keep=rank == 0)
    if rank:
        return pair
    copy = towers.build(run.model, seed=0, decoder=run.data.decoder)
    towers.load_weights(copy, state)
    copy.model.to(pair.device)
    return copy
