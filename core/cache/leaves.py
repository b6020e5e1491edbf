"""Two JSON values compared leaf by leaf: what differs, under its own name. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from vllmc.core.cache.key import JsonValue, canonical_json

ChangeKind: TypeAlias = Literal["changed", "added", "removed"]

_LISTED: Final = 8
"""How many differing entries of a list are told one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A difference within a value.

    `path` leads to it (`.key`, `[2]`, `[3:]` for the rest of a list; empty for the value itself).
    `before` and `after` are None where it is absent. `note` is empty where there is nothing to add.
    """

    path: str
    before: JsonValue
    after: JsonValue
    kind: ChangeKind = "changed"
    note: str = ""


def leaves(before: JsonValue, after: JsonValue, *, unordered: bool = False) -> tuple[Leaf, ...]:
    """Where the values differ; none where they are one text in a key.

    Dictionaries with a key in common are compared key by key, lists of one length entry by entry.
    Of other lists the common beginning is left out. What has nothing in common is one difference,
    and so are more than eight entries of a list. With `unordered` two lists are sets: what was
    removed and what was added.
    """
    if unordered and isinstance(before, list) and isinstance(after, list):
        return tuple(_sets(before, after))
    return tuple(_compare("", before, after))


def _compare(path: str, before: JsonValue, after: JsonValue) -> Iterator[Leaf]:
    # Not `==`: Python takes 1, 1.0 and True for equal, the key does not.
    if canonical_json(before) == canonical_json(after):
        return
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() & after.keys():
        yield from _dictionaries(path, before, after)
    elif isinstance(before, list) and isinstance(after, list):
        yield from _lists(path, before, after)
    else:
        yield Leaf(path=path, before=before, after=after)


def _dictionaries(
    path: str, before: dict[str, JsonValue], after: dict[str, JsonValue]
) -> Iterator[Leaf]:
    for key in sorted(before.keys() | after.keys()):
        below = f"{path}.{key}"
        if key not in before:
            yield Leaf(path=below, before=None, after=after[key], kind="added")
        elif key not in after:
            yield Leaf(path=below, before=before[key], after=None, kind="removed")
        else:
            yield from _compare(below, before[key], after[key])


def _lists(path: str, before: list[JsonValue], after: list[JsonValue]) -> Iterator[Leaf]:
    different = [
        index
        for index, (old, new) in enumerate(zip(before, after, strict=False))
        if canonical_json(old) != canonical_json(new)
    ]
    if len(before) != len(after):
        start = different[0] if different else min(len(before), len(after))
        lengths = f"{len(before)} entries before, {len(after)} after"
        if start == 0:
            yield Leaf(path=path, before=before, after=after, note=lengths)
        else:
            yield _rest(f"{path}[{start}:]", before[start:], after[start:], lengths)
        return
    entries = [entry for index in different for entry in (before[index], after[index])]
    plain = not any(isinstance(entry, (dict, list)) for entry in entries)
    if len(different) > _LISTED or (plain and len(different) == len(before)):
        note = f"{len(different)} of {len(before)} entries differ" if len(before) > 1 else ""
        yield Leaf(path=path, before=before, after=after, note=note)
        return
    for index in different:
        yield from _compare(f"{path}[{index}]", before[index], after[index])


def _rest(path: str, before: list[JsonValue], after: list[JsonValue], note: str) -> Leaf:
    if not before:
        return Leaf(path=path, before=None, after=after, kind="added", note=note)
    if not after:
        return Leaf(path=path, before=before, after=None, kind="removed", note=note)
    return Leaf(path=path, before=before, after=after, note=note)


def _sets(before: list[JsonValue], after: list[JsonValue]) -> Iterator[Leaf]:
    old = {canonical_json(entry): entry for entry in before}
    new = {canonical_json(entry): entry for entry in after}
    shared = old.keys() & new.keys()
    removed = [entry for text, entry in old.items() if text not in shared]
    added = [entry for text, entry in new.items() if text not in shared]
    if not shared or (not removed and not added):
        if canonical_json(before) != canonical_json(after):
            yield Leaf(path="", before=before, after=after)
        return
    note = f"{len(shared)} in common"
    if removed:
        yield Leaf(path="", before=removed, after=None, kind="removed", note=note)
    if added:
        yield Leaf(path="", before=None, after=added, kind="added", note=note)
