"""The train stage: learners that score, select, train, log and checkpoint, each in a worker of Ray Train; on a machine
without a cluster a single learner works in this process.

The run directory is the only state: whoever is started again, a learner by Ray Train or the whole command by its user,
goes on from the newest checkpoint there. PyTorch is imported when it is needed, so that what is wrong with the run file
or its inputs is said at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import cluster, progress, storage
from pipelines.stream.source import Source, open_source
from pipelines.training import bottleneck, run_directory
from pipelines.training.heartbeat import Board, Progress, every, sigterm_noted

if TYPE_CHECKING:
    from jest_core.models.towers import Towers

_TIMEOUT = 4 * 3600  # seconds that learners wait for the one that evaluates, or writes a checkpoint
_PATIENCE = 30.0  # seconds for Ray Train's controller to be there, if it is starting, and to be ended
_LOOK_SECONDS = 0.5  # between two looks at how far the learners are


def run_stage(run: Run, label: str = "train", *, in_process: bool | None = None) -> dict[str, Any]:
    """Train to the run's budget, or go on from its newest checkpoint; returns the manifest.

    in_process: one learner, in this process, which nothing restarts. If not given, so it is where Ray is this machine
    alone and the run has one learner without a GPU: starting a worker of Ray Train would be most of a short run.
    """
    alone = run.training.n_learners == 1 and not run.training.gpus_per_learner
    if in_process and not alone:
        raise ValueError("in_process trains with one learner, and without a GPU of its own")
    in_process = alone and cluster.is_local() if in_process is None else in_process
    directory = run.path(run.run_dir)
    source = open_source(run)  # first, so that a run without its inputs claims no directory
    if run.data.replay is not None:
        from pipelines.training import replay

        replay.refuse(run)
    if (manifest := run_directory.refuse_other(run)) is not None and manifest["complete"]:
        progress.say(
            label,
            f"already at {directory}: {manifest['examples_trained']:,} examples trained in {manifest['seconds']:.0f} s",
        )
        return manifest
    # workers of Ray Train have readers of their own
    readers = "pipelines.stream.windows" if in_process else None
    with cluster.connected_meanwhile("pipelines.training.loop", readers=readers):
        from pipelines.base import checkpoints
        from pipelines.training import selection_log

        costs = _look_over(run, source, directory, label)
    run_directory.claim(run)  # once nothing is left that refuses it: one that was finished is not, from here on
    _fit(run, directory, label, in_process=in_process)
    seconds = checkpoints.read(directory)["jest"]["seconds"]
    result = {
        "steps": run.n_steps,
        "examples_seen": run.n_steps * run.super_batch_size,
        "examples_trained": run.n_steps * run.sub_batch_size,
        "seconds": seconds,
        **costs,
    }
    manifest = storage.finish(directory, "train", run_file.identity(run), **result)
    progress.say(label, bottleneck.limit(selection_log.read_metrics(directory)))
    progress.say(
        label,
        f"{result['examples_trained']:,} examples trained of {result['examples_seen']:,} seen, {seconds:.0f} s in "
        "steps",
    )
    return manifest


def _look_over(run: Run, source: Source, directory: str, label: str) -> dict[str, float]:
    """Refuse what the model cannot do, write run.yaml, say what will be trained; returns the cost of a step."""
    from jest_core.models import outlines, towers
    from pipelines.base import checkpoints
    from pipelines.training import loop
    from pipelines.training.metrics import step_costs

    pair = towers.build(run.model, seed=0)
    towers.refuse_loss(pair, run.training.loss, "training.loss")
    outlines.refuse_resolutions(run)
    loop.start_from(run, pair)  # a checkpoint that does not fit is told here, not by every learner
    if run.training.activation_checkpointing:
        pair.checkpoint_activations()
    costs = step_costs(run)
    if note := _untrained_resolution(pair, run):
        progress.say(label, note)
    storage.write_bytes(f"{directory}/run.yaml", run_file.dump(run).encode())
    selects = f" selection by {run.selection.criterion}" * run.selection.selects
    reached = (checkpoints.steps(directory) or [0])[-1]
    going = f"resumes after step {reached} of" if reached else "starts,"
    progress.say(
        label,
        f"{run.selection.method}{selects}: {going} {run.n_steps} steps of {run.sub_batch_size} from "
        f"{run.super_batch_size} of {source.order.n_rows:,} pairs; "
        f"{run.training.n_learners} learner(s), {costs['flops_step'] / 1e9:.1f} GFLOPs a step",
    )
    return costs


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


def _fit(run: Run, directory: str, label: str, *, in_process: bool) -> None:
    """Have the learners train, and show the board meanwhile; an error of the learners is raised here."""
    from pipelines.base import checkpoints
    from pipelines.training import loop

    board, failure = Board(in_process=in_process), []
    over = threading.Event()  # is_alive() may err: up to Python 3.12 a join that Ctrl-C ends marks the thread as ended
    train = (lambda: loop.learn(run, board)) if in_process else _trainer(run, directory, board)

    def fit() -> None:
        try:
            train()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            failure.append(error)
        finally:
            over.set()

    shown, said = (checkpoints.steps(directory) or [0])[-1], 0
    with sigterm_noted() as stopping, progress.bar(label, run.n_steps, "steps", start=shown) as advance:

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

        if in_process:  # in this thread: OpenMP keeps workers for each thread that computes, and they share the cores
            with every(_LOOK_SECONDS, look):
                fit()
        else:
            try:
                threading.Thread(target=fit, daemon=True, name="fit").start()
                while not over.wait(_LOOK_SECONDS):
                    if hang := look().hang(run.training.hang_minutes):
                        raise RuntimeError(f"{hang}; stopped, and the same command goes on from the newest checkpoint")
            finally:
                _give_up(over)
            look()
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


def _give_up(over: threading.Event) -> None:
    """End what the thread waits for, where that is in a Ray of this process: when such a Ray is shut down, Ray ends
    the whole process at once if one of its threads waits for an actor."""
    deadline = time.monotonic() + _PATIENCE
    while not over.is_set() and cluster.is_own() and time.monotonic() < deadline:
        cluster.kill_own("TrainController")  # which may be starting up
        over.wait(0.2)


def _trainer(run: Run, directory: str, board: Board) -> Callable[[], Any]:
    """Ray Train, which starts a worker for each learner, and starts them again where they fail."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = run.training.gpus_per_learner
    fs, inner = storage.filesystem(f"{directory}/ray")
    trainer = TorchTrainer(
        learn_as_worker,
        train_loop_config={"run": run_file.dump(run), "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.training.n_learners,
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
    return trainer.fit


def learn_as_worker(settings: dict[str, Any]) -> None:
    """One of training.n_learners, in a worker of Ray Train; settings: the run, as text, and the board."""
    import ray.train.torch

    cluster.import_large("pipelines.training.loop")
    from pipelines.training import loop

    context = ray.train.get_context()
    place = loop.Place(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_world_size(),
        ray.train.torch.get_device(),
    )
    loop.learn(run_file.load(settings["run"]), settings["board"], place)


def _arrow(fs: Any) -> Any:
    """An fsspec file system as Ray Train takes it."""
    import pyarrow.fs

    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
