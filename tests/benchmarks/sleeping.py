"""A stand-in for reading a window, in a module of its own: the workers that run it import nothing large."""

import time
from typing import Any

import pyarrow as pa


def read(item: Any, seconds: float) -> pa.Table:
    time.sleep(seconds)
    return pa.table({"number": [item["number"]]})
