"""The export stage: uids that were kept or selected, embeddings, or the model, in the formats of other tools."""

import io
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from numpy.typing import NDArray

from jest_core import run_file
from jest_core.run_file import Run
from jest_core.tables import SlotStatus

from ..base import blocks, checkpoints, cluster, progress, storage
from ..data import uid_lists
from ..data.catalogue import held_catalogue, open_catalogue
from ..scores import score_cache

STAGE = "export"
What = Literal["catalogue", "selection", "subset", "scores", "model"]
_FILE_ROWS = 1_000_000  # of a clip-retrieval file


class _Item(TypedDict):
    """A row of Ray Data: the name of a set of clip-retrieval files, and the numbers of the shards in it."""

    name: str
    shards: list[int]


class _Written(TypedDict):
    """The number of rows that such a set has got."""

    rows: int


def export(run: Run, what: What, output: str, *, distinct: bool = False) -> None:
    """Write uids to a .npy (DataComp's subset file) or a .parquet, embeddings to a folder as clip-retrieval does, or
    the model to a folder that open_clip opens as `local-dir:`.

    what: the kept rows of the catalogue, the committed selection log of the run, what `jest select` selected, the
    score cache, or the newest checkpoint of the run. A uid is listed as often as it was kept or selected; distinct:
    once.
    """
    output = run_file.join("", output)
    if what == "scores":
        _export_scores(run, output)
        return
    if what == "model":
        _export_model(run, output)
        return
    if not output.endswith((".npy", ".parquet")):
        raise ValueError(
            f"{output} ends neither in .npy (a DataComp subset) nor in .parquet (a list of uids): name such a file"
        )
    if what == "subset" and run.subset is None:
        raise ValueError(
            "the run file has no `subset` part, so nothing was selected offline: add one, and `jest select`"
        )
    subset = run.subset.directory if run.subset else ""
    directory = run.path({"catalogue": run.data.catalogue, "selection": run.run_dir, "subset": subset}[what])
    uids = uid_lists.read(directory)
    if distinct:
        uids = np.unique(uids, axis=0)
    if output.endswith(".npy"):
        storage.write_bytes(output, uid_lists.to_npy(uids))
    else:
        storage.write_table(output, uid_lists.to_table(uids))
    progress.say(STAGE, f"{len(uids):,} uids of {directory} to {output}")


def _export_scores(run: Run, output: str) -> None:
    """Write a score cache as clip-retrieval does: files of image embeddings, text embeddings, and metadata by row."""
    if run.reference is None:
        raise ValueError(
            "the run file has no `reference` part, so it has no score cache: add one, with reference.scores"
        )
    directory = run.path(run.reference.scores)
    score_cache.refuse_other(score_cache.opened(directory), open_catalogue(run.path(run.data.catalogue)), directory)
    groups = storage.open_parquet(f"{directory}/row_groups.parquet").read()
    files = plan(groups["shard"].to_numpy().astype(np.int64), groups["ok"].to_numpy(), _FILE_ROWS)
    cluster.connect()
    cluster.data_context()
    digits = int(math.log10(max(1, len(files)))) + 1
    items: list[_Item] = [{"name": f"{i:0{digits}d}", "shards": shards.tolist()} for i, shards in enumerate(files)]
    stage = ray.data.from_items(items, override_num_blocks=len(items)).map(
        partial(_export_file, run_text=run_file.dump(run), output=output)  # type: ignore[arg-type]  # rows are typed here
    )
    n_rows = 0
    with progress.bar(STAGE, len(items), "files") as advance:
        for row in stage.iter_rows():
            n_rows += row["rows"]
            advance(1)
    progress.say(STAGE, f"{n_rows:,} pairs in {len(items):,} files of embeddings to {output}")


def _export_model(run: Run, output: str) -> None:
    """Write the newest checkpoint as a folder that a stock open_clip opens, and evaluates as jest does."""
    import safetensors.torch

    from jest_core.models import configurations, folders, towers

    path = checkpoints.file_of(run.path(run.run_dir))
    pair = towers.build(run.model, seed=0, decoder=run.data.decoder)
    towers.load_weights(pair, checkpoints.read(path), path)
    config = configurations.open_clip_config(pair.name, pair.inputs)
    state = {name: value.contiguous() for name, value in pair.model.state_dict().items()}
    _export_tokenizer(pair.name, config["model_cfg"]["text_cfg"], output)
    storage.write_bytes(f"{output}/open_clip_model.safetensors", safetensors.torch.save(state, {"format": "pt"}))
    storage.write_json(f"{output}/{folders.FILE}", config)
    progress.say(STAGE, f"{path} to {output}, which open_clip opens as {folders.PREFIX}{output}")
    if configurations.needs_jest(pair.name):
        tower = config["model_cfg"]["vision_cfg"]["timm_model_name"]
        progress.warn(STAGE, f"timm has no {tower}: `import jest_core.models.configurations` before open_clip opens it")


def _export_tokenizer(name: str, text: dict[str, Any], output: str) -> None:
    """Write the files of a tokenizer of Hugging Face, which open_clip looks for in the folder; CLIP's needs none."""
    from jest_core.models import configurations

    tokenizer = configurations.open_clip_tokenizer(name, text["context_length"])
    if not text.get("hf_tokenizer_name"):
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in tokenizer.tokenizer.save_pretrained(folder):
            storage.upload(file, f"{output}/{Path(file).name}")


def plan(shards: NDArray[np.int64], ok: NDArray[np.int64], file_rows: int) -> list[NDArray[np.int64]]:
    """The numbers of the shards in each file: consecutive whole shards, of about file_rows embedded rows together.

    shards, ok: for each row group, its shard and its rows with embeddings.
    """
    totals = np.bincount(shards, weights=ok).astype(np.int64)
    numbers = np.flatnonzero(totals)
    file = (np.cumsum(totals[numbers]) - totals[numbers]) // file_rows
    return np.split(numbers, np.flatnonzero(np.diff(file)) + 1) if len(file) else []


@storage.retried
def _export_file(item: _Item, run_text: str, output: str) -> _Written:
    """Write one set of files: image embeddings, text embeddings, metadata."""
    run = run_file.load(run_text)
    assert run.reference is not None
    catalogue = held_catalogue(run.path(run.data.catalogue))
    columns = ["row", "status", "image_embedding", "text_embedding", "cosine"]
    image, text, metadata = [], [], []
    for number in item["shards"]:
        place = catalogue.place(number)
        shard = place.open(run.data.columns)
        for group in range(len(shard.row_group_sizes)):
            uids, _ = place.aligned(shard, group)
            cached = score_cache.read(run.path(run.reference.scores), place, group, uids, columns)
            ok = pc.equal(cached["status"], SlotStatus.OK.label)
            captions = pa.chunked_array([pa.array(shard.captions(group), pa.string())])
            cached = cached.append_column("caption", captions).filter(ok)
            image.append(blocks.unpack(cached["image_embedding"]))
            text.append(blocks.unpack(cached["text_embedding"]))
            paths = [f"{place.path}#{row}" for row in cached["row"].to_pylist()]
            metadata.append(
                pa.table(
                    {
                        "image_path": pa.array(paths, pa.string()),
                        "caption": cached["caption"],
                        "uid": cached["uid"],
                        "similarity": cached["cosine"],
                    }
                )
            )
    name, table = item["name"], pa.concat_tables(metadata)
    storage.write_bytes(f"{output}/img_emb/img_emb_{name}.npy", _npy(np.concatenate(image)))
    storage.write_bytes(f"{output}/text_emb/text_emb_{name}.npy", _npy(np.concatenate(text)))
    storage.write_table(f"{output}/metadata/metadata_{name}.parquet", table)
    return {"rows": len(table)}


def _npy(array: NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()
