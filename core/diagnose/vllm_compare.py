"""Two of vLLM's cache keys compared: the factors that differ, and what the hashes do not say.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vllmc.core.cache.explain import Change, ChangeClass, diff
from vllmc.core.cache.key import REDACTED, Factor, JsonValue
from vllmc.core.diagnose.vllm_cache import VllmCache
from vllmc.core.diagnose.vllm_factors import (
    ENVIRONMENT,
    HASHES,
    KeyFacts,
    Spurious,
    spurious,
)
from vllmc.core.diagnose.vllm_graph import (
    Graph,
    compare_graphs,
    moved_quotes,
    package_path,
    package_roots,
)
from vllmc.core.diagnose.vllm_log import VllmLog
from vllmc.core.diagnose.vllm_options import is_option, with_cause
from vllmc.core.diagnose.vllm_remedies import explanation, remedy

CONFIG, CODE, COMPILER = HASHES.values()
KEY: Final = "vllm"

_ONLY_HASHED: Final[Mapping[str, str]] = {
    CONFIG: "only its hash is recorded, so which field changed cannot be told; it covers vLLM's "
    "version and the settings of model, cache, parallelism, scheduler, device, loading, attention, "
    "LoRA, speculation, quantization and compilation",
    CODE: "only a hash over the absolute paths and contents of all traced files is recorded, so "
    "which file changed cannot be told",
    COMPILER: "only a hash is recorded, of torch's build, the device with its CUDA and Triton, and "
    "the options of Inductor and functorch, so which of them changed cannot be told",
}
_NOT_RECORDED: Final = (
    "; vllmc, installed beside vLLM, records it from the next compilation on (docs/vllm.md)"
)
_FEW: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One key to compare, from whatever source it is known."""

    label: str
    key: str
    facts: KeyFacts
    graph: Graph | None = None
    ranges: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyComparison:
    """Every difference of two keys, the number of equal factors, and what else is to be said."""

    changes: tuple[Change, ...]
    same: int
    notes: tuple[str, ...]


def cache_subjects(cache: VllmCache) -> tuple[Subject, ...]:
    """The compilations of a cache; a tree that has none is known by its key alone."""
    if not cache.compilations:
        return (Subject(label="", key=cache.key, facts=KeyFacts()),)
    return tuple(
        Subject(
            label=compilation.label,
            key=cache.key,
            facts=compilation.facts,
            graph=compilation.graph,
            ranges=compilation.ranges,
            sources=compilation.places.sources,
        )
        for compilation in cache.compilations
    )


def log_subjects(log: VllmLog) -> tuple[Subject, ...]:
    """The dumps of a log, of those with one label the last; in the order of ranks."""
    last = {dump.label: dump for dump in log.dumps}
    return tuple(
        Subject(label=dump.label, key=dump.key, facts=dump.facts, sources=dump.sources)
        for _, dump in sorted(last.items(), key=lambda item: _order(item[0]))
    )


def like_with_like(
    left: Sequence[Subject], right: Sequence[Subject]
) -> tuple[Subject, Subject, tuple[str, ...]]:
    """The first pair of the same rank and part, else the first of each; and what was taken."""
    by_label = {subject.label: subject for subject in reversed(right)}
    pair = next(((a, by_label[a.label]) for a in left if a.label in by_label), (left[0], right[0]))
    notes = [_spread(side, subjects) for side, subjects in (("a", left), ("b", right))]
    labels = [subject.label for subject in pair]
    if all(labels) and labels[0] != labels[1]:
        notes.append(f"no rank is on both sides: {labels[0]} is compared with {labels[1]}")
    elif len(left) > 1 or len(right) > 1:
        notes.append(f"{labels[0] or labels[1]} is compared, of each side that has several")
    return (*pair, tuple(note for note in notes if note))


def compare_keys(left: Subject, right: Subject) -> KeyComparison:
    """Compares the factors that both sides have; where one has none, the keys alone.

    What a side merely does not record is no difference.
    """
    if not left.facts.factors or not right.facts.factors:
        return _compare_bare(left, right)
    every = diff(left.facts.factors, right.facts.factors, include_provenance=True)
    missing = [change for change in every if _is_unrecorded(change, left.facts, right.facts)]
    changes = [
        told
        for change in every
        if change not in missing
        for told in _told(change, left.facts, right.facts)
    ]
    changes += _provenance(left.facts, right.facts)
    secret = tuple(_secret_changes(left.facts, right.facts))
    changes += [*secret, *_unnamed(left, right, (*changes, *secret), whole=not missing)]
    changes.sort(key=_importance)
    identities = {f.identity for f in (*left.facts.factors, *right.facts.factors)}
    same = len(identities) - len(every) - len(secret)
    return KeyComparison(
        changes=tuple(changes),
        same=same + _equal_fields(left.facts, right.facts),
        notes=(*_gaps(left.facts, right.facts, missing), *_conclusions(left, right, changes)),
    )


def _order(label: str) -> tuple[bool, list[int], bool, str]:
    rank, _, part = label.partition("/")
    numbers = [int(n[:9]) for n in rank.split("_") if n.isdecimal()]
    return (not label, numbers, part != "backbone", part)


def _spread(side: str, subjects: Sequence[Subject]) -> str:
    """What tells the keys of one side apart, as a variable of each engine does."""
    if len({subject.facts.env_hash for subject in subjects if subject.facts.env_hash}) < 2:
        return ""
    values: dict[str, set[str]] = {}
    for subject in subjects:
        for name, value in subject.facts.environment.items():
            values.setdefault(name, set()).add(repr(value))
    names = [name for name, found in sorted(values.items()) if len(found) > 1]
    return f"the keys within {side} differ among themselves, in {_few(names)}"


def _compare_bare(left: Subject, right: Subject) -> KeyComparison:
    sides = [side for side, s in (("a", left), ("b", right)) if not s.facts.factors]
    note = f"{' and '.join(sides)} has no factors, so only the keys can be compared"
    if len(sides) == 2:
        note = "neither side has factors, so only the keys can be compared"
    changes = []
    if left.key != right.key:
        changes.append(
            _change(KEY, "key", left.key, right.key, note="which factor differs is not recorded")
        )
    said = [note]
    if changes:
        said += [*_code_notes(left, right), *_graph_notes(left.graph, right.graph)]
    return KeyComparison(changes=tuple(changes), same=1 - len(changes), notes=tuple(said))


def _is_unrecorded(change: Change, left: KeyFacts, right: KeyFacts) -> bool:
    """Whether a factor is on one side alone because the other side's record has a gap."""
    if change.kind == "changed":
        return False
    lacking = left if change.kind == "added" else right
    return change.group != ENVIRONMENT or not lacking.complete


def _gaps(left: KeyFacts, right: KeyFacts, missing: Sequence[Change]) -> Iterator[str]:
    if missing:
        names = [c.name if c.group == ENVIRONMENT else c.group for c in missing]
        yield f"not compared, as one side does not record them: {_few(names)}"
    known = [dict(side.hidden) for side in (left, right)]
    names = [
        name
        for name, value in left.environment.items()
        if value == right.environment.get(name) == REDACTED
        and not all(name in hidden for hidden in known)
    ]
    if names:
        yield f"not compared, as a snapshot has no secrets: {_few(names)}"


def _told(change: Change, left: KeyFacts, right: KeyFacts) -> Iterator[Change]:
    """A change; that of a hash by the fields that it is made of, where both sides have them."""
    sides = [_fields(side, change.group) for side in (left, right)]
    if change.group == ENVIRONMENT or not all(sides):
        yield _explained(change)
        return
    found = [_of_field(field, left, right) for field in diff(*sides)]
    if not found:
        note = "of the fields that are recorded none differs, so it is one that is not"
        found = [replace(change, klass="unknown", note=note)]
    yield from found


def _of_field(change: Change, left: KeyFacts, right: KeyFacts) -> Change:
    klass: ChangeClass = change.klass
    if klass != "secret":
        is_model = change.group == CODE or change.name.startswith("model_config.")
        klass = "identity" if is_model else "codegen"
    if change.group == COMPILER and is_option(change.name):
        return with_cause(replace(change, klass=klass), left, right)
    notes = [note for note in (explanation(change.group, change.name), change.note) if note]
    return replace(
        change,
        klass=klass,
        note="; ".join(notes),
        restore=remedy(change.group, change.name, change.before),
    )


def _provenance(left: KeyFacts, right: KeyFacts) -> Iterator[Change]:
    """What vLLM does not hash and is recorded, where both sides record any."""
    sides = [[f for f in side.fields if not f.affects_key] for side in (left, right)]
    if all(sides):
        for change in diff(*sides, include_provenance=True):
            yield replace(change, klass="surroundings", note="recorded; no part of vLLM's key")


def _fields(facts: KeyFacts, group: str) -> list[Factor]:
    return [f for f in facts.fields if f.group == group and f.affects_key]


def _equal_fields(left: KeyFacts, right: KeyFacts) -> int:
    others = {f.identity: f.compared for f in right.fields}
    return sum(f.identity in others and others[f.identity] == f.compared for f in left.fields)


def _explained(change: Change) -> Change:
    if change.group != ENVIRONMENT:
        note = _ONLY_HASHED.get(change.group, "") + _NOT_RECORDED
        return replace(change, klass="unknown", note=note)
    if change.kind != "changed":
        side = "a" if change.kind == "added" else "b"
        note = f"not a factor of {side}: another release of vLLM"
        return replace(change, klass="unknown", note=note)
    known = spurious(change.name)
    klass: ChangeClass = "codegen" if known is None else "surroundings"
    return replace(
        change,
        klass="secret" if change.klass == "secret" else klass,
        note=_spurious_note(known),
        # Of one that shapes no code, what to set it to is another matter, and said in the note.
        restore="" if known else remedy(change.group, change.name, change.before),
    )


def _spurious_note(known: Spurious | None) -> str:
    if known is None:
        return ""
    return f"spurious: {known.reason}, which shapes no code; {known.advice}"


def _secret_changes(left: KeyFacts, right: KeyFacts) -> Iterator[Change]:
    """The variables whose values are left out on both sides and differ."""
    others = dict(right.hidden)
    for name, digest in left.hidden:
        if others.get(name, digest) != digest:
            note = _spurious_note(spurious(name))
            yield _change(ENVIRONMENT, name, REDACTED, REDACTED, klass="secret", note=note)


def _unnamed(
    left: Subject, right: Subject, changes: Sequence[Change], *, whole: bool
) -> Iterator[Change]:
    """The difference that no recorded factor accounts for, by the hash that it shows in.

    With the `whole` record on both sides, different names of directories are no difference.
    """
    hashes = (left.facts.env_hash, right.facts.env_hash)
    if all(hashes) and hashes[0] != hashes[1]:
        if not any(change.group == ENVIRONMENT for change in changes):
            note = "the variable that differs is not recorded on both sides"
            yield _change(ENVIRONMENT, "hash", *hashes, note=note)
    elif not changes and not whole and left.key and right.key and left.key != right.key:
        note = "what differs is not recorded on both sides"
        yield _change(KEY, "key", left.key, right.key, note=note)


def _change(
    group: str,
    name: str,
    before: JsonValue,
    after: JsonValue,
    *,
    klass: ChangeClass = "unknown",
    note: str,
) -> Change:
    return Change(
        group=group,
        name=name,
        before=before,
        after=after,
        kind="changed",
        klass=klass,
        affects_key=True,
        origin_before="probe",
        origin_after="probe",
        note=note,
    )


def _importance(change: Change) -> tuple[int, int, str]:
    """First what is named on both sides, what may shape code before what does not."""
    if not change.affects_key:
        return (3, 0, change.name)
    if change.group != ENVIRONMENT:
        return (1, [CONFIG, CODE, COMPILER, KEY].index(change.group), change.name)
    if change.kind != "changed":
        return (2, 0, change.name)
    return (0, ["codegen", "unknown", "secret", "surroundings"].index(change.klass), change.name)


def _conclusions(left: Subject, right: Subject, changes: Sequence[Change]) -> Iterator[str]:
    changes = [change for change in changes if change.affects_key]
    groups = {change.group for change in changes}
    if changes and all(c.klass == "surroundings" for c in changes):
        yield "everything that differs is spurious"
    releases = [side.facts.release for side in (left, right)]
    if all(releases) and releases[0] != releases[1]:
        yield f"two releases of vLLM: a is {releases[0]}; b is {releases[1]}"
    if CODE in groups:
        yield from _code_notes(left, right)
    if CONFIG in groups and left.ranges and right.ranges and left.ranges != right.ranges:
        yield (
            f"config: the compile ranges differ ({', '.join(left.ranges[:_FEW])} and "
            f"{', '.join(right.ranges[:_FEW])}), so max_num_batched_tokens or the compile sizes do"
        )
    if changes and (left.graph is None or right.graph is None) and groups != {ENVIRONMENT}:
        yield "graphs: not compared, as both sides must be directories with a computation_graph.py"
    elif changes:
        yield from _graph_notes(left.graph, right.graph)
    elif left.key and right.key and left.key != right.key:
        yield f"the factors are the same, but the directories are called {left.key} and {right.key}"


def _code_notes(left: Subject, right: Subject) -> Iterator[str]:
    roots = [package_roots(side.sources) for side in (left, right)]
    if all(roots) and roots[0] != roots[1]:
        yield (
            f"code: the sources lie in {_few(roots[0])} and in {_few(roots[1])}. vLLM hashes the "
            "absolute path of each file with its contents, so another virtual environment alone "
            "makes another key: install it at the same path"
        )
    names = [{package_path(path) for path in side.sources} for side in (left, right)]
    if left.graph is not None and right.graph is not None:
        if moved := moved_quotes(left.graph, right.graph):
            yield (
                f"code: the graphs quote other lines of {_few(moved)}: contents differ, or another "
                "branch was traced"
            )
    elif all(names) and names[0] != names[1]:
        yield f"code: traced on one side alone: {_few(sorted(names[0] ^ names[1]))}"


def _graph_notes(left: Graph | None, right: Graph | None) -> Iterator[str]:
    if left is None or right is None:
        return
    found = compare_graphs(left, right)
    if found.sameness == "identical":
        yield "graphs: identical, so what differs did not change the graph"
    elif found.sameness == "names":
        yield "graphs: the same but for layers' names and paths"
    else:
        where = f" in {found.piece}" if found.piece else ""
        counts = f"{len(left.pieces)} and {len(right.pieces)} pieces"
        yield (
            f"graphs: different, of {counts}; first{where}: {found.before or '(nothing)'} -> "
            f"{found.after or '(nothing)'}"
        )


def _few(names: Sequence[str]) -> str:
    if not names:
        return "what the dumps do not show"
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f"{', '.join(names[:_FEW])}{more}"
