"""Cache keys: SHA-256 over named, readable factors. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"


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
    not compared.
    """

    group: str
    name: str
    value: JsonValue
    origin: str = "default"
    is_default: bool = True
    affects_key: bool = True

    @property
    def digest(self) -> str:
        """The SHA-256 of the value's canonical JSON, as 64 hex digits."""
        return sha256_hex(canonical_json(self.value))

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
        """Reads a row that `to_json` wrote. Raises `KeyError` or `TypeError` on any other."""
        return cls(
            group=_text(row["group"]),
            name=_text(row["name"]),
            value=row["value"],
            origin=_text(row["origin"]),
            is_default=bool(row["is_default"]),
            affects_key=bool(row["affects_key"]),
        )


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def key_of(factors: Iterable[Factor]) -> str:
    """The key of a set of factors: independent of their order, origins and provenance."""
    rows = sorted((f.group, f.name, f.digest) for f in factors if f.affects_key)
    assert len({row[:2] for row in rows}) == len(rows), "a factor is listed twice"
    return sha256_hex(canonical_json(rows))
