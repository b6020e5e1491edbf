"""Cache keys: SHA-256 over named, readable factors. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

REDACTED: Final = "<redacted>"
"""What stands where a secret was (`redaction`)."""


def canonical_json(value: object) -> str:
    """One text per value: sorted keys, no spaces, no NaN. Raises `ValueError` or `TypeError`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_hex(data: bytes | str) -> str:
    """The SHA-256 of `data` (UTF-8 when text) as 64 hex digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One named entry of a cache key.

    `group` and `name` identify it, `value` is JSON. `origin` says where the value came from:
    `default`, `env:NAME`, `file:NAME:LINE`, `flag`, `vllmc` (set by vllmc itself) or `probe`
    (read from the system). Provenance is a factor with `affects_key=False`: recorded and shown,
    not compared. `hidden` is the digest of a value of which secrets were redacted (`redaction`),
    else empty.
    """

    group: str
    name: str
    value: JsonValue
    origin: str = "default"
    is_default: bool = True
    affects_key: bool = True
    hidden: str = ""

    @property
    def digest(self) -> str:
        """The SHA-256 of the value's canonical JSON, secrets included, as 64 hex digits."""
        return self.hidden or sha256_hex(canonical_json(self.value))

    @property
    def compared(self) -> JsonValue:
        """What tells the value from another: itself, or the digest where a secret is hidden."""
        return self.hidden or self.value

    @property
    def identity(self) -> tuple[str, str]:
        """`(group, name)`, unique within a key."""
        return (self.group, self.name)

    def to_json(self) -> dict[str, JsonValue]:
        """The factor as the row of `inspect-key --json` and of records."""
        return {
            "group": self.group,
            "name": self.name,
            "value": self.value,
            "digest": self.digest,
            "origin": self.origin,
            "is_default": self.is_default,
            "affects_key": self.affects_key,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, JsonValue]) -> Factor:
        """Reads a row that `to_json` wrote. Raises `KeyError` or `TypeError` on any other.

        Its digest is read where the value is redacted, and may be missing elsewhere.
        """
        factor = cls(
            group=_text(row["group"]),
            name=_text(row["name"]),
            value=row["value"],
            origin=_text(row["origin"]),
            is_default=bool(row["is_default"]),
            affects_key=bool(row["affects_key"]),
        )
        if REDACTED in canonical_json(factor.value) and "digest" in row:
            digest = _text(row["digest"])
            return factor if digest == factor.digest else replace(factor, hidden=digest)
        return factor


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def key_of(factors: Iterable[Factor]) -> str:
    """The key of a set of factors: independent of their order, origins and provenance."""
    rows = sorted((f.group, f.name, f.digest) for f in factors if f.affects_key)
    assert len({row[:2] for row in rows}) == len(rows), "a factor is listed twice"
    return sha256_hex(canonical_json(rows))
