"""A logit_bias for a reference that was trained without one, from a sample of its score cache."""

import numpy as np
import pyarrow.compute as pc
import torch

from jest_core.losses import calibrated_bias
from jest_core.run_file import Run
from jest_core.tables import SlotStatus

from ..base import blocks, progress, storage
from ..data.catalogue import Catalogue
from . import parts, score_cache
from .score_cache import STAGE, Config, Manifest


def finish(run: Run, directory: str, catalogue: Catalogue, config: Config) -> Manifest:
    """Finish a cache whose parts are all there; a model without logit_bias gets the one that fits its pairs best."""
    bias = config["logit_bias"]
    if bias is None:
        bias = calibrated_bias(*sample(directory, catalogue, run.seed), config["logit_scale"])
        progress.say(STAGE, f"{config['model']} has no logit_bias; {bias:.2f} is used, which fits a sigmoid loss best")
    manifest = parts.finish(directory, catalogue, config, bias)
    storage.remove_tree(f"{directory}/fragments")
    return manifest


def sample(directory: str, catalogue: Catalogue, seed: int, n: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings (float32) of up to n pairs, from row groups drawn at random."""
    groups = catalogue.row_groups
    images, texts, n_rows = [], [], 0
    for i in np.random.default_rng(seed).permutation(len(groups)):
        shard, number = groups["shard"][i].as_py(), groups["row_group"][i].as_py()
        columns = ["status", "image_embedding", "text_embedding"]
        place = catalogue.place(shard)
        rows = score_cache.read(directory, place, number, place.rows(number)[0], columns)
        rows = rows.filter(pc.equal(rows["status"], SlotStatus.OK.label))
        images.append(blocks.unpack(rows["image_embedding"]))
        texts.append(blocks.unpack(rows["text_embedding"]))
        n_rows += len(rows)
        if n_rows >= n:
            break
    image, text = (torch.from_numpy(np.concatenate(side)[:n].astype(np.float32)) for side in (images, texts))
    return image, text
