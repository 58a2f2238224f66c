"""What an example takes on its way from a shard to a learner: CPU time by part, bytes, requests."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jest_core.models import configurations, outlines
from jest_core.run_file import Run

from ..stream import windows
from . import sizes, unit_costs
from .assumptions import Assumptions
from .calibrate import Machine
from .sizes import Pairs

_SHORTER_SIDE = 512  # of pictures whose size nothing says


@dataclass(frozen=True)
class Example:
    """What one example takes.

    cpu_ms: CPU milliseconds where it is read, by part. storage_bytes: read from storage. store_bytes: in the object
    store, and through the network. copy_ms: of a learner's one thread that copies it. again_ms: CPU milliseconds of a
    learner's machine, to decode those that are selected once more (data.decode late), an example of the super-batch.
    send_ms, receive_ms: CPU milliseconds of Ray, where it goes from one machine to another. requests: to the storage.
    window_bytes: of all examples that a task reads, in the object store once. measured: parts of cpu_ms by calibration.
    """

    cpu_ms: Mapping[str, float]
    storage_bytes: float
    store_bytes: float
    copy_ms: float
    again_ms: float
    send_ms: float
    receive_ms: float
    requests: float
    window_bytes: float
    measured: Collection[str]

    @property
    def read_ms(self) -> float:
        """CPU milliseconds where it is read."""
        return sum(self.cpu_ms.values())


def of_training(run: Run, pairs: Pairs | None, assumed: Assumptions, machine: Machine | None) -> Example:
    """An example of a super-batch."""
    late = run.data.decode == "late"
    full, encoded, times = outlines.image_size(run.model.name), _encoded(pairs, machine), _times_read(run)
    store_bytes, view, width = sizes.example_bytes(run, encoded), sizes.read_size(run), sizes.cached_width(run)
    measured, whole = _measured(run, view, late, width, machine), _measured(run, full, False, width, machine)
    each = _cpu_ms(run, view, late, width, store_bytes, assumed, measured)
    selected = run.sub_batch_size / run.super_batch_size if late else 0.0
    kept = pairs.n_rows / max(1, pairs.n_slots) if pairs else 1.0
    stored = kept * (encoded + (sizes.cache_bytes(run, 1.0) if run.reads_scores else 0.0))
    return Example(
        cpu_ms={part: ms * times for part, ms in each.items()},
        storage_bytes=stored * times,
        store_bytes=store_bytes * times,
        copy_ms=_mb(store_bytes, assumed.copy_ms),
        again_ms=selected * whole.get("decoding", _decode_ms(run, full, False, assumed)),
        send_ms=_mb(store_bytes * times, assumed.send_ms),
        receive_ms=_mb(store_bytes * times, assumed.receive_ms),
        requests=times * assumed.requests_per_group / sizes.group_slots(pairs),
        window_bytes=sizes.window_rows(run, pairs) * store_bytes,
        measured=measured.keys() & whole.keys(),
    )


def of_scoring(run: Run, pairs: Pairs | None, assumed: Assumptions, machine: Machine | None) -> Example:
    """An example that the reference scores, by `jest reference-scores`."""
    assert run.reference is not None
    model = run.reference.model
    view = outlines.image_size(model.name)
    tokens = configurations.context_length(model.name, model.context_length)
    store_bytes = sum(windows.example_bytes(view, tokens, encoded=0).values())
    measured = _measured(run, view, False, 0, machine)
    return Example(
        cpu_ms=_cpu_ms(run, view, False, 0, store_bytes, assumed, measured),
        storage_bytes=_encoded(pairs, machine) * (pairs.n_rows / max(1, pairs.n_slots) if pairs else 1.0),
        store_bytes=store_bytes,
        copy_ms=0.0,
        again_ms=0.0,
        send_ms=_mb(store_bytes, assumed.send_ms),
        receive_ms=_mb(store_bytes, assumed.receive_ms),
        requests=assumed.requests_per_group / sizes.group_slots(pairs),
        window_bytes=sizes.group_slots(pairs) * store_bytes,
        measured=measured.keys(),
    )


def assumed_by(example: Example, assumed: Assumptions) -> set[str]:
    """Names of the assumptions behind an example."""
    always = {"requests_per_group", "copy_ms", "send_ms", "receive_ms", "receive_threads"}
    if assumed.read_cpu_ms is not None:
        return always | {"read_cpu_ms"}
    parts = {"decoding": {"picture_size", "picture_aspect"}, "tokens": {"tokens_ms"}, "reading": {"shard_ms"}}
    return always.union({"store_ms"}, *(names for part, names in parts.items() if part not in example.measured))


def _encoded(pairs: Pairs | None, machine: Machine | None) -> float:
    """Bytes of a picture in its shard: by the catalogue, else of those that were read to calibrate, else a guess."""
    if pairs is None and machine is not None and machine.reading is not None:
        return machine.reading.encoded_bytes
    return sizes.encoded_bytes(pairs)


def _mb(n_bytes: float, ms: float) -> float:
    return n_bytes / 1e6 * ms


def _times_read(run: Run) -> float:
    """How often an example is read: once, unless several learners share a stream, of which each reads it all."""
    n, streams = run.training.max_learners, run.data.n_streams
    return (n + streams - math.gcd(n, streams)) / streams  # parts that both cut a super-batch into, together


def _measured(run: Run, view: int, late: bool, width: int, machine: Machine | None) -> dict[str, float]:
    """CPU milliseconds of the parts that a machine was measured with as such an example has them. width: of its cached
    embeddings, with which tokens may come."""
    if machine is None or machine.reading is None:
        return {}
    costs = machine.reading
    found = {"reading": max(0.0, costs.cpu_ms["reading"] - unit_costs.SCORES_MS * costs.width)}
    if (costs.decoder, costs.image_size, costs.late) == (run.data.decoder, view, late):
        found["decoding"] = costs.cpu_ms["decoding"]
    if width or not costs.stored_tokens:
        found["tokens"] = costs.cpu_ms["tokens"]
    return found


def _cpu_ms(
    run: Run,
    view: int,
    late: bool,
    width: int,
    store_bytes: float,
    assumed: Assumptions,
    measured: Mapping[str, float],
) -> dict[str, float]:
    """CPU milliseconds by part, of the machine that reads: given, measured on a machine, or those of unit_costs."""
    if assumed.read_cpu_ms is not None:
        return {"all of it": assumed.read_cpu_ms}
    return {
        "decoding": _decode_ms(run, view, late, assumed),
        "tokens": assumed.tokens_ms,
        "reading": assumed.shard_ms,
        **measured,
        **({"cached scores": unit_costs.SCORES_MS * width} if width else {}),
        "object store": _mb(store_bytes, assumed.store_ms),
    }


def _decode_ms(run: Run, view: int, late: bool, assumed: Assumptions) -> float:
    decoder = run.data.decoder
    side, pixels = _size(run, assumed)
    return unit_costs.decode_ms(decoder, side, pixels, view, late)


def _size(run: Run, assumed: Assumptions) -> tuple[float, float]:
    """The shorter side of the shards' pictures, and their pixels: as ingest makes them, where it does."""
    ingest, aspect = run.ingest, assumed.picture_aspect
    side = float(assumed.picture_size or (ingest.image_size if ingest else _SHORTER_SIDE))
    match ingest.resize_mode if ingest and not assumed.picture_size else "keep_ratio":
        case "center_crop" | "border":
            return side, side**2
        case "keep_ratio_largest":
            return side / aspect, side**2 / aspect
        case _:
            return side, side**2 * aspect
