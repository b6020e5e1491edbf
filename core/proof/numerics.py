"""Whether two artifacts of a piece compute the same: both run on the same random inputs.

Inputs are drawn so that values stay near 1 through the piece: activations and vectors from a
normal distribution, matrices of weights from one that keeps the size of what they multiply.
Integers are 0 or 1, so that they index whatever they index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx

from vllmc.core.errors import VllmcError
from vllmc.core.graph.piece import OpaqueInput, Piece, PieceInput, SizeInput, TensorInput, symbol
from vllmc.core.graph.targets import allocates
from vllmc.core.torch_compat.opaque import real_value

_ROWS = 3
# Less than a vector register of floats, and more than several with a rest.
_STEPS = (0, 6, 66)


class NotComparable(Exception):
    """The results cannot be compared; `str()` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far apart results are.

    `bitwise` is whether every bit is the same; `max_abs` the largest absolute difference of two
    values, None where one side has a number and the other none (nan, infinity).
    """

    bitwise: bool
    max_abs: float | None


Runnable = tuple[Piece, Callable[[list[Any]], Sequence[Any]]]
"""A piece, and what an artifact of it loads to."""

Sizes = dict[sympy.Symbol, int]


def token_counts(low: int, high: int) -> tuple[int, ...]:
    """A few numbers of tokens between `low` and `high`, both inclusive."""
    return tuple(sorted({min(high, low + step) for step in _STEPS}))


def alike(a: Piece, b: Piece) -> bool:
    """Whether the pieces take and give the same, but for dtypes and devices."""
    if (a.roles, a.outputs, len(a.inputs)) != (b.roles, b.outputs, len(b.inputs)):
        return False
    # In numbers: `256*s0` and `256*Max(1, s0)` are the same stride.
    sizes = _sizes(a, 7)
    return all(_form(x, sizes) == _form(y, sizes) for x, y in zip(a.inputs, b.inputs, strict=True))


def difference(a: Runnable, b: Runnable, tokens: int) -> Difference:
    """Runs both, whose pieces are `alike`, for `tokens` tokens. What they write to counts too.

    Memory that a piece allocates for others to write to does not: it holds what was there before.

    Raises `NotComparable` where one of them does not take random inputs.
    """
    (piece_a, call_a), (piece_b, call_b) = a, b
    sizes = _sizes(piece_a, tokens)
    generator = torch.Generator().manual_seed(tokens)
    given = [
        _inputs(x, y, sizes, generator) for x, y in zip(piece_a.inputs, piece_b.inputs, strict=True)
    ]
    args_a, args_b = ([pair[side] for pair in given] for side in (0, 1))
    try:
        with torch.no_grad():
            results_a = [*call_a(list(args_a)), *args_a]
            results_b = [*call_b(list(args_b)), *args_b]
    except (RuntimeError, IndexError, VllmcError) as error:
        if isinstance(error, VllmcError) and error.code == "no-forward-context":
            raise NotComparable(
                "an op in it reads a layer's experts or KV cache, which are no inputs"
            ) from error
        raise NotComparable(f"it does not run on random inputs: {_first_line(error)}") from error
    unwritten = _unwritten(piece_a)
    return widest(
        _compare(x, y)
        for index, (x, y) in enumerate(zip(results_a, results_b, strict=True))
        if index not in unwritten
    )


def widest(differences: Iterable[Difference]) -> Difference:
    """The differences taken together."""
    found = tuple(differences)
    known = [d.max_abs for d in found if d.max_abs is not None]
    return Difference(
        bitwise=all(d.bitwise for d in found),
        max_abs=max(known, default=0.0) if len(known) == len(found) else None,
    )


def _unwritten(piece: Piece) -> frozenset[int]:
    """Which outputs of the piece are allocated in it and nothing more."""
    end = piece.graph.output_node()
    (results,) = end.args
    assert isinstance(results, tuple)
    return frozenset(
        index
        for index, node in enumerate(results)
        if isinstance(node, fx.Node) and allocates(node) and set(node.users) == {end}
    )


def _sizes(piece: Piece, tokens: int) -> Sizes:
    counts = {"tokens": tokens, "rows": min(tokens, _ROWS), "other": _ROWS, "data": _ROWS}
    return {symbol(index): counts[role] for index, role in enumerate(piece.roles)}


def _numbers(expressions: Iterable[sympy.Expr], sizes: Sizes) -> list[int]:
    return [int(expression.xreplace(sizes)) for expression in expressions]


def _form(given: PieceInput, sizes: Sizes) -> tuple[object, ...]:
    match given:
        case TensorInput():
            kind = "floating" if given.dtype.is_floating_point else given.dtype
            return kind, _numbers(given.shape, sizes), _numbers(given.stride, sizes)
        case SizeInput():
            return ("size", *_numbers([given.value], sizes))
        case OpaqueInput():
            return ("opaque", given.type_name)


def _inputs(
    a: PieceInput, b: PieceInput, sizes: Sizes, generator: torch.Generator
) -> tuple[Any, Any]:
    if isinstance(a, TensorInput) and isinstance(b, TensorInput):
        shape, stride = _numbers(a.shape, sizes), _numbers(a.stride, sizes)
        values = _values(a, shape, stride, sizes, generator)
        # What both can hold: the inputs are the same, whatever the dtypes.
        values = values.to(a.dtype).to(b.dtype)
        own = [values.to(side.dtype, copy=True).to(side.device) for side in (a, b)]
        first, second = (torch.as_strided(memory, shape, stride) for memory in own)
        return first, second
    if isinstance(a, SizeInput):
        [size] = _numbers([a.value], sizes)
        return size, size
    assert isinstance(a, OpaqueInput)
    assert isinstance(b, OpaqueInput)
    return real_value(a.example), real_value(b.example)


def _values(
    given: TensorInput,
    shape: list[int],
    stride: list[int],
    sizes: Sizes,
    generator: torch.Generator,
) -> torch.Tensor:
    """The memory of a tensor, flat: elements may lie apart, or share their place."""
    length = 1 + sum(max(n - 1, 0) * step for n, step in zip(shape, stride, strict=True))
    if not given.dtype.is_floating_point and not given.dtype.is_complex:
        below = 2 if min(sizes.values(), default=2) > 1 else 1
        return torch.randint(0, below, (length,), generator=generator)
    values = torch.randn(
        length,
        generator=generator,
        dtype=torch.complex64 if given.dtype.is_complex else torch.float32,
    )
    weights = len(shape) > 1 and not any(e.free_symbols for e in given.shape)
    return values * max(shape[-1], 1) ** -0.5 if weights else values


def _compare(a: Any, b: Any) -> Difference:
    if not isinstance(a, torch.Tensor):
        return Difference(bitwise=a == b, max_abs=0.0 if a == b else None)
    if a.shape != b.shape:
        raise NotComparable("the results have other shapes")
    if a.numel() == 0:
        return Difference(bitwise=True, max_abs=0.0)
    kind = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.cpu().to(kind), b.cpu().to(kind)
    same = (x == y) | (x.isnan() & y.isnan())
    worst = torch.where(same, 0.0, (x - y).abs()).max().item()
    return Difference(
        bitwise=a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b)),
        max_abs=worst if worst < float("inf") else None,
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
