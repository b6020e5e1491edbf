"""The form of an artifact's bytes: a line of JSON, then its files one after the other.

Imports no torch. The line names the format and describes the rest, and the content decides every
byte. Nothing is compressed and nothing checked a second time: an artifact's digest is verified
before it is opened, and to inflate one takes as long as to load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from vllmc.core.cache.key import JsonValue, canonical_json
from vllmc.core.errors import UnsafeCacheError

NATIVE = "inductor-native"
BUNDLE = "inductor-bundle"
EAGER = "eager-graph"

_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """An artifact opened: its format, its description and its files."""

    format: str
    description: dict[str, JsonValue]
    files: dict[str, bytes]

    def text(self, name: str) -> str:
        """The file `name` as UTF-8 text."""
        return self.files[name].decode()


def pack(format: str, description: Mapping[str, JsonValue], files: Mapping[str, bytes]) -> bytes:
    """The bytes of an artifact. The same content gives the same bytes."""
    ordered = sorted(files.items())
    header = {
        "format": format,
        "version": _VERSION,
        "description": dict(description),
        "files": [[name, len(data)] for name, data in ordered],
    }
    return b"".join([canonical_json(header).encode(), b"\n", *(data for _, data in ordered)])


def unpack(data: bytes) -> Container:
    """Opens what `pack` wrote. Raises `UnsafeCacheError` (`bad-artifact`) for anything else."""
    try:
        at = data.index(b"\n") + 1
        header = json.loads(data[:at])
        if header["version"] != _VERSION:
            raise ValueError(f"its version is {header['version']}, not {_VERSION}")
        files = {}
        for name, size in header["files"]:
            files[name] = data[at : at + size]
            at += size
        if at != len(data):
            raise ValueError(f"it has {len(data)} bytes, not {at}")
        return Container(format=header["format"], description=header["description"], files=files)
    except (KeyError, ValueError, TypeError) as error:
        raise UnsafeCacheError(
            "bad-artifact",
            "an artifact is not in a form that this vllmc reads",
            context={"cause": str(error)},
            hint="compile it again: vllmc warm --force",
        ) from error
