"""The next step is put together while the last one is trained on: a thread that is one step ahead.

Unpickling, joining and pinning a batch would else stand between two steps of the trainer.
Not here: what a step is (`exact`).
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
# A thread that still waits for its data when nobody wants them is left behind after so long.
PATIENCE_SECONDS = 5.0


def one_ahead(made: Iterator[T], begin: Callable[[], object] = lambda: None) -> Iterator[T]:
    """Yield what an iterator yields, each made while its predecessor is used.

    Never more than one is made ahead. What the iterator raises is raised in its place.

    Args:
        made: used in one thread only, which is not the caller's.
        begin: called once in that thread, before all.
    """
    wanted = threading.Semaphore(0)
    over = threading.Event()
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            begin()
            while wanted.acquire() and not over.is_set():
                box.put((next(made), None))
        except BaseException as error:  # raised where it is waited for
            box.put((None, error))

    # A daemon: a process that ends does not wait for a disk that hangs.
    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        wanted.release()
        while True:
            value, error = box.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            wanted.release()
            yield value  # type: ignore[misc]
    finally:
        over.set()
        wanted.release()
        thread.join(PATIENCE_SECONDS)
