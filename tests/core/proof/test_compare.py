from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllmc.core.compiler.container import EAGER, pack
from vllmc.core.graph.piece import TensorInput
from vllmc.core.proof.compare import Built, BuiltUnit, Verdict, compare
from vllmc.core.spec import CompileRange

SAME = {"code": "same", "bitwise": True, "max_abs_diff": 0.0, "reason": ""}


@pytest.fixture(scope="session")
def build(link_toy: Any, toy_spec: Any, ops: Any) -> Callable[..., Built]:
    """A toy of two pieces with the eager backend: `build(factor, **changes of the spec)`."""

    def make(factor: float = 2.0, **changes: Any) -> Built:
        made = link_toy(
            lambda m, h, p, r: ops.cut(m.linear(h).relu() * factor)[0, r] + 1, **changes
        )
        units = {
            place: BuiltUnit(label=" for ".join(place), code=c.code, data=c.artifact)
            for place, c in made.artifacts.items()
        }
        return Built(spec=toy_spec(**changes), plan=made.plan, units=units)

    return make


def recoded(built: Built, *places: tuple[str, str]) -> Built:
    """The same artifacts, as if other code had been generated at `places`."""
    units = {
        place: dataclasses.replace(unit, code="other") if place in places else unit
        for place, unit in built.units.items()
    }
    return dataclasses.replace(built, units=units)


def told(verdict: Verdict) -> dict[str, Any]:
    row = dataclasses.asdict(verdict)
    del row["differing"], row["of"]
    return row


def test_the_same_code_has_the_same_results(build: Any) -> None:
    verdict = compare(build(), build())
    assert told(verdict) == SAME
    assert (verdict.differing, verdict.of) == ((), 2)


def test_other_code_is_run_and_may_compute_the_same(build: Any) -> None:
    built = build()
    verdict = compare(built, recoded(built, ("piece_2", "1:64")))
    assert told(verdict) == SAME | {"code": "differs"}
    assert (verdict.differing, verdict.of) == (("piece_2 for 1:64",), 2)


def test_other_code_that_computes_something_else_is_seen(build: Any) -> None:
    verdict = compare(build(2.0), build(2.5))
    assert verdict.code == "differs"
    assert verdict.differing == ("piece_0 for 1:64",)
    assert verdict.bitwise is False
    assert verdict.max_abs_diff is not None
    assert 0.1 < verdict.max_abs_diff < 5


def test_one_code_for_pieces_of_two_dtypes_is_run_as_well(build: Any) -> None:
    built = build()
    narrow = tuple(
        dataclasses.replace(
            unique,
            piece=dataclasses.replace(
                unique.piece,
                digest=f"narrow {unique.piece.digest}",
                inputs=tuple(
                    dataclasses.replace(given, dtype=torch.bfloat16)
                    if isinstance(given, TensorInput) and given.dtype == torch.float32
                    else given
                    for given in unique.piece.inputs
                ),
            ),
        )
        for unique in built.plan.unique
    )
    plan = dataclasses.replace(built.plan, unique=narrow)
    verdict = compare(built, dataclasses.replace(built, plan=plan))
    assert (verdict.code, verdict.bitwise) == ("same", False)
    assert verdict.max_abs_diff is not None
    assert 0 < verdict.max_abs_diff < 0.1


def test_units_are_compared_where_they_serve_the_same_token_counts(build: Any) -> None:
    whole = build()
    parts = build(ranges=(CompileRange(1, 16), CompileRange(17, 32)), sizes=(4,))
    for a, b in ((whole, parts), (parts, whole)):
        verdict = compare(a, b)
        assert told(verdict) == SAME | {"reason": "only one side serves 33:64 tokens"}
        assert verdict.of == 6, "each piece for 1:16, 17:32 and 4"
    verdict = compare(whole, recoded(parts, ("piece_0", "4"), ("piece_2", "17:32")))
    assert verdict.differing == ("piece_0 for 4", "piece_2 for 17:32")
    assert (verdict.code, verdict.of, verdict.bitwise) == ("differs", 6, True)


def test_ranges_that_share_no_token_count_cannot_be_compared(build: Any) -> None:
    low, high = build(), build(ranges=(CompileRange(65, 128),))
    verdict = compare(low, high)
    assert verdict.code == "unproved"
    assert verdict.reason == "no number of tokens is compiled for on both sides"


def test_token_counts_that_only_one_side_serves_are_told(build: Any) -> None:
    whole, part = build(), build(ranges=(CompileRange(9, 32),))
    for verdict in (compare(whole, part), compare(part, whole)):
        assert (verdict.code, verdict.bitwise) == ("same", True)
        assert verdict.reason == (
            "only one side serves 1:8 tokens; only one side serves 33:64 tokens"
        )


def test_pieces_that_are_cut_elsewhere_are_compared_by_their_code_alone(build: Any) -> None:
    ops = build().spec.splitting_ops
    finer = build(splitting_ops=(*ops, "torch.Tensor.relu"))
    verdict = compare(build(), finer)
    assert verdict.code == "differs"
    assert (len(verdict.differing), verdict.of) == (2, 3), "the last piece is the same"
    assert (verdict.bitwise, verdict.max_abs_diff) == (None, None)
    assert "cut into other pieces" in verdict.reason


def test_a_unit_that_cannot_be_run_leaves_the_results_unknown(build: Any) -> None:
    built = build()
    source = b"def forward(self, *args):\n    raise RuntimeError('out of bounds')\n"
    broken = BuiltUnit(
        label="piece_0 for 1:64",
        code="other",
        data=pack(EAGER, {"imports": {}}, {"graph.py": source}),
    )
    other = dataclasses.replace(built, units={**built.units, ("piece_0", "1:64"): broken})
    verdict = compare(built, other)
    assert (verdict.code, verdict.bitwise, verdict.max_abs_diff) == ("differs", None, None)
    assert verdict.reason == "piece_0 for 1:64: it does not run on random inputs: out of bounds"
