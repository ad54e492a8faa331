"""Signals to whoever starts a server: the first ends it in order, a second hurries, and none comes in mid-start."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading

from sonovqa.cli import console

HURRY = threading.Event()  # set by a second signal: whoever sends it waits no longer
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, `kill`, a terminal or connection that closed


@contextlib.contextmanager
def stopping_on_signals():
    """Turn `SIGNALS` into an ordinary end with status 0: whoever starts a server stops it so."""

    def stop(number, frame):
        for each in SIGNALS:
            signal.signal(each, lambda number, frame: HURRY.set())
        say("stopping vLLM")
        sys.exit(0)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup ./serve.sh` goes on
            signal.signal(number, stop)
    yield


@contextlib.contextmanager
def held_back():
    """Signals that a handler takes wait until the block is done: none may come between a process and what looks after it.

    Not by a mask (``pthread_sigmask``): what is started in the block would inherit it and could not be stopped.
    """
    if threading.current_thread() is not threading.main_thread():  # no signal is handled here
        yield
        return
    came: list[int] = []
    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def say(line: str) -> None:
    """Print a line if there is still a terminal to write to: after SIGHUP there may be none."""
    with contextlib.suppress(OSError):
        console.print(line, markup=False, soft_wrap=True)
