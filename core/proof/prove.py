"""Which of the changes between two configurations change what is generated for a model's pieces.

The configuration of side A is set up in this process and its pieces are compiled. Then each
change is made on its own, and all of them together. What comes out is compared: code by its
digest, results by running what differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from vllmc.core.cache.explain import Pair, differing
from vllmc.core.cache.key import Factor, canonical_json
from vllmc.core.errors import VllmcError
from vllmc.core.job import Job
from vllmc.core.proof.compare import Verdict, compare, unproved
from vllmc.core.proof.settings import Setting, not_settable, read_setting, with_settings
from vllmc.core.proof.workbench import Workbench

Identity: TypeAlias = tuple[str, str]

_FIRST: Final = "side a"
# What a side says of its model; the proof is about the one that was named for it.
_OF_THE_MODEL: Final = frozenset({"model", "sources", "graph", "range"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvedChange:
    """A factor that differs, and what that was found to change.

    `follows` says that the factor cannot be set, but changed here with those that can: what they
    change together holds for it too.
    """

    pair: Pair
    verdict: Verdict
    follows: bool

    @property
    def identity(self) -> Identity:
        """The factor's group and name."""
        return _identity(self.pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was found, in the order of `differing`.

    `pieces` is how many unique pieces the model has under side A, None where that was not
    compiled. `together` is about all changes that can be made and compiled here. `elsewhere` are
    factors that the sides have in common, but not with this process, which cannot set them.
    """

    pieces: int | None
    changes: tuple[ProvedChange, ...]
    together: Verdict
    elsewhere: tuple[Identity, ...]


def prove(a: Sequence[Factor], b: Sequence[Factor], bench: Workbench) -> Proof:
    """Proves the changes from `a` to `b` that affect the key.

    A change that cannot be made or compiled here is `unproved`, with the reason.
    """
    start = _adopt(a, bench)
    pairs = differing(a, b)
    settings: dict[Identity, Setting] = {}
    verdicts: dict[Identity, Verdict] = {}
    for pair in pairs:
        try:
            settings[_identity(pair)] = _setting(pair, start)
        except VllmcError as error:
            verdicts[_identity(pair)] = unproved(_reason(error))
    wanted = _texts(b)
    for identity, setting in settings.items():
        verdicts[identity] = _attempt(start, [setting], wanted, bench, ".".join(identity))
    everything = [*settings.values()]
    together = _attempt(start, everything, wanted, bench, "all changes together")
    proved = [s for i, s in settings.items() if verdicts[i].code != "unproved"]
    if proved and together.code == "unproved":
        # What fails alone may be what fails in company.
        everything = proved
        together = _attempt(start, everything, wanted, bench, "all changes together")
    # Only what is proved together is proved for what comes with it.
    followers = _followers(pairs, start, everything, bench) if together.code != "unproved" else ()
    return Proof(
        pieces=_pieces(start, bench) if settings else None,
        changes=tuple(
            ProvedChange(
                pair=pair,
                verdict=verdicts[_identity(pair)],
                follows=_identity(pair) not in settings and _identity(pair) in followers,
            )
            for pair in pairs
        ),
        together=together,
        elsewhere=_elsewhere(a, b, start),
    )


def _adopt(side: Iterable[Factor], bench: Workbench) -> Job:
    """A job as near to `side` as it can be made here."""
    plain = bench.plain_job()
    here = _texts(plain.factors)
    settings = []
    for factor in side:
        text = canonical_json(factor.value)
        # What is no factor here is never set, whatever a snapshot lists.
        if factor.affects_key and here.get(factor.identity, text) != text:
            with contextlib.suppress(VllmcError):
                settings.append(read_setting(factor))
    return bench.job(with_settings(plain.spec, settings))


def _setting(pair: Pair, start: Job) -> Setting:
    """What makes the change `pair` out of `start`. Raises `VllmcError` where nothing does."""
    before, after = pair
    if before is None or after is None:
        read_setting(_present(pair))
        raise not_settable("only one of the sides has it")
    setting = read_setting(after)
    if _texts(start.factors).get(before.identity) != canonical_json(before.value):
        read_setting(before)
        raise not_settable("the value of side a takes no effect here")
    return setting


def _attempt(
    start: Job,
    settings: Sequence[Setting],
    wanted: dict[Identity, str],
    bench: Workbench,
    label: str,
) -> Verdict:
    """What `settings`, made on top of `start`, change."""
    if not settings:
        return unproved("no change can be made here")
    try:
        first = bench.build(start, _FIRST)
    except VllmcError as error:
        return unproved(f"side a cannot be compiled: {_reason(error)}")
    try:
        job = bench.job(with_settings(start.spec, settings))
        here = _texts(job.factors)
        for setting in settings:
            identity = (setting.group, setting.name)
            if here.get(identity) != wanted[identity]:
                raise not_settable("the value of side b takes no effect here")
        return compare(first, bench.build(job, label))
    except VllmcError as error:
        return unproved(_reason(error))


def _followers(
    pairs: Iterable[Pair], start: Job, settings: Sequence[Setting], bench: Workbench
) -> frozenset[Identity]:
    """The factors that change as in `pairs` once `settings` are made."""
    here = _texts(start.factors)
    there = _texts(bench.job(with_settings(start.spec, settings)).factors)
    return frozenset(
        before.identity
        for before, after in pairs
        if before is not None
        and after is not None
        and here.get(before.identity) == canonical_json(before.value)
        and there.get(after.identity) == canonical_json(after.value)
    )


def _pieces(start: Job, bench: Workbench) -> int | None:
    try:
        return len(bench.build(start, _FIRST).plan.unique)
    except VllmcError:
        return None


def _elsewhere(a: Iterable[Factor], b: Iterable[Factor], start: Job) -> tuple[Identity, ...]:
    here, other = _texts(start.factors), _texts(b)
    return tuple(
        factor.identity
        for factor in a
        if factor.affects_key
        and factor.group not in _OF_THE_MODEL
        and canonical_json(factor.value) == other.get(factor.identity)
        and here.get(factor.identity) != canonical_json(factor.value)
    )


def _texts(factors: Iterable[Factor]) -> dict[Identity, str]:
    return {factor.identity: canonical_json(factor.value) for factor in factors}


def _present(pair: Pair) -> Factor:
    found = pair[0] or pair[1]
    assert found is not None, "a pair has at least one side"
    return found


def _identity(pair: Pair) -> Identity:
    return _present(pair).identity


def _reason(error: VllmcError) -> str:
    """Why something cannot be done, in one line."""
    cause = str(error.context.get("cause", "")).strip().splitlines()
    return f"{error.message}: {cause[0]}" if cause else error.message
