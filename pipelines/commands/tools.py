"""Commands beside the stages: what a run will cost, where to cut, and what other tools read."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .arguments import Overrides, RunFile, load

PANEL = "Before and after a run"


class Exported(StrEnum):
    """What `jest export` writes."""

    catalogue = "catalogue"
    selection = "selection"
    subset = "subset"
    scores = "scores"
    model = "model"


@app.command(rich_help_panel=PANEL)
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
    assume: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A price or a rate, such as cpu_hour=0.05; an unknown key lists all."),
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(metavar="FILE", help="Manifest of a RayCluster or RayJob, or a file of `ray up`: its machines."),
    ] = "",
    reference_run: Annotated[
        str, typer.Option(metavar="FILE", help="Run file by which the reference is trained: its cost is added.")
    ] = "",
) -> None:
    """Print what a run will cost: FLOPs by part, beside other methods; bytes, memory, time; and check what can be."""
    run = load(run_file, overrides)
    if calibrate and machine:
        raise ValueError("--calibrate measures the rates that --machine reads: give one of them")
    from ..planning import assumptions, machines
    from ..planning import calibrate as rates
    from ..planning import plan as planning

    given = {"flops_per_second": flops_per_second, "learner_hour": price}
    assumed = assumptions.read([*(assume or []), *(f"{k}={v}" for k, v in given.items() if v is not None)])
    manifest = machines.read(cluster) if cluster else None
    if manifest is None and (between := assumptions.BETWEEN & assumed.model_fields_set):
        raise ValueError(
            f"--assume {min(between)} is of what goes between machines: --cluster FILE says which there are"
        )
    other = load(Path(reference_run), [f"root={run.root}"]) if reference_run else None
    measured = rates.measure_into(run, calibrate) if calibrate else rates.read(machine) if machine else None
    planning.print_plan(run, measured, assumed, manifest, other)


@app.command(rich_help_panel=PANEL)
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
    run = load(run_file, overrides)
    from ..reports import thresholds as page

    page.write_page(run, column, truth or None, output)


@app.command(rich_help_panel=PANEL)
def export(
    run_file: RunFile,
    what: Annotated[
        Exported, typer.Argument(metavar="catalogue|selection|subset|scores|model", help="What of the run to write.")
    ],
    output: Annotated[
        str,
        typer.Argument(
            help=".npy: a DataComp subset; .parquet: a list of uids; a folder of clip-retrieval for scores, of "
            "open_clip for the model."
        ),
    ],
    overrides: Overrides = None,
    distinct: Annotated[
        bool, typer.Option("--distinct", help="Each uid once, not as often as it was kept or selected.")
    ] = False,
) -> None:
    """Write what a run kept, selected, embedded or trained in the formats of other tools."""
    run = load(run_file, overrides)
    from ..offline import export as exporting

    exporting.export(run, what.value, output, distinct=distinct)
