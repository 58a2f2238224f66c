"""A reference model on its device: blocks of decoded rows -> the columns of the score cache."""

import time
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from jest_core import run_file, tables
from jest_core.models import configurations, folders, scorers, towers
from jest_core.models.flexible import Resolution
from jest_core.models.scorers import Batch
from jest_core.models.towers import Towers
from jest_core.run_file import Reference, Run
from jest_core.selection.learnability import matched_losses
from jest_core.tables import SlotStatus

from ..base import blocks, checkpoints, storage
from ..data.rows import ReadReport
from . import stored_tokens
from .parts import EmbedReport


def load_reference(run: Run, spec: Reference) -> Towers:
    """Build a reference model with the weights of its checkpoint or its pretrained tag, in evaluation mode.

    Raises ValueError where its towers cannot look at reference.score_image_size or score_patch_size.
    """
    towers.refuse_resolution(spec.model, "reference.score_", spec.score_image_size, spec.score_patch_size)
    reference = towers.build(spec.model, seed=0, decoder=run.data.decoder)
    if spec.checkpoint is not None:
        path = checkpoints.file_of(run.path(spec.checkpoint))
        checkpoint = checkpoints.read(path)
        towers.load_weights(reference, checkpoint, path)
        beside = f"{path.rpartition('/')[0]}/{folders.FILE}"
        trained = checkpoint.get("jest", {}).get("open_clip_config")
        if trained is None and storage.exists(beside):
            trained = storage.read_json(beside)
        if trained is not None:
            configurations.refuse_other_pixels(trained, reference.inputs, path, "reference.model.")
    reference.model.eval()
    return reference


def resolution_of(spec: Reference, reference: Towers) -> Resolution:
    """The image and patch size at which the reference looks at images."""
    return reference.resolution(spec.score_image_size, spec.score_patch_size)


class Embedder:
    """Embeds and scores blocks of decoded rows by a reference model on its device.

    run_text, spec_text: the run file, and its Reference in JSON. n_threads: PyTorch's threads in an actor on CPUs, for
    which Ray sets one; default: as many as the process has.
    """

    def __init__(self, run_text: str, spec_text: str, n_threads: int | None = None) -> None:
        run, self.spec = run_file.load(run_text), Reference.model_validate_json(spec_text)
        self.reference = load_reference(run, self.spec)
        if self.spec.gpus_per_actor:
            self.reference.model.cuda()
        elif n_threads is not None:
            torch.set_num_threads(n_threads)
        if self.spec.compile:
            self.reference.compile()
        self.scorers = {s.name: scorers.create(s.scorer, _resolved(run, s.options)) for s in self.spec.scorers}

    def __call__(self, block: pa.Table) -> pa.Table:
        """Columns of tables.score_cache and of EmbedReport, for the rows of one block (data.rows.of_row_group)."""
        return pa.concat_tables(self._columns(part) for part in blocks.runs(block, "unit"))

    def _columns(self, block: pa.Table) -> pa.Table:
        began, started = time.time(), time.perf_counter()
        columns = {name: block[name] for name in ("uid", "row")}
        columns["status"], values = self._embed(block)
        for name, value in values.items():
            columns[name] = blocks.pack_halves(value) if value.ndim > 1 else value
        with_tokens = self.reference.inputs.tokenizer.identity is not None
        if with_tokens:
            columns |= stored_tokens.pack(blocks.unpack(block["tokens"]), block["caption"])
        width = configurations.width(self.reference.name)
        schema = tables.score_cache(width, list(self.scorers), tokens=with_tokens)
        table = pa.table(columns).select(schema.names).cast(schema)
        read = cast(ReadReport, {name: block[name][0].as_py() for name in ReadReport.__annotations__})
        report: EmbedReport = {**read, "embed": time.perf_counter() - started, "began": began}
        return blocks.append_constants(table, report)

    def _embed(self, block: pa.Table) -> tuple[pa.Array, dict[str, NDArray[Any]]]:
        """Status, and embeddings and scores of a block's rows: `damaged` and zeros where the image did not decode, or
        the embeddings are not finite.

        Raises ValueError where they are of no row.
        """
        size = self.reference.view.image_size
        status = np.array(block["status"].to_pylist(), dtype=object)
        ok = np.flatnonzero(status == SlotStatus.OK.label)
        pixels = torch.from_numpy(blocks.unpack(block["pixels"])[ok].reshape(-1, 3, size, size))
        embeddings = self.reference.embed(
            pixels,
            torch.from_numpy(blocks.unpack(block["tokens"])[ok].astype(np.int64)),
            batch_size=self.spec.batch_size,
            resolution=resolution_of(self.spec, self.reference),
            precision=self.spec.precision,
        )
        values = {
            "image_embedding": embeddings.image.half().cpu().numpy(),
            "text_embedding": embeddings.text.half().cpu().numpy(),
            "matched_pair_loss": matched_losses(embeddings, self.reference.loss).float().cpu().numpy(),
            "cosine": (embeddings.image * embeddings.text).sum(1).cpu().numpy(),
        }
        if self.scorers:
            captions = block["caption"].to_pylist()
            batch = Batch(pixels, [captions[i] for i in ok], embeddings.image, embeddings.text)
            values |= {name: scorer(batch) for name, scorer in self.scorers.items()}
        sound = np.isfinite(values["image_embedding"]).all(1) & np.isfinite(values["text_embedding"]).all(1)
        if len(ok) > 1 and not sound.any():
            raise ValueError(
                f"the reference {self.reference.name} gives embeddings that are NaN or infinite: check its weights, or "
                f"choose a reference.precision with more range than {self.spec.precision}"
            )
        status[ok[~sound]] = SlotStatus.DAMAGED.label
        out = {name: np.zeros((len(block), *value.shape[1:]), value.dtype) for name, value in values.items()}
        for name, value in values.items():
            out[name][ok[sound]] = value[sound]
        return pa.array(status, pa.string()), out


def _resolved(run: Run, options: dict[str, Any]) -> dict[str, Any]:
    """A scorer's options, which are the user's, with `path` resolved as every path of the run file is."""
    return options | ({"path": run.path(options["path"])} if "path" in options else {})
