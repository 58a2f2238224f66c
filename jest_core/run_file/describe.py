"""The parts of a run file -> its reference for people (run-file.md), and a JSON schema for editors.

`python -m jest_core.run_file.describe FOLDER` writes both: `make docs`.
"""

import json
import re
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from jest_core.run_file.explain import on_one_line, parts_of, tag_of
from jest_core.run_file.parts import CIRCUMSTANCE, Part, Unit
from jest_core.run_file.rules import RuleOrBasicFilter
from jest_core.run_file.schema import Run

SCHEMA_FILE, REFERENCE_FILE = "run-file.schema.json", "run-file.md"
_RULES = parts_of(RuleOrBasicFilter)
_RULES_HEADING = "Rules"
_RULES_TEXT = """What `data.rules` and `ingest.rules` list, as `{rule: size, min_side: 200}`. The name of a column is
jest's (`data.columns`) or the shards' own."""
_WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
    "object": "mapping",
    "null": "`null`",
}
# What jest's YAML 1.1 takes for a number or a truth value and editors' YAML 1.2 for text, or the other way round:
# 1e-3, 1_000, yes
_NUMBER = r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)?$"
_INTEGER = r"^[-+]?\d[\d_]*$"
_BOOLEAN = "^([Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF)$"


class _Schema(GenerateJsonSchema):
    """Without titles, which repeat the keys; draft 7, the latest that all editors know."""

    schema_dialect = "http://json-schema.org/draft-07/schema#"

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def tuple_schema(self, schema: Any) -> JsonSchemaValue:
        """Draft 7 has `items` where later ones have prefixItems."""
        found = super().tuple_schema(schema)
        return found | {"items": found.pop("prefixItems")} if "prefixItems" in found else found


class _YamlSchema(_Schema):
    """Accepts numbers and truth values as text too, where versions of YAML differ."""

    def float_schema(self, schema: Any) -> JsonSchemaValue:
        return super().float_schema(schema) | {"type": ["number", "string"], "pattern": _NUMBER}

    def int_schema(self, schema: Any) -> JsonSchemaValue:
        return super().int_schema(schema) | {"type": ["integer", "string"], "pattern": _INTEGER}

    def bool_schema(self, schema: Any) -> JsonSchemaValue:
        return super().bool_schema(schema) | {"type": ["boolean", "string"], "pattern": _BOOLEAN}


def json_schema() -> str:
    """The JSON schema of run files, which accepts what `load` accepts of single values."""
    found = Run.model_json_schema(schema_generator=_YamlSchema)
    head = {"$schema": _Schema.schema_dialect, "title": "Run file of jest"}
    return json.dumps(head | {k: v for k, v in _on_one_line(found).items() if k != "title"}, indent=1) + "\n"


def reference() -> str:
    """The reference of run files as Markdown: the introduction, then each part and each rule with its keys."""
    document = _Document()
    introduction = Path(__file__).with_name("introduction.md").read_text()
    sections = [document.section(*each) for each in _parts()]
    rules = [document.section(f"rule {tag_of(rule)}", rule, None) for rule in _RULES]
    return "\n".join([introduction, *sections, f"## {_RULES_HEADING}\n\n{_RULES_TEXT}\n", *rules])


def main(folder: str) -> None:
    (Path(folder) / REFERENCE_FILE).write_text(reference())
    (Path(folder) / SCHEMA_FILE).write_text(json_schema())


class _Document:
    """Sections that link to each other."""

    def __init__(self) -> None:
        # as values are once they are read, without what stands for another value (`json_schema_input_type`)
        self.schemas = {Run.__name__: Run.model_json_schema(schema_generator=_Schema, mode="serialization")}
        self.schemas |= self.schemas[Run.__name__]["$defs"]
        self.headings = {part.__name__: heading for heading, part, _ in _parts()}

    def section(self, heading: str, part: type[Part], circumstance: bool | None) -> str:
        """A heading, what the part is, and a table of its keys. circumstance: whether all of its keys may change while
        a run goes on; None where that depends on who has the part."""
        rows = [
            self.row(part, key, field, circumstance)
            for key, field in part.model_fields.items()
            if not (part in _RULES and key == "rule")
        ]
        titles = [title for title in (rows[0] if rows else ()) if any(row[title] for row in rows)]
        lines = [titles, ["---"] * len(titles), *([row[title] for title in titles] for row in rows)] if rows else []
        level = "###" if "." in heading or part in _RULES else "##"
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"{level} {heading}\n\n{cleandoc(part.__doc__ or '')}\n" + f"\n{table}" * bool(table)

    def row(self, part: type[Part], key: str, field: FieldInfo, circumstance: bool | None) -> dict[str, str]:
        """Title of a column -> its cell."""
        changes = "yes" if circumstance or CIRCUMSTANCE in field.metadata else "no"
        if changes == "no" and _some_may_change(field):
            changes = "some keys"
        cells = {
            "key": f"`{key}`",
            "type": self.words(self.schemas[part.__name__]["properties"][key]),
            "unit": next((mark.name for mark in field.metadata if isinstance(mark, Unit)), ""),
            "default": "required" if field.is_required() else f"`{on_one_line(field.default)}`",
            "may change": "" if circumstance is None else changes,
            "meaning": " ".join((field.description or "").split()),
            "example": " or ".join(f"`{on_one_line(each)}`" for each in field.examples or []),
        }
        return {title: cell.replace("|", "\\|") for title, cell in cells.items()}

    def words(self, schema: JsonSchemaValue) -> str:
        """A type in plain words."""
        match schema:
            case {"anyOf": choices}:
                return " or ".join(self.words(each) for each in choices)
            case {"oneOf": _}:
                return f"[rule](#{_anchor(_RULES_HEADING)})"
            case {"$ref": path}:
                heading = self.headings[path.rpartition("/")[2]]
                return f"[{heading}](#{_anchor(heading)})"
            case {"enum": values}:
                return ", ".join(f"`{on_one_line(value)}`" for value in values)
            case {"const": value}:
                return f"`{on_one_line(value)}`"
            case {"type": "array", "items": list(items)}:
                return f"list of {len(items)} {self.words(items[0])}s"
            case {"type": "array", "items": items}:
                return f"list of {self.words(items)}"
            case {"type": "object", "additionalProperties": {"type": "string"}}:
                return "mapping of text to text"
        return _WORDS[schema["type"]] + _bounds(schema)


def _parts() -> Iterator[tuple[str, type[Part], bool]]:
    """Each part under the keys that first lead to it, and whether all of it may change while a run goes on."""
    seen = set[type[Part]]()

    def visit(part: type[Part], keys: str, circumstance: bool) -> Iterator[tuple[str, type[Part], bool]]:
        seen.add(part)
        yield keys or "The run", part, circumstance
        for key, field in part.model_fields.items():
            for inside in parts_of(field.annotation):
                if inside not in seen and inside not in _RULES:
                    changes = circumstance or CIRCUMSTANCE in field.metadata
                    yield from visit(inside, f"{keys}.{key}".lstrip("."), changes)

    return visit(Run, "", False)


def _bounds(schema: JsonSchemaValue) -> str:
    if schema["type"] == "integer" and "exclusiveMinimum" in schema:
        schema = schema | {"minimum": schema["exclusiveMinimum"] + 1, "exclusiveMinimum": None}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if schema.get(key) is not None]
    return f" {' and '.join(bounds)}" if bounds else ""


def _some_may_change(field: FieldInfo) -> bool:
    """Whether a key of a part in this field, or of one within it, may change while a run goes on."""
    inside = [each for part in parts_of(field.annotation) if part not in _RULES for each in part.model_fields.values()]
    return any(CIRCUMSTANCE in each.metadata or _some_may_change(each) for each in inside)


def _anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _on_one_line(schema: Any) -> Any:
    """The schema with descriptions whose lines are joined: editors show them as they are."""
    if isinstance(schema, dict):
        joined = {k: " ".join(v.split()) if k == "description" and isinstance(v, str) else v for k, v in schema.items()}
        return {key: _on_one_line(value) for key, value in joined.items()}
    return [_on_one_line(each) for each in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    main(*sys.argv[1:])
