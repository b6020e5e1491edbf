"""Two configurations of a model, compiled: whose code differs, and whose results do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vllmc.core.graph.piece import Piece
from vllmc.core.graph.plan import Plan
from vllmc.core.prediction import ANY_RANGE
from vllmc.core.proof.numerics import (
    Difference,
    NotComparable,
    alike,
    difference,
    token_counts,
    widest,
)
from vllmc.core.runtime.loader import load_artifact
from vllmc.core.spec import CompileRange, CompileSpec, unit_ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltUnit:
    """A compile unit: the digest of its generated code, and its artifact."""

    label: str
    code: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A configuration compiled; `units` by the first piece that is the unit, and its range."""

    spec: CompileSpec
    plan: Plan
    units: Mapping[tuple[str, str], BuiltUnit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a change was found to change, for the token counts that both sides serve.

    `differing` names the units whose code differs, `of` how many were compared. `bitwise` is
    whether all results are the same bit for bit, `max_abs_diff` how far apart any two values are
    (see `Difference`); both are None where that is not known. `reason` says why, why a change is
    `unproved`, and for which token counts nothing was compared.
    """

    code: Literal["same", "differs", "unproved"]
    differing: tuple[str, ...] = ()
    of: int = 0
    bitwise: bool | None = None
    max_abs_diff: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Match:
    """A unit of each side that serve the same piece, for the token counts of `range`."""

    pieces: tuple[Piece, Piece]
    units: tuple[BuiltUnit, BuiltUnit]
    range: CompileRange

    @property
    def same_code(self) -> bool:
        """Whether the code generated for both is the same."""
        return self.units[0].code == self.units[1].code


def unproved(reason: str) -> Verdict:
    """The verdict about what could not be compiled, or not been compared."""
    return Verdict(code="unproved", reason=reason)


def compare(a: Built, b: Built) -> Verdict:
    """Compares unit by unit: those of one piece that serve the same token counts.

    Pieces that only one side has are compared by their code alone.
    """
    pairs = _pairs(a, b)
    matches = [match for pair in pairs for match in _matches(a, b, *pair)]
    paired = {second for _, second in pairs}
    rest = [unit for (piece, _), unit in b.units.items() if piece not in paired]
    if not matches and not rest:
        return unproved("no number of tokens is compiled for on both sides")
    known = {unit.code for unit in a.units.values()}
    foreign = [unit for unit in rest if unit.code not in known]
    changed = [match.units[1] for match in matches if not match.same_code]
    differing = [unit.label for unit in (*changed, *foreign)]
    reasons = ["the model is cut into other pieces there"] if foreign else []
    found = []
    for match in matches:
        # One code may compute other things: an eager piece of another dtype.
        if not match.same_code or match.pieces[0].digest != match.pieces[1].digest:
            try:
                found.append(_difference(match))
            except NotComparable as error:
                reasons.append(f"{match.units[1].label}: {error}")
    total = widest(found)
    return Verdict(
        code="differs" if differing else "same",
        differing=tuple(differing),
        of=len(matches) + len(rest),
        # One difference is enough to know that not all is the same.
        bitwise=None if reasons and total.bitwise else total.bitwise,
        max_abs_diff=None if reasons else total.max_abs,
        reason="; ".join([*reasons, *_served_by_one(unit_ranges(a.spec), unit_ranges(b.spec))]),
    )


def _pairs(a: Built, b: Built) -> list[tuple[str, str]]:
    """The first names of the pieces that stand for each other on the two sides."""
    firsts, seconds = a.plan.unique, b.plan.unique
    by_position = len(firsts) == len(seconds) and (
        a.spec.splitting_ops == b.spec.splitting_ops
        and all(alike(x.piece, y.piece) for x, y in zip(firsts, seconds, strict=True))
    )
    if by_position:
        return [(x.names[0], y.names[0]) for x, y in zip(firsts, seconds, strict=True)]
    names = {unique.piece.digest: unique.names[0] for unique in firsts}
    return [(names[y.piece.digest], y.names[0]) for y in seconds if y.piece.digest in names]


def _matches(a: Built, b: Built, first: str, second: str) -> Iterator[_Match]:
    pieces = (_piece(a.plan, first), _piece(b.plan, second))
    shared = _shared_ranges(unit_ranges(a.spec), unit_ranges(b.spec))
    if not pieces[0].depends_on_tokens:
        shared = {(ANY_RANGE, ANY_RANGE): CompileRange(1, a.spec.max_tokens)}
    for (name_a, name_b), tokens in shared.items():
        units = (a.units[first, name_a], b.units[second, name_b])
        yield _Match(pieces=pieces, units=units, range=tokens)


def _piece(plan: Plan, name: str) -> Piece:
    return next(unique.piece for unique in plan.unique if unique.names[0] == name)


def _shared_ranges(
    a: Sequence[CompileRange], b: Sequence[CompileRange]
) -> dict[tuple[str, str], CompileRange]:
    """Which range of `a` and which of `b` serve the same token counts, and most of those.

    Ranges are in the order in which they are tried.
    """
    found: dict[tuple[str, str], CompileRange] = {}
    for low, beyond in itertools.pairwise(_ends(a, b)):
        first, second = (next((r for r in side if low in r), None) for side in (a, b))
        if first is None or second is None:
            continue
        here, names = CompileRange(low, beyond - 1), (str(first), str(second))
        before = found.get(names)
        if before is None or here.end - here.start > before.end - before.start:
            found[names] = here
    return found


def _served_by_one(a: Sequence[CompileRange], b: Sequence[CompileRange]) -> Iterator[str]:
    """What to say of the token counts that only one of the sides is compiled for."""
    for low, beyond in itertools.pairwise(_ends(a, b)):
        if any(low in r for r in a) != any(low in r for r in b):
            yield f"only one side serves {CompileRange(low, beyond - 1)} tokens"


def _ends(a: Sequence[CompileRange], b: Sequence[CompileRange]) -> list[int]:
    """Where a range begins, or has just ended."""
    return sorted({end for given in (*a, *b) for end in (given.start, given.end + 1)})


def _difference(match: _Match) -> Difference:
    a, b = (
        (piece, load_artifact(unit.data))
        for piece, unit in zip(match.pieces, match.units, strict=True)
    )
    counts = token_counts(match.range.start, match.range.end)
    return widest(difference(a, b, tokens) for tokens in counts)
