"""tests/mutants.yaml matches the sources and the tests; `make mutants` runs the faults."""

from collections import Counter

from tests import mutants


def test_every_fault_matches_one_line_and_names_existing_tests():
    for mutant in mutants.MUTANTS:
        mutants.place_of(mutant)
        assert mutant.fault != mutant.line
        for test in mutant.tests:
            file, name = test.split("::")
            assert f"\ndef {name}(" in (mutants.ROOT / "tests" / file).read_text(), test
    names = Counter(mutant.name for mutant in mutants.MUTANTS)
    assert max(names.values()) == 1
    assert len(names) >= 25
    assert sum(mutant.fast for mutant in mutants.MUTANTS) >= 15
