"""Ctrl-C, and the signals that end a process, as an exception, so that cleanup code runs before the process ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """
    Raised in the main thread when a signal arrives.

    :param number: number of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.name = "Interrupted" if number == signal.SIGINT else "Terminated"
        self.exit_code = 128 + number  # the convention of shells


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """
    Raise ``Interrupted`` at the first signal in the block, and ignore further ones, so that cleanup is not disturbed.

    :return: a context manager
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    # After `nohup`, SIGHUP stays ignored
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
