"""Publishes in a process of its own, with a fault at its n-th step, for n = 0, 1, ...

python faulty.py kill|ERRNO ROOT UNIT... PROGRAM

Each n has a fork and the cache `ROOT/<n>` to itself, until one comes to its end without a fault.
A step is a system call that changes something, and either half of every write; a write that fails
has written its first half. Prints what became of each n, one word a line: `killed`, the code of
the error, or `done` where the fault was passed over. Existing caches are taken as they are.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllmc.core.cache.record import ProgramRecord, UnitRecord, decode
from vllmc.core.cache.store import Store
from vllmc.core.errors import VllmcError

CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.utime")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def artifact(unit: UnitRecord) -> bytes:
    """What a unit's artifact is in these tests."""
    return f"artifact {unit.code}".encode()


def waits(who: str) -> None:
    """Fails: no process holds a lease but dead ones."""
    raise AssertionError(f"waits for {who}")


def publish(store: Store, units: Iterable[UnitRecord], program: ProgramRecord) -> None:
    """What `warm` does; a lease that is left over is a failure."""
    units = tuple(units)
    with store.lock(program.key, waits):
        for unit in units:
            with store.lock(unit.key, waits):
                store.put_artifact(artifact(unit))
                store.put_unit(unit)
        # As the pipeline does, but for the note of the use, of which each has its line.
        for unit in units:
            store.retain(unit.artifact, artifact(unit))
        store.put_program(program)


class Steps:
    """Counts steps, and has the fault happen at one of them."""

    def __init__(self, fault: Callable[[], None], at: int) -> None:
        self.happened = False
        self._fault = fault
        self._left = at

    def step(self) -> None:
        """One more."""
        self._left -= 1
        if self._left == -1:
            self.happened = True
            self._fault()

    def watch(self, undone: bool) -> None:
        """Counts from now on; removals only with `undone`: a full disk does not hinder them."""
        changes = CHANGES if undone else CHANGES[:3]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in changes or (event == "open" and arguments[2] & WRITES):
                self.step()

        opened, synced, written = io.open, os.fsync, os.write

        def open_torn(*arguments: Any, **named: Any) -> Any:
            file = opened(*arguments, **named)
            if isinstance(file, io.BufferedWriter):
                return Torn(file.detach(), self)
            return file

        def sync(fd: int) -> None:
            self.step()
            synced(fd)

        def write(fd: int, data: bytes) -> int:
            half = written(fd, data[: len(data) // 2])
            self.step()
            return half + written(fd, data[half:])

        io.open = builtins.open = open_torn  # type: ignore[assignment]
        os.fsync = sync  # type: ignore[assignment]
        os.write = write  # type: ignore[assignment]
        sys.addaudithook(hook)


class Torn(io.BufferedWriter):
    """A file that is written in two halves."""

    def __init__(self, raw: Any, steps: Steps) -> None:
        super().__init__(raw)
        self._steps = steps

    def write(self, data: Any) -> int:
        """Writes one half, then the other."""
        half = super().write(data[: len(data) // 2])
        super().flush()
        self._steps.step()
        half += super().write(data[half:])
        super().flush()
        self._steps.step()
        return half


def main(fault: str, root: Path, *paths: str) -> None:
    """See above."""
    *units, program = (decode(Path(path).read_bytes()) for path in paths)
    number = None if fault == "kill" else getattr(errno, fault)

    def happen() -> None:
        if number is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            raise OSError(number, os.strerror(number))

    for moment in range(10_000):
        told, tell = os.pipe()
        if os.fork() == 0:
            steps = Steps(happen, moment)
            steps.watch(undone=number is None)
            try:
                publish(Store(root / str(moment)), units, program)  # type: ignore[arg-type]
                word = "done" if steps.happened else "end"
            except VllmcError as error:
                word = error.code
            os.writev(tell, [word.encode()])
            os._exit(0)
        os.close(tell)
        os.wait()
        word = os.read(told, 100).decode() or "killed"
        os.close(told)
        if word == "end":
            return
        print(word)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
