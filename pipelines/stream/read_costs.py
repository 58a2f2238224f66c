"""What reading the run's own examples takes of one CPU: windows, read and decoded once more in this process."""

import time
from collections import Counter
from itertools import islice

from pydantic import BaseModel, ConfigDict

from jest_core import run_file
from jest_core.examples.inputs import Inputs
from jest_core.run_file import Run

from ..scores import score_cache
from . import windows
from .source import open_source

_SKIPPED = 1  # the first window starts the libraries


class ReadCosts(BaseModel):
    """Of an example, on average: CPU milliseconds by part, milliseconds by the clock without waiting for a CPU, bytes
    of its encoded picture; and what was measured, as another run may read another way.

    decoder, image_size, late: of data.decoder, of the pixels, of data.decode; None in files of earlier versions.
    stored_tokens: they were read with the scores. width: of the cached embeddings; 0 where none were read.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)  # earlier versions have store_bytes

    cpu_ms: dict[str, float]
    clock_ms: float
    encoded_bytes: float
    decoder: str | None = None
    image_size: int | None = None
    late: bool | None = None
    stored_tokens: bool = True
    width: int = 0

    @property
    def busy(self) -> float:
        """Share of the time in which the CPU works; in the rest it waits for the storage."""
        return min(1.0, sum(self.cpu_ms.values()) / self.clock_ms)


def measure(run: Run, seconds: float = 2.0) -> ReadCosts:
    """Read windows as tasks do, for so many seconds, or one. Raises what reading raises."""
    from . import super_batches  # imports PyTorch, which a run whose inputs are missing need not wait for

    source, inputs, text = open_source(run), super_batches.inputs_of(run), run_file.dump(run)
    stored_tokens, width = _cached(run, inputs)
    middle = source.order.stream_length(0) // 2  # far from what has just been read
    spent, clock, n, encoded = Counter[str](), 0.0, 0, 0
    for number, window in enumerate(islice(source.order.windows(0, middle), 1000)):
        before = time.process_time(), _clock()
        table = windows.of_window(windows.item_of(source.catalogue, window), text, inputs)
        cpu, took = time.process_time() - before[0], _clock() - before[1]
        if number < _SKIPPED:
            continue
        images = table["image"].to_pylist()
        began = time.process_time()
        inputs.view.batch(images)
        pixels = time.process_time() - began
        if not stored_tokens:
            inputs.tokenizer(table["caption"].to_pylist())
        tokens = time.process_time() - began - pixels
        spent.update({"decoding": pixels, "tokens": tokens, "reading": max(0.0, cpu - pixels - tokens)})
        clock, n = clock + took, n + len(table)
        encoded += sum(len(image or b"") for image in images)
        if clock > seconds:
            break
    cpu_ms = {part: 1e3 * spent[part] / n for part in ("decoding", "tokens", "reading")}
    return ReadCosts(
        cpu_ms=cpu_ms,
        clock_ms=1e3 * clock / n,
        encoded_bytes=encoded / n,
        decoder=run.data.decoder,
        image_size=inputs.view.image_size,
        late=run.data.decode == "late",
        stored_tokens=stored_tokens,
        width=width,
    )


def _clock() -> float:
    """Seconds by the clock without those in which this thread could have gone on, and other processes had all CPUs: a
    machine that trains meanwhile is not slow storage. Only Linux counts them."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            waited = int(file.read().split()[1])  # nanoseconds
    except (OSError, IndexError):  # another system, or a kernel that does not count
        waited = 0
    return time.perf_counter() - waited / 1e9


def _cached(run: Run, inputs: Inputs) -> tuple[bool, int]:
    """Whether the tokens are read with the scores, and the width of the cached embeddings."""
    if not run.reads_scores or run.reference is None:
        return False, 0
    scores = score_cache.opened(run.path(run.reference.scores))
    return scores.get("tokenizer") == inputs.tokenizer.identity, scores["config"]["width"]
