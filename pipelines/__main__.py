"""`jest`, and `python -m pipelines` in a checkout: runs a command; an error ends it with one clear line."""

import atexit
import gc
import sys

_INTERRUPTED = 130  # typer's exit status after Ctrl-C
_GLOBAL = ("--traceback", "--log-level")  # options that are understood behind the command too


def main() -> None:
    """Run the command line. Exit status after an error: 2 where the same command would fail again, else 1.

    No process of Ray that was started here stays behind."""
    try:
        _run()
    except (KeyboardInterrupt, SystemExit) as ended:  # typer makes the former the latter, once it runs
        if isinstance(ended, KeyboardInterrupt) or ended.code == _INTERRUPTED:
            print("jest: stopped; the same command goes on from what is done", file=sys.stderr)
            sys.exit(_INTERRUPTED)
        raise


def _run() -> None:
    from . import errors
    from .base import cluster
    from .commands import app

    sys.argv[1:] = _global_options_first(sys.argv[1:])
    atexit.register(gc.freeze)  # otherwise the interpreter searches all objects of PyTorch once more before it ends
    with cluster.cleared_up():
        try:
            app()
        except Exception as error:
            sys.exit(errors.report(error))


def _global_options_first(words: list[str]) -> list[str]:
    """The words of a command line with the options of all commands in front, where typer expects them."""
    front: list[str] = []
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*front, *rest, word, *words]
        if word.split("=")[0] not in _GLOBAL:
            rest.append(word)
            continue
        front.append(word)
        if word == "--log-level" and words:
            front.append(words.pop(0))
    return front + rest


if __name__ == "__main__":
    main()
