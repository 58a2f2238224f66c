"""Imported by multiprocessing's fork server, from which `run_learners` forks each learner: it imports the tests of
learners, with jaxtyping's checks of shapes, and makes two steps, so that no learner repeats that."""

import gc
import os
from contextlib import suppress

gc.disable()  # as Python's documentation has it for what forks: learners share what is there, and look at none of it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # learners are on the CPU; where there is a GPU, autograd survives no fork

import torch  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

torch.set_num_threads(1)  # before there are more: threads do not survive a fork
with install_import_hook("jest_core", "beartype.beartype"):
    from tests.core import test_losses  # noqa: F401
    from tests.core.models import test_sharding  # noqa: F401
    from tests.core.selection import test_algorithm, test_consensus  # noqa: F401
    from tests.core.training import test_step

    with suppress(Exception):  # the tests say what is wrong
        test_step.two_steps(0, 1, None, [0, test_step.B], [])
gc.freeze()
gc.enable()
