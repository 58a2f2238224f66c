"""Sums, gathers and exchanges over the learners: the one file that calls torch.distributed.

With one process every one of them is the identity.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor


class Learners:
    """The learners of one run, as a communicator; without a process group there is one learner.

    Every method is collective: all learners call it, in the same order, with the same shapes except for the first axis.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        # NCCL sends from GPU memory only: tensors are copied there, and results back to the device of the input
        self.device = "cuda" if group is not None and dist.get_backend(group) == "nccl" else "cpu"

    def counts(self, n: int) -> list[int]:
        """The n of each learner, in rank order."""
        if self.group is None:
            return [n]
        out = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        out[self.rank] = n
        dist.all_reduce(out, group=self.group)
        return [int(x) for x in out.tolist()]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over learners, on all of them."""
        if self.group is None:
            return x
        out = x.to(self.device, copy=True)
        dist.all_reduce(out, group=self.group)
        return out.to(x.device)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether one of the learners has it set."""
        return [bool(n) for n in self.sum(torch.tensor(flags, dtype=torch.int64)).tolist()]

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all learners, in rank order; counts: how many rows each learner has, which may differ."""
        if self.group is None:
            return x
        padded = x.new_zeros((max(counts), *x.shape[1:]), device=self.device)
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(x.device)

    def gather_equal(self, x: Tensor) -> Tensor:
        """The rows of all learners, in rank order, where each has the same number of them."""
        if self.group is None:
            return x
        mine = x.to(self.device).contiguous()
        out = mine.new_empty((self.size * len(mine), *mine.shape[1:]))
        dist.all_gather(list(out.split(len(mine))), mine, group=self.group)
        return out.to(x.device)

    def rows_at(self, shares: Sequence[Tensor], positions: Tensor, offsets: Tensor) -> list[Tensor]:
        """The rows at these global positions of tensors of which `shares` are this learner's, on all learners.

        offsets (size + 1,): learner r has the positions offsets[r] .. offsets[r + 1]. Only the wanted rows are sent, in
        one collective whose size the host knows: the sum of their bytes, as all learners but the owner of a row have
        zeros there.
        """
        if self.group is None or not len(positions):
            return [x[positions] for x in shares]
        local = positions - offsets[self.rank]
        ours = (local >= 0) & (local < len(shares[0]))
        rows = [_bytes(_rows_or_zeros(x, local, ours)) for x in shares]
        widths = [part.shape[1] for part in rows]
        padding = local.new_zeros((len(local), -sum(widths) % 8), dtype=torch.uint8)
        words = torch.cat([*rows, padding], 1).view(torch.int64).to(self.device)
        dist.all_reduce(words, group=self.group)
        parts = words.to(local.device).view(torch.uint8)[:, : sum(widths)].split(widths, 1)
        return [
            part.clone(memory_format=torch.contiguous_format).view(x.dtype).reshape(len(local), *x.shape[1:])
            for part, x in zip(parts, shares, strict=True)
        ]

    def exchange(self, outgoing: Sequence[bytes]) -> list[bytes]:
        """Send outgoing[r] to learner r; returns what each learner sent to this one, in rank order."""
        if self.group is None:
            return list(outgoing)
        sizes_out = torch.tensor([len(x) for x in outgoing], dtype=torch.int64, device=self.device)
        sizes_in = torch.empty_like(sizes_out)
        dist.all_to_all_single(sizes_in, sizes_out, group=self.group)
        data_out = torch.frombuffer(bytearray(b"".join(outgoing)) or bytearray(1), dtype=torch.uint8)
        data_out = data_out[: int(sizes_out.sum())].to(self.device)
        data_in = torch.empty(int(sizes_in.sum()), dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(data_in, data_out, sizes_in.tolist(), sizes_out.tolist(), group=self.group)
        return [part.cpu().numpy().tobytes() for part in data_in.split(sizes_in.tolist())]


def _rows_or_zeros(x: Tensor, rows: Tensor, there: Tensor) -> Tensor:
    """The rows of x, zeros where they are not there."""
    if not len(x):
        return x.new_zeros((len(rows), *x.shape[1:]))
    chosen = x[rows.clamp(0, len(x) - 1)]
    return chosen.masked_fill_(~there.view(-1, *[1] * (x.ndim - 1)), 0)


def _bytes(x: Tensor) -> Tensor:
    """(n, ...) -> (n, bytes of a row)."""
    return x.reshape(len(x), -1).contiguous().view(torch.uint8)


def offsets_of(counts: Sequence[int]) -> Int[Tensor, " R"]:
    """Where each learner's share starts, and where the last one ends, for shares of so many rows each."""
    return torch.tensor([0, *accumulate(counts)])


def local_positions(positions: Int[Tensor, " n"], offsets: Int[Tensor, " R"], rank: int) -> Int[Tensor, " k"]:
    """Those of the global positions that are in the share of learner `rank`, as positions in that share."""
    low, high = offsets[rank], offsets[rank + 1]
    return positions[(positions >= low) & (positions < high)] - low
