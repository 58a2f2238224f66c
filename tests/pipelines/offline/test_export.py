"""Exported files, compared with what numpy and pyarrow write by the formats' definitions, and imported again."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jest_core import run_file, tables
from pipelines.base import manifests, storage
from pipelines.data import uid_lists
from pipelines.data.catalogue import open_catalogue
from pipelines.offline import export
from pipelines.scores import reference_scores, score_cache
from pipelines.training import selection_log


def datacomp_subset(uids: list[str]) -> bytes:
    """A subset file as DataComp's scripts write it."""
    array = np.sort(np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8")))
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def kept(run) -> list[str]:
    place = open_catalogue(run.path("catalogue")).place
    groups = [place(shard).rows(group) for shard in range(4) for group in range(3)]
    return [uid for uids, times in groups for uid, n in zip(uids, times, strict=True) for _ in range(n)]


def test_a_catalogue_is_exported_as_a_datacomp_subset_and_as_a_list(scored, tmp_path):
    export.export(scored, "catalogue", str(tmp_path / "kept.npy"))
    assert (tmp_path / "kept.npy").read_bytes() == datacomp_subset(kept(scored))
    export.export(scored, "catalogue", str(tmp_path / "kept.parquet"))
    listed = pq.read_table(tmp_path / "kept.parquet")
    assert listed.schema == pa.schema([("uid", pa.string())])
    assert listed["uid"].to_pylist() == sorted(kept(scored))
    back = uid_lists.from_npy(str(tmp_path / "kept.npy"))
    assert tables.uid_to_hex(*back.T) == sorted(kept(scored))


def test_a_selection_log_is_exported_with_repeats(scored, tmp_path):
    run = run_file.load(run_file.dump(scored), [f"run_dir={tmp_path / 'run'}"])
    uids = [f"{i:032x}" for i in (5, 9, 5, 1 << 100)]
    rows = {name: [0] * 5 for name in tables.SELECTION.names} | {
        "uid": [*uids, f"{7:032x}"],
        "selected": [True] * 4 + [False],
    }
    table = pa.table({f.name: pa.array(rows[f.name]).cast(f.type) for f in tables.SELECTION})
    storage.write_table(f"{run.path(run.run_dir)}/selection/committed.parquet", table)
    storage.write_table(f"{run.path(run.run_dir)}/selection/left-by-a-crash.parquet", table)
    manifests.begin(run.path(run.run_dir), "train", {}, dict)
    from pipelines.base import checkpoints

    with pytest.raises(FileNotFoundError, match="has not come to a checkpoint"):
        export.export(run, "selection", str(tmp_path / "picked.npy"))
    checkpoints.write(run.path(run.run_dir), 1, {"jest": {"log_parts": ["committed.parquet"]}})
    assert len(selection_log.read(run.path(run.run_dir))) == 5
    export.export(run, "selection", str(tmp_path / "picked.npy"))
    assert (tmp_path / "picked.npy").read_bytes() == datacomp_subset(uids)
    export.export(run, "selection", str(tmp_path / "once.npy"), distinct=True)
    assert (tmp_path / "once.npy").read_bytes() == datacomp_subset(sorted(set(uids)))


def test_invalid_exports_are_refused(scored, tmp_path):
    with pytest.raises(ValueError, match=r"ends neither in \.npy"):
        export.export(scored, "catalogue", str(tmp_path / "kept.txt"))
    with pytest.raises(ValueError, match="no `subset` part"):
        export.export(scored, "subset", str(tmp_path / "kept.npy"))
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        export.export(scored, "selection", str(tmp_path / "kept.npy"))


def test_export_files_group_neighbouring_shards_up_to_a_size():
    files = export.plan(np.array([0, 0, 1, 2, 4]), np.array([3, 3, 5, 1, 9]), 10)
    assert [f.tolist() for f in files] == [[0, 1], [2], [4]] or [f.tolist() for f in files] == [[0, 1], [2, 4]]
    assert sorted(np.concatenate(files).tolist()) == [0, 1, 2, 4]


def columns(run) -> dict[str, dict]:
    parts = [storage.open_parquet(score_cache.part_path(run.path(run.reference.scores), i)).read() for i in range(4)]
    rows = [row for part in parts for row in score_cache.with_lists(part).to_pylist()]
    return {row["uid"]: row for row in rows if row["status"] == "ok"}


def imported(run, tmp_path, features: str, *overrides):
    run = run_file.load(
        run_file.dump(run),
        [
            "reference.checkpoint=null",
            f"reference.features={features}",
            f"reference.scores={tmp_path}/imported",
            *overrides,
        ],
    )
    return run, reference_scores.run_stage(run)


def test_a_score_cache_round_trips_through_clip_retrievals_layout(scored, tmp_path):
    export.export(scored, "scores", str(tmp_path / "out"))
    image, text = (np.load(tmp_path / "out" / f"{s}_emb" / f"{s}_emb_0.npy") for s in ("img", "text"))
    metadata = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet")
    assert image.dtype == text.dtype == np.float16
    assert metadata.column_names[:2] == ["image_path", "caption"]
    original = columns(scored)
    assert len(image) == len(text) == len(metadata) == len(original)
    captions = {
        row["uid"]: row["caption"]
        for path in sorted(Path(scored.data.shards).parent.iterdir())
        for row in pq.read_table(path).to_pylist()
    }
    for i, row in enumerate(metadata.to_pylist()):
        assert image[i].tolist() == original[row["uid"]]["image_embedding"]
        assert text[i].tolist() == original[row["uid"]]["text_embedding"]
        assert row["caption"] == captions[row["uid"]]
    run, manifest = imported(scored, tmp_path, f"{{format: clip-retrieval, folder: {tmp_path}/out, logit_scale: 10.0}}")
    assert manifest["counts"] == score_cache.opened(scored.path("scores"))["counts"]
    back = columns(run)
    for uid, row in original.items():
        for name in ("image_embedding", "text_embedding"):
            np.testing.assert_allclose(back[uid][name], row[name], atol=1e-3)
        assert back[uid]["cosine"] == pytest.approx(row["cosine"], abs=2e-3)


def datacomp_features(folder, uids, generator, *, lost=0):
    """Write <stem>.parquet and .npz, in another order than the shards and with uids of no shard; the features by uid.

    lost: the number of uids that get no features.
    """
    folder.mkdir()
    uids = [*uids[lost:], *(f"{i:032x}" for i in range(40))]
    generator.shuffle(uids)
    features_of = {}
    for stem, part in (("aaaa", uids[: len(uids) // 3]), ("bbbb", uids[len(uids) // 3 :])):
        arrays = {
            name: generator.normal(size=(len(part), 512 if name[0] == "b" else 768)).astype(np.float16)
            for name in ("b32_img", "b32_txt", "l14_img", "l14_txt")
        }
        np.savez(folder / f"{stem}.npz", **arrays, dedup=np.zeros(len(part)))
        pq.write_table(
            pa.table({"uid": part, "url": ["u"] * len(part), "text": ["t"] * len(part)}), folder / f"{stem}.parquet"
        )
        features_of |= {uid: {name: array[i] for name, array in arrays.items()} for i, uid in enumerate(part)}
    return features_of


@pytest.mark.parametrize("kind", ["b32", "l14"])
def test_datacomp_features_are_matched_by_uid(scored, tmp_path, kind):
    times = Counter(kept(scored))
    features_of = datacomp_features(tmp_path / "metadata", list(times), np.random.default_rng(0), lost=2)
    features = f"{{format: datacomp, folder: {tmp_path}, kind: {kind}}}"
    with pytest.raises(Exception, match=r"kept rows are bad \(missing \d\), more than data\.max_bad_share 0\.01"):
        imported(scored, tmp_path, features, "data.max_bad_share=0.01")
    run, manifest = imported(scored, tmp_path, features, "data.max_bad_share=0.05")
    assert manifest["config"]["logit_scale"] == 100.0
    assert manifest["logit_bias"] < 0  # calibrated, as CLIP was trained without one
    back = columns(run)
    assert len(back) == len(times) - 2
    for uid, row in back.items():
        for name, side in (("image_embedding", "img"), ("text_embedding", "txt")):
            raw = features_of[uid][f"{kind}_{side}"].astype(np.float32)
            np.testing.assert_allclose(row[name], raw / np.linalg.norm(raw), atol=1e-3)


def test_missing_or_inconsistent_features_are_refused(scored, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no datacomp embeddings"):
        imported(scored, tmp_path, f"{{format: datacomp, folder: {tmp_path}}}")
    (tmp_path / "img_emb").mkdir()
    np.save(tmp_path / "img_emb" / "img_emb_0.npy", np.zeros((3, 4), np.float16))
    clip_retrieval = f"{{format: clip-retrieval, folder: {tmp_path}}}"
    with pytest.raises(FileNotFoundError, match=r"there is no .*text_emb_0\.npy"):
        imported(scored, tmp_path, clip_retrieval)
    for number, width in ((0, 4), (1, 8)):
        for side in ("img", "text"):
            (tmp_path / f"{side}_emb").mkdir(exist_ok=True)
            np.save(tmp_path / f"{side}_emb" / f"{side}_emb_{number}.npy", np.ones((3, width), np.float16))
        (tmp_path / "metadata").mkdir(exist_ok=True)
        uids = pa.table({"uid": [f"{i:032x}" for i in range(3)]})
        pq.write_table(uids, tmp_path / "metadata" / f"metadata_{number}.parquet")
    with pytest.raises(Exception, match=r"img_emb_1\.npy: embeddings of shape \(3, 8\) .* and 4 wide elsewhere"):
        imported(scored, tmp_path, clip_retrieval)
