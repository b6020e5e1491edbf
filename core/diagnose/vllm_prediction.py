"""Whether a start of vLLM's would find in its caches what it needs. Imports no torch.

Compared is what vLLM hashes before it traces anything; the files that were traced for an entry are
read again where they were. Nothing that is stored is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from vllmc.core.cache.explain import Change
from vllmc.core.diagnose.vllm_cache import Compilation, VllmCache
from vllmc.core.diagnose.vllm_compare import Subject, compare_keys
from vllmc.core.diagnose.vllm_factors import HASHES, KeyFacts, derived_key
from vllmc.core.diagnose.vllm_recorded import PLACE, Start, Tree

Outcome: TypeAlias = Literal["would-hit", "would-miss", "unknown"]

_NOT_KNOWN: Final = (
    "fields that vLLM sets only once its workers run, as after measuring the memory",
    "options of torch that the model's code or another plugin sets when it is loaded",
    "which functions of the model are compiled",
    "whether the stored artifacts load: they are not opened",
)

_CODE: Final = HASHES["code"]
_BEFORE_TRACING: Final = (HASHES["config"], HASHES["compiler"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What a start would find: `key` is that of the entry it is about, empty where there is none.

    `changes` are from that entry to the start. `part` is what an entry of the same environment,
    config and compiler is of: a function, where it is a whole model's; None of another entry.
    """

    outcome: Outcome
    reason: str
    key: str = ""
    changes: tuple[Change, ...] = ()
    part: str | None = None


def not_known(start: Start) -> tuple[str, ...]:
    """What a prediction of the start leaves open."""
    beside = [
        f"whether {what} is stored, and of which sources: it is compiled beside the model"
        for what in start.beside
    ]
    return (*_NOT_KNOWN, *beside, *start.unread)


def foresee(start: Start, caches: Sequence[VllmCache]) -> Foreseen:
    """Predicts a start; where it looks in two trees, the first that it misses in decides."""
    if not start.trees:
        return Foreseen(outcome="unknown", reason=start.reason)
    found = [_in_tree(start, tree, [c for c in caches if c.kind == tree]) for tree in start.trees]
    return next((one for one in found if one.outcome != "would-hit"), found[0])


def _in_tree(start: Start, tree: Tree, caches: Sequence[VllmCache]) -> Foreseen:
    known = [cache for cache in caches if cache.main is not None and cache.main.facts.factors]
    if not known:
        if caches:
            reason = f"nothing records what its {len(caches)} {tree} entries are keyed by"
            return Foreseen(outcome="unknown", reason=reason)
        return Foreseen(outcome="would-miss", reason=f"there is no entry in the {tree} tree")
    # The newest of the nearest; of a model in several parts that of the part that has the worst.
    compared = [_against(start, cache) for cache in reversed(known)]
    parts = dict.fromkeys(one.part for one in compared if one.part is not None)
    best = [min((one for one in compared if one.part == part), key=_distance) for part in parts]
    return max(best, key=_distance) if best else min(compared, key=_distance)


def _distance(found: Foreseen) -> tuple[int, int]:
    order: tuple[Outcome, ...] = ("would-hit", "unknown", "would-miss")
    return order.index(found.outcome), len(found.changes)


def _against(start: Start, cache: VllmCache) -> Foreseen:
    """What a start would find in one entry, judged by all the ranks that it needs."""
    main = _keyed(cache)
    before = Subject(label=main.label, key="", facts=main.facts)
    after = Subject(label="", key="", facts=start.facts)
    changes = [c for c in compare_keys(before, after).changes if c.affects_key]
    changes = [change for change in changes if change.group != _CODE]
    unequal = _unequal(main.facts, start.facts)
    part = None if unequal or changes else _part(main.facts)
    if unequal and not changes:
        return _miss(cache, part, (), f"the hash of the {' and of the '.join(unequal)} differs")
    changes += _changed_sources(main.facts)
    if changes:
        return _miss(cache, part, changes, f"the nearest entry differs in {_first(changes)}")
    if not any(f.group == _CODE for f in main.facts.fields):
        reason = (
            "all hashes but that of the sources are the same, and which they are is not recorded"
        )
        return Foreseen(outcome="unknown", reason=reason, key=cache.key, part=part)
    if lacking := _lacking(start.ranks, cache.compilations):
        return _miss(cache, part, (), f"there is nothing of {lacking} in the entry")
    if stale := _stale(cache, main):
        return Foreseen(outcome="unknown", reason=stale, key=cache.key, part=part)
    return Foreseen(
        outcome="would-hit",
        reason="the factors are the same, and the traced sources are as they were",
        key=cache.key,
        part=part,
    )


def _keyed(cache: VllmCache) -> Compilation:
    """The compilation that names the directory: that which was compiled first, if not the main."""
    assert cache.main is not None, "only entries that record factors are compared"
    named = (c for c in cache.compilations if derived_key(c.facts) == cache.key)
    return next(named, cache.main)


def _part(facts: KeyFacts) -> str:
    """The function that a whole model's entry is of; its line may move with its source."""
    found = (str(f.value) for f in facts.fields if f.identity == (_CODE, "forward"))
    return next(found, "").partition(",")[0]


def _stale(cache: VllmCache, keyed: Compilation) -> str:
    """The other parts in an entry of which the sources changed, which vLLM does not check."""
    rank = keyed.label.partition("/")[0]
    parts = [c for c in cache.compilations if c.label.startswith(f"{rank}/") and c is not keyed]
    changed = [c.label.partition("/")[2] for c in parts if _changed_sources(c.facts)]
    if not changed:
        return ""
    return (
        f"the entry is found by the sources of {keyed.label.partition('/')[2]}, and vLLM would run "
        f"what is stored of {', '.join(changed)}, whose sources changed since"
    )


def _miss(cache: VllmCache, part: str | None, changes: Sequence[Change], reason: str) -> Foreseen:
    return Foreseen(
        outcome="would-miss", reason=reason, key=cache.key, changes=tuple(changes), part=part
    )


def _unequal(before: KeyFacts, after: KeyFacts) -> list[str]:
    """The parts of the key that differ by their hashes."""
    sides = [{f.group: f.value for f in side.factors} for side in (before, after)]
    names = {group: name for name, group in HASHES.items()}
    # The key of a whole model without its artifacts has no hash of the compiler.
    found = [
        names[g] for g in _BEFORE_TRACING if sides[0].get(g) and sides[0][g] != sides[1].get(g)
    ]
    return ["environment", *found] if before.env_hash != after.env_hash else found


def _changed_sources(facts: KeyFacts) -> list[Change]:
    """The traced files that are not as they were when they were traced."""
    fields = [f for f in facts.fields if f.group == _CODE]
    places = {f.name.removeprefix(PLACE): str(f.value) for f in fields if f.name.startswith(PLACE)}
    changes = []
    for field in fields:
        root = places.get(field.name.partition("/")[0])
        path = Path(field.name) if field.name.startswith("/") else Path(root or "", field.name)
        if field.name.startswith(PLACE) or field.name == "forward" or not field.value:
            continue
        digest = _digest(path)
        if digest != field.value:
            note = "a source file that was traced: " + (
                "its contents differ" if digest else f"it is not at {path}"
            )
            changes.append(_source_change(field.name, str(field.value), digest, note))
    return changes


def _source_change(name: str, before: str, after: str, note: str) -> Change:
    return Change(
        group=_CODE,
        name=name,
        before=before,
        after=after or None,
        kind="changed" if after else "removed",
        klass="identity",
        affects_key=True,
        origin_before="probe",
        origin_after="probe" if after else None,
        note=note,
    )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _lacking(ranks: Sequence[str], compilations: Iterable[Compilation]) -> str:
    """The ranks that an entry holds nothing of; empty where it has something of each."""
    # With the artifacts in a whole model's file, a compilation beside it has none.
    stored = {c.label.partition("/")[0] for c in compilations if c.artifacts}
    return _few([rank for rank in ranks if rank not in stored])


def _first(changes: Sequence[Change]) -> str:
    return _few([f"{change.group}.{change.name}" for change in changes])


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
