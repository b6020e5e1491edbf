"""What passes between the process that wants units compiled and those that compile them.

Every message is pickled: both ends are this program, and nobody else holds the sockets.
"""

from __future__ import annotations

import pickle
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vllmc.core.cache.key import Factor
from vllmc.core.spec import CompileRange, CompileSpec

if TYPE_CHECKING:  # importing it takes seconds, in which a server could have begun to start
    from vllmc.core.compiler.protocol import Compiled

_LENGTH: Final = struct.Struct("!Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A unit to compile, and under what: a worker that finds anything else declines.

    `piece` is `pack_piece`'s. `factors` are the key's. `cxx` are the C++ compilers to try,
    `threads` torch's number of threads, `compilers` how many may run at once, `path` where modules
    are imported from, and `modules` those of the model's own code. `texts` asks for what a
    person may read.
    """

    piece: dict[str, Any]
    range: CompileRange
    spec: CompileSpec
    factors: tuple[Factor, ...]
    cxx: tuple[str | None, ...]
    threads: int
    compilers: int
    path: tuple[str, ...]
    modules: tuple[str, ...]
    texts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A unit that was compiled, in so many seconds of wall time."""

    compiled: Compiled
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Declined:
    """A unit that the worker would compile under other settings, or cannot rebuild."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A unit that the compiler refused, as it would have refused it here. `trace` is for -vv."""

    kind: str
    code: str
    message: str
    context: dict[str, object]
    hint: str
    trace: str


Answer = Done | Declined | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The server is up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The server made a worker for the order that was sent as number `order`."""

    order: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """That worker is gone; `status` as `os.waitpid` has it."""

    order: int
    status: int


News = Ready | Started | Exited


def write(channel: socket.socket, message: object) -> None:
    """Sends a message of any length. Raises `OSError` where nobody reads."""
    data = pickle.dumps(message)
    channel.sendall(_LENGTH.pack(len(data)) + data)


class Incoming:
    """Puts the messages of a stream together as they come in."""

    def __init__(self) -> None:
        self._held = bytearray()

    def read(self, channel: socket.socket) -> bool:
        """Takes what is there; False at the stream's end."""
        try:
            data = channel.recv(1 << 20)
        except ConnectionError:
            return False
        self._held += data
        return bool(data)

    def messages(self) -> list[Any]:
        """The messages that are whole by now, each once."""
        found = []
        while len(self._held) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held)
            end = _LENGTH.size + length
            if len(self._held) < end:
                break
            found.append(pickle.loads(self._held[_LENGTH.size : end]))
            del self._held[:end]
        return found


def read_one(channel: socket.socket) -> Any:
    """Waits for one message. Raises `EOFError` where none comes."""
    incoming = Incoming()
    while incoming.read(channel):
        if messages := incoming.messages():
            return messages[0]
    raise EOFError
