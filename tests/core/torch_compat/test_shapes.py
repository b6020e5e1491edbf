from __future__ import annotations

import pytest
import sympy
import torch

from vllmc.core.torch_compat.shapes import ShapeScope, SymbolRange, truth

S = sympy.Symbol("s0", integer=True, nonnegative=True)
R = sympy.Symbol("s1", integer=True, nonnegative=True)


def scope(low: int, high: int | None, *, backed: bool = False) -> ShapeScope:
    return ShapeScope([SymbolRange(symbol=S, low=low, high=high, backed=backed)])


def test_a_range_of_one_value_is_a_number() -> None:
    size = scope(4, 4).size(S * 2)
    assert type(size) is int
    assert size == 8


@pytest.mark.parametrize("backed", [False, True])
def test_a_tensor_has_the_shape_and_stride_asked_for(backed: bool) -> None:
    given = scope(1, 64, backed=backed)
    tensor = given.tensor(
        (sympy.Integer(1), S, sympy.Integer(8)),
        (8 * S, sympy.Integer(8), sympy.Integer(1)),
        dtype=torch.bfloat16,
        device="cpu",
    )
    assert tensor.dtype is torch.bfloat16
    tokens = tensor.shape[1]
    assert isinstance(tokens, torch.SymInt)
    assert tokens.node.has_hint() is backed
    assert str(tensor.stride(0)) == str(8 * tokens)
    assert given.narrowed() == []


def test_a_guard_beyond_the_range_is_reported() -> None:
    given = scope(1, 64, backed=True)
    size = given.size(S)
    assert size > 8
    assert given.narrowed()


def test_a_guard_that_the_range_implies_is_not() -> None:
    given = scope(16, 64, backed=True)
    size = given.size(S)
    assert size > 8
    assert size <= 64
    assert given.narrowed() == []


def test_a_size_taken_for_one_number_is_reported() -> None:
    given = scope(1, 64, backed=True)
    size = given.size(S)
    assert isinstance(size, torch.SymInt)
    int(size)
    assert given.narrowed()


def test_unbacked_sizes_cannot_be_guarded_on() -> None:
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    given = scope(1, None)
    with pytest.raises(GuardOnDataDependentSymNode):
        bool(given.size(S) > 8)
    assert given.narrowed() == []


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (sympy.true, True),
        (sympy.false, False),
        (S >= 1, True),
        (S <= 64, True),
        (S <= 63, False),
        (sympy.Ne(S, 0), True),
        (sympy.Ne(S, 1), False),
        (sympy.Eq(sympy.Mod(S, 2), 0), False),
        (sympy.Ne(S, 7), None),
        (R <= S + 64, True),
        (R <= S, False),
        (sympy.Symbol("other") > 0, None),
    ],
    ids=str,
)
def test_the_truth_of_a_condition_over_a_range(
    condition: sympy.Basic, expected: bool | None
) -> None:
    assert truth(condition, {S: (1, 64), R: (1, 64)}) is expected
