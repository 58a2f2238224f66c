"""The training loop of one learner: score, select, train, log and checkpoint, step by step.

The run directory is the only state: whoever is started again goes on from the newest checkpoint there.
"""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from jest_core.collectives import Learners
from jest_core.models import towers
from jest_core.models.towers import Towers
from jest_core.run_file import Run
from jest_core.selection.arguments import Diverged
from jest_core.training import optim
from jest_core.training.forward import TrainingPass
from jest_core.training.step import Learner, StepResult, train_step
from pipelines.base import checkpoints, cluster, storage
from pipelines.base.prefetch import prefetch
from pipelines.evaluation import evaluate
from pipelines.stream.source import Source, open_source
from pipelines.training import selection_log, sub_batches
from pipelines.training.heartbeat import EVALUATES, Board
from pipelines.training.metrics import Journal


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
    if board.get().failure:  # and this is the restart, which would only fail there again
        return
    rank, size = place.rank, place.n_learners
    directory = run.path(run.run_dir)
    group = dist.group.WORLD if size > 1 else None
    if not run.training.gpus_per_learner:
        torch.set_num_threads(max(1, cluster.n_cores() // size))
        cluster.keep_freed_memory()
    source = storage.retried(open_source)(run)
    learner = _create(run, source, place, group)
    done = checkpoints.resume(directory, learner.towers, learner.optimizer)
    log = selection_log.SelectionLog(directory, done["log_parts"])
    if rank == 0:
        log.tidy()
        checkpoints.tidy(directory)
    step = done["step"]
    journal = Journal(run, board, done) if rank == 0 else None
    items = sub_batches.stream(run, source, learner.towers, rank=rank, n_learners=size, first_step=step)
    learners, committed, saving = Learners(group), time.monotonic(), 0.0
    if len(set(learners.counts(step))) > 1:
        raise RuntimeError(
            "the learners found different newest checkpoints; the storage shows some of them an old list"
        )
    with (
        journal or nullcontext(),
        checkpoints.Writer() as writer,
        board.pulse(rank) as pulse,
        closing(prefetch(items)) as super_batch_stream,
    ):

        def evaluate_now() -> None:
            """After the step's checkpoint, so that what fails here loses no step; the others wait."""
            pulse.doing = EVALUATES
            whole = _whole(run, learner.towers, rank)
            if journal is not None:
                writer.wait()
                journal.add_evaluation(step, evaluate.evaluate_step(run, whole, step))
                if step in checkpoints.steps(directory):
                    writer.submit(partial(storage.retried(journal.write), journal.text()))
            if group is not None:
                dist.barrier(group)

        if step and learners.any(rank == 0 and evaluate.is_due(run, step) and evaluate.is_missing(run, step))[0]:
            evaluate_now()  # the try before this one did not come to it
        while step < run.n_steps:
            began = time.perf_counter()
            pulse.doing = f"waits for the data of step {step}"
            super_batch = next(super_batch_stream)
            times = {"wait": time.perf_counter() - began, "checkpoint": saving}
            pulse.doing = f"is in step {step}"
            try:
                result = _sound(run, train_step(learner, super_batch, step))
            except Diverged as error:
                board.fail(f"step {step}: {error}; {directory}/failed has the examples of its super-batch")
                storage.write_table(f"{directory}/failed/step-{step:08d}-{rank}.parquet", super_batch.identities())
                raise
            step += 1
            times |= result.seconds | {"batch": time.perf_counter() - began}
            if journal is not None:
                log.add(result)
                journal.add(result, step, times)
            due = (time.monotonic() - committed) / 60 >= (run.training.checkpoint_every_minutes or math.inf)
            stops, due = learners.any(rank == 0 and board.is_stopping(), rank == 0 and due)
            commits = due or stops or step % run.training.checkpoint_every_steps == 0 or step == run.n_steps
            began = time.perf_counter()
            if commits and (journal is not None or learner.towers.sharded):  # whose shares are on all learners
                content = checkpoints.content(step, learner.towers, learner.optimizer)
                held = checkpoints.copied(content, keep=journal is not None)
                if journal is not None:
                    _checkpoint(writer, run, directory, step, held, log, journal)
                committed = time.monotonic()
            saving = time.perf_counter() - began
            if evaluate.is_due(run, step) and (not stops or step == run.n_steps):
                evaluate_now()
            if stops:
                return


def _sound(run: Run, result: StepResult) -> StepResult:
    """The step, unless it diverged."""
    loss, norm = (result.optimisation[name] for name in ("loss", "gradient_norm"))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(f"loss {loss:.4g}, gradient norm {norm:.4g}")
    if run.training.max_loss is not None and loss > run.training.max_loss:
        raise Diverged(f"loss {loss:.4g} is above training.max_loss {run.training.max_loss:g}")
    return result


def _create(run: Run, source: Source, place: Place, group: dist.ProcessGroup | None) -> Learner:
    config = run.training
    pair = towers.build(run.model, seed=run.seed)
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
    trained: torch.nn.Module = TrainingPass(pair, run, group)
    if group is not None and not pair.sharded:  # no buffer of a tower changes: batch norm is refused
        trained = torch.nn.parallel.DistributedDataParallel(trained, broadcast_buffers=False)
    decoders = max(1, cluster.n_cores() // place.n_here)
    selector = sub_batches.selector(run, source, pair, group, ThreadPoolExecutor(decoders))
    return Learner(**vars(selector), optimizer=optimizer, wrapped=trained)


def start_from(run: Run, pair: Towers) -> None:
    """The initial checkpoint's weights, where the run has no checkpoint of its own yet."""
    if run.training.initial_checkpoint is not None and not checkpoints.steps(run.path(run.run_dir)):
        towers.load_weights(pair, checkpoints.read(run.path(run.training.initial_checkpoint)))


def _whole(run: Run, pair: Towers, rank: int) -> Towers:
    """What the first learner evaluates alone: of sharded towers a copy with all weights, which all learners give it."""
    if not pair.sharded:
        return pair
    state = checkpoints.copied(pair.model.state_dict(), keep=rank == 0)
    if rank:
        return pair
    copy = towers.build(run.model, seed=0)
    towers.load_weights(copy, state)
    copy.model.to(pair.device)
    return copy


def _checkpoint(
    writer: checkpoints.Writer,
    run: Run,
    directory: str,
    step: int,
    held: dict[str, Any],
    log: selection_log.SelectionLog,
    journal: Journal,
) -> None:
    """Write the copied state while training goes on: log parts and metrics, then the checkpoint that commits them, then
    away with those that are not to be kept."""
    training = run.training
    steps_logged, told, seconds = log.take(), journal.text(), journal.seconds

    def write() -> None:
        parts = log.commit(steps_logged)
        journal.write(told)
        checkpoints.write(directory, step, held | {"jest": {"step": step, "seconds": seconds, "log_parts": parts}})

    def write_and_prune() -> None:
        storage.retried(write)()
        storage.retried(checkpoints.prune)(
            directory, training.keep_last_checkpoints, training.keep_checkpoint_every_steps
        )

    writer.submit(write_and_prune)
