"""The reproduce stage: the paper's figures at the scale of a laptop, each a few runs, a chart and a table."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from jest_core import config as run_files
from jest_core.config import Run
from pipelines import progress
from pipelines.chain import Chain
from pipelines.drawings.place import place

FOLDER = files("deploy") / "reproduction"


def experiments() -> dict[str, Any]:
    """deploy/reproduction/experiments.yaml"""
    return dict(yaml.safe_load((FOLDER / "experiments.yaml").read_text()))


def load_run(name: str, seed: int, root: str) -> Run:
    """One of its runs, whole."""
    told = experiments()
    values = _merge(told["base"], _changes(name, told["runs"]))
    values |= {"root": root, "run_dir": f"runs/{name}-seed{seed}", "seed": seed}
    return run_files.load(yaml.safe_dump(values), source=f"run {name}")


def _changes(name: str, runs: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(runs[name])
    like = own.pop("like", None)
    return _merge(_changes(like, runs), own) if like else own


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """base with changes, part by part; a list or a value is replaced whole."""
    out = dict(base)
    for key, value in changes.items():
        old = out.get(key)
        out[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return out


def run_stage(figures: list[str], root: str, seeds: list[int] | None = None) -> None:
    told = experiments()
    place("small", root)
    place("medium", root)
    chain = Chain(load_run(name, 0, root) for name in told["runs"])
    for figure in figures:
        spec = told["figures"][figure]
        names = [*spec.get("runs", []), *(name for line in spec.get("series", {}).values() for name in line)]
        for seed in seeds if seeds is not None else range(spec.get("seeds", 1)):
            for name in dict.fromkeys(names):
                seed_of = 0 if name.startswith("reference") else seed
                progress.say("reproduce", f"{figure}: {name}, seed {seed_of}")
                chain.finish(load_run(name, seed_of, root))
