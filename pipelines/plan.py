"""The plan stage: what a run will cost, from its run file alone, before any machine is rented."""

from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError
from rich.table import Table

from jest_core import flexible, flops, towers
from jest_core.config import LowResolution, Reference, Run
from jest_core.flops import StepFlops
from pipelines import progress, storage
from pipelines.catalogue import open_catalogue

_ENCODED_BYTES = 25_000  # of a picture, where no catalogue tells: a JPEG of 512 pixels
_WINDOWS_HELD = 4  # two of each stream, while the next two are read
_BYTES_A_PARAMETER = 16  # float32 weight, gradient, and AdamW's two moments


@dataclass(frozen=True)
class _Pairs:
    """Of the run's catalogue."""

    slots: int  # of an epoch
    mean_bytes: float  # of a row, in its shard


def run_stage(run: Run, flops_per_second: float | None = None) -> None:
    """Print sizes, cost by part, the cost of other methods, and memory. flops_per_second: what a learner sustains."""
    towers.refuse_resolutions(run)
    pairs = _catalogue(run)
    tables = (
        _sizes(run, pairs),
        _forward(run),
        _step(run, pairs, flops_per_second),
        _alternatives(run),
        _memory(run, pairs),
    )
    for table in tables:
        progress.console.print(table)


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
    if run.selection.criterion == "hard":
        found["JEST, no reference"] = found.pop("JEST, reference cached")
        del found["JEST, reference online"]
    if low is not None:
        sizes = {"score_image_size": low.image_size, "score_patch_size": low.patch_size}
        flexi = _changed(run, selection=full | sizes, training={"low_resolution": low})
        found["FlexiJEST" + ", reference cached" * (run.selection.criterion != "hard")] = flexi.model_copy(
            update={"reference": _changed(reference, online=False)}
        )
    return {name: flops.step_flops(other) for name, other in found.items()}


def _low_resolution(run: Run) -> LowResolution | None:
    """The run's own, or for a ViT the paper's: half of the sub-batch in patches twice as large."""
    if run.training.low_resolution is not None:
        return run.training.low_resolution
    visual = towers.outline(run.model.name).visual
    if not flexible.is_flexible(visual) or towers.image_size(run.model.name) % (2 * flexible.patch_size(visual)):
        return None
    return LowResolution(patch_size=2 * flexible.patch_size(visual))


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


def _sizes(run: Run, pairs: _Pairs | None) -> Table:
    table = Table(title="Sizes", title_justify="left", caption_justify="left", show_header=False)
    n = run.training.n_learners
    rows = {
        "steps": f"{run.n_steps:,}",
        "super-batch": f"{run.super_batch_size:,}" + (f", {run.super_batch_size // n:,} on each learner" * (n > 1)),
        "sub-batch": f"{run.sub_batch_size:,}" + (f", {run.sub_batch_size // n:,} on each learner" * (n > 1)),
        "examples trained": f"{run.n_steps * run.sub_batch_size:,}",
        "examples seen": f"{run.n_steps * run.super_batch_size:,}",
    }
    if run.selection.method != "uniform":
        chunks = 1 if run.selection.method == "independent" else run.selection.n_chunks
        rows["selection"] = f"{run.selection.method}, {chunks} draws of {run.sub_batch_size // chunks:,}"
    if run.n_low_resolution:
        rows["trained at low resolution"] = f"{run.n_low_resolution:,} of a sub-batch"
    if pairs is not None:
        epochs = run.n_steps * run.super_batch_size / pairs.slots
        rows["pairs of an epoch"] = f"{pairs.slots:,}: {epochs:.2f} epochs seen"
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
    if run.selection.method != "uniform":
        seen["scoring"] = (selection.score_image_size, selection.score_patch_size)
    if low is not None:
        seen["low resolution"] = (low.image_size, low.patch_size)
    full = flops.forward_flops(run.model).total
    for name, (image_size, patch_size) in seen.items():
        found = flops.forward_flops(run.model, image_size, patch_size)
        size = f"{image_size or towers.image_size(run.model.name)} pixels" + (
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


def _step(run: Run, pairs: _Pairs | None, flops_per_second: float | None) -> Table:
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
        once = pairs.slots * flops.forward_flops(run.reference.model, *sizes).total
        table.add_row("reference scores, once", "", "", _si(once))
    if flops_per_second:
        hours = step.total * run.n_steps / (flops_per_second * run.training.n_learners) / 3600
        table.caption = (
            f"{hours:,.1f} hours on {run.training.n_learners} learners of {flops_per_second:.3g} FLOPs a second"
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


def _memory(run: Run, pairs: _Pairs | None) -> Table:
    table = Table(title="Memory that the run file decides, GB", title_justify="left", caption_justify="left")
    for column in ("", "GB", "where"):
        table.add_column(column, justify="left" if column != "GB" else "right")
    n, size = run.training.n_learners, towers.image_size(run.model.name)
    held = run.selection.score_image_size or size if run.data.decode == "late" else size
    encoded = pairs.mean_bytes if pairs else _ENCODED_BYTES
    example = encoded + 3 * held**2
    windows = run.data.n_streams * run.data.window_rows * _WINDOWS_HELD * example
    said = "by the catalogue" if pairs else "assumed"
    widths = [towers.width(run.model.name)]
    if run.uses_reference and run.reference is not None:
        widths.append(towers.width(run.reference.model.name))
    rows = {
        f"windows of {run.data.n_streams} streams ({encoded / 1e3:,.0f} kB a picture, {said})": (
            windows,
            "Ray's object stores together",
        ),
        "super-batches, this one and two to come": (3 * run.super_batch_size // n * example, "each learner's host"),
        "embeddings of the super-batch": (
            run.super_batch_size // n * sum(widths) * 8 if run.selection.method != "uniform" else 0,
            "each learner's device",
        ),
        "weights, gradients, AdamW's moments": (
            flops.n_parameters(run.model) * _BYTES_A_PARAMETER,
            "each learner's device",
        ),
    }
    if run.uses_reference and not run.reads_scores and run.reference is not None:
        rows["the reference's weights"] = (4 * flops.n_parameters(run.reference.model), "each learner's device")
    for name, (value, where) in rows.items():
        table.add_row(name, f"{value / 1e9:,.2f}", where)
    table.caption = "activations come on top: bound them by training.score_batch_size and training.micro_batch_size"
    return table


def _catalogue(run: Run) -> _Pairs | None:
    """None where the catalogue is not made, or its storage cannot be reached from here."""
    directory = run.path(run.data.catalogue)
    try:
        if not storage.exists(f"{directory}/{storage.MANIFEST}"):
            raise FileNotFoundError("it is not made yet")
        found = open_catalogue(directory)
        shards = found.shards
        n_rows = sum(shards["rows"].to_pylist())
        return _Pairs(found.order(run).n_rows, sum(shards["bytes"].to_pylist()) / max(1, n_rows))
    except (OSError, BotoCoreError) as error:
        progress.say("plan", f"without the catalogue {directory}: {error}")
        return None
