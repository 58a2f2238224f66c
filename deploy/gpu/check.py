"""Run the pieces one after the other, each in a process of its own with a limit of its own.

Called by check.sh. OUT gets results.jsonl (a line a measurement), page.md (written anew after each piece) and log.txt
(all that the pieces print). A piece that fails, crashes or is beyond its limit does not stop the next.
"""

import argparse
import contextlib
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from deploy.gpu import results
from deploy.gpu.page import page


@dataclass(frozen=True)
class Piece:
    """A module with a function run(results), and its share of the time: seconds of a call of six minutes."""

    module: str
    seconds: float

    @property
    def name(self) -> str:
        return self.module.rsplit(".", 1)[-1]


# In order of worth
PIECES = [
    Piece(f"deploy.gpu.pieces.{name}", seconds)
    for name, seconds in {
        "kernels": 45,
        "selection": 45,
        "losses": 30,
        "steps": 130,
        "scoring": 25,
        "decoding": 20,
        "chain": 130,
        "learning": 90,
    }.items()
]
_MINUTES = {"cuda": 6.0, "cpu": 60.0}  # on the CPU beside whatever else runs there
_SHORTEST = 5.0  # seconds left with which a piece is still started


def machine(device: str) -> dict[str, Any]:
    """What the figures are measured on."""
    found: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found |= {"device": device, "cores": os.cpu_count(), "python": platform.python_version()}
    for name in ("torch", "torchvision", "triton", "timm", "open_clip_torch", "ray"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            found["card, driver, memory"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return found


def run_pieces(out: Path, pieces: Sequence[Piece], *, device: str, small: bool, minutes: float) -> bool:
    """Run them; whether all passed."""
    out.mkdir(parents=True, exist_ok=True)
    lines, over, passed = out / "results.jsonl", time.monotonic() + 60 * minutes, True
    results.append(lines, {"piece": "machine", "state": "started", **machine(device), "small": small})
    scratch = Path(tempfile.mkdtemp(prefix="jest-gpu-"))
    try:
        for piece in pieces:
            limit = min(piece.seconds * minutes / 6, over - time.monotonic())
            results.append(lines, {"piece": piece.name, "state": "started"})
            ended = {"state": "not started: no time is left"}
            if limit >= _SHORTEST * minutes / 6:
                ended = run_piece(out, piece, scratch, limit, device, small)
            passed &= ended["state"] == "passed"
            results.append(lines, {"piece": piece.name, **ended})
            print(f"{piece.name}: {ended['state']}, {ended.get('seconds', 0)} s", flush=True)
            _write(out / "page.md", page(results.read(lines)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return passed


def run_piece(out: Path, piece: Piece, scratch: Path, limit: float, device: str, small: bool) -> dict[str, Any]:
    """One piece in a process; how it ended."""
    words = [piece.module, out / "results.jsonl", scratch, limit, device, *(["small"] if small else [])]
    began = time.monotonic()
    with (out / "log.txt").open("ab") as log:
        log.write(f"\n==== {piece.name}\n".encode())
        log.flush()
        start = log.tell()
        command = [sys.executable, "-m", "deploy.gpu.piece", *map(str, words)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill(process.pid)
            process.wait()
    ended: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
    if status is None:
        return {"state": f"stopped at its limit of {limit:.0f} s", **ended}
    if status in (0, 1):
        return {"state": "failed" if status else "passed", **ended}
    return {"state": f"failed: its process ended with status {status}", **ended, "error": _tail(out / "log.txt", start)}


def _kill(pid: int) -> None:
    """A process, if it still runs, and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _tail(path: Path, start: int) -> str:
    """The end of what was printed after `start`."""
    return path.read_bytes()[start:][-4000:].decode(errors="replace")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def main() -> None:
    names = [piece.name for piece in PIECES]
    parser = argparse.ArgumentParser(prog="check.sh", description="Measure all that jest does on a GPU.")
    parser.add_argument("out", type=Path, help="directory of the results; an earlier call's are kept, and added to")
    parser.add_argument("--device", choices=list(_MINUTES), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes at which no time means anything")
    parser.add_argument("--only", default="", help=f"pieces, separated by commas: {','.join(names)}")
    parser.add_argument("--minutes", type=float, help="of all pieces; 6, and 60 on the CPU")
    asked = parser.parse_args()
    wanted = asked.only.split(",") if asked.only else names
    if unknown := set(wanted) - set(names):
        parser.error(f"no piece {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    pieces = [piece for piece in PIECES if piece.name in wanted]
    minutes = asked.minutes or _MINUTES[asked.device]
    passed = run_pieces(asked.out.resolve(), pieces, device=asked.device, small=asked.small, minutes=minutes)
    print((asked.out / "page.md").read_text() if passed else f"not all pieces passed: {asked.out / 'page.md'}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
