from typing import get_args

import pytest

from jest_core import choices, run_file


@pytest.mark.parametrize(
    ("words", "table"),
    [
        (choices.Method, choices.METHODS),
        (choices.Criterion, choices.CRITERIA),
        (choices.Loss, choices.LOSSES),
    ],
)
def test_each_word_of_a_choice_has_its_traits(words, table):
    assert set(get_args(words)) == set(table)


def test_the_traits_say_which_models_a_criterion_needs():
    uses = {name: (c.uses_learner, c.uses_reference) for name, c in choices.CRITERIA.items()}
    assert uses == {"learnability": (True, True), "hard": (True, False), "easy": (False, True)}


def test_the_traits_say_how_many_draws_a_method_makes():
    assert {name: (m.selects, m.n_draws(16)) for name, m in choices.METHODS.items()} == {
        "joint": (True, 16),
        "independent": (True, 1),
        "uniform": (False, 1),
    }
    selection = run_file.Selection(method="joint", n_chunks=8)
    assert (selection.selects, selection.n_draws) == (True, 8)
