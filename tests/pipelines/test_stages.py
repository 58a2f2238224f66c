"""The table of stages: the commands and the document made from it, and what is refused before the first stage."""

import contextlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from jest_core import run_file
from jest_core.run_file import Run
from pipelines import stages
from pipelines.base import manifests, storage
from pipelines.base.stage_table import STAGES, with_table
from pipelines.commands import app
from pipelines.planning import plan
from pipelines.planning.stage_status import statuses

EVALUATED = "evaluation={sets: [{name: a, shards: s, format: shards, tasks: [retrieval]}]}"


def test_each_stage_is_a_command_with_the_help_of_the_table():
    commands = typer.main.get_command(app).commands
    assert [name for name in commands if name in STAGES] == [*STAGES]
    for name, stage in STAGES.items():
        assert commands[name].help == stage.help


def test_every_stage_has_the_same_signature():
    for stage in STAGES.values():
        first, *options = inspect.signature(stage.load()).parameters.values()
        assert (first.name, first.annotation) in {("run", Run), ("run", "Run")}
        assert all(option.kind is option.KEYWORD_ONLY and option.default is not option.empty for option in options)


def test_importing_the_commands_imports_neither_ray_nor_pytorch():
    code = "import sys, pipelines.commands; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "pyarrow", "pydantic"} & {*out.stdout.split()}


def test_importing_the_stages_does_not_import_pytorch():
    """So that what a run lacks is said at once, and stages that do not compute start in a moment."""
    code = "import sys, pipelines.stages, pipelines.training.train, pipelines.data.catalogue, pipelines.data.ingest; "
    out = subprocess.run(
        [sys.executable, "-c", code + "print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    assert not {"torch", "open_clip", "ray.data"} & {*out.stdout.split()}


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (["catalogue", "evaluates"], [], "evaluates: no such stage; the stages are ingest catalogue"),
        ([], [], "name at least one stage of ingest"),
        (["catalogue", "train", "evaluate"], [], "no `evaluation` part"),
        (["catalogue", "ingest"], [], "no `ingest` part"),
        (["catalogue", "select"], [], "no `subset` part"),
        (["catalogue", "reference-scores"], ["reference=null", "selection.method=uniform"], "no `reference` part"),
    ],
)
def test_a_stage_without_anything_to_do_is_refused_before_the_first_starts(make_run, names, overrides, message):
    run = make_run("joint", *overrides)
    with pytest.raises(ValueError, match=re.escape(message)):
        stages.run_stages(run, names)
    assert not Path(run.path(run.data.catalogue)).exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train"], "`jest train` needs .*/catalogue, .* run `jest catalogue` first"),
        (["catalogue", "train", "reference-scores"], "run `jest reference-scores` first"),
        (["catalogue", "reference-scores", "report"], "run `jest train` first"),
    ],
)
def test_a_stage_without_its_input_is_refused_before_the_first_starts(make_run, names, message):
    run = make_run("joint")
    with pytest.raises(FileNotFoundError, match=message):
        stages.run_stages(run, names)
    assert not Path(run.path(run.data.catalogue)).exists()


def test_plan_lists_which_stages_are_done_and_which_can_run(scored: Run, make_run):
    assert {each.stage.name: each.state for each in statuses(scored)} == {
        "ingest": "not part of this run",
        "catalogue": "done",
        "reference-scores": "done",
        "select": "not part of this run",
        "train": "can run now",
        "evaluate": "not part of this run",
        "report": "after train",
    }
    assert {each.stage.name: each.state for each in statuses(make_run("joint"))}["train"] == "after reference-scores"


def test_a_run_that_is_made_longer_or_gets_a_further_evaluation_set_is_not_done(make_run, tmp_path):
    run = make_run("joint", EVALUATED)
    directory = run.path(run.run_dir)
    manifests.finish(directory, {"stage": "train", "complete": True, "config": run_file.identity(run)})
    storage.write_bytes(f"{directory}/checkpoints/step_00000006.pt", b"")
    storage.write_bytes(f"{directory}/eval_results.jsonl", b'{"step": 6, "key": "a/retrieval"}\n')
    assert STAGES["train"].is_done(run)
    assert STAGES["evaluate"].is_done(run)
    assert not STAGES["train"].is_done(make_run("joint", EVALUATED, "training.examples_trained=384"))
    further = EVALUATED.replace("}]}", "}, {name: b, shards: s, format: shards, tasks: [retrieval]}]}")
    assert not STAGES["evaluate"].is_done(make_run("joint", further))


def test_plan_prints_the_stages(make_run, capsys):
    with contextlib.suppress(ValueError):  # its checks fail
        plan.print_plan(make_run("joint"))
    assert "after reference-scores" in capsys.readouterr().out


def test_the_table_in_the_document_is_up_to_date():
    text = (Path(__file__).parents[2] / "deploy" / "docs" / "stages.md").read_text()
    assert with_table(text) == text, "make docs"
