"""The command line: jest STAGE RUN.yaml [--set selection.n_chunks=8]."""

import atexit
import gc
import os
import platform
import sys
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # an import is paid for when it is needed: --help, or a mistake in the run file, needs no PyTorch
    from jest_core.run_file import Run

app = typer.Typer(
    help="Joint example selection for CLIP/SigLIP training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_versions(asked: bool) -> None:
    if not asked:
        return
    names = ("jest", "torch", "ray", "open_clip_torch")
    jest, *others = (f"{name} {_version(name)}" for name in names)
    typer.echo(f"{jest} (Python {platform.python_version()}, {', '.join(others)})")
    raise typer.Exit


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.callback()
def _of_all_commands(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_versions, help="Show the versions of jest and others."),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the whole traceback of an error, as JEST_TRACEBACK=1 does.")
    ] = False,
) -> None:
    if traceback:
        os.environ["JEST_TRACEBACK"] = "1"


RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", exists=False)]


class What(StrEnum):
    """What `export` writes."""

    catalogue = "catalogue"
    selection = "selection"
    subset = "subset"
    scores = "scores"


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the run file, such as selection.n_chunks=8; @FILE: those of a YAML file.",
    ),
]


def _load(path: Path, overrides: list[str] | None) -> "Run":
    if not path.is_file():
        raise FileNotFoundError(f"no run file at {path}")
    from jest_core import run_file

    return run_file.load(path.read_text(), [_override(each) for each in overrides or []], str(path))


def _override(told: str) -> str | dict[str, Any]:
    if not told.startswith("@"):
        return told
    path = Path(told[1:])
    if not path.is_file():
        raise FileNotFoundError(f"--set {told}: no file at {path}")
    from jest_core import run_file

    return run_file.parse(path.read_text(), str(path))


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    flops_per_second: Annotated[
        float | None,
        typer.Option(min=1.0, help="What one learner sustains, such as 4e14, as a rough guess.", show_default=False),
    ] = None,
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Train some steps of the run here, write this machine's rates, and use them."
        ),
    ] = "",
    machine: Annotated[str, typer.Option(metavar="FILE", help="Rates that --calibrate wrote, on any machine.")] = "",
    price: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Of an hour of one learner: a machine's price over the learners on it.", show_default=False
        ),
    ] = None,
) -> None:
    """Tell what a run will cost: FLOPs by part, beside other methods; bytes, memory, time; and check what can be."""
    run = _load(run_file, overrides)
    if calibrate and machine:
        raise ValueError("--calibrate measures the rates that --machine reads: give one of them")
    if price is not None and not (calibrate or machine):
        raise ValueError("--price needs hours, and those need rates: give --calibrate or --machine too")
    from .base import storage
    from .planning import calibrate as machines
    from .planning import plan as stage

    if calibrate:
        measured = machines.measure(run)
        storage.write_bytes(calibrate, measured.model_dump_json(indent=1).encode() + b"\n")
    rates = machines.read(calibrate or machine) if calibrate or machine else None
    stage.run_stage(run, flops_per_second, rates, price)


@app.command()
def ingest(
    run_file: RunFile,
    overrides: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what could not be fetched; what comes makes more shards.")
    ] = False,
) -> None:
    """Fetch the pictures that lists of URLs name into shards, with img2dataset."""
    run = _load(run_file, overrides)
    from .data import ingest as stage

    stage.run_stage(run, retry_failed=retry_failed)


@app.command()
def catalogue(run_file: RunFile, overrides: Overrides = None) -> None:
    """Record which rows of the shards are kept, and which rule dropped each of the others."""
    run = _load(run_file, overrides)
    from .data import catalogue as stage

    stage.run_stage(run)


@app.command()
def reference_scores(
    run_file: RunFile,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Embed a sample of a finished cache again, and compare; writes nothing.")
    ] = False,
) -> None:
    """Embed every kept pair once with the reference, and cache the embeddings beside the shards."""
    run = _load(run_file, overrides)
    from .data import needs

    needs.reference_scores(run)
    from .scores import reference_scores as stage

    stage.verify(run) if verify else stage.run_stage(run)


@app.command()
def thresholds(
    run_file: RunFile,
    overrides: Overrides = None,
    column: Annotated[
        str, typer.Option(help="Of the score cache: cosine, matched_pair_loss, or a scorer's.")
    ] = "cosine",
    truth: Annotated[str, typer.Option(help="A column of the shards that is empty where a pair is clean.")] = "",
    output: Annotated[str, typer.Option(help="Where to write the page.")] = "thresholds.html",
) -> None:
    """A page to choose a threshold by: the scores' distribution, and what each threshold just keeps and just drops."""
    run = _load(run_file, overrides)
    from .reports import thresholds as stage

    stage.run_stage(run, column, truth or None, output)


@app.command()
def select(run_file: RunFile, overrides: Overrides = None) -> None:
    """Select from the whole catalogue offline, by fixed learner and reference: a static subset."""
    run = _load(run_file, overrides)
    from .offline import select as stage

    stage.run_stage(run)


@app.command()
def export(
    run_file: RunFile,
    what: Annotated[
        What, typer.Argument(metavar="catalogue|selection|subset|scores", help="What of the run to write.")
    ],
    output: Annotated[
        str,
        typer.Argument(help=".npy: a DataComp subset; .parquet: a list of uids; for scores, a clip-retrieval folder."),
    ],
    overrides: Overrides = None,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Each uid once, not as often as it was kept or selected.")
    ] = False,
) -> None:
    """Write what a run kept, selected or embedded in the formats of other tools."""
    run = _load(run_file, overrides)
    from .offline import export as stage

    stage.run_stage(run, what.value, output, distinct=distinct)


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    replay: Annotated[
        str,
        typer.Option(metavar="RUN_DIR", help="Train on what that run selected, step by step, and score nothing."),
    ] = "",
) -> None:
    """Train the run's model; goes on from its newest checkpoint. A reference is trained with method `uniform`."""
    chosen = [f"data.replay={replay}", "selection.method=uniform", "data.decode=eager"] if replay else []
    run = _load(run_file, [*(overrides or []), *chosen])
    from .training import train as stage

    stage.run_stage(run)


@app.command()
def evaluate(
    run_file: RunFile,
    overrides: Overrides = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, checkpoint by checkpoint, until the run has finished.")
    ] = False,
) -> None:
    """Zero-shot, few-shot and retrieval scores of every checkpoint of the run."""
    run = _load(run_file, overrides)
    from .data import needs

    needs.evaluate(run)
    from .evaluation import evaluate as stage

    stage.run_stage(run, watch=watch)


@app.command()
def stages(
    what: Annotated[
        list[str], typer.Argument(metavar="STAGE... RUN.yaml", help="Stages, in their order, and the run file.")
    ],
    overrides: Overrides = None,
) -> None:
    """Run stages one after the other, from ingest to report; each does what is missing of it."""
    run = _load(Path(what[-1]), overrides)
    from .stages import run_stages

    run_stages(run, what[:-1])


@app.command()
def submit(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="STAGE... RUN.yaml", help="Stages, in their order, and the run file.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of the job's environment; no secrets.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is submitted.")] = False,
    status: Annotated[str, typer.Option(metavar="JOB", help="Tell how a job stands.")] = "",
    logs: Annotated[str, typer.Option(metavar="JOB", help="Follow a job's log to its end.")] = "",
    stop: Annotated[str, typer.Option(metavar="JOB", help="End a job; it can be submitted again.")] = "",
) -> None:
    """Run stages as one job of a Ray cluster; the exit status is the job's."""
    if sum(map(bool, (what, status, logs, stop))) != 1:
        raise ValueError("give stages and a run file, or one of --status, --logs and --stop")
    from . import submit as stage

    if status:
        stage.status(status, address)
    elif logs:
        stage.follow(logs, address)
    elif stop:
        stage.stop(stop, address)
    elif what:
        pairs = [pair.partition("=") for pair in env or []]
        if bad := [name for name, equals, _ in pairs if not equals]:
            raise ValueError(f"--env {bad[0]!r} has no '='")
        variables = {name: value for name, _, value in pairs}
        stage.run_stage(_load(Path(what[-1]), overrides), what[:-1], address, variables, detach=detach)


@app.command()
def report(
    run_dirs: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR...", help="Run directories to compare, paths or URLs.")
    ],
    output: Annotated[str, typer.Option(help="Where to write the page.")] = "report.html",
) -> None:
    """Compare runs on one page: curves, what was selected, and what it cost."""
    from jest_core import run_file

    from .data import needs

    for directory in run_dirs:
        needs.report(run_file.join("", directory))
    from .reports import report as stage

    stage.run_stage(run_dirs, output)


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="small (in the package) or medium (built from npm packages).")] = "small",
    root: Annotated[str, typer.Option(help="Directory or URL for everything it writes; runs/demo if not given.")] = "",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few steps of everything, to see that it works; figures mean nothing.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds 0, 1, ...")] = 1,
    n_learners: Annotated[int, typer.Option(min=1, help="Learners of each run.")] = 1,
) -> None:
    """The main job on this machine: reference, score cache, uniform, independent and joint selection, report."""
    from .paper import demo as stage

    stage.run_stage(data=data, root=root, smoke=smoke, seeds=seeds, n_learners=n_learners)


@app.command()
def reproduce(
    figures: Annotated[
        list[str] | None, typer.Argument(metavar="[FIGURE]...", help="fig1 ... table5, batch; all if none is named.")
    ] = None,
    root: Annotated[str, typer.Option(help="Directory or URL for its runs; runs/reproduction if not given.")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="At most so many of each run.", show_default=False)] = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="A few steps of the first run of each kind, on the small tier; figures mean nothing."
        ),
    ] = False,
    publish: Annotated[
        str, typer.Option(help="Also write README.md, its pictures and results.json into this directory.")
    ] = "",
) -> None:
    """The paper's figures and tables at the scale of this machine; goes on with the runs that are not done."""
    from .paper import reproduce as stage

    stage.run_stage(figures or [], root=root, seeds=seeds, smoke=smoke, publish=publish)


_INTERRUPTED = 130


def main() -> None:
    """Run the command line; an error is one clear line and exit status 1. Nothing that a command starts here outlives
    it, however it ends."""
    from . import errors
    from .base import cluster

    if "--traceback" in sys.argv[2:]:  # behind the command too
        sys.argv.remove("--traceback")
        sys.argv.insert(1, "--traceback")
    atexit.register(gc.freeze)  # else the interpreter looks through all of PyTorch once more before it ends
    with cluster.cleared_up():
        try:
            app()
        except SystemExit as ended:
            if ended.code == _INTERRUPTED:  # typer's answer to Ctrl-C
                print("jest: stopped; the same command goes on from what is done", file=sys.stderr)
            raise
        except Exception as error:
            errors.report(error)
            sys.exit(1)


if __name__ == "__main__":
    main()
