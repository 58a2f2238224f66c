"""Preloaded by multiprocessing's fork server, from which `run_learners` forks each learner.

It imports the tests that run learners, with jaxtyping's shape checks, and trains two steps, so that no learner has to
repeat either.
"""

import gc
import os
from contextlib import suppress

gc.disable()  # as Python's documentation advises before forks: children share these objects without copying them
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # learners run on the CPU: autograd does not survive a fork once CUDA is in use

import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

torch.set_num_threads(1)  # before PyTorch starts more: threads do not survive a fork
with install_import_hook("jest_core", "beartype.beartype"):
    from tests.core import test_losses  # noqa: F401
    from tests.core.models import test_sharding  # noqa: F401
    from tests.core.selection import test_algorithm, test_consensus  # noqa: F401
    from tests.core.training import test_step

    with suppress(Exception):  # the tests themselves report what is wrong
        test_step.two_steps(0, 1, None, [0, test_step.B], [])
gc.freeze()
gc.enable()
