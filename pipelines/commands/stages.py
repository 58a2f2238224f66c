"""One command a stage, in their order, and the two that run several: `jest stages` here, `jest submit` on a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from ..base.stage_table import STAGES
from .app import app
from .arguments import Overrides, RunFile, StagesAndRunFile, load

PANEL = "Stages of a run, in their order"


def _run(name: str, run_file: Path, overrides: list[str] | None, **options: object) -> None:
    """Load the run file, and do one stage of it."""
    run = load(run_file, overrides)
    from ..stages import run_stage

    run_stage(name, run, **options)


@app.command(rich_help_panel=PANEL, help=STAGES["ingest"].help)
def ingest(
    run_file: RunFile,
    overrides: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what could not be fetched; what comes makes more shards.")
    ] = False,
) -> None:
    _run("ingest", run_file, overrides, retry_failed=retry_failed)


@app.command(rich_help_panel=PANEL, help=STAGES["catalogue"].help)
def catalogue(run_file: RunFile, overrides: Overrides = None) -> None:
    _run("catalogue", run_file, overrides)


@app.command(rich_help_panel=PANEL, help=STAGES["reference-scores"].help)
def reference_scores(
    run_file: RunFile,
    overrides: Overrides = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Embed a sample of a finished cache again, and compare; writes nothing.")
    ] = False,
) -> None:
    _run("reference-scores", run_file, overrides, verify=verify)


@app.command(rich_help_panel=PANEL, help=STAGES["select"].help)
def select(run_file: RunFile, overrides: Overrides = None) -> None:
    _run("select", run_file, overrides)


@app.command(rich_help_panel=PANEL, help=STAGES["train"].help)
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    replay: Annotated[
        str,
        typer.Option(metavar="RUN_DIR", help="Train on what that run selected, step by step, and score nothing."),
    ] = "",
) -> None:
    chosen = [f"data.replay={replay}", "selection.method=uniform", "data.decode=eager"] if replay else []
    _run("train", run_file, [*(overrides or []), *chosen])


@app.command(rich_help_panel=PANEL, help=STAGES["evaluate"].help)
def evaluate(
    run_file: RunFile,
    overrides: Overrides = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, checkpoint by checkpoint, until the run has finished.")
    ] = False,
) -> None:
    _run("evaluate", run_file, overrides, watch=watch)


@app.command(rich_help_panel=PANEL, help=STAGES["report"].help)
def report(
    run_dirs: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR...", help="Run directories to compare, paths or URLs.")
    ],
    output: Annotated[str, typer.Option(help="Where to write the page.")] = "report.html",
) -> None:
    from jest_core import run_file

    from ..base import manifests

    for directory in run_dirs:  # before the libraries of the page are imported
        manifests.finished(run_file.join("", directory), "train", manifests.AnyManifest, "train it first")
    from ..reports import report as page

    page.write_report(run_dirs, output)


Retry = Annotated[
    bool, typer.Option("--retry", help="Start although the same failed in vain before (JEST_SUBMISSION).")
]


@app.command(rich_help_panel=PANEL)
def stages(words: StagesAndRunFile = None, overrides: Overrides = None, retry: Retry = False) -> None:
    """Run stages one after the other, from ingest to report; each does what is missing of it."""
    if not words:
        raise ValueError("give stages and a run file, such as `jest stages catalogue train run.yaml`")
    run = load(Path(words[-1]), overrides)
    from ..in_vain import remembered

    with remembered(run, words[:-1], retry=retry):
        from ..stages import run_stages

        run_stages(run, words[:-1])


@app.command(rich_help_panel=PANEL)
def submit(
    words: StagesAndRunFile = None,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable of the job's environment; no secrets.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is submitted.")] = False,
    retry: Retry = False,
    status: Annotated[str, typer.Option(metavar="JOB", help="Print the state of a job.")] = "",
    logs: Annotated[str, typer.Option(metavar="JOB", help="Follow a job's log to its end.")] = "",
    stop: Annotated[str, typer.Option(metavar="JOB", help="End a job; it can be submitted again.")] = "",
) -> None:
    """Run stages as one job of a Ray cluster; the exit status is the job's."""
    if sum(map(bool, (words, status, logs, stop))) != 1:
        raise ValueError("give stages and a run file, or one of --status, --logs and --stop")
    from .. import submit as jobs

    if status:
        jobs.status(status, address)
    elif logs:
        jobs.follow(logs, address)
    elif stop:
        jobs.stop(stop, address)
    elif words:
        run = load(Path(words[-1]), overrides)
        jobs.submit(run, words[:-1], address, jobs.variables(env or []), detach=detach, again=retry)
