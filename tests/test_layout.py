"""The README's tree is the architecture: it matches the files, and the method imports no Ray."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tree_of_readme() -> set[str]:
    block = re.search(r"```text\n(jest_core/.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block, "the README has no tree"
    found, folder = set(), ""
    for line in block[1].splitlines():
        name = line.split()[0] if line.split() else ""
        if not line.startswith(" "):
            folder = name
            found.add(name.rstrip("/"))
        elif name:
            found.add(folder + name.rstrip("/"))
    return found


def test_every_module_stands_in_the_tree_and_every_line_exists():
    listed = tree_of_readme()
    for path in listed:
        assert (ROOT / path).exists(), f"the README lists {path}, which does not exist"
    for folder in ("jest_core", "pipelines"):
        for path in (ROOT / folder).iterdir():
            if (path.suffix == ".py" and path.name != "__init__.py") or (path.is_dir() and path.name == "drawings"):
                assert f"{folder}/{path.name}" in listed, f"{folder}/{path.name} is missing from the README's tree"


def test_every_module_of_the_method_has_its_test():
    for path in (ROOT / "jest_core").glob("*.py"):
        if path.stem not in {"__init__", "choices", "examples", "collectives"}:
            assert (ROOT / "tests" / "core" / f"test_{path.stem}.py").exists(), path.name


def test_the_method_imports_no_ray_and_no_pipeline():
    for path in (ROOT / "jest_core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not [n for n in names if n.split(".")[0] in {"ray", "pipelines"}], path.name


def test_only_collectives_communicates():
    for path in (ROOT / "jest_core").glob("*.py"):
        if path.name != "collectives.py":
            calls = re.findall(r"\bdist\.(?!ProcessGroup\b)\w+", path.read_text())
            assert not calls, f"{path.name} calls torch.distributed: {calls}"


def test_no_machine_paths_or_index_hosts_are_committed():
    pattern = re.compile(r"/work/|/root/|/tmp/w/|--index-url|--extra-index-url")
    for folder in ("jest_core", "pipelines", "deploy", "docker", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".md", ".txt", ".toml", ""} and path.is_file():
                assert not pattern.search(path.read_text()), path
