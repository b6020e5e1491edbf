"""Records as a later vllmc might write them."""

from __future__ import annotations

import json

from vllmc.core.cache.record import _checksum


def of_version_2(data: bytes) -> bytes:
    """The file of a record of this version, made one of the next."""
    body = data.partition(b',"body":')[2].removesuffix(b"}\n")
    form = json.loads(data)["format"]
    checksum = _checksum(form, 2, body)
    header = f'{{"format":"{form}","version":2,"checksum":"{checksum}","body":'
    return header.encode() + body + b"}\n"
