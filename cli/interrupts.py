"""Ctrl-C that cannot get lost: Python drops a KeyboardInterrupt raised within a finalizer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def remembered_interrupts() -> Iterator[Callable[[], None]]:
    """Yields a check that raises `KeyboardInterrupt` if one was raised in the block and lost.

    A finalizer or a weak reference's callback runs anywhere, often while compiling. What it raises
    is printed and forgotten, so the block checks between its steps, and once more at its end.
    """
    seen: list[int] = []

    def check() -> None:
        if seen:
            raise KeyboardInterrupt

    def interrupt(signum: int, _: object) -> None:
        seen.append(signum)
        raise KeyboardInterrupt

    # Only the main thread gets signals, and a caller's own way to handle them stays.
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
        check()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
