from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vllmc.core.errors import VllmcError
from vllmc.core.graph.layout import Layout, OpStep
from vllmc.core.graph.plan import encode, make_plan, plan_units, unit_ranges
from vllmc.core.obtain import ANY_RANGE, range_name
from vllmc.core.spec import CompileRange, CompileSpec


def ranges_of(*ranges: tuple[int, int], **fields: Any) -> list[str]:
    spec = CompileSpec(ranges=tuple(CompileRange(*r) for r in ranges), **fields)
    return [str(r) for r in unit_ranges(spec)]


def test_sizes_come_before_the_ranges_that_hold_them() -> None:
    assert ranges_of((1, 8), (9, 64), sizes=(16, 1)) == ["1", "16", "1:8", "9:64"]


def test_a_range_of_one_count_and_that_size_are_one_unit() -> None:
    assert ranges_of((1, 1), (2, 8), sizes=(1,)) == ["1", "2:8"]


def test_sizes_need_no_range() -> None:
    assert ranges_of(sizes=(4, 2)) == ["2", "4"]


@pytest.mark.parametrize("kind", ["unbacked", "backed-size-oblivious"])
def test_a_range_from_one_is_whole_where_sizes_are_not_taken_for_above_one(kind: Any) -> None:
    assert ranges_of((1, 64), dynamic_shapes=kind) == ["1:64"]


def test_a_backed_range_from_one_is_the_size_one_and_the_rest() -> None:
    assert ranges_of((1, 64), dynamic_shapes="backed") == ["1", "2:64"]
    assert ranges_of((1, 1), dynamic_shapes="backed") == ["1"]
    assert ranges_of((1, 2), (3, 9), sizes=(5,), dynamic_shapes="backed") == ["1", "2", "5", "3:9"]


def test_identical_pieces_are_planned_once_and_named_by_the_first(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        for _ in range(4):
            x = ops.cut(entry.linear(x))
        return x[0] * 2

    plan = make_plan(*trace_toy(function))
    assert plan.counts == {"total": 9, "splitting": 4, "compilable": 5, "unique": 3}
    assert [unique.names for unique in plan.unique] == [
        ("piece_0",),
        ("piece_2", "piece_4", "piece_6"),
        ("piece_8",),
    ]
    assert plan.layout.pieces == ("piece_0", "piece_2", "piece_8")


def test_a_unit_for_each_unique_piece_and_range(trace_toy: Any, ops: Any) -> None:
    ranges = (CompileRange(1, 8), CompileRange(9, 64))
    captured, spec = trace_toy(
        lambda e, x, p, r: e.linear(ops.cut(ops.cut(x)[0, r])), ranges=ranges, sizes=(4,)
    )
    units = plan_units(make_plan(captured, spec), spec)
    assert [(names, range_name(unit)) for names, unit in units] == [
        (("piece_0",), "4"),
        (("piece_0",), "1:8"),
        (("piece_0",), "9:64"),
        (("piece_2",), "4"),
        (("piece_2",), "1:8"),
        (("piece_2",), "9:64"),
        # The last piece sees rows of logits only: one unit serves every range.
        (("piece_4",), ANY_RANGE),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unbacked", "backed"])
def test_the_unit_of_any_range_is_the_same_whatever_the_ranges(
    link_toy: Any, ops: Any, kind: Any
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return entry.linear(ops.cut(ops.cut(x)[0, rows])).softmax(-1)

    changes = {"backend": "inductor", "dynamic_shapes": kind}
    ranged = link_toy(function, **changes)
    sized = link_toy(function, ranges=(), sizes=(1,), **changes)
    place = ("piece_4", ANY_RANGE)
    # Its key names no range, so neither may its code: not even that of a single token.
    assert ranged.artifacts[place] == sized.artifacts[place]
    ranged.check(1, 2, 17)
    sized.check(1)


def test_without_a_splitting_op_the_error_names_the_nearest(trace_toy: Any) -> None:
    captured, spec = trace_toy(
        lambda e, x, p, r: torch.nn.functional.silu(x)[0], splitting_ops=("aten::silu",)
    )
    with pytest.raises(VllmcError) as caught:
        make_plan(captured, spec)
    assert caught.value.code == "no-splitting-op"
    assert "torch.nn.functional.silu" in caught.value.hint


def test_an_argument_that_a_record_cannot_hold_is_refused() -> None:
    with pytest.raises(VllmcError, match="complex") as caught:
        encode(1j, {})
    assert caught.value.code == "unsupported-model"


def test_a_layout_is_the_same_after_a_record(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        left, right = ops.pair(entry.linear(x), [float("inf"), -0.0])
        room = torch.empty((1, x.shape[1], 8), dtype=torch.float32, device="cpu")
        ops.fill(room)
        return (ops.cut(left.to(torch.float32) + right) + room)[0, rows]

    layout = make_plan(
        *trace_toy(function, splitting_ops=("vllmc_test::pair", "torch.Tensor.to"))
    ).layout
    assert any(isinstance(step, OpStep) for step in layout.steps)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@dataclass
class Tagged:
    """What a forward returns, in fields named as the marks of a record are."""

    ref: Any
    output: Any
    argument: Any = 0


class Attributes:
    def __init__(self, ref: torch.Tensor, call: torch.Tensor) -> None:
        self.ref, self.call = ref, call


def test_a_result_may_have_fields_of_any_name(link_toy: Any, toy_batch: Any, ops: Any) -> None:
    def forward(entry: Any, x: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Any:
        y = ops.cut(entry.linear(x))
        return Tagged("v0", 3, Attributes(y * 2, {"ref": y, "tuple": (y + 1, "v1")}))

    toy, arguments = link_toy(forward), toy_batch(5)
    found, expected = toy.program(*arguments), toy.entry(*arguments)
    assert (found.ref, found.output) == ("v0", 3)
    (y, tag), (z, _) = (made.argument.call["tuple"] for made in (found, expected))
    assert tag == "v1"
    torch.testing.assert_close(
        (found.argument.ref, found.argument.call["ref"], y),
        (expected.argument.ref, expected.argument.call["ref"], z),
    )
