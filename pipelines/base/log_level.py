"""How much a command prints: the option --log-level, or JEST_LOG_LEVEL, which the processes of Ray inherit."""

import os
from enum import StrEnum


class LogLevel(StrEnum):
    """From most to least."""

    debug = "debug"  # also the messages of Ray and the output of its workers
    info = "info"  # what each stage does
    warning = "warning"  # what may be wrong
    error = "error"  # what ends the command


def shows(level: LogLevel) -> bool:
    """Whether messages of this level are printed. Raises ValueError where JEST_LOG_LEVEL is none of the levels."""
    order = [*LogLevel]
    name = (os.environ.get("JEST_LOG_LEVEL") or LogLevel.info).lower()
    if name not in order:
        raise ValueError(f"JEST_LOG_LEVEL is {name}: set it to {', '.join(order)}")
    return order.index(level) >= order.index(LogLevel(name))
