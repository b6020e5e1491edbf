"""A pool of processes that compile units beside each other, and what becomes of those that die.

Workers are forked from a server process (`server`), which is started as soon as something will
have to be compiled, so that it imports and warms up what compiling needs while this process
captures. Each unit has a worker of its own. Linux only.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, TypeAlias

from vllmc.core.spec import CompileSpec
from vllmc.core.workers.frames import (
    Answer,
    Declined,
    Exited,
    Failed,
    Incoming,
    News,
    Order,
    Ready,
    Started,
    write,
)
from vllmc.core.workers.processes import group_memory, kill_group, worker_limit

_LOOK_SECONDS: Final = 0.25
_END_SECONDS: Final = 5
_NUMBER_BYTES: Final = 8
_SCRIPT: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from vllmc.core.workers.server import main; main(int(sys.argv[1]))"
)


@dataclass(frozen=True, slots=True)
class Begun:
    """A worker has begun with a unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """A worker ended without an answer; `last` if its unit is not tried again."""

    cause: str
    last: bool


Event: TypeAlias = Begun | Answer | Died


@dataclass(slots=True, kw_only=True)
class _Running:
    index: int
    channel: socket.socket
    incoming: Incoming = field(default_factory=Incoming)
    pid: int | None = None
    closed: bool = False
    cause: str | None = None


class WorkerPool:
    """Up to `jobs` workers at once, each with `memory` bytes for itself and its C++ compilers.

    A context manager: at its end no process is left. Not for several threads.
    """

    def __init__(self, jobs: int, *, memory: int | None = None) -> None:
        self.jobs = jobs
        self._memory = memory or worker_limit(jobs)
        self._numbers = itertools.count()
        self._server: _Server | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()

    def prepare(self, spec: CompileSpec) -> None:
        """Starts what workers are made from, if it does not run; returns at once."""
        if self._server is None:
            self._server = _Server(spec)

    def run(
        self, orders: Sequence[Order], claim: Callable[[int], bool]
    ) -> Generator[tuple[int, Event], None, None]:
        """Has all orders carried out; yields what happens, with the index of the order.

        `claim` is asked before an order is begun: what it refuses is left out. After a unit that
        failed no other is begun; those at work come to their end. A unit whose worker died is tried
        once more, when no other is at work.
        """
        return _Run(self, orders, claim).events()


class _Server:
    """The process that makes workers."""

    def __init__(self, spec: CompileSpec) -> None:
        self.ready = False
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Of its own session, so that Ctrl-C is for this process alone.
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SCRIPT, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # What a compiler prints is no data of ours.
                stdout=2,
                start_new_session=True,
            )
        self.control.send(pickle.dumps(spec))

    def ask(self, number: int) -> socket.socket | None:
        """Asks for a worker; its channel, or None where the server is gone."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                data = number.to_bytes(_NUMBER_BYTES, "big")
                socket.send_fds(self.control, [data], [theirs.fileno()])
            except OSError:
                ours.close()
                return None
        return ours

    def news(self) -> News | None:
        """What it tells next; None at its end."""
        try:
            data = self.control.recv(4096)
        except ConnectionError:
            return None
        return pickle.loads(data) if data else None

    def close(self) -> int:
        """Ends it, and it its workers; returns its exit status."""
        self.control.close()
        if not self.ready:
            # It would notice only once it is up, and has no workers yet. A compiler that is asked
            # to end leaves no half of a header.
            kill_group(self._process.pid, signal.SIGTERM)
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            kill_group(self._process.pid)
            return self._process.wait()


class _Run:
    """The units of one call of `run`: waiting, at work, and to be tried again."""

    def __init__(
        self, pool: WorkerPool, orders: Sequence[Order], claim: Callable[[int], bool]
    ) -> None:
        self._pool = pool
        self._orders = orders
        self._claim = claim
        self._waiting = deque(range(len(orders)))
        self._again: deque[int] = deque()
        self._dead: set[int] = set()
        self._running: dict[int, _Running] = {}
        self._looked = time.monotonic()

    def events(self) -> Generator[tuple[int, Event], None, None]:
        try:
            while self._waiting or self._again or self._running:
                self._start()
                if self._running:
                    yield from self._listen()
                    self._watch_memory()
        finally:
            for running in self._running.values():
                running.channel.close()
                if running.pid is not None:
                    kill_group(running.pid)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._pool.jobs:
            if self._claim(index := self._waiting.popleft()):
                self._ask(index)
        if not self._running and self._again:
            self._ask(self._again.popleft())

    def _ask(self, index: int) -> None:
        number = next(self._pool._numbers)
        self._pool.prepare(self._orders[index].spec)
        server = self._pool._server
        assert server is not None
        channel = server.ask(number)
        if channel is None:
            # `_listen` hears of the server's end, and what became of it.
            channel, theirs = socket.socketpair()
            theirs.close()
        self._running[number] = _Running(index=index, channel=channel)

    def _listen(self) -> Iterator[tuple[int, Event]]:
        server = self._pool._server
        assert server is not None
        channels = {r.channel: number for number, r in self._running.items() if not r.closed}
        readable, _, _ = select.select([server.control, *channels], [], [], _LOOK_SECONDS)
        for channel in readable:
            if channel in channels:
                yield from self._answered(channels[channel])
        if server.control in readable:
            yield from self._told(server)

    def _answered(self, number: int) -> Iterator[tuple[int, Event]]:
        running = self._running[number]
        # Where nothing came, the server tells how it ended.
        running.closed = not running.incoming.read(running.channel)
        for answer in running.incoming.messages():
            yield from self._finish(number, answer)

    def _told(self, server: _Server) -> Iterator[tuple[int, Event]]:
        match server.news():
            case Ready():
                server.ready = True
            case Started(order=number, pid=pid):
                if (running := self._running.get(number)) is None:
                    kill_group(pid)
                    return
                running.pid = pid
                # One that died at once is told of by the server.
                with contextlib.suppress(OSError):
                    write(running.channel, self._orders[running.index])
                yield running.index, Begun()
            case Exited(order=number, status=status):
                # What it wrote before it ended counts.
                while number in self._running and not self._running[number].closed:
                    yield from self._answered(number)
                if number in self._running:
                    yield from self._died(number, _in_words(status))
            case None:
                yield from self._server_ended(server)

    def _server_ended(self, server: _Server) -> Iterator[tuple[int, Event]]:
        status = server.close()
        self._pool._server = None
        for number, running in tuple(self._running.items()):
            if running.pid is not None:
                kill_group(running.pid)
            if server.ready:
                yield from self._died(number, "the process that makes workers was killed")
                continue
            # It would not start the next time either.
            reason = f"workers do not start (exit status {status})"
            yield from self._finish(number, Declined(reason=reason))
        if not server.ready:
            for index in (*self._waiting, *self._again):
                yield index, Declined(reason="workers do not start")
            self._waiting.clear()
            self._again.clear()

    def _finish(self, number: int, answer: Answer) -> Iterator[tuple[int, Event]]:
        running = self._running.pop(number)
        running.channel.close()
        if isinstance(answer, Failed):
            self._waiting.clear()
            self._again.clear()
        yield running.index, answer

    def _died(self, number: int, cause: str) -> Iterator[tuple[int, Event]]:
        running = self._running.pop(number)
        running.channel.close()
        last = running.index in self._dead
        self._dead.add(running.index)
        if last:
            self._again.clear()
        else:
            self._again.append(running.index)
        yield running.index, Died(cause=running.cause or cause, last=last)

    def _watch_memory(self) -> None:
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        taken = group_memory()
        for running in self._running.values():
            if running.pid is not None and taken.get(running.pid, 0) > self._pool._memory:
                running.cause = f"it took more than {self._pool._memory >> 20} MB of memory"
                kill_group(running.pid)


def _in_words(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"it was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"it ended with exit code {os.waitstatus_to_exitcode(status)}"
