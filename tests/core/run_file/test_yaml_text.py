"""What a YAML text is read as, and what is refused."""

import re
import time

import pytest

from jest_core import run_file
from jest_core.run_file import yaml_text
from tests.core.run_file.test_load import TEXT

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0123", 123),
        ("-7", -7),
        ("0x1f", 31),
        ("10_000", 10_000),
        ("1.0e-3", 0.001),
        ("1:30", "1:30"),
        ("2026-11-27", "2026-11-27"),
        ("on", True),
        ("'on'", "on"),
        ("~", None),
        ("a: &a {x: 1}\nb: {<<: *a, x: 2}", {"a": {"x": 1}, "b": {"x": 2}}),
        ("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}", {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}),
    ],
)
def test_values_are_read_as_they_are_meant(text: str, value: object):
    found = yaml_text.read(text, "run.yaml")
    assert found == value or run_file.load(TEXT, [f"seed={text}"]).seed == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT + "seed: 1\n", "has the key 'seed' twice: remove one"),
        ("data: {rules: [{rule: size, rule: status}]}", "has the key 'rule' twice: remove one"),
        (LAUGHS, "more than 100,000 values, with those that an alias such as *name repeats"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("a: &a {b: &b [*a, *b]}", "more than 100,000 values"),
        ("a: " + "[\n " * 500, "brackets within brackets"),
        ("a: " + "{b: " * 500, "brackets within brackets"),
        ("#" * (33 << 20), "a run file 33,554,432 at most: name many shards by a glob"),
        ("a:\n\tb: 1", "found character '\\t'"),
        ("a: \x00", "run.yaml is not YAML: unacceptable character"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("{[1]: 2}: 3", "unhashable key"),
        (f"seed: {'9' * 5_000}", "Exceeds the limit"),
        ("a: [1\nb: 2", 'in "run.yaml", line 2'),
    ],
)
def test_what_is_no_run_file_is_refused_in_a_moment(text: str, message: str):
    before = time.process_time()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run_file.parse(text, "run.yaml")
    assert "run.yaml" in str(error.value)
    assert time.process_time() - before < 5


def test_an_override_that_is_no_yaml_is_named():
    with pytest.raises(ValueError, match=r"--set 'seed=\[1' is not YAML"):
        run_file.load(TEXT, ["seed=[1"])


def test_a_list_of_many_shards_is_read():
    names = [f"pool/{i:05}.parquet" for i in range(2_000)]
    assert run_file.load(TEXT, [{"data": {"shards": names}}]).data.sources == names
    text = TEXT.replace('"pool/*.parquet"', "[" + ", ".join(names) + "]")
    assert run_file.load(text).data.sources == names
