"""The train stage: Ray Train learners that score, select, train, log and checkpoint.

The run directory is the only state: whoever is started again, a learner by Ray Train or the whole command by its user,
goes on from the newest checkpoint there.
"""

import math
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist

from jest_core import config as run_files
from jest_core import optim, towers
from jest_core.collectives import Learners
from jest_core.config import Run
from jest_core.selection import Diverged
from jest_core.towers import Towers
from jest_core.train_step import Learner, StepResult, train_step
from jest_core.training_pass import TrainingPass
from pipelines import (
    checkpoints,
    cluster,
    evaluation,
    pace,
    progress,
    replay,
    selection_log,
    storage,
    sub_batches,
    super_batches,
)
from pipelines.board import EVALUATES, Board, Progress, every, sigterm_noted
from pipelines.journal import Journal, step_costs


def run_stage(run: Run, label: str = "train", *, in_process: bool = False) -> dict[str, Any]:
    """Train to the run's budget, or go on from its newest checkpoint; returns the manifest.

    in_process: one learner, in this process (Ray Train's local mode): for many short runs, to which starting a worker
    would be most of the work. Nothing restarts it.
    """
    if in_process and (run.training.n_learners > 1 or run.training.gpus_per_learner):
        raise ValueError("in_process trains with one learner, and without a GPU of its own")
    directory = run.path(run.run_dir)
    source = super_batches.open_source(run)  # first, so that a run without its inputs claims no directory
    if run.data.replay is not None:
        replay.refuse(run)
    config = run.identity()
    if (manifest := storage.begin(directory, "train", config)) is not None:
        progress.say(
            label,
            f"already at {directory}: {manifest['examples_trained']:,} examples trained in {manifest['seconds']:.0f} s",
        )
        return manifest
    pair = towers.build(run.model, seed=0)
    towers.refuse_loss(pair, run.training.loss, "training.loss")
    towers.refuse_resolutions(run)
    _start_from(run, pair)  # a checkpoint that does not fit is told here, not by every learner
    if run.training.activation_checkpointing:
        pair.checkpoint_activations()
    costs = step_costs(run)
    if note := _untrained_resolution(pair, run):
        progress.say(label, note)
    storage.write_bytes(f"{directory}/run.yaml", run_files.dump(run).encode())
    reached = (checkpoints.steps(directory) or [0])[-1]
    going = f"resumes after step {reached} of" if reached else "starts,"
    method = (
        run.selection.method
        if run.selection.method == "uniform"
        else f"{run.selection.method} selection by {run.selection.criterion}"
    )
    progress.say(
        label,
        f"{method}: {going} {run.n_steps} steps of {run.sub_batch_size} from {run.super_batch_size} of "
        f"{source.order.n_rows:,} pairs; "
        f"{run.training.n_learners} learner(s), {costs['flops_step'] / 1e9:.1f} GFLOPs a step",
    )
    cluster.connect()
    _fit(run, directory, label, reached, n_workers=0 if in_process else run.training.n_learners)
    seconds = checkpoints.read(directory)["jest"]["seconds"]
    result = {
        "steps": run.n_steps,
        "examples_seen": run.n_steps * run.super_batch_size,
        "examples_trained": run.n_steps * run.sub_batch_size,
        "seconds": seconds,
        **costs,
    }
    manifest = storage.finish(directory, "train", config, **result)
    progress.say(label, pace.limit(selection_log.read_metrics(directory)))
    progress.say(
        label,
        f"{result['examples_trained']:,} examples trained of {result['examples_seen']:,} seen, {seconds:.0f} s in "
        "steps",
    )
    return manifest


_TIMEOUT = 4 * 3600  # seconds that learners wait for the one that evaluates, or writes a checkpoint


def _untrained_resolution(pair: Towers, run: Run) -> str | None:
    """A warning where the learner scores at a resolution that it is never trained at."""
    selection, low = run.selection, run.training.low_resolution
    scored = pair.resolution(selection.score_image_size, selection.score_patch_size)
    trained = [pair.resolution(low.image_size, low.patch_size)] if low else []
    if low is None or low.share < 1:
        trained.append(pair.resolution())
    if not run.uses_learner or scored in trained:
        return None
    patches = f" in patches of {scored.patch_size}" if scored.patch_size else ""
    return (
        f"scores at {scored.image_size} pixels{patches} and never trains at that: what a learner has not seen it "
        "scores badly; set training.low_resolution to the same"
    )


def _fit(run: Run, directory: str, label: str, reached: int, *, n_workers: int) -> None:
    """Run Ray Train, and show the board meanwhile; an error of the learners is raised here."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    board, gpus = Board(), run.training.gpus_per_learner
    fs, inner = storage.filesystem(f"{directory}/ray")
    trainer = TorchTrainer(
        _learn,
        train_loop_config={"run": run_files.dump(run), "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=n_workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=_TIMEOUT),
        run_config=ray.train.RunConfig(
            name="learners",
            storage_path=inner,
            storage_filesystem=_arrow(fs),
            failure_config=ray.train.FailureConfig(max_failures=run.training.max_failures),
        ),
    )
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failure.append(error)

    shown, said = reached, 0
    with sigterm_noted() as stopping, progress.bar(label, run.n_steps, "steps", start=reached) as advance:

        def look() -> Progress:
            nonlocal shown, said
            if stopping.is_set():
                board.stop()
            seen = board.get()
            if seen.step > shown:
                advance(seen.step - shown, note=seen.note)
                shown = seen.step
            for text in seen.told[said:]:
                progress.say(label, text)
            said = len(seen.told)
            return seen

        if n_workers:
            thread = threading.Thread(target=fit, daemon=True, name="fit")
            thread.start()
            while thread.is_alive():
                thread.join(0.5)
                if hang := look().hang(run.training.hang_minutes):
                    raise RuntimeError(f"{hang}; stopped, and the same command goes on from the newest checkpoint")
            look()
        else:  # in this thread: OpenMP keeps workers for each thread that computes, and they would share the cores
            with every(0.5, look):
                fit()
    last = board.get()
    if last.failure:
        raise RuntimeError(f"the run stopped: {last.failure}")
    if not failure and stopping.is_set() and last.step < run.n_steps:
        progress.say(
            label, f"SIGTERM: stopped with a checkpoint after step {last.step}; the same command goes on from it"
        )
        raise SystemExit(128 + signal.SIGTERM)
    if failure:
        raise RuntimeError(
            f"the learners failed; {directory} keeps what they finished, and the same command goes on from there"
        ) from failure[0]


def _learn(settings: dict[str, Any]) -> None:
    """One learner: from the newest checkpoint to the end of the run."""
    import ray.train.torch

    run, board = run_files.load(settings["run"]), settings["board"]
    if board.get().failure:  # and this is the restart, which would only fail there again
        return
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    directory = run.path(run.run_dir)
    group = dist.group.WORLD if size > 1 else None
    if not run.training.gpus_per_learner:
        torch.set_num_threads(max(1, cluster.n_cores() // size))
        cluster.keep_freed_memory()
    source = storage.retried(super_batches.open_source)(run)
    learner = _create(run, source, ray.train.torch.get_device(), group)
    done = checkpoints.resume(directory, learner.towers, learner.optimizer)
    log = selection_log.SelectionLog(directory, done["log_parts"])
    if rank == 0:
        log.tidy()
        checkpoints.tidy(directory)
    step = done["step"]
    journal = Journal(run, board, done) if rank == 0 else None
    items = sub_batches.stream(run, source, learner.towers, rank=rank, n_learners=size, first_step=step)
    super_batch_stream = super_batches.prefetch(items)
    learners, committed, saving = Learners(group), time.monotonic(), 0.0
    if len(set(learners.counts(step))) > 1:
        raise RuntimeError(
            "the learners found different newest checkpoints; the storage shows some of them an old list"
        )
    with journal or nullcontext(), checkpoints.Writer() as writer, board.pulse(rank) as pulse:

        def evaluate() -> None:
            """After the step's checkpoint, so that what fails here loses no step; the others wait."""
            pulse.doing = EVALUATES
            whole = _whole(run, learner.towers, rank)
            if journal is not None:
                writer.wait()
                journal.add_evaluation(step, evaluation.evaluate_step(run, whole, step))
                if step in checkpoints.steps(directory):
                    writer.submit(partial(storage.retried(journal.write), journal.text()))
            if group is not None:
                dist.barrier(group)

        if step and learners.any(rank == 0 and evaluation.is_due(run, step) and evaluation.is_missing(run, step))[0]:
            evaluate()  # the try before this one did not come to it
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
            if evaluation.is_due(run, step) and (not stops or step == run.n_steps):
                evaluate()
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


def _create(run: Run, source: super_batches.Source, device: torch.device, group: dist.ProcessGroup | None) -> Learner:
    config = run.training
    pair = towers.build(run.model, seed=run.seed)
    _start_from(run, pair)
    pair.model.to(device=device, memory_format=torch.contiguous_format if config.shard_weights else torch.channels_last)
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
    decoders = max(1, cluster.n_cores() // ray.train.get_context().get_local_world_size())
    selector = sub_batches.selector(run, source, pair, group, ThreadPoolExecutor(decoders))
    return Learner(**vars(selector), optimizer=optimizer, wrapped=trained)


def _start_from(run: Run, pair: Towers) -> None:
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


def _arrow(fs: Any) -> Any:
    """An fsspec file system as Ray Train takes it."""
    import pyarrow.fs

    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
