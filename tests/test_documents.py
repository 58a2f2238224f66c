"""The documents: their links have targets, their Python runs, and errors that they quote exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jest_core import run_file

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "deploy").rglob("*.md")]
API = ROOT / "deploy" / "docs" / "python.md"
RUN_FILE = "deploy/runs/demo-small/joint.yaml"  # the run of the API's examples


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```", document.read_text())


def fragments(message: str) -> list[str]:
    """The literal parts of an error that a document quotes, without its placeholders (upper-case words and numbers)."""
    parts = re.split(r"\.\.\.|\b[A-Z_]+\b|\d+|['(){}]", message)
    return [part.strip(" :;,") for part in parts if len(part.strip(" :;,")) >= 8]


def needs_a_run(block: str) -> bool:
    return "runs/" in block


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    prose = re.sub(r"(?ms)^```.*?^```", "", text)
    headings = re.findall(r"(?m)^#+ (.*)$", prose)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_link_targets_exist(document: Path):
    prose = re.sub(r"(?ms)^```.*?^```|`[^`]*`", "", document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.is_relative_to(ROOT), target
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_every_document_can_be_reached_from_the_readme():
    reached, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        document = todo.pop()
        reached.add(document)
        for name in re.findall(r"\]\(([^)#\s]+\.md)", document.read_text()):
            path = (document.parent / name).resolve()
            if path not in reached and path.exists():
                todo.append(path)
    assert set((ROOT / "deploy" / "docs").glob("*.md")) <= reached


def test_the_python_of_the_readme_runs(capsys):
    blocks = python_blocks(ROOT / "README.md")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "tensor([" in capsys.readouterr().out


@pytest.mark.parametrize("block", [b for b in python_blocks(API) if not needs_a_run(b)])
def test_the_python_of_the_api_runs(block: str, capsys):
    """It also prints the text block below it, where there is one."""
    exec(compile(block, API.name, "exec"), {})
    below = API.read_text().partition(f"{block}```\n")[2]
    printed = re.match(r"(?s)\n```text\n(.*?)```", below)
    assert not printed or capsys.readouterr().out == printed[1]


def test_the_python_that_reads_a_run_runs(make_scored_run, tmp_path: Path):
    """In a directory with a small run in the place of the examples' run."""
    from pipelines.training import train

    run = make_scored_run("joint")
    root = tmp_path / "place" / "runs" / "demo"
    shutil.copytree(run.path("catalogue"), root / "catalogue")
    shutil.copytree(run.path("scores"), root / "scores" / "pool")
    run = run_file.load(run_file.dump(run), [f"root={root}", "reference.scores=scores/pool"])
    train.run_stage(run)
    file = tmp_path / "place" / RUN_FILE
    file.parent.mkdir(parents=True)
    file.write_text(run_file.dump(run))
    blocks = [block for block in python_blocks(API) if needs_a_run(block)]
    assert blocks
    for block in blocks:
        ran = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path / "place", capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr


def test_the_errors_quoted_in_troubleshooting_exist_in_the_code():
    sources = [path for folder in ("jest_core", "pipelines") for path in (ROOT / folder).rglob("*.py")]
    sources.append(ROOT / "deploy" / "slurm" / "jest.sbatch")
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources)).replace("`", "")
    document = (ROOT / "deploy" / "docs" / "troubleshooting.md").read_text()
    quoted = [m for row in re.findall(r"(?m)^\| (.*?) \|", document) for m in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 30
    for message in quoted:
        for fragment in fragments(message):
            assert fragment in code, message


def test_the_tests_that_show_what_is_promised_exist():
    document = (ROOT / "deploy" / "docs" / "reliability.md").read_text()
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", document)
    assert len(named) > 40
    for path, test in named:
        source = (ROOT / "tests" / path).read_text()
        assert not test or f"def {test}(" in source, f"{path}::{test}"
