"""The run file and its overrides, as arguments of a command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jest_core.run_file import Run

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", exists=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the run file, such as selection.n_chunks=8; @FILE: those of a YAML file.",
    ),
]
StagesAndRunFile = Annotated[
    list[str] | None, typer.Argument(metavar="STAGE... RUN.yaml", help="Stages, in their order, and the run file.")
]


def load(path: Path, overrides: list[str] | None) -> "Run":
    if not path.is_file():
        raise FileNotFoundError(f"no run file at {path}")
    from jest_core import run_file

    return run_file.load(_text(path), [_override(each) for each in overrides or []], str(path))


def _override(word: str) -> str | dict[str, Any]:
    """`KEY=VALUE` as it is; the mapping in the YAML file of `@FILE`."""
    if not word.startswith("@"):
        return word
    path = Path(word[1:])
    if not path.is_file():
        raise FileNotFoundError(f"--set {word}: no file at {path}")
    from jest_core import run_file

    return run_file.parse(_text(path), str(path))


def _text(path: Path) -> str:
    """Of a YAML file. Raises ValueError where it is too large, or not UTF-8."""
    from jest_core.run_file.yaml_text import MOST_CHARACTERS

    with path.open("rb") as file:
        data = file.read(4 * MOST_CHARACTERS + 1)  # a character has four bytes at most; what is longer is refused
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, at its byte {error.start}: save it as UTF-8") from None
