"""Fake example inputs with symbolic sizes, made without tracing anything."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch._prims_common import is_contiguous_or_false
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from vllmc.core.torch_compat.fake import fake_mode


@dataclass(frozen=True, slots=True, kw_only=True)
class SymbolRange:
    """What one symbol may be: between `low` and `high` inclusive, `high` None for no limit.

    A backed symbol has an example value, which code may be specialised for; it needs a limit.
    """

    symbol: sympy.Symbol
    low: int
    high: int | None
    backed: bool = False


def truth(condition: sympy.Basic, ranges: Mapping[sympy.Symbol, tuple[int, int]]) -> bool | None:
    """Whether `condition` holds for all values of its symbols in their `ranges` (inclusive).

    False where it is seen to fail for some; None where neither can be shown.
    """
    free = condition.free_symbols
    if not free <= ranges.keys():
        return None
    bounds = bound_sympy(condition, {s: ValueRanges(*ranges[s]) for s in free})
    if bounds.is_singleton():
        return bool(bounds.lower)
    for ends in itertools.product(*(ranges[s] for s in free)):
        values = {s: sympy.Integer(end) for s, end in zip(free, ends, strict=True)}
        if condition.xreplace(values) == sympy.false:
            return False
    return None


def python_text(condition: sympy.Basic, names: Mapping[sympy.Symbol, sympy.Symbol]) -> str:
    """`condition` as a Python expression, with its symbols renamed."""
    text: str = PythonPrinter().doprint(condition.xreplace(names))
    return text


def exact_text(expr: sympy.Expr) -> str:
    """`expr` with the assumptions of its symbols, for `parse_exact`."""
    text: str = sympy.srepr(expr)
    return text


def parse_exact(text: str) -> sympy.Expr:
    """The expression that `exact_text` wrote. Evaluates `text`: it comes from this program."""
    return eval(text, {"__builtins__": {}}, {**vars(sympy), **vars(functions)})


def is_contiguous(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is contiguous whatever its unbacked sizes are; guards on nothing."""
    return bool(is_contiguous_or_false(tensor))


class ShapeScope:
    """A fake mode of its own, with one symbolic size for each `SymbolRange`.

    A range of one value becomes that number. Backed symbols get a hint inside their range.
    """

    def __init__(self, ranges: Sequence[SymbolRange]) -> None:
        self.shape_env = ShapeEnv()
        self.fake_mode = fake_mode(self.shape_env)
        self._sizes: dict[sympy.Symbol, sympy.Expr] = {}
        self._declared: dict[sympy.Symbol, SymbolRange] = {}
        for index, declared in enumerate(ranges):
            if declared.low == declared.high:
                self._sizes[declared.symbol] = sympy.Integer(declared.low)
                continue
            fresh = self._backed(index, declared) if declared.backed else self._unbacked(declared)
            self._sizes[declared.symbol] = fresh
            self._declared[fresh] = declared

    def _unbacked(self, declared: SymbolRange) -> sympy.Expr:
        size = self.shape_env.create_unbacked_symint()
        # An input's symbol is bound by the call, not by an operation of the graph.
        self.shape_env.pending_fresh_unbacked_symbols.clear()
        expr = size.node.expr
        self.shape_env._constrain_range_for_size(expr, declared.low, declared.high)
        return expr

    def _backed(self, index: int, declared: SymbolRange) -> sympy.Expr:
        assert declared.high is not None
        # 0 and 1 are the sizes that a backed symbol would be specialised on.
        hint = min(declared.high, max(declared.low, 64))
        expr = self.shape_env.create_symbol(
            hint,
            ConstantSource(f"s{index}"),
            DimDynamic.DYNAMIC,
            do_not_specialize_zero_one=True,
        )
        self.shape_env.constrain_symbol_range(expr, declared.low, declared.high)
        return expr

    def size(self, expr: sympy.Expr) -> int | torch.SymInt:
        """The number or symbolic size that `expr` over the declared symbols stands for."""
        replaced = sympy.sympify(expr).xreplace(self._sizes)
        if replaced.is_number:
            return int(replaced)
        hint: int | None = None
        if replaced.free_symbols <= self.shape_env.backed_var_to_val.keys():
            hint = int(replaced.xreplace(self.shape_env.backed_var_to_val))
        return self.shape_env.create_symintnode(replaced, hint=hint)

    def tensor(
        self,
        shape: Sequence[sympy.Expr],
        stride: Sequence[sympy.Expr],
        *,
        dtype: torch.dtype,
        device: str,
    ) -> torch.Tensor:
        """A fake tensor of this shape and stride, in elements."""
        with self.fake_mode:
            return torch.empty_strided(
                [self.size(e) for e in shape],
                [self.size(e) for e in stride],
                dtype=dtype,
                device=device,
            )

    def narrowed(self) -> list[str]:
        """What compilation assumed of the sizes beyond the declared ranges, as expressions.

        Empty for unbacked symbols, which cannot be guarded on.
        """
        found = [str(guard.expr) for guard in self.shape_env.guards if not self._holds(guard.expr)]
        for fresh, declared in self._declared.items():
            bounds = self.shape_env.var_to_range[fresh]
            low_moved = int(bounds.lower) > declared.low
            high_moved = declared.high is not None and (
                not bounds.upper.is_integer or int(bounds.upper) < declared.high
            )
            if low_moved or high_moved or fresh in self.shape_env.replacements:
                found.append(f"{fresh} in [{bounds.lower}, {bounds.upper}]")
        return found

    def _holds(self, expr: sympy.Basic) -> bool:
        return self.shape_env._maybe_evaluate_static(expr) is sympy.true
