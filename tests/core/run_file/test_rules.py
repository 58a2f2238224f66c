import pytest
from pydantic import TypeAdapter, ValidationError

from jest_core.run_file.rules import BASIC_FILTER, Rule

parse = TypeAdapter(Rule).validate_python


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ({"rule": "score"}, "one of at_least and keep_share"),
        ({"rule": "score", "at_least": 0.3, "keep_share": 0.5, "scores": "s"}, "one of at_least and keep_share"),
        ({"rule": "score", "keep_share": 0.5}, "name it in `scores`"),
        ({"rule": "score", "keep_share": 1.5, "scores": "s"}, "less than or equal to 1"),
        ({"rule": "nonsense"}, "does not match any of the expected tags"),
        ({"rule": "status", "bellow": 1}, "Extra inputs are not permitted"),
    ],
)
def test_invalid_rules_are_refused(rule, why):
    with pytest.raises(ValidationError, match=why):
        parse(rule)


def test_basic_filter_expands_to_valid_rules():
    assert [parse(rule).rule for rule in BASIC_FILTER] == ["language", "caption", "size"]
