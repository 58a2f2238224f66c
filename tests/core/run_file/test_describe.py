"""The reference of run files and their JSON schema: up to date, complete, and exactly as strict as the loader."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import TypeAdapter

from jest_core import run_file
from jest_core.run_file import describe, rules
from jest_core.run_file.explain import parts_of
from jest_core.run_file.parts import Part
from tests.core.run_file.test_load import TEXT

DOCUMENTS = files("deploy") / "docs"
RUNS = sorted(p for d in Path(str(files("deploy") / "runs")).iterdir() if d.is_dir() for p in d.glob("*.yaml"))
TEXTS = {"type": "string"}


def every_part(part: type[Part] = run_file.Run) -> set[type[Part]]:
    inside = {each for field in part.model_fields.values() for each in parts_of(field.annotation)}
    return {part}.union(*map(every_part, inside)) | set(parts_of(rules.RuleOrBasicFilter))


FIELDS = [(part, name) for part in sorted(every_part(), key=lambda p: p.__name__) for name in part.model_fields]


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft7Validator:
    content = json.loads((DOCUMENTS / describe.SCHEMA_FILE).read_text())
    jsonschema.Draft7Validator.check_schema(content)
    return jsonschema.Draft7Validator(content)


@pytest.mark.parametrize(
    ("name", "generate"), [(describe.REFERENCE_FILE, describe.reference), (describe.SCHEMA_FILE, describe.json_schema)]
)
def test_generated_documents_are_up_to_date(name: str, generate: Any):
    same = (DOCUMENTS / name).read_text() == generate()
    assert same, f"deploy/docs/{name} is not what jest_core/run_file says: run `make docs`"


@pytest.mark.parametrize(("part", "name"), FIELDS, ids=lambda each: getattr(each, "__name__", each))
def test_every_field_has_a_description(part: type[Part], name: str):
    text = part.model_fields[name].description or ""
    assert text[:1].isupper(), f"{part.__name__}.{name} needs a string with sentences under it"
    assert text.endswith("."), f"{part.__name__}.{name}: its description ends in the middle of a sentence"
    assert (part.__doc__ or "") != (Part.__doc__ or ""), f"{part.__name__} needs a docstring"


@pytest.mark.parametrize(("part", "name"), FIELDS, ids=lambda each: getattr(each, "__name__", each))
def test_text_lists_of_text_and_mappings_have_examples(part: type[Part], name: str):
    """Their type alone does not show what a value looks like. Each example must be valid for its field."""
    described = part.model_json_schema(schema_generator=describe._Schema)["properties"][name]
    kinds = described.get("anyOf", [described])
    examples = part.model_fields[name].examples or []
    if any(kind == TEXTS or kind.get("items") == TEXTS or kind.get("type") == "object" for kind in kinds):
        assert examples, f"{part.__name__}.{name} needs Field(examples=[...])"
    for example in examples:
        TypeAdapter(part.model_fields[name].rebuild_annotation()).validate_python(example)


def test_the_reference_has_every_key():
    text = describe.reference()
    for part, name in FIELDS:
        assert f"| `{name}` |" in text or (name == "rule" and part is not run_file.Run)
    for part in parts_of(rules.RuleOrBasicFilter):
        assert f"\n### rule {part.model_fields['rule'].annotation.__args__[0]}\n" in text
    assert "| `keep_checkpoint_every_steps` | whole number ≥ 1 or `null` | steps | `null` | yes | Of the older" in text
    assert "| `filter_ratio` | number ≥ 0 and < 1 | " in text


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_schema_accepts_every_run_file_and_each_names_it(path: Path, schema: jsonschema.Draft7Validator):
    schema.validate(yaml.safe_load(path.read_text()))
    schema.validate(yaml.safe_load(run_file.dump(run_file.load(path.read_text()))))
    first = path.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == Path(str(DOCUMENTS / describe.SCHEMA_FILE))


def test_the_schema_accepts_the_rehearsal_over_a_run_file(schema: jsonschema.Draft7Validator):
    runs = files("deploy") / "runs"
    parts = [runs / "laion2b" / "flexi.yaml", runs / "rehearsal.yaml"]
    schema.validate(run_file.merged(*(yaml.safe_load(path.read_text()) for path in parts)))


@pytest.mark.parametrize(
    "override",
    [
        "data.rules=[{rule: basic_filter}, {rule: deny, file: x}]",
        "ingest={urls: x, shards: pool, resize_mode: no}",
        "ingest={urls: [x, y], shards: pool, resize_mode: 'no'}",
        "training.learning_rate=1e-3",
        "training.learning_rate='1.5E-3'",
        "training.loss_tile=1_024",
        "training.loss_tile='1_024'",
        "training.compile=yes",
        "training.compile='off'",
        "training.gradient_clip=null",
        "model.image_mean=[0.5, 0.5, 0.5]",
        "data.shards=[a, b]",
        "evaluation={sets: [{name: a, shards: x, tasks: [few_shot], few_shot: {pool: {shards: y}}}]}",
    ],
)
def test_the_schema_accepts_what_the_loader_accepts(override: str, schema: jsonschema.Draft7Validator):
    run_file.load(TEXT, [override])
    schema.validate(values(override))


@pytest.mark.parametrize(
    "override",
    [
        "selection.n_chunk=8",
        "secret=x",
        "selection.n_chunks=many",
        "selection.n_chunks=0",
        "selection.filter_ratio=1",
        "selection.method=jont",
        "training.compile=perhaps",
        "training.report_to=[wandbb]",
        "data.rules=[{rule: nonsense}]",
        "data.rules=[{rule: size, min_sid: 3}]",
        "data.rules=[{rule: basic_filter, min_side: 3}]",
        "data.shards=3",
        "data.shards=null",
        "model.image_mean=[0.5, 0.5]",
        "model.image_mean=[a, b, c]",
        "ingest={urls: x, shards: pool, resize_mode: yes}",
        "ingest={urls: x, shards: pool, rules: [{rule: basic_filter}]}",
        "evaluation={sets: []}",
        "reference.scorers=[{name: A, scorer: fasttext}]",
        "training=null",
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(override: str, schema: jsonschema.Draft7Validator):
    with pytest.raises(ValueError, match="run file:"):
        run_file.load(TEXT, [override])
    with pytest.raises(jsonschema.ValidationError):
        schema.validate(values(override))


def values(override: str) -> dict[str, Any]:
    keys, _, value = override.partition("=")
    changes = yaml.safe_load(value)
    for key in reversed(keys.split(".")):
        changes = {key: changes}
    return run_file.merged(run_file.parse(TEXT, "a run file"), changes)
