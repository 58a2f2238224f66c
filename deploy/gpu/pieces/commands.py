"""`jest` as its users run it, on the demonstration's data: commands, run files, and what a piece changes of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from deploy.gpu.results import Results
from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import manifests
from pipelines.paper.drawings.place import place

RUNS = Path(__file__).resolve().parents[2] / "runs" / "demo-small"
_TINY = [
    "model.name=jest-tiny",
    "training.sub_batch_size=64",
    "training.warmup_steps=1",
    "selection.n_chunks=4",
    "data.window_rows=300",
    'evaluation.sets=[{name: clipart, shards: "data/small/eval-clipart/*.parquet", tasks: [retrieval]}]',
]


def root(results: Results) -> str:
    """Where the runs of all pieces are, with the demonstration's data."""
    found = results.scratch / "demo"
    if not found.exists():
        place("small", str(found))
    return str(found)


def load(results: Results, name: str, *overrides: str) -> Run:
    """A run file of the demonstration, on this device."""
    text = (RUNS / f"{name}.yaml").read_text()
    scored = name in ("joint", "independent")
    chosen = [f"root={root(results)}", *(_TINY if results.small else [])]
    if results.small:
        chosen += ["data.shards=data/small/pool/0000[01].parquet"] if name != "reference" else []
        chosen += ["reference.model.name=jest-tiny"] if scored else []
    if results.cuda:
        chosen += ["training.gpus_per_learner=1", "evaluation.gpus=1"]
        chosen += ["reference.gpus_per_actor=1", "reference.n_actors=1"] if scored else []
    return run_file.load(text, [*chosen, *overrides], name)


def words(command: str, run: Run, *more: str) -> list[str]:
    """The command line of a stage, or of several: `stages catalogue train`."""
    path = Path(run.root) / f"{run.run_dir.replace('/', '-')}.yaml"
    path.write_text(run_file.dump(run))
    return [sys.executable, "-m", "jest_pipelines", *command.split(), str(path), *more]


def finish(command: list[str], **environment: str) -> float:
    """Seconds of a command. Raises RuntimeError, with all that it printed, where it fails."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - began


def prepare(results: Results) -> None:
    """Catalogues, the reference and its score cache, once for all pieces."""
    joint = load(results, "joint")
    if manifests.is_finished(joint.path("scores/pool")):
        return
    few = 512 if results.small else 30_720
    reference = load(results, "reference", f"training.examples_trained={few}", "training.checkpoint_every_steps=1000")
    for what, run in (("stages catalogue train", reference), ("stages catalogue reference-scores", joint)):
        seconds = finish(words(what, run))
        results.row(f"jest {what} {run.run_dir}.yaml", seconds=seconds)
