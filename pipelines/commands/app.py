"""The application, and the options of all commands."""

import os
import platform
from importlib import metadata
from typing import Annotated

import typer

from ..base.log_level import LogLevel, shows

app = typer.Typer(
    help="Joint example selection for CLIP/SigLIP training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_versions(wanted: bool) -> None:
    if not wanted:
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
def _options_of_all_commands(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_versions, help="Show the version of jest and others."),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the whole traceback of an error, as JEST_TRACEBACK=1 does.")
    ] = False,
    log_level: Annotated[
        LogLevel | None,
        typer.Option(
            help="debug: also the messages of Ray and of its workers; warning: no progress. As JEST_LOG_LEVEL does."
        ),
    ] = None,
) -> None:
    if traceback:
        os.environ["JEST_TRACEBACK"] = "1"
    if log_level:
        os.environ["JEST_LOG_LEVEL"] = log_level.value
    shows(LogLevel.error)  # raises where the variable has no level
