"""The layout of the project: packages are listed in the README and installed, files are short, modules have tests."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "jest_core").rglob("*.py")), *sorted((ROOT / "pipelines").rglob("*.py"))]
METHOD = [path for path in SOURCES if path.is_relative_to(ROOT / "jest_core")]
PACKAGES = sorted({path.parent for path in SOURCES} - {ROOT / "pipelines" / "paper" / "drawings"})
MAX_README_LINES = 150
MAX_LINES, MAX_LINES_OF_A_FUNCTION, MAX_POSITIONAL = 300, 60, 7
# tested by the tests of their users
UNTESTED_ALONE = {"__init__", "choices", "super_batch", "configurations"}
PARTS = "data evaluation ingest model parts paths reference schema selection subset training"
UNTESTED_ALONE |= {f"run_file/{name}" for name in PARTS.split()}  # test_load.py tests the whole run file


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of_readme() -> set[str]:
    block = re.search(r"```text\n(jest_core/.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block, "the README has no tree"
    paths, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
            paths.add(name.rstrip("/"))
        else:
            paths.add(folder + name)
    return paths


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_every_package_is_in_the_readme_and_every_line_of_its_tree_exists():
    listed = tree_of_readme()
    for path in listed:
        assert (ROOT / path).exists(), f"the README lists {path}, which does not exist"
    for package in PACKAGES:
        assert name_of(package) in listed, f"{name_of(package)} is missing from the README's tree"


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_a_package_lists_its_files(package: Path):
    doc = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    listed = set(re.findall(r"^ *(\w+)  +\S", doc, re.MULTILINE))
    there = {path.stem for path in package.glob("*.py")} | {path.name for path in PACKAGES if path.parent == package}
    assert there - {"__init__"} <= listed
    assert listed - {"B", "b", "D", "n", "R", "L", "drawings"} <= there, "it lists modules that do not exist"


def test_an_installed_jest_has_every_package():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {folder: name for name, folder in tools["package-dir"].items()}
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES} | {"deploy"}
    names = {name.partition(".")[0]: installed.get(name.partition(".")[0], name.partition(".")[0]) for name in packages}
    assert sorted(tools["packages"]) == sorted(
        ".".join([names[package.partition(".")[0]], *package.split(".")[1:]]) for package in packages
    )


def test_the_flow_imports_itself_by_relative_imports():
    """An installed jest has the package under the name `jest_pipelines`."""
    for path in SOURCES:
        if path.is_relative_to(ROOT / "pipelines"):
            assert not re.search(r"(?m)^ *(from|import) pipelines\b", path.read_text()), name_of(path)


@pytest.mark.usefixtures("ray_session")
def test_other_packages_named_like_our_folders_are_not_imported(tmp_path):
    """Ray's workers have the current directory first on sys.path."""
    for name in ("pipelines", "deploy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('of another project')")
    run_file = (ROOT / "deploy" / "runs" / "demo-small" / "uniform.yaml").read_text()
    (tmp_path / "run.yaml").write_text(run_file)
    shard = ROOT / "deploy" / "data" / "small" / "pool" / "00000.parquet"
    overrides = ["--set", f"data.shards={shard}", "--set", f"root={tmp_path}"]
    out = subprocess.run(
        [Path(sys.executable).parent / "jest", "catalogue", "run.yaml", *overrides],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr


def test_every_module_of_the_method_has_its_test():
    for path in METHOD:
        folder = path.parent.relative_to(ROOT / "jest_core")
        if not {path.stem, f"{folder}/{path.stem}"} & UNTESTED_ALONE:
            assert (ROOT / "tests" / "core" / folder / f"test_{path.stem}.py").exists(), name_of(path)


def test_only_collectives_communicates():
    for path in METHOD:
        if path.name != "collectives.py":
            calls = re.findall(r"\bdist\.(?!ProcessGroup\b)\w+", path.read_text())
            assert not calls, f"{name_of(path)} calls torch.distributed: {calls}"


def test_no_machine_paths_or_index_hosts_are_committed():
    pattern = re.compile(r"/work/|/root/|/tmp/w/|--index-url|--extra-index-url")
    for folder in ("jest_core", "pipelines", "deploy", "docker", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".md", ".txt", ".toml", ""} and path.is_file():
                assert not pattern.search(path.read_text()), path


PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_files_and_functions_are_short(path: Path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_LINES_OF_A_FUNCTION, node.name
