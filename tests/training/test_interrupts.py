"""Signals that stop a run: never in the middle of a step, and each with its exit status."""

import signal
import threading

import pytest

from paligemma_med.training import interrupts


@pytest.fixture
def usual_handlers():
    """Python's own; a shell starts background jobs with SIGINT ignored."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "number, error, status",
    [(signal.SIGINT, KeyboardInterrupt, 130), (signal.SIGTERM, interrupts.Terminated, 143)],
)
def test_a_signal_waits_for_the_end_of_the_step(usual_handlers, number, error, status):
    done = []
    with pytest.raises(error) as caught, interrupts.Signals() as signals:
        with signals.deferred():
            signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # schedulers send it more than once
            done.append(1)
        done.append(2)
    assert done == [1]
    assert getattr(caught.value, "exit_code", 130) == status
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_elsewhere_it_takes_effect_at_once(usual_handlers):
    with interrupts.Signals():
        with pytest.raises(interrupts.Terminated):
            signal.raise_signal(signal.SIGTERM)
        # What is saved then isn't disturbed by another one, unless somebody insists.
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_the_shell_ignores_stays_ignored(usual_handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        with signals.deferred():
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_threads_are_left_alone(usual_handlers):
    found = []

    def run():
        with interrupts.Signals() as signals, signals.deferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
