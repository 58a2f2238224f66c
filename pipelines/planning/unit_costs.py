"""What an example costs on its way from a shard to a learner, by part: measured, and the one place to change it.

All by `python -m tests.benchmarks.bench_read_costs` on 2 cores (AMD EPYC), on pieces of photographs; another machine
takes up to twice or half as long. `jest plan --calibrate` measures the machine at hand, with the run's own pictures.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Decoding:
    """CPU milliseconds to decode a square JPEG of `picture` pixels a side and cut it to `view`.

    decoder: as data.decoder names it. late: as data.decode late decodes for scoring.
    """

    decoder: str
    picture: int
    view: int
    ms: float
    late: bool = False

    @property
    def kind(self) -> Literal["late", "whole", "resized"]:
        """Which work it is: pictures of one kind differ by their pixels."""
        return _kind(self.picture, self.view, self.late)


DECODING = (
    Decoding("pillow", 256, 256, 0.46),
    Decoding("pillow", 256, 224, 1.4),
    Decoding("pillow", 512, 256, 3.6),
    Decoding("pillow", 512, 224, 3.5),
    Decoding("pillow", 256, 32, 0.27, late=True),
    Decoding("pillow", 256, 128, 0.35, late=True),
    Decoding("pillow", 512, 128, 0.77, late=True),
    Decoding("simplejpeg", 256, 256, 0.30),
    Decoding("simplejpeg", 256, 224, 0.49),
    Decoding("simplejpeg", 512, 256, 1.3),
    Decoding("simplejpeg", 512, 224, 1.3),
    Decoding("simplejpeg", 256, 32, 0.19, late=True),
    Decoding("simplejpeg", 256, 128, 0.23, late=True),
    Decoding("simplejpeg", 512, 128, 0.66, late=True),
)
TOKENS_MS = 0.024  # of a caption of 71 characters (tests/benchmarks/bench_cached.py)
READ_MS = 0.058  # of an example whose shard is on a local disk: bytes, captions, uids, Arrow
SCORES_MS = 0.0000036  # of its cached embeddings, for each of their dimensions (bench_cached.py)
STORE_MS = 0.1  # to put a MB into Ray's object store
SEND_MS = 0.62  # Ray's own, to send a MB to another node
RECEIVE_MS = 0.75  # Ray's own, to receive it there
COPY_MS = 0.09  # of a MB, by the one thread with which a learner makes tensors of what it got


def decode_ms(decoder: str, side: float, pixels: float, view: int, late: bool) -> float:
    """CPU milliseconds to decode a JPEG with so many pixels, whose shorter side is `side`, and cut it to `view`: those
    of the measured picture nearest to it, in proportion to its pixels."""
    kind = _kind(side, view, late)
    same = [point for point in DECODING if point.decoder == decoder and point.kind == kind]
    nearest = min(same, key=lambda point: (abs(point.picture - side), abs(point.view - view)))
    return nearest.ms * pixels / nearest.picture**2


def _kind(side: float, view: int, late: bool) -> Literal["late", "whole", "resized"]:
    return "late" if late else "whole" if side == view else "resized"
