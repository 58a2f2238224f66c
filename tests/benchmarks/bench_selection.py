"""Joint selection, compared with Algorithm 1 as written, with the best dense version, and with its floor.

    python -m tests.benchmarks.bench_selection [--device cuda] [--only dense|floor|linear|paper|chunks] [--smaller 16]

The floor is torch's own float32 matrix products and softplus of the shapes that the algorithm needs, and nothing else:
N - 1 chunks of n drawn examples with all B, in both directions, for learner and reference.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from jest_core import noise
from jest_core.selection import Embeddings, Selection, batch_score, gibbs_select, select
from jest_core.selection.arguments import uid_words
from tests.benchmarks.measure import console, machine, peak_bytes, seconds, table, threads
from tests.synthetic import structured_models, uids


@dataclass(frozen=True)
class Problem:
    """A super-batch, and the sizes of a selection from it."""

    learner: Embeddings
    reference: Embeddings
    sub_batch_size: int
    n_chunks: int
    uids: Tensor

    def select(self, **options: Any) -> Selection:
        return select(
            self.learner,
            self.reference,
            sub_batch_size=self.sub_batch_size,
            n_chunks=self.n_chunks,
            uids=self.uids,
            **({"seed": 0, "step": 0} | options),
        )


def problem(super_batch: int, sub_batch: int, width: int, n_chunks: int, device: str, dtype: str) -> Problem:
    learner, reference = (
        Embeddings(*(x.to(device, getattr(torch, dtype)) for x in (m.image, m.text)), m.logit_scale, m.logit_bias)
        for m in structured_models(super_batch, width)
    )
    return Problem(learner, reference, sub_batch, n_chunks, uid_words(uids(super_batch)).to(device))


def exact(p: Problem) -> None:
    p.select()


def fast(p: Problem) -> None:
    p.select(precision="fast")


def as_written(p: Problem) -> Tensor:
    """Algorithm 1, line by line, on dense matrices: an identity matrix, masks, and products with them."""
    scores = _pair_losses(p.learner) - _pair_losses(p.reference)
    identity = torch.eye(len(scores), device=scores.device)
    matched = (scores * identity).sum(1)
    drawn = _draw(matched, p, 0)
    for chunk in range(1, p.n_chunks):
        is_drawn = identity[drawn].sum(0)
        column_sums = (scores * is_drawn[:, None]).sum(0)
        row_sums = (scores * is_drawn[None]).sum(1)
        drawn = torch.cat([drawn, _draw(matched + column_sums + row_sums - 1e8 * is_drawn, p, chunk)])
    return drawn


def _pair_losses(model: Embeddings) -> Tensor:
    logits = model.logit_scale * model.image.float() @ model.text.float().T + model.logit_bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits)


def best_dense(p: Problem) -> Tensor:
    """The score matrix built once, in tiles with a cheap softplus; each chunk adds only its rows and columns."""
    scores = torch.empty(len(p.learner), len(p.learner), device=p.learner.image.device)
    for start in range(0, len(scores), 1024):
        rows = slice(start, start + 1024)
        scores[rows] = _tile_losses(p.learner, rows).sub_(_tile_losses(p.reference, rows))
    diagonal = scores.diagonal()
    # the matched pair's softplus(-l) is softplus(l) - l
    diagonal += p.reference.matched_logits() - p.learner.matched_logits()
    conditional = diagonal.double()
    available = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    drawn = []
    for chunk in range(p.n_chunks):
        drawn.append(_draw(conditional.masked_fill(~available, -torch.inf), p, chunk))
        available[drawn[-1]] = False
        conditional += scores[drawn[-1]].sum(0)
        conditional += scores[:, drawn[-1]].sum(1)
    return torch.cat(drawn)


def _tile_losses(model: Embeddings, rows: slice) -> Tensor:
    """Softplus as log(1 + exp(l)): a tenth of the time of F.softplus on a CPU, and accurate enough for timing."""
    logits = model.image[rows].float() @ (model.logit_scale * model.text.float()).T
    return logits.add_(model.logit_bias).mul_(math.log2(math.e)).exp2_().add_(1.0).log_()


def _draw(scores: Tensor, p: Problem, chunk: int) -> Tensor:
    keys = scores + noise.gumbel(p.uids, torch.zeros_like(p.uids[:, 0]), 0, 0, chunk)
    return torch.topk(keys, p.sub_batch_size // p.n_chunks).indices


def floor(p: Problem, softplus: bool = True, tile: int = 1024) -> None:
    """Only the products and the softplus, in tiles, which is faster than without."""
    n = p.sub_batch_size // p.n_chunks
    for chunk in range(p.n_chunks - 1):
        for model in (p.learner, p.reference):
            for rows, columns in ((model.image, model.text), (model.text, model.image)):
                drawn = columns[chunk * n : (chunk + 1) * n].T
                for start in range(0, len(rows), tile):
                    logits = rows[start : start + tile] @ drawn
                    if softplus:
                        F.softplus(logits)


def against_dense(device: str, smaller: int) -> None:
    sizes = (20480 // smaller, 4096 // smaller, 512, 16, device, "float32")
    contestants: dict[str, Callable[[Problem], Any]] = {
        "Algorithm 1 as written": as_written,
        "best dense": best_dense,
        "jest, exact": exact,
        "jest, fast": fast,
    }
    p = problem(*sizes)
    took = seconds({name: partial(f, p) for name, f in contestants.items()}, 2, device)
    memory = {name: peak_bytes(f, partial(problem, *sizes), device)[0] for name, f in contestants.items()}
    rows = []
    for name in contestants:
        ratios = [f"{took[d] / took[name]:.1f}" for d in ("Algorithm 1 as written", "best dense")]
        less = memory["best dense"] / memory[name]
        rows.append([name, f"{took[name]:.2f}", *ratios, f"{memory[name] / 1e6:,.0f}", f"{less:.1f}"])
    columns = ["", "seconds", "times faster than as written", "than best dense", "peak MB above the embeddings"]
    table(_title(sizes), [*columns, "times less than best dense"], rows)


def against_floor(device: str, smaller: int) -> None:
    sizes = (20480 // smaller, 4096 // smaller, 512, 16, device, "float32")
    p = problem(*sizes)
    contestants = {
        "floor": partial(floor, p),
        "its matrix products alone": partial(floor, p, softplus=False),
        "jest, exact": partial(exact, p),
        "jest, fast": partial(fast, p),
    }
    took = seconds(contestants, 5, device)
    rows = [[name, f"{s:.2f}", f"{s / took['floor']:.2f}"] for name, s in took.items()]
    table(_title(sizes), ["", "seconds", "of the floor"], rows)
    quality = []
    for step in range(20):
        chosen = (p.select(step=step, precision=precision).indices for precision in ("fast", "exact"))
        score = [batch_score(p.learner, p.reference, indices).item() for indices in chosen]
        quality.append(score[0] / score[1] - 1)
    console.print(
        f"score of the set that fast mode selects, against exact mode's, 20 draws: mean {sum(quality) / 20:+.4%}, "
        f"smallest {min(quality):+.4%}, largest {max(quality):+.4%}\n"
    )


def linear_in_super_batch(device: str, smaller: int) -> None:
    rows, first, b = [], 0.0, 2048 // smaller
    for size in (10240 // smaller, 20480 // smaller, 40960 // smaller, 81920 // smaller):
        p = problem(size, b, 512, 16, device, "float32")
        took = seconds({"exact": partial(exact, p), "fast": partial(fast, p)}, 3, device)
        first = first or took["exact"] / size
        rows.append(
            [f"{size:,}", *(f"{took[k]:.2f}" for k in took), f"{took['exact'] / size * 1e6:.1f}",
             f"{took['exact'] / size / first:.2f}"]
        )  # fmt: skip
    columns = ["B", "seconds, exact", "seconds, fast", "exact, µs an example", "of the first"]
    table(f"Time against B at b = {b:,}, D = 512, N = 16", columns, rows)


def at_the_papers_size(device: str, smaller: int) -> None:
    dtype = "bfloat16" if device == "cuda" else "float32"
    sizes = (163840 // smaller, 32768 // smaller, 768, 16, device, dtype)
    n_bytes = 4 * sizes[0] * sizes[2] * getattr(torch, dtype).itemsize
    rows = []
    for name, function in (("exact", exact), ("fast", fast)):
        extra, took = peak_bytes(function, partial(problem, *sizes), device)
        rows.append([name, f"{took:.2f}", f"{extra / 1e6:,.0f}", f"{n_bytes / 1e6:,.0f}"])
    columns = ["", "seconds", "peak MB above the embeddings", "MB of the embeddings"]
    table(f"{_title(sizes)}; the first call of a process", columns, rows)


def over_chunks(device: str, smaller: int) -> None:
    """Figure 2, middle: learnability of the joint draw against n_chunks, 0 at a uniform set and 1 at Gibbs' plateau."""
    n, b, draws = 2048 // smaller, 512 // smaller, 8
    p = problem(n, b, 64, 16, device, "float32")
    _, trace = gibbs_select(p.learner, p.reference, sub_batch_size=b, n_iterations=20 * b, uids=p.uids, seed=0, step=0)
    generator = torch.Generator().manual_seed(0)
    some = [batch_score(p.learner, p.reference, torch.randperm(n, generator=generator)[:b]) for _ in range(50)]
    uniform, plateau = torch.stack(some).mean().item(), trace[-5 * b :].mean().item()

    def reached(score: float) -> str:
        return f"{(score - uniform) / (plateau - uniform):.3f}"

    rows = []
    for n_chunks in [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= b]:
        options = {"sub_batch_size": b, "n_chunks": n_chunks, "uids": p.uids, "seed": 0}
        scores = [select(p.learner, p.reference, step=k, **options).sub_batch_score for k in range(draws)]
        mean = sum(scores) / draws
        rows.append([f"joint, {n_chunks} chunks", f"{mean / b:.1f}", reached(mean), f"{mean / plateau:.3f}"])
    for sweep in (1, 2, 4, 8, 16):
        score = trace[sweep * b - 1].item()
        rows.append([f"Gibbs, {sweep * b:,} iterations", f"{score / b:.1f}", reached(score), f"{score / plateau:.3f}"])
    columns = ["", "nats an example", "uniform set = 0, plateau = 1", "of the plateau"]
    table(f"B = {n:,}, b = {b}, D = 64; uniform set: {uniform / b:.1f} nats an example", columns, rows)


def _title(sizes: tuple[int, int, int, int, str, str]) -> str:
    super_batch, sub_batch, width, n_chunks, _, dtype = sizes
    return f"B = {super_batch:,}, b = {sub_batch:,}, D = {width}, N = {n_chunks}, {dtype}"


PARTS = {
    "dense": against_dense,
    "floor": against_floor,
    "linear": linear_in_super_batch,
    "paper": at_the_papers_size,
    "chunks": over_chunks,
}


def main(
    device: str = "cpu",
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PARTS)}")] = None,
    smaller: Annotated[int, typer.Option(help="divides B and b: to see that it runs, not for figures")] = 1,
) -> None:
    threads()
    console.print(machine(device))
    for name in only or PARTS:
        PARTS[name](device, smaller)


if __name__ == "__main__":
    typer.run(main)
