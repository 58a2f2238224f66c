"""What a run does when its learners end: the learners themselves are stood in for by a function, the board is real."""

import threading
import time
from collections.abc import Callable

import pytest
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from jest_core import run_file
from pipelines.base import progress, waiting
from pipelines.training import train
from pipelines.training.attempts import Attempts
from pipelines.training.heartbeat import EVALUATES, WAITS, Board, Order, Progress
from pipelines.training.room import Room
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


def leaves_at_the_last_step(board: Board) -> None:
    board.put(run_file.load(TEXT).n_steps, "")
    board.order(Order.restart)


def leaves_before_the_last_step(board: Board) -> None:
    board.put(run_file.load(TEXT).n_steps - 1, "")
    board.order(Order.restart_at_checkpoint)


def finds_no_room(board: Board) -> None:
    raise ControllerError(WorkerGroupStartupTimeoutError(2))


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
        ([leaves_before_the_last_step, leaves_at_the_last_step], 0),
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


def interrupted(n_learners: str, error: type[BaseException]) -> tuple[int, float]:
    """Raise the error in the thread that waits for learners which fail again and again, as Ctrl-C does; how many
    attempts there were after that, and after how many seconds the last one had ended."""
    run = run_file.load(TEXT, ["training.max_failures=-1", f"training.n_learners={n_learners}"])
    board, over, began, at = Board(in_process=True), threading.Event(), list[int](), list[int]()

    def fit(n: int) -> None:
        began.append(n)
        time.sleep(0.02)
        raise RuntimeError("killed")

    def thread() -> None:
        try:
            Attempts(run, board, fit).run()
        except RuntimeError:
            pass
        finally:
            over.set()

    def look() -> Progress:
        at.append(len(began))
        raise error

    threading.Thread(target=thread, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(error):
        train._wait(over, look, board, threading.Event(), 60)
    assert over.wait(20), "the learners are started again and again"
    return len(began) - at[0], time.monotonic() - start


@pytest.mark.parametrize("error", [KeyboardInterrupt, waiting.NoRoom])
def test_a_command_that_is_interrupted_starts_no_learners_again(error: type[BaseException]):
    assert interrupted("2", error)[0] <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("learners", ["{min: 1, max: 2, wait_minutes: 0}", "{min: 16, max: 32, wait_minutes: 0}"])
def test_a_command_with_a_range_that_is_interrupted_ends_at_once(learners: str):
    more, seconds = interrupted(learners, KeyboardInterrupt)
    assert more <= 1
    assert seconds < 10


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_where_ray_train_finds_no_room_a_range_is_looked_at_again():
    """That is no failure; a number of learners that is fixed waits in Ray Train itself."""
    run = run_file.load(TEXT, ["training.max_failures=0", "training.n_learners={min: 1, max: 2, wait_minutes: 0}"])
    board, ends = Board(in_process=True), [finds_no_room, finds_no_room, comes_to_the_end]
    Attempts(run, board, lambda n: ends.pop(0)(board)).run()
    assert not ends
    assert sum("after all" in text for text in board.get().messages) == 2
    with pytest.raises(ControllerError):
        attempts([finds_no_room], 0)


@pytest.mark.parametrize(
    ("doing", "still", "moves"),
    [
        ({}, 0.0, False),  # none has begun: they may wait for room
        ({0: f"{WAITS} of step 3", 1: "is in step 3"}, 1.0, True),
        ({0: f"{WAITS} of step 3", 1: "is in step 3"}, 60.0, False),  # its readers may wait for room
        ({0: "is in step 0", 1: "is in step 0"}, 3000.0, True),
        ({0: EVALUATES}, 30000.0, True),
    ],
)
def test_learners_move_unless_they_wait_for_data(doing: dict[int, str], still: float, moves: bool):
    assert Progress(doing=doing, still=still).moves == moves


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_that_waits_for_room_as_long_as_it_may_moves():
    before = progress.moved()
    assert Room([64, 128], 0).wait(64, 0, lambda: True, print) == 0
    looks = iter([False, True])
    assert progress.moved() == before
    assert Room([64, 128], 0).wait(64, 60, lambda: next(looks), print) == 0
    assert progress.moved() > before
