"""Why two keys differ: factors compared, the ones that matter first. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from vllmc.core.cache.expressions import most_telling, spoken
from vllmc.core.cache.key import REDACTED, Factor, JsonValue, canonical_json
from vllmc.core.cache.leaves import ChangeKind, Leaf, leaves
from vllmc.core.cache.record import Outline, SourceFile
from vllmc.core.cache.restore import restoring

ChangeClass: TypeAlias = Literal["codegen", "surroundings", "identity", "secret", "unknown"]
Pair: TypeAlias = "tuple[Factor | None, Factor | None]"

_IDENTITY: Final = 4

# In the order in which a change is worth knowing: causes before what follows from them (another
# torch brings other config defaults with it, and any of them another graph).
_GROUPS: Final[Mapping[str, ChangeClass]] = {
    "model": "identity",
    "sources": "identity",
    "guarded": "identity",
    "spec": "codegen",
    "passes": "codegen",
    "versions": "codegen",
    "code": "codegen",
    "kernels": "codegen",
    "system": "codegen",
    "environment": "codegen",
    "dynamo": "codegen",
    "inductor": "codegen",
    "functorch": "codegen",
    "graph": "identity",
}
_RANKS: Final[Mapping[str, int]] = {group: rank for rank, group in enumerate(_GROUPS)}

# The digest of code that `describe` puts behind a name.
_CODE: Final = re.compile(r"#[0-9a-f]{16}(?=>)")

# Lists of which neither the order nor a repetition means anything.
_SETS: Final = frozenset(
    {
        ("spec", "ranges"),
        ("spec", "sizes"),
        ("spec", "splitting_ops"),
        ("system", "cpu_features"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A difference between two sets of factors: `before` and `after` are None where it is absent.

    `name` is that of a factor, or of the part of its value that differs (`name.key`, `name[2]`).
    `klass` says what the difference means: another thing is compiled (`identity`), other code may
    be generated for it (`codegen`), it is only recorded (`surroundings`), its values are hidden
    (`secret`), or vllmc does not know the group (`unknown`). `restore` is what to type or set to
    have the factor as it was, empty where only warming again helps.
    """

    group: str
    name: str
    before: JsonValue
    after: JsonValue
    kind: ChangeKind
    klass: ChangeClass
    affects_key: bool
    origin_before: str | None
    origin_after: str | None
    note: str
    restore: str = ""

    def to_json(self) -> dict[str, JsonValue]:
        """The change as the CHANGE row of `--json` output."""
        return {
            "group": self.group,
            "name": self.name,
            "before": self.before,
            "after": self.after,
            "kind": self.kind,
            "class": self.klass,
            "affects_key": self.affects_key,
            "origin_before": self.origin_before,
            "origin_after": self.origin_after,
            "note": self.note,
            "restore": self.restore,
        }


def diff(
    before: Sequence[Factor], after: Sequence[Factor], *, include_provenance: bool = False
) -> tuple[Change, ...]:
    """How the factors differ, leaf by leaf where both values are nested; what matters first.

    In the order of `differing`; the leaves of a value stay together.
    """
    pairs = differing(before, after, include_provenance=include_provenance)
    return tuple(change for pair in pairs for change in _changes(*pair))


def differing(
    before: Sequence[Factor], after: Sequence[Factor], *, include_provenance: bool = False
) -> tuple[Pair, ...]:
    """The factors that differ, as they are on both sides (None where absent).

    First what affects the key; then by group, causes before consequences; within a group what
    somebody set before what is a default. Provenance only with `include_provenance`.
    """
    left = {factor.identity: factor for factor in before}
    right = {factor.identity: factor for factor in after}
    pairs = [(left.get(i), right.get(i)) for i in left.keys() | right.keys()]
    different = [pair for pair in pairs if not _same(*pair)]
    wanted = [pair for pair in different if _affects_key(pair) or include_provenance]
    return tuple(sorted(wanted, key=_importance))


def diff_sources(before: Sequence[SourceFile], after: Sequence[SourceFile]) -> tuple[Change, ...]:
    """The traced source files whose contents differ, named `package/path`."""
    left = {(source.package, source.path): source for source in before}
    right = {(source.package, source.path): source for source in after}
    changes = []
    for identity in sorted(left.keys() | right.keys()):
        old, new = left.get(identity), right.get(identity)
        if (old and old.digest) == (new and new.digest):
            continue
        changes.append(
            Change(
                group="sources",
                name="/".join(identity),
                before=old.digest if old else None,
                after=new.digest if new else None,
                kind=_kind(old, new),
                klass=_GROUPS["sources"],
                affects_key=True,
                origin_before="probe" if old else None,
                origin_after="probe" if new else None,
                note=_source_note(old, new),
            )
        )
    return tuple(changes)


def diff_guarded(
    before: Mapping[str, JsonValue], after: Mapping[str, JsonValue], *, files_changed: bool = False
) -> tuple[Change, ...]:
    """The Python values that capture depended on and that differ, named as `spoken` names them.

    `after` is what the expressions of `before` say now. Where source files changed too, functions
    and classes of which only the code differs follow from that, and are left out.
    """

    def told(value: JsonValue) -> str:
        text = canonical_json(value)
        return _CODE.sub("", text) if files_changed else text

    different = [
        expression
        for expression in sorted(before.keys() & after.keys())
        if told(before[expression]) != told(after[expression])
    ]
    return tuple(
        Change(
            group="guarded",
            name=spoken(expression),
            before=before[expression],
            after=after[expression],
            kind="changed",
            klass=_GROUPS["guarded"],
            affects_key=True,
            origin_before="probe",
            origin_after="probe",
            note="a Python value that capture depended on",
        )
        for expression in most_telling(different)
    )


def by_distance(
    factors: Sequence[Factor], outlines: Iterable[Outline], model: str
) -> list[tuple[str, str]]:
    """The (key, id) of the programs to explain a miss of `model` by, the nearest first.

    One of the same model if there is any, as that is what the user expected to hit; among those
    the one with the fewest differences that affect the key, of which one of identity weighs as
    much as several others; then the newest.
    """
    wanted = {f.identity: f.compared for f in factors if f.affects_key}
    absent = object()

    def distance(outline: Outline) -> tuple[bool, int, float, str, str]:
        values = outline.values
        different = [
            identity
            for identity, value in values.items()
            # Most values are one and the same object to Python.
            if (other := wanted.get(identity, absent)) is not value and not alike(value, other)
        ]
        different += wanted.keys() - values.keys()
        weight = sum(_IDENTITY if _GROUPS.get(g) == "identity" else 1 for g, _ in different)
        return (outline.model != model, weight, -outline.created, outline.key, outline.id)

    # One outline at a time: to hold the values of a thousand takes longer than to compare them.
    return [(key, id) for *_, key, id in sorted(map(distance, outlines))]


def alike(left: object, right: object) -> bool:
    """Whether two JSON values are the same to a key; Python takes 1, 1.0 and True for equal."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, dict)):
        # The text of Python is quicker made, and can differ in the order of names alone.
        return repr(left) == repr(right) or canonical_json(left) == canonical_json(right)
    return left == right


def _same(before: Factor | None, after: Factor | None) -> bool:
    if before is None or after is None:
        return False
    return before.affects_key == after.affects_key and alike(before.compared, after.compared)


def _changes(before: Factor | None, after: Factor | None) -> Iterator[Change]:
    """The differences of one factor."""
    sides = [side for side in (before, after) if side is not None]
    whole = Leaf(
        path="",
        before=before.value if before else None,
        after=after.value if after else None,
        kind=_kind(before, after),
    )
    found: tuple[Leaf, ...] = ()
    if before is not None and after is not None:
        found = leaves(before.value, after.value, unordered=before.identity in _SETS)
    for leaf in found or (whole,):
        yield Change(
            group=sides[0].group,
            name=sides[0].name + leaf.path,
            before=leaf.before,
            after=leaf.after,
            kind=leaf.kind,
            klass=_klass(leaf, sides, _affects_key((before, after))),
            affects_key=_affects_key((before, after)),
            origin_before=before.origin if before else None,
            origin_after=after.origin if after else None,
            note="; ".join(filter(None, (_note(before, after), leaf.note))),
            restore=_restore(before, after),
        )


def _restore(before: Factor | None, after: Factor | None) -> str:
    side = before or after
    assert side is not None, "a change has at least one side"
    return restoring(
        side.group,
        side.name,
        before.value if before else None,
        origin_before=before.origin if before else None,
        origin_after=after.origin if after else None,
    )


def _affects_key(pair: Pair) -> bool:
    return any(side is not None and side.affects_key for side in pair)


def _kind(before: object | None, after: object | None) -> ChangeKind:
    if before is None:
        return "added"
    return "removed" if after is None else "changed"


def _klass(leaf: Leaf, sides: Sequence[Factor], affects_key: bool) -> ChangeClass:
    hidden = not leaf.path and any(side.hidden for side in sides)
    if hidden or REDACTED in (leaf.before, leaf.after):
        return "secret"
    return _GROUPS.get(sides[0].group, "unknown") if affects_key else "surroundings"


def _importance(pair: Pair) -> tuple[bool, int, bool, str, str]:
    sides = [side for side in pair if side is not None]
    group, name = sides[0].identity
    origins = {side.origin for side in sides} - {"default", "probe", "vllmc"}
    return (not _affects_key(pair), _RANKS.get(group, len(_RANKS)), not origins, group, name)


def _note(before: Factor | None, after: Factor | None) -> str:
    if before is None or after is None:
        return _absence_note(before, after)
    if before.affects_key != after.affects_key:
        return f"{'now' if after.affects_key else 'no longer'} part of the key"
    if not after.affects_key:
        return "recorded only; it does not change the key"
    if before.origin == after.origin:
        return ""
    if after.origin == "default":
        return f"back at its default; it was {_source_of(before)}"
    return f"{_source_of(after)}; it was {_source_of(before)}"


def _absence_note(before: Factor | None, after: Factor | None) -> str:
    present, side = (after, "before") if before is None else (before, "after")
    assert present is not None, "a change has at least one side"
    if present.origin == "default":
        return f"absent {side}"
    return f"absent {side}; {_source_of(present)}"


def _source_of(factor: Factor) -> str:
    how, _, what = factor.origin.partition(":")
    match how:
        case "env":
            return f"set by the environment variable {what}"
        case "file":
            return f"set in {what}"
        case "flag":
            return "set on the command line"
        case "vllmc":
            return "set by vllmc"
        case "probe":
            return "read from the system"
        case _:
            return "the default"


def _source_note(before: SourceFile | None, after: SourceFile | None) -> str:
    source = after or before
    assert source is not None, "a change has at least one side"
    where = f"{source.package}/{source.path}"
    if after is None:
        where += " is no longer there"
    elif before is None:
        where += " was not traced before"
    functions = ", ".join(source.functions[:3])
    more = f" and {len(source.functions) - 3} more" if len(source.functions) > 3 else ""
    return f"{where}; traced in it: {functions}{more}" if functions else where
