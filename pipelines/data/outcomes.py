"""What became of the URLs of a shard, as img2dataset says it in NNNNN_stats.json, and how many had each outcome."""

import re
from collections import Counter
from typing import TypedDict

from .addresses import PRIVATE

NOT_STORED = "fetched, but not stored"  # a reason among img2dataset's own


class Stats(TypedDict):
    """NNNNN_stats.json, as img2dataset writes it: what became of the URLs of a shard; it has more keys than these.

    count: URLs. successes: pictures. status_dict: URLs by `success` or error message.
    """

    count: int
    successes: int
    status_dict: dict[str, int]


def corrected(stats: Stats, n_stored: int) -> Stats:
    """img2dataset's statistics, where a picture counts that is in the shard; it counts those that it fetched."""
    if (lost := stats["successes"] - n_stored) == 0:
        return stats
    outcomes = {**stats["status_dict"], "success": n_stored, NOT_STORED: lost}
    return {**stats, "successes": n_stored, "status_dict": outcomes}


def reasons_of(stats: Stats) -> Counter[str]:
    reasons: Counter[str] = Counter()
    for message, n in stats["status_dict"].items():
        reasons[_reason(message)] += n
    return reasons


def _reason(message: str) -> str:
    """img2dataset's message on a picture, without what differs between pictures, so that equal ones can be counted."""
    text = re.sub(r"<urlopen error (.*)>", r"\1", message)
    text = re.sub(r"OpenCV.*CV_IO_MAX_IMAGE_PIXELS.*", "more pixels than ingest.max_pixels", text, flags=re.DOTALL)
    text = re.sub(r"(control characters\.) .*|(?<=in position )\d+(-\d+)?| ?\(?_ssl\.c:\d+[):]", r"\1", text)
    return re.sub(r"<(\S+) object at 0x[0-9a-f]+>", r"\1", text).strip()[:80]


def refuse_nothing_fetched(reasons: Counter[str], asked: int) -> None:
    """Raises ValueError, with the most frequent reasons, where no picture was fetched."""
    if reasons["success"]:
        return
    most = "; ".join(f"{n:,} {reason}" for reason, n in reasons.most_common(3))
    private = any(PRIVATE in reason for reason in reasons)
    remedy = "allow these hosts in ingest.private_addresses" if private else "correct what the reasons name"
    raise ValueError(
        f"0 of {asked:,} pictures fetched ({most}): {remedy}, and run `jest ingest RUN.yaml --retry-failed`"
    )
