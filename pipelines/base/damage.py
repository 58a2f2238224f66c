"""Notes beside damaged parts of a finished directory, which have the stage that made them make them again.

A stage does not read a finished directory of many terabytes to see whether it is whole: who reads a part and finds it
damaged leaves a note, `PART.damaged`, and says which command to run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from . import storage
from .integrity import Damaged

_SUFFIX = ".damaged"


@contextmanager
def noted(part: str, stage: str) -> Iterator[None]:
    """Leave a note beside the part where it turns out to be damaged. Raises Damaged, with the remedy.

    stage: the name on the command line of the one that made it.
    """
    try:
        yield
    except Damaged as error:
        remedy = f"run `jest {stage}` again, which makes {part} again"
        try:
            storage.write_bytes(f"{part}{_SUFFIX}", f"{error}\n".encode())
        except OSError:  # as where the directory may only be read
            remedy = f"remove {part}, and {remedy}"
        raise Damaged(f"{str(error).removesuffix('; replace it')}; {remedy}") from error


@contextmanager
def made_again_by(stage: str) -> Iterator[None]:
    """Raises Damaged, with the remedy, for a file that needs no note: the stage looks at it whenever it runs."""
    try:
        yield
    except Damaged as error:
        raise Damaged(
            f"{str(error).removesuffix('; replace it')}; run `jest {stage}` again, which makes it again"
        ) from error


def whole(directory: str) -> set[str]:
    """Names of the parts in a directory that nobody has found damaged."""
    names = set(storage.names(directory))
    return {name for name in names if name.endswith(".parquet") and f"{name}{_SUFFIX}" not in names}


def remove_note(part: str) -> None:
    """Remove the note, once the part was made again."""
    storage.remove(f"{part}{_SUFFIX}")
