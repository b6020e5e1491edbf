"""What other systems recorded, as sides of a comparison. Imports no torch.

Whether a file is such a record is asked for each snapshot of vllmc's own too, so the readers are
imported by the functions that read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from vllmc.cli.snapshots import WORDS, Comparison, Side, snapshot_side
from vllmc.core.diagnose.foreign_files import clean
from vllmc.core.diagnose.torch_trace import is_trace
from vllmc.core.diagnose.vllm_factors import ENVIRONMENT, HASHES, KeyFacts
from vllmc.core.diagnose.vllm_layout import is_vllm_cache
from vllmc.core.diagnose.vllm_log import is_vllm_log, read_log
from vllmc.core.diagnose.vllm_recorded import PROVENANCE
from vllmc.core.errors import UsageError, VllmcError

if TYPE_CHECKING:
    from vllmc.core.diagnose.torch_caches import TorchTrace
    from vllmc.core.diagnose.vllm_cache import CacheKind
    from vllmc.core.diagnose.vllm_compare import Subject

ForeignKind: TypeAlias = Literal["vllm-cache", "vllm-log", "torch-trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Keys of vLLM's that something holds: at least one, and remarks on what it holds.

    Those of a `torch_aot_compile` tree are made of other things than all others.
    """

    kind: str
    name: str
    subjects: tuple[Subject, ...]
    tree: CacheKind = "compile"
    notes: tuple[str, ...] = ()


def kind_of(path: Path) -> ForeignKind | None:
    """What of another system a path holds; None where it holds nothing that is known."""
    if path.is_dir() and is_vllm_cache(path):
        return "vllm-cache"
    if path.exists() and is_trace(path):
        return "torch-trace"
    return "vllm-log" if path.is_file() and is_vllm_log(path) else None


def _recorded(text: str) -> Recorded | None:
    """The keys of vLLM's in the directory, log or snapshot `text`; None where it is none.

    Raises `VllmcError` where there is not exactly one cache, or no key in a log.
    """
    path = Path(text)
    kind = None if text in WORDS else kind_of(path)
    if kind == "vllm-cache":
        return _cache(path)
    if kind == "vllm-log":
        return _log(path)
    return _snapshot(path) if text not in WORDS and path.is_file() else None


def compare_recorded(a: str, b: str) -> Comparison | None:
    """Compares what other systems recorded, like with like; None where both sides are vllmc's own.

    Raises `UsageError` (`unlike-sides`) where only one is, or they record different things.
    """
    traces = [text not in WORDS and kind_of(Path(text)) == "torch-trace" for text in (a, b)]
    if all(traces):
        return _compare_traces(Path(a), Path(b))
    left, right = _recorded(a), _recorded(b)
    if left is None and right is None and not any(traces):
        return None
    if left is None or right is None or left.tree != right.tree:
        raise UsageError(
            "unlike-sides",
            f"the keys of '{a}' and '{b}' are made of different things",
            hint="compare a vLLM cache or log with another or with a snapshot of one, a "
            "torch_aot_compile tree with another, and a torch trace with another",
        )
    return _compare(left, right)


def _compare_traces(a: Path, b: Path) -> Comparison:
    from vllmc.core.diagnose.torch_caches import read_trace
    from vllmc.core.diagnose.torch_diff import diff_traces

    left, right = read_trace(a), read_trace(b)
    found = diff_traces(left, right)
    if not found.changes and not found.keys:
        # Nothing differs because nothing is there: to call that equal would mislead.
        raise VllmcError(
            "no-keys",
            "the traces have no key of torch's caches in common",
            context={"notes": list(found.notes)} if found.notes else None,
            hint="the caches were off, bypassed or not asked; vllmc inspect-key TRACE says which",
        )
    return Comparison(
        left=_trace_side(left),
        right=_trace_side(right),
        changes=found.changes,
        same=found.same,
        notes=found.notes,
    )


def _trace_side(trace: TorchTrace) -> Side:
    notes = tuple(f"{trace.name}: {note}" for note in trace.notes)
    return Side(kind="torch-trace", name=trace.name, model="", factors=(), notes=notes)


def _compare(left: Recorded, right: Recorded) -> Comparison:
    from vllmc.core.diagnose.vllm_compare import compare_keys, like_with_like

    a, b, taken = like_with_like(left.subjects, right.subjects)
    found = compare_keys(a, b)
    return Comparison(
        left=_side(left, a),
        right=_side(right, b),
        changes=found.changes,
        same=found.same,
        notes=(*found.notes, *taken),
    )


def _side(recorded: Recorded, subject: Subject) -> Side:
    return Side(
        kind=recorded.kind,
        name=recorded.name,
        model="",
        factors=subject.facts.factors,
        notes=recorded.notes,
    )


def _cache(path: Path) -> Recorded:
    from vllmc.core.diagnose.vllm_cache import read_caches
    from vllmc.core.diagnose.vllm_compare import cache_subjects

    caches = read_caches(path)
    notes = []
    keyed = tuple(cache for cache in caches if cache.kind == "compile")
    if len(keyed) == 1 < len(caches):
        # A start that stores a whole model leaves one key of each kind.
        caches = keyed
        notes.append(f"{path}: its torch_aot_compile tree is not compared; name that of both sides")
    if len(caches) > 1:
        names = [clean(str(cache.path.relative_to(path.resolve()))) for cache in caches]
        raise UsageError(
            "several-keys",
            f"{path} holds {len(caches)} keys, and one is to be compared",
            context={"keys": names},
            hint="name the directory of one; vllmc inspect-key says how they differ",
        )
    [cache] = caches
    notes += [f"{path}: {note}" for note in cache.notes]
    return Recorded(
        kind="vllm-cache",
        name=str(path),
        subjects=cache_subjects(cache),
        tree=cache.kind,
        notes=tuple(notes),
    )


def _log(path: Path) -> Recorded:
    from vllmc.core.diagnose.vllm_compare import log_subjects

    log = read_log(path)
    notes = [*log.notes]
    if log.loaded:
        notes.append(
            f"a whole model was loaded from {log.loaded[-1]}: a start that does so dumps no factors"
        )
    if not log.dumps:
        raise VllmcError(
            "no-factors",
            f"{path} has no dump of cache key factors",
            context={"loaded": list(log.loaded)} if log.loaded else None,
            hint="start vLLM with VLLM_LOGGING_LEVEL=DEBUG"
            + (" and VLLM_USE_AOT_COMPILE=0" if log.loaded else ""),
        )
    subjects = log_subjects(log)
    if len(log.dumps) > len(subjects):
        notes.append(f"{len(log.dumps)} dumps; of each rank the last is taken")
    return Recorded(
        kind="vllm-log",
        name=str(path),
        subjects=subjects,
        notes=tuple(f"{path}: {note}" for note in notes),
    )


def _snapshot(path: Path) -> Recorded | None:
    try:
        side = snapshot_side(path)
    except VllmcError:
        # It is for the caller to say that a file is nothing at all.
        return None
    known = {ENVIRONMENT, *HASHES.values(), *PROVENANCE}
    if not side.factors or not {f.group for f in side.factors} <= known:
        return None
    from vllmc.core.diagnose.vllm_compare import Subject

    hashed = tuple(f for f in side.factors if f.group == ENVIRONMENT or f.name == "hash")
    fields = tuple(f for f in side.factors if f not in hashed)
    facts = KeyFacts(factors=hashed, fields=fields, complete=True)
    subject = Subject(label="", key="", facts=facts)
    return Recorded(kind=side.kind, name=side.name, subjects=(subject,))
