"""Messages and progress of a stage: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .log_level import LogLevel, shows

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=132)  # a log file has no width
_LINE_SECONDS = 15.0  # between plain lines, where there is no terminal
_moved = 0.0  # when the progress of a stage last advanced


def say(stage: str, text: str) -> None:
    """Print one line, with the name of the stage before it."""
    if shows(LogLevel.info):
        _print_line(stage, text)


def warn(stage: str, text: str) -> None:
    """Print one line on what may be wrong."""
    if shows(LogLevel.warning):
        _print_line(stage, text)


def _print_line(stage: str, text: str) -> None:
    console.print(f"[bold cyan]{stage}:[/] {escape(text)}", soft_wrap=True)
    sys.stdout.flush()


class _Rate(ProgressColumn):
    """Recent units per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


Advance = Callable[..., None]


def moved() -> float:
    """When the progress of a stage last advanced, by time.monotonic(); 0.0 if it never has."""
    return _moved


def mark_moved() -> None:
    """Say that a stage moves, without progress to show."""
    global _moved
    _moved = time.monotonic()


@contextlib.contextmanager
def bar(stage: str, total: int, unit: str, start: int = 0) -> Iterator[Advance]:
    """Show the progress of a stage; the block calls advance(n, note="...") after every n units of work.

    total: units of work in all. start: units that an earlier try has done. Rate and time left are always shown.
    """
    with _bar(stage, total, unit, start) as show:

        def advance(n: int, note: str = "") -> None:
            mark_moved()
            show(n, note=note)

        yield advance


@contextlib.contextmanager
def _bar(stage: str, total: int, unit: str, start: int) -> Iterator[Advance]:
    if not shows(LogLevel.info):
        yield lambda n, note="": None
        return
    if console.is_terminal:
        columns = (
            TextColumn("[bold cyan]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as live:
            task = live.add_task(stage, total=total, completed=start, note="")
            yield lambda n, note="": live.update(task, advance=n, note=escape(note))
        return
    done, first, began, printed = start, start, 0.0, time.monotonic()

    def advance(n: int, note: str = "") -> None:
        nonlocal done, first, began, printed
        done += n
        now = time.monotonic()
        if not began:  # the rate leaves out the time before the first report, which was start-up
            first, began = done, now
        if now - printed >= _LINE_SECONDS:
            printed = now
            pace = ""
            if done > first:
                rate = (done - first) / (now - began)
                pace = f", {rate:.3g}/s, {(total - done) / rate:.0f} s left"
            say(stage, f"{done:,} of {total:,} {unit}{pace}{note and ', '}{note}")

    yield advance
