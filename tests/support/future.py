"""Records as a later vllmc might write them."""

from __future__ import annotations

import json

from vllmc.core.cache.record import seal


def of_version_2(data: bytes) -> bytes:
    """The file of a record of this version, made one of the next."""
    body = data.partition(b',"body":')[2].removesuffix(b"}\n")
    return seal(json.loads(data)["format"], 2, body)
