"""The process of one piece: python -m deploy.gpu.piece MODULE RESULTS SCRATCH SECONDS DEVICE [small]

It ends with status 1 where a check or a part of the piece failed; the measurements before stay.
"""

import faulthandler
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

from deploy.gpu.results import Results


def main(module: str, path: str, scratch: str, limit: str, device: str, size: str = "") -> None:
    faulthandler.enable()
    name, deadline = module.rsplit(".", 1)[-1], time.monotonic() + float(limit)
    results = Results(name, Path(path), Path(scratch), device, size == "small", deadline)
    try:
        found = importlib.import_module(module)
        # before the kernels are imported, and after what a piece imports from tests, which sets it too
        os.environ["TRITON_INTERPRET"] = "0" if results.cuda else "1"
        found.run(results)
    except Exception:
        results.failed = True
        results.row(name, error=traceback.format_exc())
    sys.exit(results.failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
