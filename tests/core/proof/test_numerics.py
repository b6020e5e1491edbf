from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch

from vllmc.core.graph.piece import Piece, SizeInput, TensorInput
from vllmc.core.graph.plan import make_plan
from vllmc.core.proof.numerics import (
    Difference,
    NotComparable,
    alike,
    difference,
    token_counts,
    widest,
)
from vllmc.kernels.forward_context import current_experts

EQUAL = Difference(bitwise=True, max_abs=0.0)
Call = Callable[[list[Any]], Sequence[Any]]
Pieces = Callable[..., tuple[Piece, ...]]


@pytest.fixture(scope="session")
def pieces(trace_toy: Any) -> Pieces:
    """The unique pieces of a toy."""

    def make(function: Any, **changes: Any) -> tuple[Piece, ...]:
        captured, spec = trace_toy(function, **changes)
        return tuple(unique.piece for unique in make_plan(captured, spec).unique)

    return make


@pytest.fixture(scope="session")
def piece(pieces: Pieces, ops: Any) -> Piece:
    """The part before the cut, which holds the embedding: ids and positions are integers."""
    found = pieces(lambda m, h, p, r: ops.cut(m.linear(h) + p[..., None])[0, r])
    assert {i.dtype.is_floating_point for i in found[0].inputs if isinstance(i, TensorInput)} == {
        True,
        False,
    }
    return found[0]


def run(piece: Piece) -> Call:
    module = piece.module
    return lambda args: module(*args)


def changed(piece: Piece, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The piece with its first output changed."""

    def call(args: list[Any]) -> Sequence[Any]:
        first, *others = run(piece)(args)
        return [change(first.clone()), *others]

    return call


def compared(piece: Piece, change: Callable[[torch.Tensor], torch.Tensor]) -> Difference:
    return difference((piece, run(piece)), (piece, changed(piece, change)), 7)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_a_piece_agrees_with_itself(piece: Piece, tokens: int) -> None:
    assert difference((piece, run(piece)), (piece, run(piece)), tokens) == EQUAL


def test_the_largest_difference_of_any_value_is_told(piece: Piece) -> None:
    def change(x: torch.Tensor) -> torch.Tensor:
        x[0, 0, 0] += 0.5
        x[0, 3, 1] -= 2
        return x

    found = compared(piece, change)
    assert not found.bitwise
    assert found.max_abs == pytest.approx(2, rel=1e-6)


def test_the_last_bit_counts(piece: Piece) -> None:
    found = compared(piece, lambda x: torch.nextafter(x, torch.tensor(math.inf)))
    assert not found.bitwise
    assert found.max_abs is not None
    assert 0 < found.max_abs < 1e-5


def test_a_number_against_none_has_no_distance(piece: Piece) -> None:
    for value in (math.nan, math.inf):
        assert compared(piece, lambda x, v=value: x.fill_(v)) == Difference(
            bitwise=False, max_abs=None
        )


def test_what_both_lack_is_equal(piece: Piece) -> None:
    infinite = changed(piece, lambda x: x.fill_(math.inf))
    lacking = changed(piece, lambda x: x.fill_(math.nan))
    for call in (infinite, lacking):
        assert difference((piece, call), (piece, call), 7) == EQUAL


def test_inputs_are_near_one_the_same_each_time_and_index_what_there_is(piece: Piece) -> None:
    seen: list[list[Any]] = []

    def look(args: list[Any]) -> Sequence[Any]:
        seen.append([a.clone() if isinstance(a, torch.Tensor) else a for a in args])
        return run(piece)(args)

    difference((piece, look), (piece, look), 7)
    difference((piece, look), (piece, look), 7)
    assert len(seen) == 4
    for args in seen[1:]:
        assert all(map(torch.equal, args, seen[0]))
    for value in seen[0]:
        if value.dtype.is_floating_point:
            assert 0 < value.abs().max() < 6
        else:
            assert set(value.unique().tolist()) == {0, 1}


def test_a_single_token_has_no_other_index_than_zero(piece: Piece) -> None:
    def look(args: list[Any]) -> Sequence[Any]:
        integers = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int64]
        assert integers
        assert not any(a.any() for a in integers)
        return run(piece)(args)

    difference((piece, look), (piece, look), 1)


def test_what_a_piece_writes_to_its_inputs_counts(pieces: Pieces, ops: Any) -> None:
    def toy(m: Any, h: Any, p: Any, r: Any) -> Any:
        state = ops.cut(h)
        state.mul_(2)
        return ops.cut(h)[0, r] + state[0, r]

    [writer] = [
        piece for piece in pieces(toy) if any(node.target == "mul_" for node in piece.graph.nodes)
    ]

    def lazy(args: list[Any]) -> Sequence[Any]:
        return run(writer)([a.clone() if isinstance(a, torch.Tensor) else a for a in args])

    assert difference((writer, run(writer)), (writer, run(writer)), 7) == EQUAL
    assert not difference((writer, run(writer)), (writer, lazy), 7).bitwise


@pytest.mark.parametrize(
    "allocate",
    [
        lambda h: torch.empty_like(h),
        lambda h: h.new_empty((1, h.shape[1], 8)),
        lambda h: torch.empty((1, h.shape[1], 8), dtype=h.dtype),
    ],
)
def test_memory_that_nobody_wrote_to_is_not_compared(
    pieces: Pieces, ops: Any, allocate: Callable[[Any], Any]
) -> None:
    def toy(m: Any, h: Any, p: Any, r: Any) -> Any:
        hidden = m.linear(h)
        out = allocate(hidden)
        ops.fill(out)
        return (out + hidden)[0, r]

    piece = pieces(toy)[0]
    [empty] = [
        index
        for index, node in enumerate(piece.graph.output_node().args[0])
        if "empty" in str(node.target)
    ]

    def soiled(args: list[Any], index: int) -> Sequence[Any]:
        return [x.fill_(9) if i == index else x for i, x in enumerate(run(piece)(args))]

    whole = (piece, run(piece))
    assert difference(whole, (piece, lambda args: soiled(args, empty)), 7) == EQUAL
    assert not difference(whole, (piece, lambda args: soiled(args, 1 - empty)), 7).bitwise


def test_memory_that_the_piece_itself_wrote_to_is_compared(pieces: Pieces, ops: Any) -> None:
    def toy(m: Any, h: Any, p: Any, r: Any) -> Any:
        out = torch.empty_like(h)
        out.copy_(h)
        return ops.cut(out)[0, r]

    assert not compared(pieces(toy)[0], lambda x: x + 1).bitwise


def test_pieces_of_two_dtypes_are_given_the_same_values(piece: Piece) -> None:
    narrow = dataclasses.replace(
        piece,
        inputs=tuple(
            dataclasses.replace(given, dtype=torch.bfloat16)
            if isinstance(given, TensorInput) and given.dtype == torch.float32
            else given
            for given in piece.inputs
        ),
    )
    assert alike(piece, narrow)
    seen: list[list[Any]] = []

    def look(args: list[Any]) -> Sequence[Any]:
        seen.append(list(args))
        return run(piece)(args)

    found = difference((piece, look), (narrow, look), 7)
    first, second = seen
    assert {a.dtype for a in second} == {torch.bfloat16, torch.int64}
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(first, second, strict=True))
    assert not found.bitwise
    assert found.max_abs is not None
    assert 0 < found.max_abs < 0.1


def test_pieces_that_take_something_else_are_not_alike(piece: Piece) -> None:
    *others, last = piece.inputs
    assert alike(piece, piece)
    assert not alike(piece, dataclasses.replace(piece, inputs=tuple(others)))
    assert not alike(piece, dataclasses.replace(piece, outputs=piece.outputs + 1))
    for given in (
        SizeInput(value=piece.inputs[0].shape[-1]),  # type: ignore[union-attr]
        dataclasses.replace(last, shape=(sympy.Integer(3),), stride=(sympy.Integer(1),)),
        dataclasses.replace(last, dtype=torch.int32),
    ):
        assert not alike(piece, dataclasses.replace(piece, inputs=(*others, given)))


def test_a_piece_that_refuses_random_inputs_is_not_compared(piece: Piece) -> None:
    def refuse(args: list[Any]) -> Sequence[Any]:
        raise RuntimeError("index out of bounds\nat some place")

    with pytest.raises(NotComparable, match=r"on random inputs: index out of bounds$"):
        difference((piece, run(piece)), (piece, refuse), 7)


def test_a_piece_that_reads_a_layers_experts_or_cache_is_not_compared(piece: Piece) -> None:
    def refuse(args: list[Any]) -> Sequence[Any]:
        return [current_experts("a.layer")]

    with pytest.raises(NotComparable, match="experts or KV cache, which are no inputs"):
        difference((piece, refuse), (piece, run(piece)), 7)


def test_results_of_other_shapes_are_not_compared(piece: Piece) -> None:
    with pytest.raises(NotComparable, match="other shapes"):
        compared(piece, lambda x: x[:, :3])


@pytest.mark.parametrize(
    ("low", "high", "counts"),
    [(1, 8192, (1, 7, 67)), (4, 4, (4,)), (1, 5, (1, 5)), (17, 40, (17, 23, 40))],
)
def test_token_counts_lie_within_the_range(low: int, high: int, counts: tuple[int, ...]) -> None:
    assert token_counts(low, high) == counts


def test_the_widest_of_several_differences_knows_no_more_than_each() -> None:
    near, far = (Difference(bitwise=False, max_abs=d) for d in (1e-6, 1e-3))
    assert widest([EQUAL, far, near]) == far
    assert widest([EQUAL, EQUAL]) == EQUAL
    unknown = Difference(bitwise=False, max_abs=None)
    assert widest([far, unknown]) == unknown
