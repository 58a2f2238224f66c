"""What a draw costs a GPU beside its matrix products: collectives, and host reads (the host waits for the device).

Each host read drains the device's queue, and a collective has a latency that small chunks do not hide. Both are counted
on the CPU: a read is an operation that returns a value to the host, or whose result has a size that depends on values.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from jest_core.selection import Embeddings, select
from tests.core.selection.draws import model, uids
from tests.processes import run_learners

MAX_COLLECTIVES, MAX_READS = 40, 5  # of a draw of 16 chunks
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast", "barrier")
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.unique_dim, aten._unique2}


class Reads(TorchDispatchMode):
    """Counts the operations for which the host waits, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        by_mask = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in arguments[1]
        )
        if function.overloadpacket in READS or by_mask:
            self.counts[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def _counted(counts: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **options)

    return call


def _draw(rank: int, size: int, group: Any, criterion: str, n_chunks: int) -> tuple[Counter[str], Counter[str]]:
    """Collectives and host reads of a learner."""
    collectives: Counter[str] = Counter()
    for name in COLLECTIVES:
        setattr(dist, name, _counted(collectives, name, getattr(dist, name)))
    share = slice(rank * 640, (rank + 1) * 640)
    learner, reference = (
        Embeddings(m.image, m.text, torch.tensor(10.0), torch.tensor(-10.0))
        for m in (model(640 * size, 8, 0)[share], model(640 * size, 6, 1)[share])
    )
    reads = Reads()
    tolist = torch.Tensor.tolist
    torch.Tensor.tolist = _counted(reads.counts, "tolist", tolist)
    with reads:
        select(
            learner,
            None if criterion == "hard" else reference,
            sub_batch_size=256,
            n_chunks=n_chunks,
            criterion=criterion,
            uids=torch.from_numpy(uids(640 * size).view("int64"))[share],
            seed=0,
            step=0,
            group=group,
        )
    return collectives, reads.counts


@pytest.mark.parametrize("criterion", ["learnability", "hard"])
def test_a_draw_of_16_chunks_needs_few_collectives_and_host_reads(criterion):
    for collectives, reads in run_learners(_draw, 2, criterion, 16):
        assert 16 <= collectives.total() <= MAX_COLLECTIVES, collectives
        assert 1 <= reads.total() <= MAX_READS, reads


def test_host_reads_do_not_grow_with_the_chunks():
    (_, few), (_, many) = run_learners(_draw, 2, "learnability", 2)[0], run_learners(_draw, 2, "learnability", 32)[0]
    assert few == many


def test_the_counter_detects_every_kind_of_host_read():
    """Otherwise a draw could meet the bounds above by waiting in a way that is not counted."""
    x = torch.arange(5)
    for wait in (
        lambda: x[x > 2],
        lambda: bool(x.sum()),
        lambda: int(x[0]),
        lambda: torch.nonzero(x),
        lambda: x.max().item(),
    ):
        with Reads() as reads:
            wait()
        assert reads.counts.total() == 1
