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
from vllmc.core.diagnose.vllm_factors import HASHES, KeyFacts
from vllmc.core.diagnose.vllm_recorded import PLACE, Start, Tree

Outcome: TypeAlias = Literal["would-hit", "would-miss", "unknown"]

NOT_KNOWN: Final = (
    "fields that vLLM sets only once its workers run, as after measuring the memory",
    "options of torch that the model's code or another plugin sets when it is loaded",
    "which function of the model is compiled, and parts beside the main model that are stored "
    "under a key of their own",
    "whether the stored artifacts load: they are not opened",
)

_CODE: Final = HASHES["code"]
_BEFORE_TRACING: Final = (HASHES["config"], HASHES["compiler"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What a start would find: `key` is that of the entry it is about, empty where there is none.

    `changes` are from that entry to the start.
    """

    outcome: Outcome
    reason: str
    key: str = ""
    changes: tuple[Change, ...] = ()


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
    # The newest of the nearest.
    compared = [_against(start, cache) for cache in reversed(known)]
    order: tuple[Outcome, ...] = ("would-hit", "unknown", "would-miss")
    return min(compared, key=lambda one: (order.index(one.outcome), len(one.changes)))


def _against(start: Start, cache: VllmCache) -> Foreseen:
    """What a start would find in one entry, judged by all the ranks that it needs."""
    main = cache.main
    assert main is not None, "only entries that record factors are compared"
    before = Subject(label=main.label, key="", facts=main.facts)
    after = Subject(label="", key="", facts=start.facts)
    changes = [c for c in compare_keys(before, after).changes if c.affects_key]
    changes = [change for change in changes if change.group != _CODE]
    unequal = _unequal(main.facts, start.facts)
    if unequal and not changes:
        return _miss(cache, (), f"the hash of the {' and of the '.join(unequal)} differs")
    changes += _changed_sources(main.facts)
    if changes:
        return _miss(cache, changes, f"the nearest entry differs in {_first(changes)}")
    if not any(f.group == _CODE for f in main.facts.fields):
        reason = (
            "all hashes but that of the sources are the same, and which they are is not recorded"
        )
        return Foreseen(outcome="unknown", reason=reason, key=cache.key)
    if lacking := _lacking(start.ranks, cache.compilations):
        return _miss(cache, (), f"there is nothing of {lacking} in the entry")
    return Foreseen(
        outcome="would-hit",
        reason="the factors are the same, and the traced sources are as they were",
        key=cache.key,
    )


def _miss(cache: VllmCache, changes: Sequence[Change], reason: str) -> Foreseen:
    return Foreseen(outcome="would-miss", reason=reason, key=cache.key, changes=tuple(changes))


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


def _lacking(ranks: int, compilations: Iterable[Compilation]) -> str:
    """The first rank that an entry holds nothing of; empty where it has something of each."""
    # With the artifacts in a whole model's file, a compilation beside it has none.
    stored = {c.label.split("/")[0].split("_")[1] for c in compilations if c.artifacts}
    return next((f"rank {n}" for n in range(ranks) if str(n) not in stored), "")


def _first(changes: Sequence[Change]) -> str:
    names = [f"{change.group}.{change.name}" for change in changes]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
