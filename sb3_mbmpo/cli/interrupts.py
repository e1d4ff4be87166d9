"""Ctrl-C, and the signals that end a process, as an exception: what is half done is put in order on its way up."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """
    Ends what was running when a signal came.

    :param number: of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.name = "Interrupted" if number == signal.SIGINT else "Terminated"
        self.exit_code = 128 + number  # as shells have it


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """
    The first signal in the block raises ``Interrupted``; what follows it is not disturbed by a second one.

    :return: a context
    """
    if threading.current_thread() is not threading.main_thread():  # which gets no signals
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    # After `nohup`, the end of the terminal is ignored
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
