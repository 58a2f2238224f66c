"""The train stage: learners that score, select, train, log and checkpoint, each in a worker of Ray Train; on a machine
without a cluster a single learner works in this process.

The run directory is the only state: a learner that Ray Train starts again, and a command that its user repeats, go on
from the newest checkpoint there. PyTorch is imported late, so that errors of the run file and its inputs come at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from importlib.util import resolve_name
from typing import TYPE_CHECKING, Any, TypedDict, cast

from jest_core import run_file
from jest_core.run_file import Run

from ..base import cluster, manifests, node_checks, owner, progress, storage
from ..base.owner import Owner, Token
from ..data import local_cache
from ..evaluation import first_look
from ..stream.source import Source, open_source
from . import bottleneck, doubtful, metrics_line, run_directory
from .attempts import Attempts
from .heartbeat import Board, Order, Progress, every, sigterm_noted
from .run_directory import TrainManifest
from .shown import Shown

if TYPE_CHECKING:
    from .hardware import Hardware

_TIMEOUT = 4 * 3600  # seconds that learners wait for the one that evaluates, or writes a checkpoint
_PATIENCE = 30.0  # seconds within which Ray Train's controller has started, and is ended
_LOOK_SECONDS = 0.5  # between two looks at the learners' progress


@owner.until_return
def run_stage(run: Run, *, label: str = "train", in_process: bool | None = None) -> TrainManifest:
    """Train to the run's budget, or go on from its newest checkpoint; returns the manifest.

    in_process: one learner, in this process, which nothing restarts. If not given, that is what happens where there is
    no cluster and the run has one learner without a GPU: starting a worker of Ray Train would take most of a short run.
    """
    alone = run.training.max_learners == 1 and not run.training.gpus_per_learner
    if in_process and not alone:
        raise ValueError(
            f"in_process trains one learner without a GPU: training.n_learners is {run.training.max_learners}, "
            f"gpus_per_learner {run.training.gpus_per_learner}"
        )
    in_process = alone and cluster.is_local() if in_process is None else in_process
    directory = run.path(run.run_dir)
    source = open_source(run)  # first, so that a run without its inputs claims no directory
    if run.data.replay is not None:
        from . import replay

        replay.refuse(run)
    if (manifest := run_directory.own(run)) is not None:
        progress.say(
            label,
            f"already at {directory}: {manifest['examples_trained']:,} examples trained in {manifest['seconds']:.0f} s",
        )
        return manifest
    first_look.before_training(run, label)
    # workers of Ray Train have readers of their own
    readers = resolve_name("..stream.windows", __package__) if in_process else None
    with cluster.connected_meanwhile(f"{__package__}.loop", readers=readers):
        node_checks.refuse_unfit(gpus=bool(run.training.gpus_per_learner), compiled=run.training.compile)
        local_cache.warn_where_unusable(run)
        costs = _look_over(run, source, directory, label)
    run_directory.claim(run)  # after all checks: it marks a finished run that is made longer as not complete
    computed_on = _fit(run, owner.claim(directory), label, in_process=in_process)
    lines = metrics_line.read(directory)
    last = lines[-1]
    seen, trained, seconds = last["jest/samples_seen"], last["jest/samples_trained"], last["jest/seconds"]
    begun = {"stage": "train", "complete": True, "config": run_file.identity(run)}
    results = {"steps": run.n_steps, "examples_seen": seen, "examples_trained": trained, "seconds": seconds, **costs}
    finished = manifests.finish(directory, begun | results)
    progress.say(label, bottleneck.limit(lines, run, computed_on))
    progress.say(label, f"{trained:,} examples trained of {seen:,} seen, {seconds:.0f} s in steps")
    return cast(TrainManifest, finished)


def _look_over(run: Run, source: Source, directory: str, label: str) -> dict[str, float]:
    """Refuse what the model cannot do, write run.yaml, print what will be trained; returns the cost of a step."""
    from jest_core.models import outlines, towers

    from ..base import checkpoints
    from . import loop
    from .metrics import step_costs

    pair = towers.build(run.model, seed=0, decoder=run.data.decoder)
    towers.refuse_loss(pair, run.training.loss, "training.loss")
    outlines.refuse_resolutions(run)
    outlines.refuse_hidden_state(run.model)
    loop.start_from(run, pair)  # a checkpoint that does not fit is refused here, not in every learner
    if run.training.activation_checkpointing:
        pair.checkpoint_activations()
    costs = step_costs(run)
    if note := doubtful.untrained_resolution(pair, run):
        progress.say(label, note)
    doubts = outlines.untrained_parameters(run.model), doubtful.unfinished_warmup(run), doubtful.repeated_reading(run)
    for warning in doubts:
        if warning:
            progress.warn(label, warning)
    storage.write_bytes(f"{directory}/run.yaml", run_file.dump(run).encode())
    selects = f" selection by {run.selection.criterion}" * run.selection.selects
    reached = (checkpoints.steps(directory) or [0])[-1]
    numbers = run.learner_numbers
    learners = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[-1]}"
    going = f"resumes after step {reached} of" if reached else "starts,"
    progress.say(
        label,
        f"{run.selection.method}{selects}: {going} {run.n_steps} steps of {run.sub_batch_size} from "
        f"{run.super_batch_size} of {source.order.n_rows:,} pairs; "
        f"{learners} learner(s), {costs['flops_step'] / 1e9:.1f} GFLOPs a step",
    )
    return costs


def _fit(run: Run, here: Owner, label: str, *, in_process: bool) -> Hardware | None:
    """Run the learners as long as this process owns the run directory, and show their progress meanwhile; returns what
    the first one computed on. Raises RuntimeError where they fail, and ValueError where they would fail again."""
    from ..base import checkpoints
    from . import loop

    directory, board, failure = here.directory, Board(in_process=in_process), []
    over = threading.Event()  # is_alive() may err: up to Python 3.12 a join that Ctrl-C ends marks the thread as ended
    attempts = None if in_process else Attempts(run, board, _trainer(run, here.token, board))

    def fit() -> None:
        try:
            attempts.run() if attempts else loop.learn(run, board)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            failure.append(error)
        finally:
            over.set()

    shown = (checkpoints.steps(directory) or [0])[-1]
    with sigterm_noted() as stopping, progress.bar(label, run.n_steps, "steps", start=shown) as advance:
        show = Shown(label, shown, advance)

        def look() -> Progress:
            if here.lost or _notice(stopping, attempts):
                board.order(Order.stop)
            seen = board.get()
            show(seen)
            if attempts:
                attempts.look(seen)
            if seen.moves or (attempts and attempts.asks):
                progress.mark_moved()
            return seen

        if in_process:  # in this thread: OpenMP keeps workers for each thread that computes, and they share the cores
            with every(_LOOK_SECONDS, look):
                fit()
        else:
            threading.Thread(target=fit, daemon=True, name="fit").start()
            if _wait(over, look, board, stopping, run.training.hang_minutes):
                failure.clear()  # that is of what was ended
            look()
    if reason := board.get().failure:
        raise ValueError(f"the run stopped: {reason}")  # the same command would come to the same step
    if failure:
        raise RuntimeError(f"the learners failed; {directory} keeps what they finished") from failure[0]
    reached = (checkpoints.steps(directory) or [0])[-1]
    if reached >= run.n_steps:
        return board.get().hardware
    where = f"with a checkpoint after step {reached}" if reached else "before the first checkpoint"
    if not (notice := _notice(stopping, attempts)):
        storage.retried(here.check)()
        raise RuntimeError(f"the learners ended {where}, of {run.n_steps}, without an error; the same command goes on")
    progress.say(label, f"{notice}: stopped {where}; the same command goes on from it")
    raise SystemExit(128 + signal.SIGTERM)


def _wait(
    over: threading.Event,
    look: Callable[[], Progress],
    board: Board,
    stopping: threading.Event,
    hang_minutes: float,
) -> bool:
    """Wait until the learners end, however they do; whether they were ended by a SIGTERM before one had begun: where
    there is no room for them, none ever does. Raises RuntimeError where they hang."""
    try:
        while not over.wait(_LOOK_SECONDS):
            seen = look()
            if stopping.is_set() and not seen.doing:
                return True
            if hang := seen.hang(hang_minutes):
                raise RuntimeError(f"{hang}; stopped, and the same command goes on from the newest checkpoint")
    finally:
        with contextlib.suppress(Exception):  # the board may be what failed
            board.order(Order.stop)  # or the learners would be started again while they are ended
        _give_up(over)
    return False


def _notice(stopping: threading.Event, attempts: Attempts | None) -> str:
    """Why the command is to end with a checkpoint; empty where it is not."""
    if stopping.is_set():
        return "SIGTERM"
    return "this node is drained" if attempts is not None and attempts.leaves_this_node else ""


def _give_up(over: threading.Event) -> None:
    """End the actor for which the thread waits: Ray's shutdown would end the whole process at once while one of its
    threads waits for an actor."""
    deadline = time.monotonic() + _PATIENCE
    while not over.is_set() and cluster.is_joined() and time.monotonic() < deadline:
        cluster.kill_own("TrainController")  # which may be starting up
        over.wait(0.2)


def _trainer(run: Run, token: Token, board: Board) -> Callable[[int], Any]:
    """The call that runs Ray Train with a worker for each of so many learners, until they end or one fails."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus, ranged = run.training.gpus_per_learner, len(run.learner_numbers) > 1
    fs, inner = storage.filesystem(f"{token.directory}/ray")
    worker: Any = learn_as_worker  # Ray Train's type of it is a plain dictionary's
    failures: Any = ray.train.FailureConfig  # which has a further argument than its type says

    def fit(n_learners: int) -> Any:
        return TorchTrainer(
            worker,
            train_loop_config=dict(WorkerSettings(run=run_file.dump(run), board=board, owner=token)),
            scaling_config=ray.train.ScalingConfig(
                num_workers=n_learners,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=_TIMEOUT),
            run_config=ray.train.RunConfig(
                name="learners",
                storage_path=inner,
                storage_filesystem=_arrow(fs),
                # attempts.py starts the learners again, which Ray Train would do on the same number alone; where that
                # is all there is, Ray Train asks again for their workers, without limit
                failure_config=failures(
                    max_failures=0, max_preemption_failures=0, controller_failure_limit=0 if ranged else -1
                ),
            ),
        ).fit()

    return fit


class WorkerSettings(TypedDict):
    """What a worker of Ray Train is started with."""

    run: str  # the run file
    board: Board
    owner: Token


def learn_as_worker(settings: WorkerSettings) -> None:
    """One of the run's learners, in a worker of Ray Train, which may outlive the command that started it."""
    import ray.train.torch

    cluster.import_large(f"{__package__}.loop")
    from . import loop

    context = ray.train.get_context()
    place = loop.Place(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_world_size(),
        ray.train.torch.get_device(),
    )
    try:
        with owner.working_for(settings["owner"]):
            storage.retried(settings["owner"].check)()
            loop.learn(run_file.load(settings["run"]), settings["board"], place)
    except storage.Lost as error:
        settings["board"].fail(str(error))  # a restart would fail there again
        raise


def _arrow(fs: Any) -> Any:
    """An fsspec file system as pyarrow's, which Ray Train needs."""
    import pyarrow.fs

    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
