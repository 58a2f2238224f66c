"""What a pair costs that was scored before: its cached embeddings and tokens, in microseconds of one core's CPU time.

python -m tests.benchmarks.bench_cached [--width 768] [--rows 1024] [--repeats 20]

The floor is a plain copy of as many bytes, in the same run. Captions are those of deploy/data/small, four in one: 71
characters and 16 words, about LAION's. Best of alternating turns, so that other load changes little.

On an AMD EPYC: 2.75 µs a pair of D = 768, of which 0.7 are checksums and 0.3 the opening of the file (13.2 as lists
under zstd, a plain copy 0.17); a caption's tokens 0.83 stored, 23.9 tokenised, 224 by open_clip. Captions as they are,
17 characters: 5.5 tokenised, and with the package tokenizers and the same cleaning 10.6 (37 for four in one), which is
why jest has its own.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from jest_core.examples.tokenizer import ClipTokenizer
from jest_core.models import configurations
from pipelines.base import blocks, storage
from pipelines.data.places import Place
from pipelines.scores import score_cache, stored_tokens
from pipelines.stream import windows
from tests.benchmarks.measure import console, machine, table

CAPTIONS = Path(__file__).parents[2] / "deploy/data/small"
GROUPS = 4


def microseconds(contestants: Mapping[str, Callable[[], Any]], n_rows: int, repeats: int) -> dict[str, float]:
    """Process CPU time a row: the least of each, in turns."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(repeats):
        for name, function in contestants.items():
            start = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - start)
    return {name: 1e6 * seconds / n_rows for name, seconds in best.items()}


def captions(n: int) -> list[str]:
    """Four real captions in one, n times."""
    paths = sorted(CAPTIONS.glob("*/*.parquet"))
    texts = [text for path in paths for text in pq.read_table(path, columns=["caption"])["caption"].to_pylist()]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    return [" ".join(texts[(4 * i + j) % len(texts)] for j in range(4)) for i in range(n)]


def part(width: int, n: int, *, lists: bool) -> pa.Table:
    """A part's rows; lists: as versions before wrote them."""
    rng, texts = np.random.default_rng(0), captions(n)
    values = {"uid": [f"{i:032x}" for i in range(n)], "row": np.arange(n), "status": ["ok"] * n}
    for name in score_cache.EMBEDDINGS:
        wide = rng.standard_normal((n, width))
        unit = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float16)
        values[name] = blocks.pack(unit) if lists else blocks.pack_halves(unit)
    values |= {name: rng.random(n, np.float32) for name in ("matched_pair_loss", "cosine")}
    values |= stored_tokens.pack(ClipTokenizer()(texts), pa.chunked_array([pa.array(texts)]))
    return pa.table(values)


def reading(width: int, n: int, repeats: int, folder: str) -> None:
    """A window's rows of the score cache."""
    columns, contestants, sizes = (
        ["status", *score_cache.EMBEDDINGS],
        dict[str, Callable[[], Any]](),
        dict[str, float](),
    )
    rows = np.random.default_rng(1).permutation(n)
    for name, lists in (("lists, zstd (versions before)", True), ("fixed-size binary", False)):
        directory, whole = f"{folder}/{lists}", part(width, GROUPS * n, lists=lists)
        path = score_cache.part_path(directory, 0)
        storage.write_table(path, whole, [n] * GROUPS)
        sizes[name] = storage.size(path) / len(whole)
        place, uids = Place(0, "", directory, ""), whole["uid"][n : 2 * n].to_pylist()

        def read(directory: str = directory, place: Place = place, uids: list[str] = uids) -> pa.Table:
            return score_cache.CachedRows(directory, place, 1, uids, columns).take(rows)

        contestants[name] = read
    image, text = (blocks.unpack(contestants[name]()[column]) for column in score_cache.EMBEDDINGS)
    contestants["a plain copy"] = lambda: (image.copy(), text.copy())
    cost = microseconds(contestants, n, repeats)
    cells = [
        [name, f"{us:.2f}", f"{us / cost['a plain copy']:.1f}", f"{sizes.get(name, 0):,.0f}"]
        for name, us in cost.items()
    ]
    table(f"Cached embeddings, D = {width}", ["", "µs a pair", "x copy", "bytes of a row on disk"], cells)


def tokenising(n: int, repeats: int) -> None:
    """A window's captions."""
    tokenizer, texts = ClipTokenizer(), captions(n)
    column = pa.chunked_array([pa.array(texts)])
    stored = pa.table(stored_tokens.pack(tokenizer(texts), column))
    contestants: dict[str, Callable[[], Any]] = {
        "tokenised": lambda: tokenizer(texts),
        "stored": lambda: stored_tokens.unpack(stored, column, tokenizer),
    }
    other = configurations.open_clip_tokenizer("ViT-B-32", tokenizer.context_length)
    contestants["tokenised by open_clip"] = lambda: other(texts)
    cost = microseconds(contestants, n, repeats)
    table("Tokens of a caption", ["", "µs"], [[name, f"{us:.2f}"] for name, us in cost.items()])
    console.print(f"{stored.nbytes / n:.0f} bytes a row in memory, {4 * tokenizer.context_length} as int32")


def main(width: int = 768, rows: int = 1024, repeats: int = 20) -> None:
    console.print(machine("cpu"))
    with TemporaryDirectory() as folder:
        reading(width, rows, repeats, folder)
    tokenising(rows, repeats)
    inputs = configurations.inputs("jest-b-16-256")
    parts = windows.example_bytes(inputs.view.image_size, inputs.tokenizer.context_length, width)
    cells = [[name, f"{n:,}"] for name, n in [*parts.items(), ("together", sum(parts.values()))]]
    table("Bytes of an example in the object store", ["", "bytes"], cells)


if __name__ == "__main__":
    typer.run(main)
