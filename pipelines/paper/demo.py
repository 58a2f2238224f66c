"""jest demo: every stage in order on this machine, through the run files of deploy/runs/demo-small or demo-medium."""

from importlib.resources import files

from jest_core import run_file
from jest_core.run_file import Run

from ..base import progress
from ..reports import report
from ..stages import Chain
from .drawings.place import TIERS, place

REFERENCES = ("reference", "raw-reference")

# Sizes at which every stage still does all that it does, and no figure means anything
_SMOKE = [
    "model.name=jest-tiny",
    "training.sub_batch_size=64",
    "training.examples_trained=256",
    "training.warmup_steps=1",
    "training.checkpoint_every_steps=2",
    "selection.n_chunks=4",
    "data.window_rows=300",
]


def run_demo(*, data: str, root: str, smoke: bool, seeds: int, n_learners: int) -> None:
    """Reference, score cache, and each method for each seed; ends with a table and report.html.

    Everything is written below root (a directory or URL); what is there is not made again. Without a root it is
    runs/demo, and runs/demo-medium or runs/demo-smoke where that is what runs.
    """
    if data not in TIERS:
        raise ValueError(f"--data {data!r} is not one of {', '.join(TIERS)}")
    # tiers and smoke runs have other settings, so each has a directory of its own unless one is named
    root = run_file.join(
        "", root or "-".join(["runs/demo", *(["smoke"] if smoke else []), *([data] if data != "small" else [])])
    )
    progress.say("demo", f"everything goes to {root}; the same command resumes, or says what is there")
    place(data, root)
    references = {name: run for name, run in _load(data, root, smoke, n_learners, 0).items() if name in REFERENCES}
    chain = Chain(references.values())
    run_dirs = [chain.finish(run) for run in references.values()]
    for seed in range(seeds):
        runs = _load(data, root, smoke, n_learners, seed)
        run_dirs += [chain.finish(run) for name, run in runs.items() if name not in REFERENCES]
    report.write_report(run_dirs, f"{root}/report.html")


def _load(data: str, root: str, smoke: bool, n_learners: int, seed: int) -> dict[str, Run]:
    """The demonstration's run files by name; references first, then in the order of the table."""
    folder = files("jest_deploy") / "runs" / f"demo-{data}"
    names = [p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")]
    order = [
        "reference",
        "raw-reference",
        "uniform",
        "uniform-equal-flops",
        "independent",
        "joint",
        "joint-raw-reference",
    ]
    runs = {}
    for name in sorted(names, key=order.index):
        overrides = [f"root={root}", f"seed={seed}", f"training.n_learners={n_learners}", *(_SMOKE if smoke else [])]
        if name not in REFERENCES:
            overrides.append(f"run_dir={name}-seed{seed}")
        if smoke and name in {"independent", "joint", "joint-raw-reference"}:
            overrides += ["reference.model.name=jest-tiny", "reference.n_actors=1"]
        if smoke and name != "reference":
            overrides.append(f"data.shards=data/{data}/pool/0000[01].parquet")
        runs[name] = run_file.load((folder / f"{name}.yaml").read_text(), overrides, f"{name}.yaml")
    return runs
