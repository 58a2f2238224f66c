"""Pictures and classes in the layouts of other tools."""

import json

import pytest

from jest_core.run_file import Pictures
from pipelines.base import storage
from pipelines.evaluation import sets
from tests.pipelines.evaluation.conftest import run_of


def test_imagenets_class_names_are_refused_for_a_part_of_its_synsets(tmp_path):
    for i in range(200):
        (tmp_path / "imagenet-r" / f"n{i:08d}").mkdir(parents=True)
    with pytest.raises(ValueError, match="200 of ImageNet's synsets"):
        sets.classes(run_of(tmp_path), Pictures(format="folder", shards="imagenet-r"))


def test_imagenet_uses_clips_class_names_and_prompts(tmp_path):
    for i in range(1000):
        (tmp_path / "imagenet" / f"n{i:08d}").mkdir(parents=True)
    source = Pictures(format="folder", shards="imagenet")
    classes = sets.classes(run_of(tmp_path), source)
    assert classes.ids[0] == "n00000000"
    assert list(classes.names[:2]) == [["tench"], ["goldfish"]]
    assert len(classes.templates) == 80
    assert classes.prompts()[0] == (0, "a bad photo of a tench.")


def test_a_file_name_in_the_json_cannot_leave_its_folder(tmp_path):
    picture = {"filepath": "..", "filename": "secret.png", "split": "test", "sentences": [{"raw": "x"}]}
    (tmp_path / "captions.json").write_text(json.dumps({"images": [picture]}))
    source = Pictures(format="karpathy", shards="captions.json")
    with pytest.raises(ValueError, match="outside"):
        list(sets.examples(run_of(tmp_path), source))


def test_pictures_are_read_from_object_storage(pictures, s3):
    url = f"{s3}/evaluation"
    for path in (pictures / "wds").rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{url}/wds/{path.relative_to(pictures / 'wds')}", path.read_bytes())
    source = Pictures(format="webdataset", shards="wds")
    near, far = (list(sets.examples(run_of(root), source)) for root in (pictures, url))
    assert [(e.label, e.read()) for e in near] == [(e.label, e.read()) for e in far]
