"""Shared objects without what only debuggers and linkers read. Imports no torch."""

from __future__ import annotations

import struct
from typing import Final

_ELF_64_LITTLE_ENDIAN: Final = b"\x7fELF\x02\x01"
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")


def loadable_part(library: bytes) -> bytes:
    """As much of a shared object as the dynamic loader maps; another kind of file as it is.

    The loader goes by the segments, which come first. What follows them are debugging symbols with
    paths of this machine, three quarters of what Inductor's compiler command makes.
    """
    if not library.startswith(_ELF_64_LITTLE_ENDIAN):
        return library
    fields = list(_HEADER.unpack_from(library))
    first, size, count = fields[5], fields[9], fields[10]
    end = first + size * count
    for index in range(count):
        _, _, offset, _, _, length, _, _ = _SEGMENT.unpack_from(library, first + size * index)
        end = max(end, offset + length)
    # There is no table of sections any more: its place, and how many it holds.
    fields[6] = fields[12] = fields[13] = 0
    return _HEADER.pack(*fields) + library[_HEADER.size : end]
