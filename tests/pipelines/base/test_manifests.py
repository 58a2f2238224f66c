import json

import pytest

from pipelines.base import manifests, storage
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
    folder, path = str(tmp_path), tmp_path / "manifest.json"
    path.write_text('{"stage": ')
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        manifests.read(folder)
    manifests.finish(folder, finished({"scale": 10}))
    for written, damaged in (("10", "90"), ("true", "false"), ("fingerprint", "fingerprinz"), ("config", "c0nfig")):
        whole = path.read_text()
        path.write_text(whole.replace(written, damaged))
        with pytest.raises(ValueError, match=r"manifest\.json is not as it was written: restore it"):
            manifests.finished(folder, "stage", AnyManifest, "do it")
        path.write_text(whole)
    manifests.finished(folder, "stage", AnyManifest, "do it")
