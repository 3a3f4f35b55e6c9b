"""The first signal is a request, the second one ends."""

from __future__ import annotations

import signal

import pytest

from lorakeet.train.interrupt import Interrupt, terminable


def test_first_asks_second_ends_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), Interrupt() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "Ctrl-C"
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_first_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with Interrupt():
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.strip() == "Ctrl-C: stops after the current step or evaluation. Ctrl-C again stops at once."
    with Interrupt() as stop:
        stop.quiet = True  # one of several processes
        signal.raise_signal(signal.SIGINT)
    assert stop.requested == "Ctrl-C" and capfd.readouterr().err == ""


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


def test_outside_of_training_the_first_sigterm_ends_as_ctrl_c_does_and_the_second_as_the_system_has_it() -> None:
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), terminable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_who_heeds_sigterm_already_goes_on_doing_so() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with terminable():
            signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_in_training_ends_the_process_at_once_also_there(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr("lorakeet.train.interrupt.signal.raise_signal", lambda number: raised.append(signal.getsignal(number)))
    with terminable(), Interrupt() as stop:
        stop._handle(signal.SIGTERM, None)
        assert (stop.requested, raised) == ("SIGTERM", [])
        stop._handle(signal.SIGTERM, None)
    assert raised == [signal.SIG_DFL]


def test_a_closed_terminal_ends_as_ctrl_c_does_and_what_it_sends_twice_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt, match="SIGHUP"), terminable():
            try:
                signal.raise_signal(signal.SIGHUP)
            finally:
                signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with terminable():  # under nohup
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
