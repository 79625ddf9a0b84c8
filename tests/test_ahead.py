"""One step ahead: the same things in the same order, made while the last one is used."""

import threading

import pytest

from training.data.ahead import one_ahead

WAIT = 20.0


def test_all_comes_in_order_and_ends():
    assert list(one_ahead(iter(range(100)))) == list(range(100))
    assert list(one_ahead(iter(()))) == []


def test_the_next_is_made_while_the_last_is_used_and_no_more_than_that():
    made = [threading.Event() for _ in range(4)]

    def things():
        for number, event in enumerate(made):
            event.set()
            yield number

    taken = one_ahead(things())
    assert next(taken) == 0
    assert made[1].wait(WAIT)  # nobody asked for it yet
    assert not made[2].wait(0.05)
    assert next(taken) == 1
    assert made[2].wait(WAIT)
    taken.close()


def test_an_error_comes_where_its_thing_would_have_come():
    def things():
        yield 0
        yield 1
        raise OSError("the disk is gone")

    taken = one_ahead(things())
    assert [next(taken), next(taken)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(taken)
    with pytest.raises(StopIteration):
        next(taken)


def test_it_is_made_in_one_thread_of_its_own_that_ends_with_the_taking():
    seen = []

    def things():
        while True:
            seen.append(threading.current_thread())
            yield 0

    taken = one_ahead(things(), lambda: seen.append(threading.current_thread()))
    for _ in range(3):
        next(taken)
    taken.close()
    assert len(set(seen)) == 1
    assert seen[0] is not threading.current_thread()
    assert not seen[0].is_alive()
