"""The plan stage: what a run will cost, from its run file alone, before any machine is rented."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from jest_core import flops
from jest_core.choices import CRITERIA
from jest_core.flops import StepFlops
from jest_core.models import outlines
from jest_core.run_file import LowResolution, Reference, Run

from ..base import progress
from . import basis, cost_tables, preflight, sizes, stage_status
from .assumptions import Assumptions
from .calibrate import Machine, predict
from .machines import Machines
from .preflight import Check
from .sizes import Pairs


def print_plan(
    run: Run,
    machine: Machine | None = None,
    assumed: Assumptions | None = None,
    manifest: Machines | None = None,
    reference_run: Run | None = None,
) -> None:
    """Print sizes, cost by part, the cost of other methods, bytes, memory, what each stage costs, and what can be
    checked of the run now.

    machine: what a learner was measured to sustain; manifest: of the cluster; reference_run: by which the reference is
    trained. Raises ValueError where a check fails.
    """
    assumed = assumed or Assumptions()
    outlines.refuse_resolutions(run)
    pairs = sizes.pairs(run)
    tables = [
        _sizes(run, pairs),
        _forward(run),
        _step(run, pairs, assumed.flops_per_second),
        _alternatives(run),
        _bytes(run, pairs),
        _memory(run, pairs),
    ]
    if machine is not None:
        tables.append(_time(run, machine, assumed.learner_hour))
    tables += cost_tables.tables(basis.Basis(run, pairs, assumed, machine, manifest, reference_run))
    for table in tables:
        progress.console.print(table)
    checks = list(preflight.run_checks(run, pairs, manifest))
    progress.console.print(_checks(checks))
    if checks[0].ok:  # the storage can be read
        progress.console.print(stage_status.table(run))
    if failed := [check for check in checks if check.ok is False]:
        raise ValueError("the run would fail: " + "; ".join(f"{check.name}: {check.detail}" for check in failed))


def alternatives(run: Run) -> dict[str, StepFlops]:
    """The cost of a step of the same sub-batch by other methods: the ratios of the paper's Table 1 and Figure 1."""
    reference = run.reference or Reference(model=run.model, checkpoint="-", scores="-")
    low = _low_resolution(run)
    uniform = _changed(run, selection={"method": "uniform"}, training={"low_resolution": None})
    full = {"method": "joint", "score_image_size": None, "score_patch_size": None, "agreement_every_steps": 0}
    joint = _changed(run, selection=full, training={"low_resolution": None})
    found = {
        "uniform": uniform,
        "JEST, reference online": joint.model_copy(update={"reference": _changed(reference, online=True)}),
        "JEST, reference cached": joint.model_copy(update={"reference": _changed(reference, online=False)}),
    }
    if not CRITERIA[run.selection.criterion].uses_reference:
        found["JEST, no reference"] = found.pop("JEST, reference cached")
        del found["JEST, reference online"]
    if low is not None:
        sizes = {"score_image_size": low.image_size, "score_patch_size": low.patch_size}
        flexi = _changed(run, selection=full | sizes, training={"low_resolution": low})
        found["FlexiJEST" + ", reference cached" * CRITERIA[run.selection.criterion].uses_reference] = flexi.model_copy(
            update={"reference": _changed(reference, online=False)}
        )
    return {name: flops.step_flops(other) for name, other in found.items()}


def _low_resolution(run: Run) -> LowResolution | None:
    """That of the run file, or for a ViT the paper's: half of the sub-batch in patches twice as large."""
    if run.training.low_resolution is not None:
        return run.training.low_resolution
    patch = outlines.patch_size(run.model.name)
    if patch is None or outlines.image_size(run.model.name) % (2 * patch):
        return None
    return LowResolution(patch_size=2 * patch)


def _changed(part: Any, **values: Any) -> Any:
    """A copy of a part of a run file with other values; those of a part within it as a dictionary."""
    nested = {k: _changed(getattr(part, k), **v) if isinstance(v, dict) else v for k, v in values.items()}
    return part.model_copy(update=nested)


def _si(value: float) -> str:
    """Four digits and a prefix: 5.5 P."""
    for prefix in ("", " k", " M", " G", " T", " P", " E"):
        if value < 1000:
            return f"{value:.4g}{prefix}"
        value /= 1000
    return f"{value:.4g} Z"


def _sizes(run: Run, pairs: Pairs | None) -> Table:
    table = Table(title="Sizes", title_justify="left", caption_justify="left", show_header=False)
    n = run.training.max_learners
    rows = {
        "steps": f"{run.n_steps:,}",
        "super-batch": f"{run.super_batch_size:,}" + (f", {run.super_batch_size // n:,} on each learner" * (n > 1)),
        "sub-batch": f"{run.sub_batch_size:,}" + (f", {run.sub_batch_size // n:,} on each learner" * (n > 1)),
        "examples trained": f"{run.n_steps * run.sub_batch_size:,}",
        "examples seen": f"{run.n_steps * run.super_batch_size:,}",
    }
    if run.selection.selects:
        chunks = run.selection.n_draws
        rows["selection"] = f"{run.selection.method}, {chunks} draws of {run.sub_batch_size // chunks:,}"
    if run.n_low_resolution:
        rows["trained at low resolution"] = f"{run.n_low_resolution:,} of a sub-batch"
    if pairs is not None:
        epochs = run.n_steps * run.super_batch_size / pairs.n_slots
        rows["pairs of an epoch"] = f"{pairs.n_slots:,}: {epochs:.2f} epochs seen"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _forward(run: Run) -> Table:
    """What a pair costs at each resolution that the run uses."""
    table = Table(title="A pair's forward pass, FLOPs", title_justify="left", caption_justify="left")
    for column in ("", "image", "text", "both", "of full"):
        table.add_column(column, justify="left" if not column else "right")
    selection, low = run.selection, run.training.low_resolution
    seen: dict[str, tuple[int | None, int | None]] = {"full resolution": (None, None)}
    if run.selection.selects:
        seen["scoring"] = (selection.score_image_size, selection.score_patch_size)
    if low is not None:
        seen["low resolution"] = (low.image_size, low.patch_size)
    full = flops.forward_flops(run.model).total
    for name, (image_size, patch_size) in seen.items():
        found = flops.forward_flops(run.model, image_size, patch_size)
        size = f"{image_size or outlines.image_size(run.model.name)} pixels" + (
            f", patches of {patch_size}" if patch_size else ""
        )
        cells = [_si(x) for x in (found.image, found.text, found.total)]
        table.add_row(f"{name}: {size}", *cells, f"{found.total / full:.1%}")
    if run.uses_reference and run.reference is not None:
        sizes = run.reference.score_image_size, run.reference.score_patch_size
        found = flops.forward_flops(run.reference.model, *sizes)
        cells = [_si(x) for x in (found.image, found.text, found.total)]
        when = "once a pair, cached" if run.reads_scores else "in every step"
        table.add_row(f"reference, {when}: {run.reference.model.name}", *cells, f"{found.total / full:.1%}")
    return table


def _step(run: Run, pairs: Pairs | None, flops_per_second: float | None) -> Table:
    step, uniform = flops.step_flops(run), alternatives(run)["uniform"].total
    table = Table(title="A step by part", title_justify="left", caption_justify="left")
    for column in ("", "FLOPs", "of a uniform step", "FLOPs of the run"):
        table.add_column(column, justify="left" if not column else "right")
    parts = {
        "score": step.score,
        "reference": step.reference,
        "select": step.select,
        "train": step.train,
        "loss": step.loss,
        "optimizer": step.optimizer,
        "agreement, on average": step.agreement,
        "all, as executed": step.total,
        "all, scoring counted as reused": step.total_with_reuse,
    }
    for name, value in parts.items():
        table.add_row(name, _si(value), f"{value / uniform:.3f}", _si(value * run.n_steps))
    if pairs is not None and run.reads_scores and run.reference is not None:
        sizes = run.reference.score_image_size, run.reference.score_patch_size
        once = pairs.n_slots * flops.forward_flops(run.reference.model, *sizes).total
        table.add_row("reference scores, once", "", "", _si(once))
    if flops_per_second:
        hours = step.total * run.n_steps / (flops_per_second * run.training.max_learners) / 3600
        table.caption = (
            f"{hours:,.1f} hours on {run.training.max_learners} learners of {flops_per_second:.3g} FLOPs a second"
        )
    return table


def _alternatives(run: Run) -> Table:
    table = Table(
        title=f"The same sub-batch by other methods, f = {run.selection.filter_ratio}",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "as executed", "scoring reused"):
        table.add_column(column, justify="left" if not column else "right")
    found = alternatives(run)
    for name, step in found.items():
        ratios = [x / found["uniform"].total for x in (step.total, step.total_with_reuse)]
        table.add_row(name, *(f"{x:.3f}" for x in ratios))
    table.caption = "of a uniform step; the reference's training is not counted"
    return table


def _bytes(run: Run, pairs: Pairs | None) -> Table:
    table = Table(title="Bytes on storage, GB", title_justify="left", caption_justify="left")
    for column in ("", "GB", "a step, MB"):
        table.add_column(column, justify="right" if column else "left")
    for kind, found in (("read", sizes.read_bytes(run, pairs)), ("written", sizes.written_bytes(run))):
        for name, value in found.items():
            table.add_row(f"{kind}: {name}", f"{value / 1e9:,.2f}", f"{value / run.n_steps / 1e6:,.2f}")
    if run.reads_scores and pairs is not None:
        table.add_row("written: score cache, once", f"{sizes.cache_bytes(run, pairs.n_slots) / 1e9:,.2f}", "")
    if pairs is None:
        table.caption = "pictures of 25 kB are assumed: the catalogue tells their size"
    return table


def _memory(run: Run, pairs: Pairs | None) -> Table:
    table = Table(title="Memory that the run file decides, GB", title_justify="left", caption_justify="left")
    for column in ("", "GB", "where"):
        table.add_column(column, justify="left" if column != "GB" else "right")
    source = "by the catalogue" if pairs else "assumed"
    windows = f"{run.data.n_streams} streams ({sizes.encoded_bytes(pairs) / 1e3:,.0f} kB a picture, {source})"
    host, device = "each learner's host", "each learner's device"
    rows = [
        (f"windows of {windows}", sizes.window_bytes(run, pairs), "Ray's object stores together"),
        ("super-batches, this one and two to come", sizes.super_batch_bytes(run, pairs), host),
        ("embeddings of the super-batch", sizes.embedding_bytes(run), device),
        ("weights, gradients, AdamW's moments", sizes.state_bytes(run), device),
        ("the reference's weights", sizes.reference_bytes(run), device),
    ]
    for name, value, where in rows:
        if value:
            table.add_row(name, f"{value / 1e9:,.2f}", where)
    table.caption = "activations come on top: bound them by training.score_batch_size and training.micro_batch_size"
    return table


def _time(run: Run, machine: Machine, price: float | None) -> Table:
    n, found = run.training.max_learners, predict(run, machine)
    step = sum(found.step_seconds.values())
    table = Table(title=f"Time on {n} learner(s) of {machine.name}", title_justify="left", caption_justify="left")
    for column in ("", "a step, s", "of a step", "the run"):
        table.add_column(column, justify="right" if column else "left")
    for part, seconds in found.step_seconds.items():
        table.add_row(part, f"{seconds:.4g}", f"{seconds / step:.0%}", _duration(run.n_steps * seconds))
    table.add_row("all steps, and the start of the first", f"{step:.4g}", "100%", _duration(found.steps_seconds))
    table.add_row("checkpoints, as far as they hold up the loop", "", "", _duration(found.checkpoints_seconds))
    table.add_row("start of the command", "", "", _duration(found.start_seconds))
    hours = found.total / 3600
    caption = f"{_duration(found.total)}; {hours * n:,.2f} learner-hours"
    if price is not None:
        caption += f", {hours * n * price:,.2f} at {price:g} each"
    if n > 1:
        caption += "; without what the learners exchange over the network, and evaluation"
    if machine.model != run.model.name:
        caption += f"; measured with {machine.model}, and this is {run.model.name}"
    table.caption = caption
    return table


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36000
        else f"{seconds / 3600:,.1f} h"
    )


def _checks(found: Sequence[Check]) -> Table:
    table = Table(title="Checks", title_justify="left", show_header=False)
    for check in found:
        mark = {True: "[green]ok[/]", False: "[red]fails[/]", None: "not known"}[check.ok]
        table.add_row(check.name, mark, escape(check.detail))
    return table
