"""What `run_learners` forks its processes from: a process that has imported their tests, with the checks of shapes that
`make test` asks pytest for, and has made two steps, so that each of them need not import and build what those need."""

from contextlib import suppress

import torch
from jaxtyping import install_import_hook

with install_import_hook("jest_core", "beartype.beartype"):
    from tests.core import test_losses, test_selection, test_sharding, test_train_step  # noqa: F401

torch.set_num_threads(1)  # before it has more: threads do not survive a fork
with suppress(Exception):  # the tests say what is wrong
    test_train_step.two_steps(0, 1, None, [0, test_train_step.B], [test_sharding.SHARDED])
