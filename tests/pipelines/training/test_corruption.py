"""1,000 corrupted variants of real shards: bad rows are counted, or there is one clear error. None hangs, crashes or
loses rows silently."""

import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from jest_core.examples.decode import View
from jest_core.tables import status_labels
from pipelines.data.layouts import open_shard
from tests import layouts

N_VARIANTS = 1000
Outcome = tuple[str, list[str], list[str]]  # the error, if any; uids; the status of each image


def corrupted(data: bytes, rng: np.random.Generator) -> bytes:
    """The data with one random fault, as files get them in practice."""
    out = bytearray(data)
    place, size = int(rng.integers(len(data))), int(rng.integers(1, 4096))
    match rng.integers(8):
        case 0 | 1:  # bits flip
            for i in rng.integers(len(data), size=rng.integers(1, 9)):
                out[i] ^= 1 << int(rng.integers(8))
        case 2:  # cut off
            del out[place:]
        case 3:  # a block of zeros, as after a lost write
            out[place : place + size] = bytes(len(out[place : place + size]))
        case 4:  # bytes from another place of the file
            other = int(rng.integers(len(data)))
            out[place : place + size] = data[other : other + size]
        case 5:  # bytes missing
            del out[place : place + size]
        case 6:  # random bytes inserted
            out[place:place] = rng.bytes(size)
        case 7:  # the end, where Parquet keeps its footer and tar its mark
            i = len(out) - 1 - int(rng.integers(min(2048, len(out))))
            out[i] ^= 1 << int(rng.integers(8))
    return bytes(out)


def read(path: str) -> Outcome:
    """All that jest reads of a shard."""
    view = View(16)
    uids: list[str] = []
    status: list[str] = []
    try:
        shard = open_shard(path)
        for group in range(len(shard.row_group_sizes)):
            uids += shard.uids(group)
            assert len(shard.captions(group)) == len(shard.strings(group, "nsfw"))
            status += status_labels(view.batch(shard.images(group).to_pylist())[1])
    except ValueError as error:
        return f"{error}", uids, status
    return "", uids, status


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[Path]:
    root, pairs = tmp_path_factory.mktemp("originals"), layouts.make_pairs()
    folders = [
        layouts.webdataset_tar(root / "tar", pairs),
        layouts.hugging_face(root / "hugging-face", pairs),
        layouts.webli(root / "webli", pairs),
    ]
    return [sorted(folder.iterdir())[0] for folder in folders]


@pytest.mark.slow
def test_corrupted_shards_raise_one_error_or_count_bad_rows(originals, tmp_path):
    whole = {path: read(str(path)) for path in originals}
    assert all(not problem and set(status) == {"ok"} for problem, _, status in whole.values())
    outcomes: Counter[str] = Counter()
    # in another process, so that the test survives a crash of a decoder and can time out a hang
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for number in range(N_VARIANTS):
            original = originals[number % len(originals)]
            rng = np.random.default_rng(number)
            path = tmp_path / f"{number}{original.suffix}"
            path.write_bytes(corrupted(original.read_bytes(), rng))
            problem, uids, status = pool.submit(read, str(path)).result(timeout=60)
            path.unlink()
            if problem:
                assert path.name in problem, problem
                assert len(problem) < 2000
                outcomes["one clear error"] += 1
                continue
            assert len(status) == len(uids) == len(whole[original][1]), f"variant {number} lost rows silently"
            bad = sum(s != "ok" for s in status)
            outcomes["bad rows counted" if bad else "no visible effect"] += 1
    print(dict(outcomes))
    assert outcomes["one clear error"] > 0.2 * N_VARIANTS
    assert outcomes["bad rows counted"] > 0.1 * N_VARIANTS


def test_a_file_of_another_format_is_named(tmp_path):
    for name in ("a.parquet", "a.tar"):
        path = tmp_path / name
        for content in (b"", b"PAR1", b"hello " * 1000, bytes(20000)):
            path.write_bytes(content)
            if name == "a.tar" and content == bytes(20000):
                continue  # zeros are an empty tar
            with pytest.raises(ValueError, match=name):
                open_shard(str(path))
    shutil.rmtree(tmp_path)
