"""The passes `norm-quant` and `activation-quant`: what is quantised is computed by the same op.

Each looks at every quantisation in a graph, and whether what it reads is computed in one of the
ways that model code computes it. The ways are written as model code, and traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
import torch.fx as fx

from vllmc.core.graph.normalize import expression_of
from vllmc.core.graph.passes.matching import Match, Pattern, closest, find_match
from vllmc.core.graph.passes.quants import STATIC, quants_in, replace_quant
from vllmc.core.graph.passes.report import NearMiss
from vllmc.core.torch_compat.post_grad import decomposed, insert_call
from vllmc.core.torch_compat.shapes import is_contiguous
from vllmc.kernels import activation as _activation_ops  # noqa: F401  (define the ops)
from vllmc.kernels import norm as _norm_ops  # noqa: F401

_vllmc = torch.ops.vllmc

# Stands for any number that is added to the mean of squares. No model has it, and torch's own norm
# rounds it to float32 first.
_EPS: Final = 63 / 1024
_NUMBERS: Final = {_EPS: "eps"}

_ROWS, _SIZE = 3, 5

_aten = torch.ops.aten
_PRODUCTS: Final = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default})


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way in which model code computes what is quantised, and the ops that do both.

    `example` takes the tensors named by `inputs`, of which those that are `vectors` have one
    dimension, and gives what is quantised and what else is kept. `static` and `dynamic` are the
    ops for a scale that is given and one that is found: they take the inputs, the `numbers` of the
    match, `options` and the quantisation's own arguments, and give what that gives and what is
    kept.
    """

    example: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    vectors: tuple[str, ...]
    static: Any
    dynamic: Any
    numbers: tuple[str, ...] = ()
    options: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """A pass: its ways, the likeliest and most comprehensive first.

    `signs` are ops one of which is in every such computation.
    """

    ways: tuple[Way, ...]
    signs: frozenset[object]

    def run(self, graph: fx.Graph) -> tuple[int, NearMiss | None]:
        """Fuses what it can in a graph of ATen ops: how often, and where the closest failed."""
        matches, misses = 0, []
        for quant in quants_in(graph):
            found = self._find(quant)
            if not isinstance(found, NearMiss):
                _replace(graph, quant, *found)
                matches += 1
            elif self._has_sign(quant):
                misses.append(found)
        return matches, closest(misses)

    def _has_sign(self, quant: fx.Node) -> bool:
        """Whether what is quantised is computed by a sign, without a product in between."""
        return any(
            node.target in self.signs for node in _read_for(quant.args[:1], until=_is_product)
        )

    def _find(self, quant: fx.Node) -> tuple[Way, Match] | NearMiss:
        root = quant.args[0]
        assert isinstance(root, fx.Node)
        misses = []
        for way in self.ways:
            found = find_match(_pattern(way, root.meta["val"].dtype), root, quant)
            if isinstance(found, Match):
                odd = _odd_input(way, found) or _odd_result(found, quant)
                if odd is None:
                    return way, found
                found = odd
            misses.append(found)
        best = closest(misses)
        assert best is not None, "a pass has ways"
        return best


def _odd_input(way: Way, match: Match) -> NearMiss | None:
    """An input that is not as its op wants it: of the result's dtype and shape, or a row's."""
    result = match.results[0].meta["val"]
    for name in way.inputs:
        node = match.inputs[name]
        shape = result.shape[-1:] if name in way.vectors else result.shape
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if (
            not isinstance(value, torch.Tensor)
            or value.dtype is not result.dtype
            or not _same(value.shape, shape)
        ):
            return NearMiss(
                node=node.name if isinstance(node, fx.Node) else name,
                expected=f"{name} of {_form(result.dtype, shape)}",
                found=_form(value.dtype, value.shape)
                if isinstance(value, torch.Tensor)
                else repr(node),
                matched=len(match.nodes) + 1,
            )
    return None


def _odd_result(match: Match, quant: fx.Node) -> NearMiss | None:
    """A result beside the quantised one that the fused op cannot give as the graph has it."""
    for node in match.results[1:]:
        value = node.meta["val"]
        if not is_contiguous(value):
            expected, found = "a contiguous sum", f"strides of {list(value.stride())}"
        elif node in _read_for([*match.inputs.values(), *quant.args[1:]]):
            expected, found = "a weight and a scale from elsewhere", "one computed from the sum"
        else:
            continue
        return NearMiss(
            node=node.name, expected=expected, found=found, matched=len(match.nodes) + 1
        )
    return None


def _read_for(
    values: Iterable[Any], until: Callable[[fx.Node], bool] = lambda _: False
) -> set[fx.Node]:
    """The nodes among `values`, and all that these are computed from, back to what `until` ends."""
    found: set[fx.Node] = set()
    waiting = [value for value in values if isinstance(value, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in found and not until(node):
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _is_product(node: fx.Node) -> bool:
    """Whether it multiplies matrices, as far as is known: vllmc's ops are taken for such."""
    return node.target in _PRODUCTS or getattr(node.target, "namespace", "") == "vllmc"


def _form(dtype: torch.dtype, shape: Iterable[Any]) -> str:
    return f"{dtype} {list(shape)}"


def _same(shape: Iterable[Any], other: Iterable[Any]) -> bool:
    return [*map(expression_of, shape)] == [*map(expression_of, other)]


def _replace(graph: fx.Graph, quant: fx.Node, way: Way, match: Match) -> None:
    """Puts the op that does both in the place of the quantisation and of what it quantised."""
    static = quant.target is STATIC
    args = [match.inputs[name] for name in (*way.inputs, *way.numbers)]
    kept = match.results[1:]
    with graph.inserting_before(quant):
        op = way.static if static else way.dynamic
        fused = insert_call(graph, op, [*args, *way.options, *quant.args[1:]])
        results = [fused]
        if kept or not static:
            count = len(kept) + (1 if static else 2)
            results = [_pick(graph, fused, index) for index in range(count)]
    replace_quant(quant, results)
    for node, result in zip(kept, results[len(results) - len(kept) :], strict=True):
        node.replace_all_uses_with(result)
    for node in reversed(match.nodes):
        # What else reads the nodes between was looked for: nothing does.
        if not node.users:
            graph.erase_node(node)


def _pick(graph: fx.Graph, fused: fx.Node, index: int) -> fx.Node:
    node = graph.call_function(operator.getitem, (fused, index))
    node.meta["val"] = fused.meta["val"][index]
    return node


@lru_cache(maxsize=128)
def _pattern(way: Way, dtype: torch.dtype) -> Pattern:
    examples = [
        torch.empty(_SIZE, dtype=dtype)
        if name in way.vectors
        else torch.empty(1, _ROWS, _SIZE, dtype=dtype)
        for name in way.inputs
    ]
    graph = decomposed(way.example, examples)
    for node, name in zip(graph.find_nodes(op="placeholder"), way.inputs, strict=True):
        node.target = name
    return Pattern(graph=graph, numbers=_NUMBERS)


def _normed(x: torch.Tensor) -> torch.Tensor:
    """`x` by the root of its mean square, in float32."""
    wide = x.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)


def _norm_then_weight(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (weight * _normed(x).to(x.dtype),)


def _norm_by_weight(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((weight * _normed(x)).to(x.dtype),)


def _norm_by_wide_weight(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((weight.to(torch.float32) * _normed(x)).to(x.dtype),)


def _norm_by_one_and_weight(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ((_normed(x) * (1.0 + weight.to(torch.float32))).to(x.dtype),)


def _norm_of_torch(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.nn.functional.rms_norm(x, weight.shape, weight, _EPS),)


_NORMS: Final[Mapping[Callable[..., tuple[torch.Tensor, ...]], float]] = {
    _norm_by_one_and_weight: 1.0,
    _norm_then_weight: 0.0,
    _norm_by_weight: 0.0,
    _norm_by_wide_weight: 0.0,
    _norm_of_torch: 0.0,
}
"""How models compute an RMSNorm, and what is added to the weight.

Gemma does it the first way, Llama and most the second, OLMo 2 the third, Gemma 3n the fourth.

The weight of a later one may be any tensor, a sum too.
"""


def _after_addition(
    norm: Callable[..., tuple[torch.Tensor, ...]],
) -> Callable[..., tuple[torch.Tensor, ...]]:
    def added(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        total = x + residual
        return (*norm(total, weight), total)

    return added


def _norm_ways() -> Iterable[Way]:
    for norm, offset in _NORMS.items():
        yield Way(
            example=_after_addition(norm),
            inputs=("x", "residual", "weight"),
            vectors=("weight",),
            static=_vllmc.fused_add_rms_norm_static_quant.default,
            dynamic=_vllmc.fused_add_rms_norm_dynamic_quant.default,
            numbers=("eps",),
            options=(offset,),
        )
    for norm, offset in _NORMS.items():
        yield Way(
            example=norm,
            inputs=("x", "weight"),
            vectors=("weight",),
            static=_vllmc.rms_norm_static_quant.default,
            dynamic=_vllmc.rms_norm_dynamic_quant.default,
            numbers=("eps",),
            options=(offset,),
        )


def _silu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.nn.functional.silu(gate) * up,)


def _gelu(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.nn.functional.gelu(gate) * up,)


def _gelu_tanh(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up,)


def _activation_ways() -> Iterable[Way]:
    for example, op, options in (
        (_silu, "silu_and_mul", ()),
        (_gelu, "gelu_and_mul", ("none",)),
        (_gelu_tanh, "gelu_and_mul", ("tanh",)),
    ):
        yield Way(
            example=example,
            inputs=("gate", "up"),
            vectors=(),
            static=getattr(_vllmc, f"{op}_static_quant").default,
            dynamic=getattr(_vllmc, f"{op}_dynamic_quant").default,
            options=options,
        )


NORM_QUANT: Final = Fusion(
    ways=tuple(_norm_ways()), signs=frozenset({_aten.rsqrt.default, _aten.mean.dim})
)
ACTIVATION_QUANT: Final = Fusion(
    ways=tuple(_activation_ways()),
    signs=frozenset({_aten.exp.default, _aten.erf.default, _aten.tanh.default}),
)
