"""The process that workers are forked from: `python -c "...main(FD)"`, started by `pool`.

It imports torch and Inductor once, warms them up, and makes a process for each order, which shares
what it has in memory. It has one thread, has never run a parallel region and never touched a GPU,
so that forking it is safe; the process that wants units compiled is never forked. It ends, and
ends its workers, when the socket to that process closes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

import torch

from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.config import applied, vllmc_overrides
from vllmc.core.torch_compat.warm_up import warm_up, write_below
from vllmc.core.workers.frames import Exited, News, Ready, Started, read_one, write
from vllmc.core.workers.processes import kill_group
from vllmc.core.workers.worker import carry_out

ORDER: Final = struct.Struct("!Q")
"""What asks for a worker: the order's number. The worker's socket comes with it."""


@dataclass(slots=True, kw_only=True)
class _Server:
    """`scratch` holds the kernels, which workers share; `workers` maps a process to its order."""

    control: socket.socket
    scratch: Path
    workers: dict[int, int] = field(default_factory=dict)

    def make_worker(self) -> None:
        try:
            data, descriptors, *_ = socket.recv_fds(self.control, ORDER.size, 1)
        except ConnectionError:
            self.end()
        if not data:
            self.end()
        (order,) = ORDER.unpack(data)
        channel = socket.socket(fileno=descriptors[0])
        pid = os.fork()
        if pid == 0:
            self.control.close()
            _work(channel)
        channel.close()
        # Here and in the worker, so that its group is there whoever comes first.
        os.setpgid(pid, pid)
        self.workers[pid] = order
        self.tell(Started(order=order, pid=pid))

    def reap(self) -> None:
        for pid in list(self.workers):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            # Before the process is gone: then its number may be another's.
            kill_group(pid)
            _, status = os.waitpid(pid, 0)
            self.tell(Exited(order=self.workers.pop(pid), status=status))

    def tell(self, news: News) -> None:
        try:
            self.control.send(pickle.dumps(news))
        except OSError:
            self.end()

    def end(self) -> NoReturn:
        for pid in self.workers:
            kill_group(pid)
        # Who waits for the end of this process need not look for others.
        for pid in self.workers:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        shutil.rmtree(self.scratch, ignore_errors=True)
        os._exit(0)


def main(descriptor: int) -> NoReturn:
    """Serves the socket `descriptor`: a spec to warm up for, then numbers with sockets."""
    control = socket.socket(fileno=descriptor)
    # An end that is asked for while the directory is made comes after: else that would stay.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    server = _Server(control=control, scratch=Path(tempfile.mkdtemp(prefix="vllmc-workers-")))
    signal.signal(signal.SIGTERM, lambda *_: server.end())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    spec = pickle.loads(control.recv(1 << 20))
    write_below(server.scratch)
    _warm_up(spec)
    wakes, wake = socket.socketpair()
    for end in (wakes, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    server.tell(Ready())
    while True:
        readable, _, _ = select.select([control, wakes], [], [])
        if control in readable:
            server.make_worker()
        if wakes in readable:
            wakes.recv(4096)
            server.reap()


def _warm_up(spec: CompileSpec) -> None:
    # One thread: a child of a process that ran a parallel region waits forever in its first one.
    torch.set_num_threads(1)
    with applied(vllmc_overrides(spec)):
        warm_up()
    # What is here stays: collecting it in a worker would copy its pages.
    gc.collect()
    gc.freeze()


def _work(channel: socket.socket) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        write(channel, carry_out(read_one(channel)))
        sys.stderr.flush()
        code = 0
    except (EOFError, OSError):
        pass  # Nobody waits for the answer any more.
    finally:
        # Nothing of the server's is to run at this exit.
        os._exit(code)
