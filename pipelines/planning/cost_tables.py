"""What the stages of a run cost, and what was assumed for it, as tables for a terminal."""

from collections.abc import Iterator, Mapping

from rich.markup import escape
from rich.table import Table

from . import flow
from .assumptions import Assumptions, source
from .basis import Basis
from .costs import Costs, costs
from .flow import Flow, rounded
from .machines import Machines


def tables(basis: Basis) -> Iterator[Table]:
    """The machines of the manifest, if one is given, the stages with their total, and the assumptions behind them."""
    if basis.manifest is not None:
        yield _machines(basis.manifest)
    found = costs(basis)
    if flows := flow.flows(basis, found.used):
        yield _reading(flows)
    yield _stages(found)
    yield _assumptions(basis.assumed, found)


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for name in left:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _machines(manifest: Machines) -> Table:
    table = _table(
        f"Machines of {manifest.source}", ("group", "machines", "CPUs", "GPUs", "GB"), ("CPUs", "GPUs", "GB")
    )
    for group in manifest.groups:
        number = f"{group.least} to {group.most}" if group.least != group.most else f"{group.most}"
        gb = f"{group.memory_bytes / 1e9:,.0f}" if group.memory_bytes else ""
        have = (f"{group.cpus:g}", f"{group.gpus:g}", gb) if group.known else ("?", "?", "")
        table.add_row(escape(group.name), number, *have)
    most = manifest.most
    table.caption = f"at their largest {most['CPU']:,.0f} CPUs and {most['GPU']:,.0f} GPUs"
    if manifest.limit is not None and manifest.limit < sum(group.most for group in manifest.groups):
        table.caption += f", not both at once: {manifest.limit:,} machines at most"
    if manifest.unknown:
        table.caption += f", without those of {', '.join(manifest.unknown)}, which the file does not say"
    return table


def _reading(flows: Mapping[str, Flow]) -> Table:
    """A column for each stage that reads: what it takes, what the machines deliver, and what limits it."""
    table = _table("Reading", ("", *flows), tuple(flows))
    columns = [_column(found) for found in flows.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "") for column in columns))
    table.caption = "\n".join(f"{stage}: {found.words()}" for stage, found in flows.items())
    return table


def _column(found: Flow) -> dict[str, str]:
    """What the stage takes as fast as it computes, and then what each part of the cluster delivers."""
    each, there = found.example, found.readers
    parts = {f"CPU ms a picture: {part}": f"{ms:.3f}" for part, ms in each.cpu_ms.items()}
    if there.crossing:
        parts["CPU ms a picture: sent to another machine"] = f"{there.crossing * each.send_ms:.3f}"
    parts["kB a picture: from storage"] = f"{each.storage_bytes / 1e3:,.1f}"
    parts["kB a picture: in Ray's object stores"] = f"{each.store_bytes / 1e3:,.1f}"
    for name, value in found.needs.items():
        parts[f"needs {name}"] = rounded(value) if value >= 1000 else f"{value:,.1f}"
    parts |= {f"pictures a second by {part}": rounded(value) for part, value in found.limits.items()}
    return parts


def _stages(found: Costs) -> Table:
    table = _table("What each stage takes", ("stage", "work", "hours", "on", "money", ""), ("hours", "money"))
    for line in found.lines:
        hours = "?" if line.hours is None else f"{line.hours:,.2f}" if line.hours else ""
        money = "?" if line.money is None and line.note != "done" else f"{line.money or 0.0:,.2f}"
        table.add_row(line.stage, escape(line.work), hours, line.machines, money, escape(line.note))
    table.add_section()
    table.add_row("total", "", f"{found.hours:,.2f}", "", f"{found.money:,.2f}")
    unknown = [line.stage for line in found.lines if line.hours is None]
    parts = [f"the hours of {', '.join(unknown)}"] if unknown else []
    parts += [f"the money of {', '.join(found.without)} (no price or no rate)"] if found.without else []
    unpriced = {what: [line.stage for line in found.lines if line.unpriced == what] for what in found.unpriced}
    parts += [f"the money of {what} in {', '.join(stages)}" for what, stages in unpriced.items()]
    table.caption = f"the total is without {'; and without '.join(parts)}" if parts else None
    return table


def _assumptions(assumed: Assumptions, found: Costs) -> Table:
    table = _table("Assumed, or given by --assume KEY=VALUE", ("key", "value", "meaning", "source"))
    for name, field in Assumptions.model_fields.items():
        value = getattr(assumed, name)
        if name in found.used or name in assumed.model_fields_set:
            shown = "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"
            table.add_row(name, shown, field.title or "", source(assumed, name))
        elif value is None and ("hour" in name or name in ("gb_month", "thousand_requests")):
            table.add_row(name, "no price given", field.title or "", "")
    return table
