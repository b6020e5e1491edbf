"""Files that other systems wrote: read with limits, parsed without running anything.

Nothing here trusts what it reads. `Unreadable` says why something was not understood; it never
carries a part of the contents, which may be secret. Imports no torch.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from vllmc.core.cache.key import JsonValue

_MAX_TEXT: Final = 64 << 20
_MAX_DEPTH: Final = 24
_MAX_INT_BITS: Final = 1024
_CHUNK: Final = 1 << 20
_OVERLAP: Final = 4096
# What would move the cursor of a terminal, or cannot be encoded.
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

# An absolute path, cut behind the directory that tells what it is. In a pickle a letter may stand
# before it: the length of a short text, behind the opcode 0x8c.
_PLACE: Final = re.compile(
    rb"(?s:(?<=\x8c.)|(?<![\w./~-]))"
    rb"(/(?:[\w.@+~-]{1,64}/){0,20}?"
    rb"(?:torch_compile_cache|torch_aot_compile|torchinductor_[\w.-]{1,64}|inductor_cache"
    rb"|triton_cache|site-packages|dist-packages))(?![\w.-])"
)


class Unreadable(Exception):
    """A file that cannot be read or understood; `str()` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What is known of a file or directory tree by its bytes.

    `digest` is equal for equal contents; `places` are the absolute directories it mentions.
    """

    digest: str
    bytes: int
    places: frozenset[str]


def read_text(path: Path, limit: int = _MAX_TEXT) -> str:
    """The text of a plain file of at most `limit` bytes. Raises `Unreadable`."""
    try:
        with _open_plain(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from error
    if len(data) > limit:
        raise Unreadable(f"larger than {limit >> 20} MB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"no UTF-8 text, at byte {error.start}") from error


def parse_json(text: str) -> object:
    """The value of a JSON text. Raises `Unreadable`."""
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"no JSON, at line {error.lineno} column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"JSON beyond what can be read: {type(error).__name__}") from error
    return value


def parse_literal(text: str) -> object:
    """The value of a Python literal; nothing is run. Raises `Unreadable`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value: object = ast.literal_eval(text)
    except SyntaxError as error:
        raise Unreadable(f"no Python literal, at line {error.lineno}") from error
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        raise Unreadable(f"no Python literal: {type(error).__name__}") from error
    return value


def content_of(path: Path) -> Content:
    """The digest, size and places of a file, or of all files below a directory.

    Symbolic links are not followed. Raises `Unreadable`.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            return _file_content(path)
        digest, size, places = hashlib.sha256(), 0, frozenset[str]()
        for file in files_below(path):
            part = _file_content(file)
            digest.update(f"{file.relative_to(path).as_posix()!a}:{part.digest}\n".encode())
            size += part.bytes
            places |= part.places
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from error
    return Content(digest=digest.hexdigest(), bytes=size, places=places)


def files_below(directory: Path) -> Iterator[Path]:
    """The plain files below a directory, in one order everywhere. Raises `OSError`."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, directories, names in os.walk(directory, onerror=refuse):
        directories.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


def places_in(data: bytes) -> frozenset[str]:
    """The absolute directories of caches and installed packages that `data` mentions."""
    return frozenset(clean(m[1].decode("utf-8", "replace")) for m in _PLACE.finditer(data))


def clean(text: str) -> str:
    r"""`text` with every control character (but line ends and tabs) written as `\x1b` is."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def clean_json(value: object, depth: int = 0) -> JsonValue:
    """Any value that a parser gave as JSON that can be hashed, stored and printed."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        huge = value.bit_length() > _MAX_INT_BITS
        return f"<an integer of {value.bit_length()} bits>" if huge else value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, str):
        return clean(value)
    if depth == _MAX_DEPTH:
        return "<nested too deeply>"
    if isinstance(value, dict):
        return {clean(str(k)): clean_json(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean_json(item, depth + 1) for item in value]
    return f"<{type(value).__name__}>"


def _open_plain(path: Path) -> BinaryIO:
    # A pipe that stands where a file belongs would never end.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "no plain file")
    return path.open("rb")


def _file_content(path: Path) -> Content:
    digest, size, places, tail = hashlib.sha256(), 0, frozenset[str](), b""
    with _open_plain(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            places |= places_in(tail + chunk)
            tail = chunk[-_OVERLAP:]
    return Content(digest=digest.hexdigest(), bytes=size, places=places)
