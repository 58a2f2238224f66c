"""The reproduce stage: the paper's figures and tables at the scale of a laptop, each a few runs, a chart and a table.

deploy/reproduction/experiments.yaml has the runs and the figures. What a run gave goes into results.json; pages and
README are made of that alone, so that they can be made again, and compared, without the runs.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml

from jest_core import run_file
from jest_core.run_file import Run

from ..base import progress, storage
from ..reports import comparison, study
from ..stages import Chain
from . import charts, figures
from .drawings.place import place
from .records import Experiments, FigureSpec, Record, Results, runs_of

FOLDER = files("jest_deploy") / "reproduction"
RESULTS = "results.json"
_SMALLER = 16  # sub-batches of a smoke run


def reproduce(names: Sequence[str], *, root: str, seeds: int | None, smoke: bool, publish: str) -> None:
    """Do the runs of these figures (all, if none is named) that are not done, and write <root>/reproduction.html.

    seeds: at most so many of each. smoke: a few steps, on the small tier, of the first run of each kind. publish: also
    write the README, its pictures and results.json into this directory.
    """
    described = experiments()
    unknown = set(names) - set(described["figures"])
    if unknown:
        raise ValueError(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(described['figures'])}")
    root = run_file.join("", root or ("runs/reproduction-smoke" if smoke else "runs/reproduction"))
    wanted = {name: spec for name, spec in described["figures"].items() if not names or name in names}
    plan = first_of_each_kind(wanted) if smoke else {name: list(_runs_of(spec, seeds)) for name, spec in wanted.items()}
    for tier in ("small",) if smoke else ("small", "medium"):
        place(tier, root)
    chain = Chain(load_run(name, 0, root, smoke=smoke) for name in described["runs"])
    results = read_results(f"{root}/{RESULTS}")
    for figure, spec in wanted.items():
        todo = plan[figure]
        for i, (name, seed) in enumerate(todo, 1):
            run, done = load_run(name, seed, root, smoke=smoke), results["runs"].setdefault(name, {})
            before = done.get(str(seed))
            if before is None or before["identity"] != _identity(run):
                progress.say("reproduce", f"{figure}, run {i} of {len(todo)}: {name}, seed {seed}")
                done[str(seed)] = _record(chain.finish(run), _identity(run))
                storage.write_json(f"{root}/{RESULTS}", results)
        if "study" in spec:
            run = load_run(spec["of"], 0, root, smoke=smoke)
            chain.finish(run)
            results["studies"][figure] = (
                study.figure2(run, n_iterations=400 if smoke else 4_000)
                if spec["study"] == "figure2"
                else study.sizes(run, _sizes(spec, smoke=smoke))
            )
            storage.write_json(f"{root}/{RESULTS}", results)
    storage.write_bytes(f"{root}/reproduction.html", figures.page(wanted, results, described["scores"]).encode())
    progress.say("reproduce", f"written to {root}/reproduction.html")
    if publish:
        _publish(publish, results)


@cache
def experiments() -> Experiments:
    """experiments.yaml. Cached: callers must not change it."""
    found: Experiments = yaml.safe_load((FOLDER / "experiments.yaml").read_text())
    return found


def load_run(name: str, seed: int, root: str, *, smoke: bool = False) -> Run:
    """A run of the experiments, whole. References have one seed, whatever the learner's."""
    described = experiments()
    values = deepcopy(run_file.merged(described["base"], _changes(name, described["runs"])))
    values |= {"root": root, "run_dir": f"runs/{name}-seed{seed}", "seed": seed}
    return run_file.load(yaml.safe_dump(_small(values) if smoke else values), source=f"run {name}")


def read_results(path: str) -> Results:
    """results.json; empty where nothing was run yet."""
    return cast(Results, storage.read_json(path)) if storage.exists(path) else Results(runs={}, studies={})


def _runs_of(spec: FigureSpec, seeds: int | None) -> Iterator[tuple[str, int]]:
    for seed in spec.get("seeds", [0])[:seeds]:
        yield from dict.fromkeys((name, 0 if name.startswith("reference") else seed) for name in runs_of(spec))


def first_of_each_kind(figures: Mapping[str, FigureSpec]) -> dict[str, list[tuple[str, int]]]:
    """Of each figure the runs that have a setting which none before them has: a key, or a word, such as a method or a
    rule. Another number, or path, makes no kind."""
    described, seen = experiments(), set[str]()
    out: dict[str, list[tuple[str, int]]] = {}
    for figure, spec in figures.items():
        out[figure] = []
        for name, seed in _runs_of(spec, 1):
            new = set(_settings(run_file.merged(described["base"], _changes(name, described["runs"])))) - seen
            if new:
                out[figure].append((name, seed))
            seen |= new
    return out


def _settings(values: Any, key: str = "") -> Iterator[str]:
    """The keys of a run file's values, and the words among the values, each with its key."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from _settings(value, f"{key}.{name}" if key else name)
    elif isinstance(values, list):
        for value in values:
            yield from _settings(value, key)
    else:
        yield key
        if values is None or (isinstance(values, str) and "/" not in values):
            yield f"{key}={values}"


def _changes(name: str, runs: Mapping[str, Any]) -> dict[str, Any]:
    changes = dict(runs[name])
    like = changes.pop("like", None)
    return run_file.merged(_changes(like, runs), changes) if like else changes


def _sizes(spec: FigureSpec, *, smoke: bool) -> list[int]:
    return [b // _SMALLER for b in spec["sub_batch_sizes"]] if smoke else list(spec["sub_batch_sizes"])


def _small(values: dict[str, Any]) -> dict[str, Any]:
    """A run at sizes at which every stage still does all that it does, and no figure means anything."""
    b = max(4, values["training"]["sub_batch_size"] // _SMALLER)
    schedule = {"sub_batch_size": b, "examples_trained": 2 * b, "warmup_steps": 1, "checkpoint_every_steps": 2}
    sizes = {"selection": {"n_chunks": 2}, "training": schedule, "data": {"window_rows": 300}}
    out = run_file.merged(values, sizes | {"model": {"name": "jest-tiny"}})
    if "micro_batch_size" in out["training"]:
        out["training"]["micro_batch_size"] //= _SMALLER
    if out["reference"] is not None:
        out["reference"] |= {"model": {"name": "jest-tiny"}, "n_actors": 1}
    for part in (out["selection"], out["training"].get("low_resolution") or {}):
        for key in ("score_image_size", "image_size"):
            if key in part:
                part[key] //= 2
    flat, *others = out["evaluation"]["sets"]  # the tasks that tables show; the small tier has not all of the sets
    flat["tasks"] = ["emoji_name", "group", "few_shot"]
    flat["few_shot"]["pool"]["shards"] = "data/small/eval-fluent-high-contrast/*.parquet"
    out["evaluation"]["sets"] = [flat, *(s for s in others if s["name"] == "clipart")]
    text = yaml.safe_dump(out).replace("/pool/*", "/pool/0000[01]").replace("data/medium/", "data/small/")
    small: dict[str, Any] = yaml.safe_load(text)
    return small


def _identity(run: Run) -> str:
    """Hash of a run and its evaluation, without root, and without defaults: a new setting changes no old hash."""
    return storage.fingerprint(run.model_dump(mode="json", exclude={"root"}, exclude_defaults=True))[:16]


def _record(directory: str, identity: str) -> Record:
    """What tables and charts need of a finished run."""
    run = comparison.read_run(directory)
    by_step: dict[int, dict[str, float]] = {}
    for line in run.results:
        for metric, value in line["metrics"].items():
            by_step.setdefault(line["step"], {})[f"{line['key']} {metric}"] = round(value, 5)
    m = run.manifest
    return {
        "identity": identity,
        "checkpoints": [{"step": step, "scores": scores} for step, scores in sorted(by_step.items())],
        "steps": m["steps"],
        "examples_trained": m["examples_trained"],
        "examples_seen": m["examples_seen"],
        "teraflops": round(run.teraflops, 4),
        "teraflops_with_reuse": round(m["steps"] * m["flops_step_with_reuse"] / 1e12, 4),
        "seconds": round(m["seconds"], 1),
        "filter_ratio": 1 - run.run.sub_batch_size / run.run.super_batch_size,
        "sub_batch_size": run.run.sub_batch_size,
    }


def _publish(directory: str, results: Results) -> None:
    """results.json, the README made of it, and the pictures that it shows."""
    described = experiments()
    Path(directory, "pictures").mkdir(parents=True, exist_ok=True)
    scores = [described["scores"], *(spec["scores"] for spec in described["figures"].values() if "scores" in spec)]
    used = {" ".join(where) for each in scores for where in each.values()}
    for checkpoint in (c for seeds in results["runs"].values() for r in seeds.values() for c in r["checkpoints"]):
        checkpoint["scores"] = {key: value for key, value in checkpoint["scores"].items() if key in used}
    storage.write_bytes(f"{directory}/{RESULTS}", (json.dumps(results, indent=None) + "\n").encode())
    text = readme(results)
    storage.write_bytes(f"{directory}/README.md", text.encode())
    for name, spec in described["figures"].items():
        if f"(pictures/{name}.svg)" in text:
            drawn = charts.chart(spec, results, described["scores"], figure=name)
            assert drawn is not None, f"the README shows {name}, of which nothing was run"
            progress.say("reproduce", f"picture {name}")
            drawn.write_image(f"{directory}/pictures/{name}.svg", width=1000, height=460)


def readme(results: Results) -> str:
    """deploy/reproduction/README.md: its template with these results; every number in it is one of them."""
    described = experiments()
    return figures.render((FOLDER / "README.md.j2").read_text(), described["figures"], results, described["scores"])
