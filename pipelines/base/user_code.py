"""Modules of the user that a run file names, such as scorers, for a job on a cluster: what is sent along with it."""

import importlib.machinery
import importlib.util
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from . import progress


def to_send(names: Iterable[str]) -> list[Path]:
    """The files and folders of the top-level modules of `package.module:factory`, as they are imported on this machine,
    the working directory included. A line says what is sent, and what every node has to have by itself: installed
    packages, and what cannot be imported here."""
    sent = []
    for name in sorted({name.partition(":")[0].partition(".")[0] for name in names if ":" in name}):
        code = _code(name)
        if code is None:
            progress.warn("submit", f"the module {name} is not on this machine's path: every node has to have it")
        elif _is_installed(code):
            progress.say("submit", f"the package {name} is installed, so not sent along: every node has to have it")
        else:
            progress.say("submit", f"sends the module {name} along: {code}")
            sent.append(code)
    return sent


def _code(name: str) -> Path | None:
    """The file of a module, or the folder of a package."""
    spec = importlib.util.find_spec(name) or importlib.machinery.PathFinder.find_spec(name, [os.getcwd()])
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    return Path(folders[0] if folders else spec.origin or "").resolve()


def _is_installed(code: Path) -> bool:
    places = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib", "platstdlib")}
    return bool(places & {*code.parents})
