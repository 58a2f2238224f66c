"""First on PYTHONPATH: every process that imports torch has it use deterministic algorithms, where there are any."""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


class _Finder:
    """Of torch alone: its loader has one more thing to do."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "torch" else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_choose(module: Any) -> None:
            load(module)
            module.use_deterministic_algorithms(True, warn_only=True)

        spec.loader.exec_module = load_and_choose  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder)
