"""The form of an artifact's bytes: a zip archive whose every byte the content decides.

Imports no torch. `manifest.json` names the format and lists the rest.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass

from vllmc.core.cache.key import JsonValue, canonical_json
from vllmc.core.errors import UnsafeCacheError

NATIVE = "inductor-native"
BUNDLE = "inductor-bundle"
EAGER = "eager-graph"

_EPOCH = (1980, 1, 1, 0, 0, 0)
_MANIFEST = "manifest.json"
_VERSION = 1


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
    manifest = {"format": format, "version": _VERSION, "description": dict(description)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, data in [(_MANIFEST, canonical_json(manifest).encode()), *sorted(files.items())]:
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def unpack(data: bytes) -> Container:
    """Opens what `pack` wrote. Raises `UnsafeCacheError` (`bad-artifact`) for anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        manifest = json.loads(files.pop(_MANIFEST))
        if manifest["version"] != _VERSION:
            raise ValueError(f"its version is {manifest['version']}, not {_VERSION}")
        return Container(
            format=manifest["format"], description=manifest["description"], files=files
        )
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise UnsafeCacheError(
            "bad-artifact",
            "an artifact is not in a form that this vllmc reads",
            context={"cause": str(error)},
            hint="compile it again: vllmc warm --force",
        ) from error
