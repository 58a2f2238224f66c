import json
from collections import Counter

import numpy as np
import pytest

from pipelines.base import manifests, storage
from pipelines.base.integrity import Damaged
from pipelines.base.manifests import AnyManifest


def finished(config: dict[str, int], **results: int) -> dict[str, object]:
    return {"stage": "stage", "complete": True, "config": config, **results}


def test_a_directory_of_another_configuration_is_refused_with_the_difference(tmp_path):
    folder = str(tmp_path)
    assert manifests.begin(folder, "stage", {"a": 1, "b": 2}, AnyManifest) is None
    with pytest.raises(ValueError, match="a: there 1, here 3"):
        manifests.begin(folder, "stage", {"a": 3, "b": 2}, AnyManifest)
    with pytest.raises(FileNotFoundError, match=r"no finished stage: do it"):
        manifests.finished(folder, "stage", AnyManifest, "do it")
    manifests.finish(folder, finished({"a": 1, "b": 2}, n=5))
    assert manifests.begin(folder, "stage", {"a": 1, "b": 2}, AnyManifest)["n"] == 5
    with pytest.raises(ValueError, match="'stage'"):
        manifests.begin(folder, "other", {"a": 1, "b": 2}, AnyManifest)


def test_a_manifest_is_written_with_its_fingerprint_last(tmp_path):
    """Byte for byte as in earlier versions: other tools read these files, and derived data refers to fingerprints."""
    whole = manifests.finish(str(tmp_path), finished({"a": 1}, n=5))
    without = {"stage": "stage", "complete": True, "config": {"a": 1}, "n": 5}
    expected = {**without, "fingerprint": storage.fingerprint(without)}
    assert whole == manifests.read(str(tmp_path)) == expected
    assert (tmp_path / "manifest.json").read_text() == json.dumps(expected, indent=1) + "\n"
    assert manifests.is_finished(str(tmp_path))
    assert not manifests.is_finished(f"{tmp_path}/none")


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text('{"stage": ')
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        manifests.read(str(tmp_path))


def test_a_flipped_bit_in_a_manifest_is_refused_or_changes_nothing(tmp_path):
    path = f"{tmp_path}/manifest.json"
    config = {"shards": ["a", "é"], "n_shards": 3, "share": 0.1, "rule": None}
    written = manifests.finish(str(tmp_path), {"stage": "catalogue", "complete": True, "config": config, "n": 12})
    data, rng, counts = storage.read_bytes(path), np.random.default_rng(0), Counter[str]()
    for _ in range(400):
        copy = bytearray(data)
        copy[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        storage.write_bytes(path, bytes(copy))
        try:
            counts["equal" if manifests.read(str(tmp_path)) == written else "differs"] += 1
        except ValueError as error:
            counts["named" if path in str(error) else "not named"] += 1
    assert counts["named"] > 300
    assert counts.keys() <= {"named", "equal"}


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"stage": "x", "config": {}}', '{"complete": true}'])
def test_json_that_is_no_manifest_is_refused(tmp_path, content):
    storage.write_bytes(f"{tmp_path}/manifest.json", content.encode())
    for read in (manifests.read, manifests.is_finished, lambda folder: manifests.begin(folder, "x", {}, AnyManifest)):
        with pytest.raises(
            Damaged, match=r"manifest\.json is damaged, or was changed by hand: restore it, or remove it"
        ):
            read(str(tmp_path))
