"""How far each stage of a run is: the last table of `jest plan`, and what its user runs next."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from jest_core.run_file import Run

from ..base.stage_table import STAGES, Stage


@dataclass(frozen=True)
class Status:
    """One stage of a run, as it is now."""

    stage: Stage
    state: str  # done, ready, not part of this run, ...
    detail: str  # where it writes, or why it is no part of the run


def statuses(run: Run) -> Iterator[Status]:
    """Of each stage, in their order."""
    for stage in STAGES.values():
        directory = stage.directory(run)
        if reason := stage.refusal(run):
            yield Status(stage, "not part of this run", reason)
        elif directory is not None:
            yield Status(stage, _state(run, stage), directory)


def _state(run: Run, stage: Stage) -> str:
    if stage.is_done(run):
        return "done"
    missing = [name for name in stage.after(run) if not STAGES[name].can_be_used(run)]
    return f"after {missing[-1]}" if missing else "can run now"


def table(run: Run) -> Table:
    """The stages, for a terminal."""
    table = Table(title="Stages", title_justify="left", show_header=False)
    for each in statuses(run):
        colour = {"done": "[green]", "can run now": "[bold]"}.get(each.state, "[dim]")
        table.add_row(each.stage.name, f"{colour}{each.state}[/]", escape(each.detail))
    return table
