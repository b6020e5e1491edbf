"""Remotes: a cache in a place that fsspec reaches (a directory, http, s3, gs, az, hf).

What lies below a remote's `v1/` lies as in a cache, so that it can also be mounted as a layer.
Nothing that a remote says is believed: of a listing only names of the right form are used, what is
read has a limit, and so has the time that an answer may take. Errors of fsspec and of what it calls
are mapped here and nowhere else. Imports no torch.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, TypeVar, cast
from urllib.parse import parse_qsl, unquote

from vllmc.core.cache.files import MOST_RECORD, write_plain
from vllmc.core.errors import UnsafeCacheError, UsageError, VllmcError

T = TypeVar("T")

_FANS: Final = re.compile("[0-9a-f]{2}")
_KEY: Final = re.compile("[0-9a-f]{64}")
_RECORD: Final = re.compile(r"[0-9a-f]{64}\.json")
_URL: Final = re.compile(r"[a-zA-Z][\w+.-]*://[^\s'\"<>]+")
_LOCAL: Final = ("file", "local")
_HTTP: Final = ("http", "https")
_WEB: Final = ("http://", "https://")
_PARTIAL: Final = 206
_NO_SUCH_RANGE: Final = 416
# Whatever the connection: a large artifact on a slow one takes its time.
_SLOWEST_BYTES_PER_SECOND: Final = 100_000
# Before the first slash, or with slashes in it: rather too little is taken for the host.
_USERINFO: Final = re.compile(r"[^/@]*:[^/]*@|[^/?#]*@|[^/@]*:[^@?#]*@")
# Values of a query that are no secret, and stand in other words too.
_SHORT: Final = 3
_PACKAGES: Final = MappingProxyType(
    {
        **dict.fromkeys(_HTTP, "aiohttp"),
        **dict.fromkeys(("s3", "s3a"), "s3fs"),
        **dict.fromkeys(("gs", "gcs"), "gcsfs"),
        **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
        "hf": "huggingface_hub",
    }
)


class CorruptRemote(UnsafeCacheError):
    """Something at a remote that is not what its path says. `reason` says what is wrong."""

    def __init__(
        self, name: str, reason: str, *, hint: str = "push it again from where it was compiled"
    ) -> None:
        super().__init__(
            "corrupt-remote",
            f"{name} is not used: {reason}",
            context={"remote": name, "reason": reason},
            hint=hint,
        )
        self.reason = reason


class RemoteFailed(VllmcError):
    """A remote that gives no answer, or a bad one. `slow` says that it was waited for."""

    def __init__(self, name: str, cause: str, *, slow: bool = False) -> None:
        super().__init__(
            "remote-failed",
            f"{name} cannot be used: {cause}",
            context={"remote": name, "cause": cause},
            hint="check the URL, the network and your credentials; run again, it goes on from "
            "there",
        )
        self.slow = slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """The remote at `url`, with what opens it (user, password, query); `name` is without.

    `patience` is how many seconds an answer may take, `within` how many all of them together, and
    `chunk` how many bytes of an artifact are asked for at once. `given_up` is for who asks for one
    program after the other, and waits only once for a remote that does not answer.
    """

    url: str = field(repr=False)
    patience: float = 60.0
    within: float = float("inf")
    chunk: int = 4 << 20
    given_up: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The URL as people may see it."""
        return redacted(self.url)

    def connect(self) -> Connection:
        """A connection, which need not reach the remote yet.

        Raises `UsageError` (`bad-remote`) and `VllmcError` (`no-remote-support`, `remote-failed`).
        """
        protocol = self.url.partition("://")[0] if "://" in self.url else "file"
        # Of several in a row some would write elsewhere, as filecache:: does.
        if "::" in self.url or not self.url:
            raise _bad(self.name, "it takes one URL, or a directory")
        import fsspec

        mistyped = self.url.partition(":")[0]
        if "://" not in self.url and mistyped in {*fsspec.available_protocols()} - {*_LOCAL}:
            raise _bad(self.name, f"it would begin with {mistyped}://")
        options: dict[str, object] = {"skip_instance_cache": True}
        try:
            fsspec.get_filesystem_class(protocol)
            if protocol in _HTTP:
                options["client_kwargs"] = _http_options(self.patience)
        except ValueError:
            raise _bad(self.name, f"nothing is known of {protocol}://") from None
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            raise VllmcError(
                "no-remote-support",
                f"{self.name} cannot be reached: {error}",
                context={"remote": self.name},
                hint=f"pip install {package}" if package else "install what it names",
            ) from None
        until = time.monotonic() + self.within
        with _mapped(self.name, self.url):
            # Some ask for credentials here, and not everywhere does someone answer.
            system, root = _within(
                self.patience, lambda: fsspec.core.url_to_fs(self.url, **options)
            )
        local = Path(root) if protocol in _LOCAL else None
        return Connection(self, system, root, local, until)


class Connection:
    """A connection to a remote. Paths are those below `v1/`.

    All methods raise `VllmcError` (`remote-failed`) where there is no answer, or a bad one.
    """

    def __init__(
        self, remote: Remote, system: Any, root: str, local: Path | None, until: float
    ) -> None:
        self.remote = remote
        self._system = system
        self._root = root
        self._local = local
        self._until = until

    def name(self, path: str) -> str:
        """What people are told of the file at `path`."""
        return f"{self.remote.name.rstrip('/')}/v1/{path}"

    def programs(self, prefix: str = "") -> Iterator[str]:
        """The paths of the programs' records whose keys begin with `prefix`."""
        fans = [prefix[:2]] if prefix else self._children("programs", _FANS)
        for fan in fans:
            keys = [prefix] if len(prefix) == 64 else self._children(f"programs/{fan}", _KEY)
            for key in keys:
                if key.startswith(prefix):
                    for name in self._children(f"programs/{fan}/{key}", _RECORD):
                        yield f"programs/{fan}/{key}/{name}"

    def size(self, path: str) -> int | None:
        """The size of a file in bytes; None where there is none, or the remote does not say."""
        try:
            return cast("int | None", self._ask(lambda: self._system.info(self._at(path))["size"]))
        except FileNotFoundError:
            return None

    def read_record(self, path: str) -> bytes | None:
        """The whole of a record, of which nothing is known yet; None where there is none.

        Raises `CorruptRemote` where it is too large.
        """
        data = bytearray()
        try:
            with self.open(path) as file:
                while block := file.read(MOST_RECORD + 1 - len(data)):
                    data += block
        except FileNotFoundError:
            return None
        if len(data) > MOST_RECORD:
            raise CorruptRemote(self.name(path), f"it has more than {MOST_RECORD >> 20} MiB")
        return bytes(data)

    @contextmanager
    def open(self, path: str, start: int = 0) -> Iterator[Reading]:
        """Opens a file of the remote, from the byte `start` on where the remote can do that.

        `path` is empty for the file that the remote's URL itself names. Raises `FileNotFoundError`.
        """
        at = self._at(path) if path else self._root
        file, begun = self._ask(lambda: self._opened(at, start))
        try:
            yield Reading(file, begun, self._ask)
        finally:
            # Where it was read in vain, this too may take for ever.
            with suppress(VllmcError, FileNotFoundError):
                self._ask(file.close)

    def _opened(self, at: str, start: int) -> tuple[Any, int]:
        if not self.remote.url.startswith(_WEB):
            file = self._system.open(at, "rb", cache_type="none")
            file.seek(start)
            return file, start
        # One answer that is read as it comes, of no size that would have to be asked for before.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            file = self._system.open(at, "rb", block_size=0, size=1, headers=headers)
        except Exception as error:
            # It has become shorter.
            if start and getattr(error, "status", None) == _NO_SUCH_RANGE:
                return self._opened(at, 0)
            raise
        return file, start if file.r.status == _PARTIAL else 0

    def write(self, path: str, data: bytes) -> None:
        """Writes a file, whole or not at all."""
        if self.remote.url.startswith(_WEB):
            raise VllmcError(
                "remote-failed",
                f"{self.remote.name} cannot be pushed to: http is only read",
                context={"remote": self.remote.name},
                hint="push to where it is served from: a directory, s3://bucket/prefix, ...",
            )
        try:
            if self._local is None:
                seconds = len(data) / _SLOWEST_BYTES_PER_SECOND
                self._ask(lambda: self._system.pipe_file(self._at(path), data), more=seconds)
            else:
                self._write_locally(self._local / "v1", path, data)
        except FileNotFoundError:
            raise RemoteFailed(self.remote.name, "there is no such place to write to") from None

    def _write_locally(self, top: Path, path: str, data: bytes) -> None:
        target, temporary = top / path, top / "tmp"
        with _mapped(self.remote.name, self.remote.url):
            # Others are to read it, as far as the umask lets them.
            for directory in (target.parent, temporary):
                directory.mkdir(parents=True, exist_ok=True)
        try:
            write_plain(target, data, temporary=temporary)
        except VllmcError as error:
            raise RemoteFailed(self.remote.name, error.message) from None

    def _children(self, path: str, form: re.Pattern[str]) -> list[str]:
        """The names in a directory that have this form, in order; none where there is none."""
        try:
            found = self._ask(lambda: self._system.ls(self._at(path), detail=False))
        except FileNotFoundError:
            return []
        names = {str(item).partition("?")[0].rstrip("/").rpartition("/")[2] for item in found}
        return sorted(name for name in names if form.fullmatch(name))

    def _at(self, path: str) -> str:
        if self._local is not None:
            return str(self._local / "v1" / path)
        root, mark, query = self._root.partition("?")
        return f"{root.rstrip('/')}/v1/{path}{mark}{query}"

    def _ask(self, call: Callable[[], T], *, more: float = 0.0) -> T:
        """What `call` returns, which has `patience` and `more` seconds to do so."""
        left = self._until - time.monotonic()
        with _mapped(self.remote.name, self.remote.url):
            if left <= 0:
                raise TimeoutError(f"it takes longer than {self.remote.within:.0f} seconds")
            return _within(min(self.remote.patience + more, left), call)


@dataclass(frozen=True, slots=True)
class Reading:
    """A file of a remote that is read from the byte `start` on."""

    _file: BinaryIO
    start: int
    _ask: Callable[[Callable[[], bytes]], bytes]

    def read(self, most: int) -> bytes:
        """The next bytes, `most` at the most; none at the end."""
        # Files take a negative number for all that is left.
        assert most >= 0, most
        return self._ask(lambda: self._file.read(most)) if most else b""


def redacted(url: str) -> str:
    """`url` without what may be a credential: user, password, query and fragment."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    rest = rest.removeprefix(_userinfo(rest))
    return f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0]}"


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns. Raises `TimeoutError` where that takes longer; it is left to itself.

    fsspec has no limits of its own that all implementations keep.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised again by who waits
            answers.put((None, error))

    threading.Thread(target=work, daemon=True, name="vllmc-remote").start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None
    if error is not None:
        raise error
    return cast("T", value)


@contextmanager
def _mapped(name: str, url: str) -> Iterator[None]:
    """Turns whatever the implementations of fsspec raise into `VllmcError`s.

    A missing file stays itself. The cause is told without what `url` keeps secret.
    """
    try:
        yield
    except NotADirectoryError:
        raise FileNotFoundError(name) from None
    except (VllmcError, FileNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001 - each implementation has errors of its own
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        text = " ".join(_URL.sub(lambda match: redacted(match[0]), text).split())
        for secret in _secrets(url):
            text = text.replace(secret, "<redacted>")
        # With a traceback it would show the URL.
        raise RemoteFailed(name, text, slow=isinstance(error, TimeoutError)) from None


def _userinfo(rest: str) -> str:
    """What stands before the host, with its `@`, in a URL without its scheme."""
    match = _USERINFO.match(rest)
    return match[0] if match else ""


def _secrets(url: str) -> list[str]:
    """What `url` keeps secret, in the forms in which an error may tell it, the longest first."""
    rest = url.partition("://")[2]
    userinfo = _userinfo(rest)
    query = rest.removeprefix(userinfo).partition("?")[2]
    parts = (userinfo[:-1], userinfo[:-1].partition(":")[2], query)
    values = (value for _, value in parse_qsl(query) if len(value) > _SHORT)
    told = {form for part in parts for form in (part, unquote(part))}
    return sorted(filter(None, {*told, *values}), key=len, reverse=True)


def _http_options(patience: float) -> dict[str, object]:
    import aiohttp

    # fsspec's five minutes for all of a file are too few for a large one.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=patience, sock_read=patience)
    return {"timeout": timeout, "trust_env": True}


def _bad(name: str, reason: str) -> UsageError:
    return UsageError(
        "bad-remote",
        f"'{name}' is no remote: {reason}",
        context={"remote": name},
        hint="for example s3://bucket/prefix, https://host/path or a directory",
    )
