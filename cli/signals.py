"""Interrupts: the first cleans up, the second leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class Stopped(BaseException):
    """A signal, as an exception, so that what is half written is removed on the way out.

    Not a KeyboardInterrupt, which libraries catch.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number
        self.word = _WORDS[signal.Signals(number)]


def catch_signals() -> None:
    """From now on, signals raise :class:`Stopped` in the main thread, once."""
    for number in _WORDS:
        # nohup, and a shell that starts a job in the background, ask for these to be ignored
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def leave_on_signals() -> None:
    """From now on, signals end the process at once."""
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    leave_on_signals()
    raise Stopped(number)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # what is left beside the output is removed by the next run to it
    os._exit(128 + number)
