"""The first signal is a request, the second one ends."""

from __future__ import annotations

import signal
import threading

import pytest

from lorakeet.train.interrupt import Interrupt


def test_first_asks_second_ends_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "Ctrl-C"
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_sigterm_goes_to_the_handler_from_before() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with Interrupt() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert (stop.requested, got) == ("SIGTERM", [])
            signal.raise_signal(signal.SIGTERM)
            assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_ask_in_words() -> None:
    seen: list[str] = []

    def work() -> None:
        with Interrupt() as stop:
            stop.request("the stop button")
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["the stop button"]
