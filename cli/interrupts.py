"""Ctrl-C: what is told of it, and that it cannot get lost. Imports no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vllmc.core.errors import VllmcError


class Interrupted(VllmcError):
    """Ctrl-C; the exit code is the shells' for SIGINT."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__(
            "interrupted",
            "stopped before the end",
            hint="what was stored is whole; run it again to carry on",
        )


@contextmanager
def remembered_interrupts() -> Iterator[Callable[[], None]]:
    """Yields a check that raises `KeyboardInterrupt` if one was raised in the block and lost.

    Python drops one that is raised within a finalizer or a weak reference's callback, which run
    anywhere, often while compiling. So the block checks between its steps, and once more at its
    end.
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
