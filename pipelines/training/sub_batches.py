"""Selected sub-batches for a training loop of one's own: jest draws, logs and resumes; the loop does the rest.

    sub_batches = SubBatches(run, model, optimizer)
    for images, texts in sub_batches:
        ...
        sub_batches.checkpoint()

deploy/own_loop.py is a whole one, for one process and for torchrun.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from jest_core import run_file
from jest_core.choices import LOSSES
from jest_core.collectives import Learners
from jest_core.examples.preprocess import normalise
from jest_core.examples.super_batch import Examples
from jest_core.models import configurations, outlines, towers
from jest_core.models.towers import Towers
from jest_core.run_file import Run
from jest_core.training.draw import Selector, draw

from ..base import checkpoints, cluster, manifests, progress, storage
from ..base.prefetch import prefetch
from ..evaluation import results
from ..stream import super_batches
from ..stream.source import Source, open_source
from . import online_reference, replay, run_directory
from .online_reference import Online
from .selection_log import SelectionLog


class SubBatches:
    """This process's share of each selected sub-batch of a run, from where its newest checkpoint left off.

    model: an open_clip model of the run's configuration (the module itself, not what DistributedDataParallel makes of
    it), which scores with its weights as they are at each step. optimizer: of any kind; its state is checkpointed.
    In a job of torchrun all processes select together. Each starts a Ray of its own to read with, unless RAY_ADDRESS
    names one. The model's weights are the caller's to begin with: training.initial_checkpoint is not read.
    """

    def __init__(self, run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if run.training.low_resolution is not None:
            raise ValueError("training.low_resolution needs `jest train`: a loop of your own trains at one resolution")
        self.run, self.optimizer = run, optimizer
        self.directory = run.path(run.run_dir)
        self.group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.group else (0, 1)
        self.pair = Towers(model, run.model.name, configurations.inputs_of(run.model, run.data.decoder))
        towers.refuse_batch_norm(model)
        outlines.refuse_resolutions(run)
        if run.data.replay is not None:
            replay.refuse(run)
        source = open_source(run)
        if self.rank == 0:
            run_directory.claim(run, "sub-batches")
            storage.write_bytes(f"{self.directory}/run.yaml", run_file.dump(run).encode())
        state = checkpoints.resume(self.directory, self.pair, optimizer)
        self.step = state["step"]  # in the loop, the number of updates with the one that is being made
        refuse_disagreement(Learners(self.group), self.directory, self.step)
        self._reference = online_reference.load(run)
        online_reference.refuse_other(run, state, self._reference)
        self._log = SelectionLog(self.directory, state["log_parts"])
        if self.rank == 0:
            for text in checkpoints.set_aside(self.directory, self.step):
                progress.warn("sub-batches", text)
            self._log.tidy()
            checkpoints.tidy(self.directory)
            results.remove_after(self.directory, self.step)
        decoders = ThreadPoolExecutor(max(1, cluster.n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        self._selector = selector(run, source, self.pair, self.group, decoders, self._reference)
        cluster.connect()
        place = {"rank": self.rank, "n_learners": self.size, "first_step": self.step}
        self._stream = prefetch(stream(run, source, self.pair, **place))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (b / n, 3, H, W) and tokens (b / n, L) of each step, on the model's device; n processes."""
        for super_batch in self._stream:
            drawn = draw(self._selector, super_batch, self.step)
            (group,) = drawn.groups
            pixels = group.examples.pixels.to(self.pair.device)
            images = normalise(pixels, self.pair.inputs.mean, self.pair.inputs.std)
            if self.rank == 0:
                self._log.add(drawn.log)
            self.step += 1
            yield images, group.examples.tokens.to(self.pair.device)

    def checkpoint(self) -> None:
        """Write what was drawn and trained on so far: log, model and optimizer, as open_clip loads it.

        Within the loop, after the update of the step. All processes may call it; the first writes.
        """
        if self.rank == 0:
            content = checkpoints.content(self.step, self.pair, self.optimizer)
            checkpoints.refuse_not_finite(content["state_dict"])
            parts = storage.retried(self._log.commit)(self._log.steps)
            self._log.take()  # only now: a loop that goes on after an error here has them in its next checkpoint
            state: checkpoints.State = {
                "step": self.step,
                "seconds": 0.0,
                "log_parts": parts,
                "open_clip_config": configurations.open_clip_config(self.pair.name, self.pair.inputs),
            }
            if self._reference is not None:
                state["reference"] = self._reference.record
            storage.retried(checkpoints.write)(self.directory, self.step, content | {"jest": state})
            if self.step == self.run.n_steps:
                manifest = {"stage": "sub-batches", "complete": True, "config": run_file.identity(self.run)}
                manifests.finish(self.directory, {**manifest, "steps": self.step})


def refuse_disagreement(learners: Learners, directory: str, step: int) -> None:
    """Raises RuntimeError, on all learners, unless all of them go on after the same step. Collective."""
    if len(set(learners.counts(step))) > 1:
        raise RuntimeError(
            f"{directory}: the learners see different newest checkpoints, as its storage lists old files to some of "
            "them, or gives one of them damaged bytes; start the run again"
        )


def stream(
    run: Run, source: Source, pair: Towers, *, rank: int, n_learners: int, first_step: int
) -> Iterator[Examples]:
    """A learner's share of the super-batches, or of the sub-batches of data.replay."""
    size = pair.view.image_size
    if run.data.replay is not None:
        return replay.stream(run, size, rank=rank, n_learners=n_learners, first_step=first_step)
    return super_batches.stream(run, source, size, rank=rank, n_learners=n_learners, first_step=first_step)


def selector(
    run: Run,
    source: Source,
    pair: Towers,
    group: dist.ProcessGroup | None,
    decoders: Executor,
    online: Online | None,
) -> Selector:
    """What a learner selects with: the reference's cache, or online the reference itself; decoders: threads."""
    reference, prepare_reference, scale_and_bias = None, None, source.scale_and_bias
    if online is not None:
        reference = online.towers
        reference.model.to(device=pair.device, memory_format=torch.channels_last)
        scale_and_bias = _online_scale_and_bias(run, reference)
        if run.data.decode == "late" or not reference.inputs.prepares_as(pair.inputs):
            prepare_reference = partial(super_batches.prepare, inputs=reference.inputs, pool=decoders)
    small = None
    if run.data.decode == "late":
        assert run.selection.score_image_size is not None
        view = pair.view.smaller(run.selection.score_image_size)
        small = partial(super_batches.prepare, inputs=replace(pair.inputs, view=view), pool=decoders)
    prepare = partial(super_batches.prepare, inputs=pair.inputs, pool=decoders)
    return Selector(run, pair, scale_and_bias, prepare, group, reference, prepare_reference, small)


def _online_scale_and_bias(run: Run, reference: Towers) -> tuple[float, float]:
    """The reference's logit scale and bias; of a softmax-trained one reference.logit_bias, if a bias is needed."""
    assert run.reference is not None
    scale, bias = reference.scale_and_bias()
    if LOSSES[run.selection.loss].has_bias and not LOSSES[reference.loss].has_bias:
        if run.reference.logit_bias is None:
            raise ValueError(
                f"the reference {reference.name} has no logit_bias, which selection.loss sigmoid needs: give "
                "reference.logit_bias, or let `jest reference-scores` find one (reference.online: false)"
            )
        bias = run.reference.logit_bias
    return scale, bias
