"""The demonstration and the paper's figures."""

from typing import Annotated

import typer

from .app import app

PANEL = "The demonstration and the paper"


@app.command(rich_help_panel=PANEL)
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
    from ..paper import demo as demonstration

    demonstration.run_demo(data=data, root=root, smoke=smoke, seeds=seeds, n_learners=n_learners)


@app.command(rich_help_panel=PANEL)
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
    from ..paper import reproduce as reproduction

    reproduction.reproduce(figures or [], root=root, seeds=seeds, smoke=smoke, publish=publish)
