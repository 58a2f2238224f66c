"""A training loop of one's own on sub-batches that jest selects: python own_loop.py RUN.yaml, or by torchrun."""

import os
import sys
from pathlib import Path

import open_clip
import torch
from jest_pipelines.training.sub_batches import SubBatches
from open_clip.loss import SigLipLoss

from jest_core import run_file

run = run_file.load(Path(sys.argv[1]).read_text())
n = int(os.environ.get("WORLD_SIZE", "1"))
if n > 1:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(run.seed)
model = open_clip.create_model(run.model.name)
optimizer = torch.optim.AdamW(model.parameters(), run.training.learning_rate, betas=(0.9, 0.95))
sub_batches = SubBatches(run, model, optimizer)
trained = torch.nn.parallel.DistributedDataParallel(model) if n > 1 else model
loss = SigLipLoss(rank=int(os.environ.get("RANK", "0")), world_size=n)
for images, texts in sub_batches:
    optimizer.zero_grad()
    loss(*trained(images, texts)).backward()
    optimizer.step()
    if sub_batches.step % run.training.checkpoint_every_steps == 0 or sub_batches.step == run.n_steps:
        sub_batches.checkpoint()
