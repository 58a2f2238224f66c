"""The command line: one thin function a command. Each imports what it needs when it is called, so that `jest --help`
and the error of a wrong run file come before PyTorch is imported.

app        the application, and the options of all commands
arguments  the run file and its overrides
stages     one command a stage; several of them here, or as a job of a cluster
tools      plan, thresholds, export
paper      demo, reproduce
"""

from . import paper, stages, tools
from .app import app

__all__ = ["app", "paper", "stages", "tools"]
