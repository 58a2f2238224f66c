"""What a run does when its learners end: the learners themselves are stood in for by a function, the board is real."""

from collections.abc import Callable

import pytest

from jest_core import run_file
from pipelines.training.attempts import Attempts
from pipelines.training.heartbeat import Board, Order
from tests.core.run_file.test_load import TEXT

End = Callable[[Board], None]  # how an attempt ends


def comes_to_the_end(board: Board) -> None:
    pass


def fails(board: Board) -> None:
    raise RuntimeError("a learner died")


def leaves_a_drained_node(board: Board) -> None:
    board.order(Order.restart)


def dies_with_a_drained_node(board: Board) -> None:
    board.order(Order.restart)
    fails(board)


def is_stopped(board: Board) -> None:
    board.order(Order.stop)
    board.order(Order.restart)


def would_fail_again(board: Board) -> None:
    board.fail("loss nan")
    fails(board)


def attempts(ends: list[End], max_failures: int = 2) -> tuple[int, Board]:
    """Run attempts that end like this, one after the other; how many there were."""
    run, board, left = run_file.load(TEXT, [f"training.max_failures={max_failures}"]), Board(in_process=True), [*ends]
    Attempts(run, board, lambda n: left.pop(0)(board)).run()
    return len(ends) - len(left), board


@pytest.mark.parametrize(
    ("ends", "max_failures"),
    [
        ([comes_to_the_end], 0),
        ([fails, fails, comes_to_the_end], 2),
        ([fails] * 9 + [comes_to_the_end], -1),
        ([leaves_a_drained_node, dies_with_a_drained_node, comes_to_the_end], 0),
        ([fails, leaves_a_drained_node, fails, dies_with_a_drained_node, comes_to_the_end], 2),
        ([is_stopped], 0),
    ],
)
def test_learners_start_again_until_they_come_to_the_end(ends: list[End], max_failures: int):
    assert attempts(ends, max_failures)[0] == len(ends)


def test_each_restart_is_told_with_its_cause():
    _, board = attempts([fails, dies_with_a_drained_node, comes_to_the_end])
    failed, drained = board.get().messages
    assert "a learner died" in failed
    assert "failure 1 of training.max_failures 2" in failed
    assert "a node with learners was taken away" in drained


@pytest.mark.parametrize(("ends", "max_failures"), [([fails], 0), ([fails, fails, fails], 2), ([would_fail_again], 5)])
def test_they_end_with_the_error_that_is_one_too_many_or_would_come_again(ends: list[End], max_failures: int):
    with pytest.raises(RuntimeError, match="a learner died"):
        attempts(ends, max_failures)


def test_an_order_gives_way_to_those_for_more_and_stop_stays():
    board = Board(in_process=True)
    assert board.order(Order.restart) == Order.restart
    assert board.order(Order.restart_at_checkpoint) == Order.restart
    board.begin()
    assert board.order(Order.go_on) == Order.go_on
    board.order(Order.stop)
    board.begin()
    assert board.order(Order.restart) == Order.stop
