"""The tables of reading.md are those that the code computes, for the run files of LAION-2B and kubernetes/gpus-64."""

import re
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from pipelines.planning import flow, machines, unit_costs
from pipelines.planning.assumptions import Assumptions
from pipelines.planning.basis import Basis
from pipelines.planning.flow import Flow, rounded
from tests.deploy import kuberay
from tests.pipelines.planning.test_flow import load, training

PAGE = Path(str(files("jest_deploy") / "docs" / "reading.md"))
ROWS = 2_097_693_557
GPU_HOUR, CPU_HOUR = 2.5, 0.04  # prices of the page's example
SMALL = (
    "data.decode=late",
    "selection.score_image_size=128",
    "selection.score_patch_size=null",
    "training.low_resolution={image_size: 128}",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> machines.Machines:
    file = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    file.write_text(yaml.safe_dump_all(kuberay.render(kuberay.MANIFESTS / "gpus-64")))
    return machines.read(str(file))


def planned(cluster: machines.Machines, name: str, *overrides: str, gpus: int = 64, **assumed: float) -> Flow:
    """The training of a run of LAION-2B on so many GPUs, with as many more machines of both kinds."""
    times = gpus // 64
    groups = tuple(replace(group, most=group.most * (times if group.most > 1 else 1)) for group in cluster.groups)
    more = [f"training.n_learners={gpus}", f"data.n_streams={max(256, gpus)}"]
    given = Assumptions(**{"urls": ROWS, "flops_per_second": 4e14, **assumed})
    run = load(name, *more, *overrides)
    return flow.of_training(Basis(run, None, given, manifest=replace(cluster, groups=groups)), set())


def number(value: float) -> str:
    return rounded(value) if value >= 1000 else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def column(found: Flow) -> list[str]:
    """Of the page's table of GPUs."""
    needs = found.needs
    names = ["pictures a second", "CPUs that read, for each worker", "CPUs that read", "GB/s from storage"]
    names += ["requests a second", "GB/s into each machine", "CPUs of each machine, with which Ray receives"]
    return [
        *(number(needs[name]) for name in names),
        f"{found.example.store_bytes / 1e3:.0f}",
        f"{found.computing / 3600:.1f}",
        f"{found.seconds / 3600:.1f}",
        number(found.workers * GPU_HOUR),
        number(found.cpus_needed * CPU_HOUR),
    ]


def table(head: str) -> list[list[str]]:
    """The page's table whose head starts so: the cells of each row but the first."""
    text = PAGE.read_text().partition(f"\n| {head} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in text.splitlines()[2:]]


def test_the_unit_costs():
    points = {(point.decoder, point.picture, point.view): point for point in unit_costs.DECODING}
    found = re.findall(r"(?m)^\| (\w+) \| (\d+) \| (\d+)(, late)? \| ([\d.]+) \|", PAGE.read_text())
    assert len(found) == len(points)
    for decoder, picture, view, late, ms in found:
        point = points[decoder, int(picture), int(view)]
        assert (point.ms, point.late) == (float(ms), bool(late))
    names = ("TOKENS_MS", "READ_MS", "SCORES_MS", "STORE_MS", "SEND_MS", "RECEIVE_MS", "COPY_MS")
    values = [getattr(unit_costs, name) for name in names]
    values[2] *= 768
    assert [float(row[0]) for row in table("part")] == pytest.approx(values, rel=0.02)


def test_64_and_512_gpus(cluster: machines.Machines):
    columns = [column(planned(cluster, name, gpus=gpus)) for gpus in (64, 512) for name in ("siglip", "joint", "flexi")]
    assert table("as fast as the GPUs") == [list(row) for row in zip(*columns, strict=True)]


def test_slower_gpus(cluster: machines.Machines):
    rows = []
    for rate in (1.7e14, 2e14, 3e14, 4e14):
        found = planned(cluster, "flexi", flops_per_second=rate)
        seconds = found.computing / load("flexi").n_steps
        each = found.needs["CPUs that read, for each worker"]
        rows.append(
            [f"{seconds:.2f}", rounded(found.taken), f"{each:.1f}", f"{found.needs['GB/s into each machine']:.1f}"]
        )
    assert table("FLOPs a second of a GPU") == rows


def test_what_helps_against_the_transfer(cluster: machines.Machines):
    @cache
    def row(*overrides: str, **assumed: float) -> list[str]:
        found = planned(cluster, "flexi", *overrides, **assumed)
        return [
            f"{found.example.store_bytes / 1e3:.0f}",
            f"{found.needs['GB/s into each machine']:.1f}",
            f"{found.needs['CPUs that read, for each worker']:.1f}",
            f"{found.seconds / 3600:.1f}",
        ]

    assert table("flexi.yaml") == [
        row(),
        row(learner_gbits=100),
        row(data_gbits=12.5),
        row(receive_ms=1.5),
        row(receive_threads=4),
        row(*SMALL, receive_threads=4),
        row(*SMALL, learner_gbits=100),
    ]


def test_the_words_between_the_tables(cluster: machines.Machines):
    page = " ".join(PAGE.read_text().split())
    found = planned(cluster, "flexi")
    assert f"{found.example.read_ms + 0.99 * found.example.send_ms:.2f} ms, so {rounded(found.taken)} a second" in page
    assert f"take {found.cpus_needed:.0f} CPUs. The cluster has {found.readers.cpus:.0f} with" in page
    pillow = planned(cluster, "flexi", "data.decoder=pillow").cpus_needed
    assert f"`pillow` takes {pillow:.0f} CPUs, {pillow / 64:.1f} a GPU" in page
    own = found.readers.cpus - 64 * 14
    assert f"{-(-(found.cpus_needed - own) // 14):.0f} data nodes would do" in page
    assert planned(cluster, "flexi", flops_per_second=8e14).limit.startswith("Ray's transfer")
    plan = " ".join((PAGE.parent / "plan.md").read_text().split())
    assert f"train: {training(load('flexi'), cpus=300, urls=ROWS).words()}" in plan


def test_streams_shared_by_learners(cluster: machines.Machines):
    shared = planned(cluster, "flexi", "data.n_streams=16").example.read_ms
    alone = planned(cluster, "flexi").example.read_ms
    assert f"`data.n_streams: 16` {shared / alone:.0f} times" in PAGE.read_text()
