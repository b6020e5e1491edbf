"""The sides of a comparison: the current configuration, defaults, stored keys, snapshot files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from vllmc.core.cache.explain import Change, diff, diff_sources, differing
from vllmc.core.cache.key import Factor
from vllmc.core.cache.record import SourceFile, UnitRecord
from vllmc.core.cache.store import Store
from vllmc.core.errors import UsageError, VllmcError

# What is worked out now, also where a file has such a name.
WORDS = ("current", "defaults")
_PREFIX = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side: what it is, and its factors. `model` is empty where it has none.

    `notes` are remarks for the reader: what was taken, what was not understood.
    """

    kind: str
    name: str
    model: str
    factors: tuple[Factor, ...]
    sources: tuple[SourceFile, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two sides and every difference, also those that do not affect the key.

    `same` is the number of factors that do not differ; `notes` are remarks about the two together.
    """

    left: Side
    right: Side
    changes: tuple[Change, ...]
    same: int
    notes: tuple[str, ...] = ()


def compare_sides(left: Side, right: Side) -> Comparison:
    """Compares the factors of two sides, and their traced sources where both know them."""
    changes = diff(left.factors, right.factors, include_provenance=True)
    identities = {f.identity for f in left.factors} | {f.identity for f in right.factors}
    same = len(identities) - len(differing(left.factors, right.factors, include_provenance=True))
    if left.sources and right.sources:
        changes += diff_sources(left.sources, right.sources)
    return Comparison(left=left, right=right, changes=changes, same=same)


def stored_key(store: Store, text: str) -> str | None:
    """The key that `text` is the prefix of; None where it does not look like one.

    Raises `VllmcError` (`unknown-key`, `ambiguous-key`) where it does.
    """
    return store.resolve_prefix(text) if _PREFIX.fullmatch(text.lower()) else None


def stored_side(store: Store, text: str, *, to_use: bool = True) -> Side | None:
    """The stored record whose key starts with `text`, the newest of a program.

    `to_use`: what it says of model and options is followed, so it must be trusted.
    """
    if (key := stored_key(store, text)) is None:
        return None
    record = store.record(key, to_use=to_use)
    if isinstance(record, UnitRecord):
        return Side(kind="unit", name=key[:12], model="", factors=record.factors)
    newest = record[0]
    return Side(
        kind="key",
        name=key[:12],
        model=newest.model,
        factors=newest.factors,
        sources=newest.sources,
    )


def snapshot_side(path: Path) -> Side:
    """A file written by `vllmc inspect-key --json`. Raises `VllmcError` (`bad-snapshot`)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        factors = tuple(Factor.from_json(row) for row in data["factors"])
        if any(factor.group.startswith("torch.") for factor in factors):
            raise ValueError(
                "it is of a torch trace, which has a key per graph; compare the traces"
            )
        return Side(kind="snapshot", name=str(path), model=str(data["model"]), factors=factors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VllmcError(
            "bad-snapshot",
            f"{path} is no snapshot of a key",
            context={"cause": str(error) or type(error).__name__},
            hint="write one with: vllmc inspect-key --json > FILE",
        ) from error


def unknown_side(text: str) -> UsageError:
    """The error for a side that is none of the kinds there are."""
    return UsageError(
        "unknown-side",
        f"'{text}' is nothing to compare",
        hint="give current, defaults, a stored key (8 or more hex digits), a snapshot file, or a "
        "vLLM cache directory or debug log, or a TORCH_TRACE directory",
    )
