"""YAML text -> keys and values. A key that comes twice, and text that would take minutes or gigabytes, are refused."""

import re
from typing import Any

import yaml

# Of a run file: LAION-5B's 231,350 shards, written out, have 8 million. PyYAML reads a million in some seconds
MOST_CHARACTERS = 32 << 20
_MOST_VALUES = 100_000  # with those that an alias repeats; more where the text has as many characters
_GLOBS = "name many shards by a glob or a brace range"
_INTEGER, _DATE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """Values as YAML 1.2 has them where YAML 1.1 surprises: 0123 is not octal, 1:30 not sexagesimal, a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        letter: [(tag, pattern) for tag, pattern in each if tag not in (_INTEGER, _DATE)]
        for letter, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Raises ComposerError where a key comes twice: YAML would keep the last one."""
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.composer.ComposerError(
                    "a mapping", node.start_mark, f"has the key {key.value!r} twice: remove one", key.start_mark
                )
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


_Loader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789"))


def read(text: str, source: str) -> Any:
    """The value that a YAML text has. Raises ValueError where it is not YAML, or larger than any run file."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{source} has {len(text):,} characters, and a run file {MOST_CHARACTERS:,} at most: {_GLOBS}")
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError(f"{source} has brackets within brackets, hundreds deep: remove them") from None
    except Exception as error:  # of many types: a number that Python does not read, `!!bool x`, `!!timestamp x`
        raise ValueError(f"{source} is not YAML: {str(error).replace('<unicode string>', source)}") from error
    most = max(_MOST_VALUES, len(text))
    if _count(value, {}) > most:
        raise ValueError(
            f"{source} has more than {most:,} values, with those that an alias such as *name repeats: {_GLOBS}"
        )
    return value


def _count(value: Any, counted: dict[int, int]) -> int:
    """How many values a value has, where each alias counts as what it stands for. counted: of objects, by their id."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) not in counted:
        counted[id(value)] = MOST_CHARACTERS + 1  # should it contain itself
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_count(each, counted) for each in inside)
    return counted[id(value)]
