"""jest demo: every stage in order on this machine, through the run files of deploy/runs/demo-small or demo-medium."""

import tempfile
from importlib.resources import files
from pathlib import Path

from jest_core import config as run_files
from jest_core.config import Run
from pipelines import catalogue, evaluation, learner, progress, reference_scores, report, storage

TIERS = ("small", "medium")
REFERENCES = {"joint-raw-reference": "raw-reference"}  # runs with another reference than `reference`

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


def run_stage(*, data: str, root: str, smoke: bool, seeds: int, n_learners: int) -> None:
    """Reference, score cache, and each method for each seed; ends with a table and report.html.

    Everything lies below root (a directory or URL); what is there already is not done again. Without a root it is
    runs/demo, and runs/demo-medium or runs/demo-smoke where that is what runs.
    """
    if data not in TIERS:
        raise ValueError(f"--data {data!r} is not one of {', '.join(TIERS)}")
    # tiers and smoke runs have other settings, so each has a directory of its own unless one is named
    root = run_files.join(
        "", root or "-".join(["runs/demo", *(["smoke"] if smoke else []), *([data] if data != "small" else [])])
    )
    runs = _load(data, root, smoke, n_learners, seed=0)
    progress.say("demo", f"everything goes to {root}; the same command resumes, or says what is there")
    _place_data(data, root)

    run_dirs: list[str] = []
    for name in sorted(
        {REFERENCES.get(name, "reference") for name in runs if runs[name].reference}, key=lambda n: n != "reference"
    ):
        train_and_evaluate(runs[name], name)
        run_dirs.append(runs[name].path(runs[name].run_dir))
    for run in {run.reference.scores: run for run in runs.values() if run.reference and run.reads_scores}.values():
        catalogue.run_stage(run)
        reference_scores.run_stage(run)
    for seed in range(seeds):
        for name, run in _load(data, root, smoke, n_learners, seed).items():
            if name not in {"reference", "raw-reference"}:
                train_and_evaluate(run, f"{name}, seed {seed}")
                run_dirs.append(run.path(run.run_dir))
    page = f"{root}/report.html"
    report.run_stage(run_dirs, page)


def train_and_evaluate(run: Run, label: str) -> None:
    """The catalogue if it is missing, the run, and its scores on the evaluation sets."""
    if not storage.exists(f"{run.path(run.data.catalogue)}/{storage.MANIFEST}"):
        catalogue.run_stage(run)
    learner.run_stage(run, label)
    evaluation.run_stage(run)


def _load(data: str, root: str, smoke: bool, n_learners: int, seed: int) -> dict[str, Run]:
    """The demonstration's run files by name; references first, then in the order of the table."""
    folder = files("deploy") / "runs" / f"demo-{data}"
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
        if name not in {"reference", "raw-reference"}:
            overrides.append(f"run_dir={name}-seed{seed}")
        if smoke and name in {"independent", "joint", "joint-raw-reference"}:
            overrides.append("reference.model.name=jest-tiny")
        runs[name] = run_files.load((folder / f"{name}.yaml").read_text(), overrides, f"{name}.yaml")
    return runs


def _place_data(data: str, root: str) -> None:
    """The tier's shards below root/data: the small one comes with the package, the others are built."""
    target = f"{root}/data/{data}"
    if storage.exists(f"{target}/{storage.MANIFEST}"):
        return
    if data == "small":
        _copy_tree(Path(str(files("deploy") / "data" / "small")), target)
    else:
        from pipelines.drawings.build import build

        progress.say(
            "demo", f"builds the {data} tier of drawings from npm packages: about 300 MB to fetch, 2 to 5 minutes"
        )
        with tempfile.TemporaryDirectory() as scratch:
            build(data, Path(scratch) / data, raw=Path(scratch) / "raw")
            _copy_tree(Path(scratch) / data, target)


def _copy_tree(source: Path, target: str) -> None:
    """Copy a directory's files; the manifest goes last, so that a copy cut short is done again."""
    paths = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.name == storage.MANIFEST)
    for path in paths:
        storage.write_bytes(f"{target}/{path.relative_to(source).as_posix()}", path.read_bytes())
