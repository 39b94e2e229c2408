from __future__ import annotations

import threading

from legion_shm.waits import heard, in_slices
from tests import needs


def test_a_wait_in_slices_ends_with_the_event() -> None:
    event = threading.Event()
    timer = threading.Timer(0.3, event.set)
    timer.start()
    assert in_slices(event.wait, None)
    timer.join()


def test_it_ends_with_its_time() -> None:
    slices: list[float | None] = []

    def wait(timeout_s: float | None) -> bool:
        slices.append(timeout_s)
        return threading.Event().wait(timeout_s)

    assert not in_slices(wait, 0.45)
    assert len(slices) == 3
    assert all(one is not None and one <= 0.2 for one in slices), "Ctrl-C is heard between them"
    assert not in_slices(wait, 0.0)


def test_one_wait_is_enough_where_signals_interrupt_it() -> None:
    asked: list[float | None] = []

    def wait(timeout_s: float | None) -> bool:
        asked.append(timeout_s)
        return True

    assert heard(wait, None)
    assert asked == [0.2 if needs.WINDOWS else None]
