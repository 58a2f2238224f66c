"""Imported by every Python that starts with this folder in PYTHONPATH: writes to the file in JEST_TRACE when the
process began and ended, and how long its slow imports took. It imports only fast modules itself."""

import atexit
import importlib.machinery
import os
import sys
import time

SHOWN = {"torch", "torchvision", "timm", "open_clip", "ray", "ray.data", "ray.train", "pandas", "pydantic", "jest_core"}
SHOWN |= {"pyarrow", "torch._dynamo", "wandb", "pipelines.training.loop", "pipelines.stream.super_batches"}
TRACE = os.environ.get("JEST_TRACE")


def write(what: str) -> None:
    with open(str(TRACE), "a") as file:
        file.write(f"{time.time():.3f} {os.getpid()} {what}\n")


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in SHOWN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def timed(module):
                began = time.time()
                execute(module)
                write(f"imported {name} in {time.time() - began:.2f} s")

            spec.loader.exec_module = timed
        return spec


if TRACE:
    words = [os.path.basename(word) for word in sys.orig_argv[1:] if not word.startswith("-")]
    write(f"starts {' '.join(words[:2])}")
    sys.meta_path.insert(0, Finder)
    atexit.register(write, "ends")
