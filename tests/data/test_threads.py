"""Work is shared out over threads: each number once, bad images gathered, other errors raised."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastjepa.data.image_errors import BadImage
from fastjepa.data.threads import for_each


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 23])
def test_each_number_is_worked_on_once_and_all_are_done_on_return(count: int, num_threads: int) -> None:
    done: list[int] = []
    with ThreadPoolExecutor(num_threads) as pool:
        assert for_each(done.append, count, pool, num_threads) == {}
        assert sorted(done) == list(range(count))


def test_bad_images_are_returned_in_order_and_the_others_are_still_worked_on() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number % 3 == 1:
            raise BadImage(f"reason {number}")
        done.append(number)

    with ThreadPoolExecutor(2) as pool:
        bad = for_each(work, 11, pool, 2)
    assert list(bad.items()) == [(number, f"reason {number}") for number in (1, 4, 7, 10)]
    assert sorted(done) == [0, 2, 3, 5, 6, 8, 9]


def test_an_error_that_is_no_bad_image_is_raised() -> None:
    def work(number: int) -> None:
        if number == 3:
            raise ZeroDivisionError("at 3")

    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError, match="at 3"):
        for_each(work, 6, pool, 2)


def test_the_work_is_shared_by_all_threads() -> None:
    """Each of two threads waits for the other: with one thread alone this would never end."""
    both = threading.Barrier(2, timeout=60)

    def wait(number: int) -> None:
        both.wait()

    with ThreadPoolExecutor(2) as pool:
        assert for_each(wait, 2, pool, 2) == {}
