"""The documents: what their links name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "deploy").rglob("*.md")]


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    prose = re.sub(r"(?ms)^```.*?^```", "", text)
    headings = re.findall(r"(?m)^#+ (.*)$", prose)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_link_names_is_there(document: Path):
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
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "tensor([" in capsys.readouterr().out
