"""Two torch traces compared: which components of which keys moved. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from vllmc.core.cache.explain import Change
from vllmc.core.cache.key import REDACTED, canonical_json
from vllmc.core.cache.leaves import ChangeKind
from vllmc.core.diagnose.torch_caches import (
    AOT_DETAILS,
    UNSAVED,
    Cache,
    Compilation,
    Component,
    Lookup,
    TorchTrace,
)
from vllmc.core.diagnose.torch_components import Difference, Part, differences, part_of, rank_of

T = TypeVar("T")
S = TypeVar("S", Difference, str)

_ORIGIN: Final = "probe"
_NAMED: Final = 3
_KEY: Final = "key"
_ANSWER: Final = "answer"
_OPTIONS: Final = "autograd_config"
_INCOMPLETE: Final = (
    "torch wrote no components of keys that differ, so more may have moved than is named "
    f"({AOT_DETAILS} writes AOTAutograd's)"
)
_NO_PART: Final = Part(klass="unknown")
_NAMES: Final[Mapping[Cache, str]] = {"fx_graph": "FX graph", "aot_autograd": "AOTAutograd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceDiff:
    """The differences, the ones to read first at the top; the number of components that are the
    same wherever they were compared; the number of keys that were; and what cannot be concluded.
    """

    changes: tuple[Change, ...]
    same: int
    keys: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finding:
    """One thing to say of one compilation: a difference in a key of `cache`, or a remark."""

    cache: Cache
    label: str
    says: Difference | str


def diff_traces(before: TorchTrace, after: TorchTrace) -> TraceDiff:
    """Compares two traces.

    Compilations are matched by rank, id, frame and graph; then, as ids move when something else
    is compiled first, without the id; then by graph alone; last without the graph.
    """
    pairs, gone, new = _match(
        before.compilations,
        after.compilations,
        lambda c: (c.rank, c.id, c.frame, c.graph),
        lambda c: (c.rank, c.frame, c.graph) if c.graph else None,
        lambda c: (c.frame, c.graph) if c.graph else None,
        lambda c: c.graph or None,
        lambda c: (c.rank, c.id, c.frame),
    )
    findings: list[_Finding] = []
    compared: list[tuple[Cache, frozenset[str]]] = []
    for pair in pairs:
        found, keys = _compare(*pair)
        findings += found
        compared += keys
    names = {(cache, name) for cache, parts in compared for name in parts}
    rows = _gathered((f.cache, _with_versions(f.says, before, after), f.label)
                     for f in findings if isinstance(f.says, Difference))  # fmt: skip
    changes = [_change(cache, says, labels, len(pairs)) for cache, says, labels in rows]
    changes.sort(key=lambda change: rank_of(change.name))
    remarks = _gathered((f.cache, f.says, f.label) for f in findings if isinstance(f.says, str))
    moved = {f.says.component for f in findings if isinstance(f.says, Difference)}
    return TraceDiff(
        changes=(
            *changes,
            *(_one_sided(c, "removed") for c in gone),
            *(_one_sided(c, "added") for c in new),
        ),
        same=sum(name not in moved for _, name in names),
        keys=len(compared),
        notes=tuple(f"{_NAMES[c]} cache: {text}: {_listed(w)}" for c, text, w in remarks),
    )


def _match(
    left: Sequence[T], right: Sequence[T], *keys: Callable[[T], Hashable]
) -> tuple[list[tuple[T, T]], list[T], list[T]]:
    """Pairs what has the same key: by the first key first, and each in its order.

    A key of None matches nothing. Returns the pairs, what is left of `left`, and of `right`.
    """
    pairs: list[tuple[T, T]] = []
    left, right = list(left), list(right)
    for key in keys:
        waiting: dict[Hashable, list[T]] = {}
        for item in left:
            waiting.setdefault(key(item), []).append(item)
        waiting.pop(None, None)
        lone = []
        for item in right:
            if partners := waiting.get(key(item)):
                pairs.append((partners.pop(0), item))
            else:
                lone.append(item)
        taken = {id(one) for one, _ in pairs}
        left, right = [item for item in left if id(item) not in taken], lone
    return pairs, left, right


def _compare(
    before: Compilation, after: Compilation
) -> tuple[list[_Finding], list[tuple[Cache, frozenset[str]]]]:
    """What there is to say of a compilation; and of each key that has a counterpart, the names of
    the components that could be compared.
    """
    findings: dict[Hashable, _Finding] = {}
    keys: list[tuple[Cache, frozenset[str]]] = []
    for cache in _NAMES:
        sides = [[k for k in c.lookups if k.cache == cache] for c in (before, after)]
        left, right = ([lookup for lookup in side if lookup.key] for side in sides)
        says: list[Difference | str] = [f"in a {k.reason}" for k in sides[0] if k.answer == UNSAVED]
        if left and right:
            pairs, gone, new = _match(left, right, lambda k: k.key, _graph, lambda k: k.backward)
            for one, other in pairs:
                parts = _parts((one, other), (before, after))
                says += _keys(one, other, *parts) if one.key != other.key else _answers(one, other)
                names = {part.name for side in parts for part in side} - {_OPTIONS}
                keys.append((cache, frozenset(names)))
            says += ["a graph was looked up in a alone"] * bool(gone)
            says += ["a graph was looked up in b alone"] * bool(new)
        else:
            says += _without_keys(*sides)
        if any(isinstance(finding.says, Difference) for finding in findings.values()):
            says = [item for item in says if getattr(item, "name", "") != _KEY]
        for item in says:
            # Most components are part of both keys; one row says it.
            identity = (cache, item) if isinstance(item, str) else _identity(item)
            finding = _Finding(cache=cache, label=after.label, says=item)
            findings.setdefault(identity, finding)
    return list(findings.values()), keys


def _identity(says: Difference | str) -> Hashable:
    return says if isinstance(says, str) else (says.name, canonical_json([says.before, says.after]))


def _graph(lookup: Lookup) -> Hashable:
    return next(((c.digest, lookup.backward) for c in lookup.components if c.name == "gm"), None)


def _parts(
    lookups: tuple[Lookup, Lookup], compilations: tuple[Compilation, Compilation]
) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """What can be compared of two keys: what the trace has on both sides.

    Of AOTAutograd's options the key has a pickle; the metrics of the compilation list them.
    """
    left, right = (lookup.components for lookup in lookups)
    before, after = (c.functorch for c in compilations)
    if not left or not right:
        left = right = ()
    if lookups[0].cache == "aot_autograd" and before and after:
        left, right = (*left, *before), (*right, *after)
    return left, right


def _keys(before: Lookup, after: Lookup, *parts: tuple[Component, ...]) -> list[Difference | str]:
    """Why two lookups had different keys."""
    complete = bool(before.components and after.components)
    found = differences(*parts)
    if any(d.component.startswith(f"{_OPTIONS}[") for d in found):
        found = tuple(d for d in found if d.component != _OPTIONS)
    if not found:
        note = "no component differs" if complete else "torch wrote no components"
        key = Difference(component=_KEY, name=_KEY, before=before.key, after=after.key, note=note)
        found = (key,)
    if not complete:
        return [*found, _INCOMPLETE]
    return [*found]


def _answers(before: Lookup, after: Lookup) -> list[Difference | str]:
    """What became of the same key."""
    if before.answer == after.answer:
        reasons = (("a", before.reason), ("b", after.reason))
        told = "; ".join(f"in {side} {reason}" for side, reason in reasons if reason)
        return [f"the same key was a {after.answer} in both: {told}"] if told else []
    why = f" ({reason})" if (reason := before.reason or after.reason) else ""
    return [f"the same key was a {before.answer} in a and a {after.answer} in b{why}"]


def _without_keys(before: Sequence[Lookup], after: Sequence[Lookup]) -> list[Difference | str]:
    """What to say where a side has no key: its cache was bypassed, off, or not asked."""
    states = [
        " and ".join(dict.fromkeys(k.answer for k in side if k.answer != UNSAVED)) or "not asked"
        for side in (before, after)
    ]
    reasons = "; ".join(dict.fromkeys(k.reason for k in (*before, *after) if k.reason))
    if states[0] != states[1]:
        return [
            Difference(
                component=_ANSWER, name=_ANSWER, before=states[0], after=states[1], note=reasons
            )
        ]
    why = f" ({reasons})" if reasons else ""
    return [f"{states[0]} in both, so there is no key to compare{why}"] if before else []


def _gathered(
    rows: Iterable[tuple[Cache, S, str]],
) -> list[tuple[Cache, S, tuple[str, ...]]]:
    """Each thing once, with the labels of all that it was said of."""
    gathered: dict[Hashable, tuple[Cache, S, list[str]]] = {}
    for cache, says, label in rows:
        gathered.setdefault((cache, _identity(says)), (cache, says, []))[2].append(label)
    return [(cache, says, tuple(labels)) for cache, says, labels in gathered.values()]


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    return ", ".join(labels[:_NAMED]) + more


def _with_versions(says: Difference, before: TorchTrace, after: TorchTrace) -> Difference:
    """The version of torch in place of the hash over its sources."""
    if says.name != "torch_version" or not before.torch or not after.torch:
        return says
    if before.torch == after.torch:
        return replace(says, note=f"{after.torch} on both sides, but its sources differ")
    return replace(says, before=before.torch, after=after.torch, note="")


def _change(cache: Cache, says: Difference, labels: Sequence[str], compilations: int) -> Change:
    part = part_of(says.component) if says.component not in (_KEY, _ANSWER) else _NO_PART
    where = f"in {_listed(labels)}" if len(labels) < compilations else ""
    kinds: dict[tuple[bool, bool], ChangeKind] = {(False, True): "added", (True, False): "removed"}
    return Change(
        group=f"torch.{cache}",
        name=says.name,
        before=says.before,
        after=says.after,
        kind=kinds.get(says.present, "changed"),
        klass="secret" if REDACTED in (says.before, says.after) else part.klass,
        affects_key=True,
        origin_before=_ORIGIN if says.present[0] else None,
        origin_after=_ORIGIN if says.present[1] else None,
        note="; ".join(text for text in (part.says, says.note, where) if text),
    )


def _one_sided(compilation: Compilation, kind: ChangeKind) -> Change:
    is_new = kind == "added"
    return Change(
        group="torch.compilation",
        name=compilation.label,
        before=None if is_new else compilation.outcome,
        after=compilation.outcome if is_new else None,
        kind=kind,
        klass="identity",
        affects_key=True,
        origin_before=None if is_new else _ORIGIN,
        origin_after=_ORIGIN if is_new else None,
        note=f"compiled in {'b' if is_new else 'a'} alone",
    )
