"""Embeddings that another tool computed -> score cache: DataComp's .npz and metadata, or clip-retrieval's folder.

Rows are matched by uid, in whichever shards the catalogue has them; a kept row without an embedding is `missing`.
"""

import io
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from jest_core import tables
from jest_core.run_file import Features, Reference, Run
from jest_core.selection import Embeddings
from jest_core.selection.learnability import matched_losses
from jest_core.tables import SlotStatus

from ..base import blocks, cluster, manifests, owner, progress, storage
from ..data.catalogue import Catalogue, held_catalogue
from ..data.shards import clean
from . import calibration, score_cache
from .parts import Fragment, Parts
from .score_cache import STAGE, Config, Manifest

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class Files:
    """Paths of the files that have the image embeddings, the text embeddings and the uids of the same rows."""

    image: str
    text: str
    uids: str


class _Item(TypedDict):
    """A batch of Ray Data: one set of files."""

    files: Sequence[Files]


class _Written(TypedDict):
    """A row of Ray Data: a fragment, or the end of a set of files (`last` is 1, shard and first_row are -1).

    first_row: of the row group, in the shard.
    """

    shard: int
    first_row: int
    path: str
    last: int


@owner.until_return
def import_scores(run: Run, spec: Reference, catalogue: Catalogue) -> Manifest:
    """Write the score cache of the run's catalogue from spec.features; returns the manifest."""
    assert spec.features is not None
    folder = run.path(spec.features.folder)
    sets = find(spec.features, folder)
    width = _array(sets[0].image, f"{spec.features.kind}_img").shape[1]
    listing = [(path, storage.size(path)) for f in sets for path in dict.fromkeys((f.image, f.text, f.uids))]
    config: Config = {
        "catalogue": catalogue.manifest["fingerprint"],
        "model": f"{spec.features.format} {spec.features.kind if spec.features.format == 'datacomp' else ''}".strip(),
        "weights": None,
        "preprocessing": f"embeddings of {folder}, {storage.fingerprint(listing)}",
        "precision": "float16 embeddings",
        "loss": "softmax",
        "logit_scale": spec.features.logit_scale,
        "logit_bias": spec.logit_bias,
        "width": width,
        "scorers": [],
    }
    directory = run.path(spec.scores)
    manifest = manifests.begin(directory, STAGE, config, Manifest)
    todo = score_cache.missing(directory, catalogue)
    if manifest is not None and score_cache.is_whole(directory, todo):
        progress.say(STAGE, f"already at {directory}: {score_cache.summary(manifest)}")
        return manifest
    owner.claim(directory)  # of a finished one too, of which damaged parts are made again
    progress.say(STAGE, f"{len(sets):,} files of {spec.features.format} embeddings, {width} wide, matched by uid")
    cluster.connect()
    # on one machine no more tasks than cores: each is a process that imports PyTorch
    cluster.data_context(cluster.n_cores() if cluster.is_local() else None)
    index = ray.put(_index(catalogue))
    stage = ray.data.from_items(
        [{"files": files} for files in sets], override_num_blocks=min(len(sets), 1000)
    ).map_batches(
        _read,  # type: ignore[arg-type]
        batch_size=1,
        batch_format="numpy",
        fn_args=(index, f"{directory}/fragments/{uuid.uuid4().hex}", spec.features, config),
    )
    fragments: dict[int, list[Fragment]] = defaultdict(list)
    with progress.bar(STAGE, len(sets), "files") as advance:
        for row in stage.iter_rows():
            if row["path"]:
                fragments[row["shard"]].append(Fragment(row["first_row"], row["path"]))
            advance(row["last"])
    parts = Parts(run, directory, config)
    for shard in todo.tolist():
        parts.write(shard, fragments.get(shard, []))
    parts.wait()
    manifest = calibration.finish(run, directory, catalogue, config)
    progress.say(STAGE, score_cache.summary(manifest))
    return manifest


def find(spec: Features, folder: str) -> list[Files]:
    """The files of a folder of embeddings. Raises FileNotFoundError where there are none, or one is missing."""
    if spec.format == "datacomp":
        folder = f"{folder}/metadata" if "metadata" in storage.names(folder) else folder
        stems = [name.removesuffix(".npz") for name in storage.names(folder, ".npz")]
        paths = [tuple(f"{folder}/{stem}.{kind}" for kind in ("npz", "npz", "parquet")) for stem in stems]
    else:
        numbers = [n.removeprefix("img_emb_").removesuffix(".npy") for n in storage.names(f"{folder}/img_emb", ".npy")]
        names = ("img_emb/img_emb_{}.npy", "text_emb/text_emb_{}.npy", "metadata/metadata_{}.parquet")
        paths = [tuple(f"{folder}/{name.format(n)}" for name in names) for n in numbers]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no {spec.format} embeddings: correct reference.features.folder")
    for path in (path for files in paths for path in files):
        if not storage.exists(path):
            raise FileNotFoundError(
                f"there is no {path} beside the other files of these embeddings: copy it there, or correct "
                "reference.features.folder"
            )
    return [Files(*files) for files in paths]


def _array(path: str, name: str) -> NDArray[np.floating[Any]]:
    """The array (n, D) of a .npy file, or the array of that name in a .npz. Raises ValueError where there is none."""
    try:
        loaded = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
        array: NDArray[np.floating[Any]] = loaded if isinstance(loaded, np.ndarray) else loaded[name]
    except (ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"{path} holds no array of embeddings ({error}): replace the file, or correct reference.features"
        ) from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}, and embeddings are floats of shape (n, D): correct"
            " reference.features"
        )
    return array


@dataclass(frozen=True)
class _Index:
    """The place of each kept row of a catalogue, sorted by the upper half of its uid."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]  # of the shard
    group: NDArray[np.int32]  # first row of its row group, in the shard

    def find(self, uids: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Every match, as (index into uids, entry); a uid that several rows have has several matches."""
        high, low = tables.uid_from_hex(uids)
        starts, stops = np.searchsorted(self.high, high, "left"), np.searchsorted(self.high, high, "right")
        which = np.repeat(np.arange(len(uids)), stops - starts)
        entries = np.arange(len(which)) - np.repeat(np.cumsum(stops - starts) - (stops - starts), stops - starts)
        entries += starts[which]
        same = self.low[entries] == low[which]
        return which[same], entries[same]


def _index(catalogue: Catalogue) -> _Index:
    """The index of a catalogue, gathered from tasks that read its parts."""
    n_shards = len(catalogue.shards)
    stage = ray.data.range(n_shards, override_num_blocks=min(n_shards, 1000)).map_batches(
        _kept,  # type: ignore[arg-type]
        batch_size=1,
        fn_args=(catalogue.directory,),
    )
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in _Index.__annotations__}
    for batch in stage.iter_batches(batch_size=None, batch_format="numpy"):
        for name, arrays in columns.items():
            arrays.append(batch[name].copy())
    whole = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    order = np.argsort(whole["high"], kind="stable")
    return _Index(**{name: array[order] for name, array in whole.items()})


@storage.retried
def _kept(batch: dict[str, np.ndarray], directory: str) -> pa.Table:
    """The kept rows of a shard, as columns of `_Index`."""
    catalogue, shard = held_catalogue(directory), int(batch["id"][0])
    columns: dict[str, list[NDArray[Any]]] = {name: [np.empty(0, np.int64)] for name in _Index.__annotations__}
    start = 0
    for number, size in enumerate(catalogue.row_group_sizes(shard)):
        uids, multiplicity = catalogue.place(shard).rows(number)
        rows = np.flatnonzero(multiplicity > 0)
        high, low = tables.uid_from_hex([uids[i] for i in rows])
        here = (high, low, np.full(len(rows), shard), rows + start, np.full(len(rows), start))
        for name, value in zip(columns, here, strict=True):
            columns[name].append(value)
        start += size
    kinds = (np.uint64, np.uint64, np.int32, np.int32, np.int32)
    return pa.table(
        {
            name: np.concatenate([array.astype(k) for array in arrays])
            for (name, arrays), k in zip(columns.items(), kinds, strict=True)
        }
    )


@storage.retried
def _read(batch: _Item, held_index: "ObjectRef[_Index]", session: str, spec: Features, config: Config) -> pa.Table:
    """One set of files -> a fragment for each row group in which the catalogue keeps one of its rows, and a row of
    _Written for each. session: folder of the fragments."""
    files, index = batch["files"][0], ray.get(held_index)
    uids = _uids(files.uids, spec)
    image, text = _array(files.image, f"{spec.kind}_img"), _array(files.text, f"{spec.kind}_txt")
    if not (len(uids) == len(image) == len(text) and image.shape[1] == text.shape[1] == config["width"]):
        raise ValueError(
            f"{files.image}: embeddings of shape {image.shape} and {text.shape} for the {len(uids)} rows of "
            f"{files.uids}, and {config['width']} wide elsewhere: replace the file that differs"
        )
    which, entries = index.find(uids)
    order = np.lexsort((index.row[entries], index.shard[entries]))
    which, entries = which[order], entries[order]
    written: list[_Written] = [{"shard": -1, "first_row": -1, "path": "", "last": 1}]
    keys = np.stack([index.shard[entries], index.group[entries]], 1)
    groups, starts, sizes = np.unique(keys, axis=0, return_index=True, return_counts=True)
    for (shard, group), start, size in zip(groups.tolist(), starts, sizes, strict=True):
        of_group = slice(start, start + size)  # rows are in order, so those of a group follow each other
        table = _fragment(uids, image, text, which[of_group], index.row[entries[of_group]], config)
        path = f"{session}/{shard:05d}-{group:09d}-{uuid.uuid4().hex}.parquet"
        storage.write_table(path, table)
        written.append({"shard": shard, "first_row": group, "path": path, "last": 0})
    return pa.Table.from_pylist(written)


def _uids(path: str, spec: Features) -> list[str]:
    """The uids of a file of metadata."""
    column = "uid" if spec.format == "datacomp" else spec.uid_column
    file = storage.open_parquet(path)
    if column not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {column!r} of uids: name it in reference.features.uid_column")
    return [clean(value) for value in file.read(columns=[column])[column].to_pylist()]


def _fragment(
    uids: list[str],
    image: NDArray[Any],
    text: NDArray[Any],
    which: NDArray[np.int64],
    rows: NDArray[np.int32],
    config: Config,
) -> pa.Table:
    """The score cache's columns of some rows; a row is `damaged` where an embedding is zero or not finite.

    which (k,): their indices into uids, image and text. rows (k,): their numbers in the shard.
    """
    sides = [torch.from_numpy(side[which].astype(np.float32)) for side in (image, text)]
    sound = torch.stack([side.isfinite().all(1) & (side.norm(dim=1) > 0) for side in sides]).all(0)
    unit = [normalize(torch.nan_to_num(side), dim=1) for side in sides]
    embeddings = Embeddings(unit[0], unit[1], config["logit_scale"])
    values = {
        "image_embedding": embeddings.image.half(),
        "text_embedding": embeddings.text.half(),
        "matched_pair_loss": matched_losses(embeddings, "softmax").float(),
        "cosine": (embeddings.image * embeddings.text).sum(1),
    }
    columns = {
        "uid": [uids[i] for i in which],
        "row": rows,
        "status": tables.status_labels(np.where(sound.numpy(), SlotStatus.OK, SlotStatus.DAMAGED)),
    }
    for name, value in values.items():
        masked = torch.where(sound.view(-1, *[1] * (value.ndim - 1)), value, torch.zeros_like(value)).numpy()
        columns[name] = blocks.pack_halves(masked) if masked.ndim > 1 else masked
    return pa.table(columns).cast(tables.score_cache(config["width"]))
