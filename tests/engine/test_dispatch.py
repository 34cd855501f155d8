"""The thread that hands programs over: order, failures, and what is waited for."""

from __future__ import annotations

import threading

import pytest

from jqserve.engine.dispatch import Dispatcher


def test_calls_are_made_in_order_and_beside_the_caller() -> None:
    dispatcher, gate, made = Dispatcher(), threading.Event(), []
    first = dispatcher.submit(lambda: gate.wait(10) and made.append(0))
    rest = [dispatcher.submit(lambda i=i: made.append(i)) for i in range(1, 20)]  # type: ignore[misc]
    assert not made and not first.done(), "the caller waits for nobody"
    gate.set()
    assert [future.result() for future in rest] == [None] * 19
    assert made == list(range(20)) and dispatcher.seconds > 0


def test_a_call_that_fails_says_so_to_whoever_asks_and_stops_nobody() -> None:
    dispatcher = Dispatcher()
    failed, after = dispatcher.submit(lambda: 1 // 0), dispatcher.submit(lambda: "made")
    dispatcher.drain()
    assert after.done() and after.result() == "made"
    with pytest.raises(ZeroDivisionError):
        failed.result()


def test_draining_waits_for_what_was_asked_for() -> None:
    dispatcher, gate = Dispatcher(), threading.Event()
    slow = dispatcher.submit(lambda: gate.wait(10))
    threading.Timer(0.05, gate.set).start()
    dispatcher.drain()
    assert slow.done()
    dispatcher.drain()  # nothing under way
