"""The pass `attention-quant`: attention writes its output quantised, where it is only quantised.

It works on the captured graph, because the cut lies between attention and what reads it: no piece
holds both. The op keeps its other arguments, the layer's name among them, whether that is an input
of the graph or a constant in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.fx as fx

from vllmc.core.graph.normalize import value_of
from vllmc.core.graph.passes.matching import closest
from vllmc.core.graph.passes.report import NearMiss
from vllmc.core.graph.targets import op_names, spelled
from vllmc.core.spec import ATTENTION_OP
from vllmc.kernels import attention as _attention_op  # noqa: F401  (define the ops)
from vllmc.kernels import quant as _quant_ops  # noqa: F401

_QUANT: Final = "vllmc::static_scaled_quant"
_ALLOCATIONS: Final = (torch.empty,)
_RESHAPES: Final = frozenset({"reshape", "view", "contiguous", "flatten", "unflatten"})
_OUTPUT: Final = "output"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chain:
    """From the tensor that attention fills to its quantisation, by what only reshapes it."""

    output: fx.Node
    reshapes: tuple[fx.Node, ...]
    quant: fx.Node


def quantize_attention(graph: fx.Graph) -> tuple[int, NearMiss | None]:
    """Rewrites a captured graph: how often it did, and where the closest attempt failed."""
    attentions = [node for node in graph.nodes if _calls(node, ATTENTION_OP)]
    matches, misses = 0, []
    for attention in attentions:
        found = _chain(attention)
        if isinstance(found, NearMiss):
            misses.append(found)
        else:
            _rewrite(attention, found)
            matches += 1
    quantised = any(_calls(node, _QUANT) for node in graph.nodes)
    return matches, closest(misses) if quantised and not matches else None


def _chain(attention: fx.Node) -> _Chain | NearMiss:
    output = _argument(attention, _OUTPUT)
    assert isinstance(output, fx.Node)
    if output.target not in _ALLOCATIONS:
        return _miss(output, "an output of its own", spelled(output), 0)
    reshapes: list[fx.Node] = []
    node = output
    while True:
        readers = [user for user in node.users if user is not attention]
        if len(readers) != 1:
            return _miss(node, "one reader", f"{len(readers)} readers", len(reshapes) + 1)
        (reader,) = readers
        if _calls(reader, _QUANT):
            if reader.kwargs:
                return _miss(reader, "arguments by position", "arguments by name", len(reshapes))
            scale = reader.args[1]
            if not isinstance(scale, fx.Node) or scale.op != "placeholder":
                return _miss(reader, "a scale that is an input", str(scale), len(reshapes) + 2)
            return _Chain(output=output, reshapes=tuple(reshapes), quant=reader)
        if not _reshapes(reader, node):
            return _miss(reader, _QUANT, spelled(reader), len(reshapes) + 1)
        reshapes.append(reader)
        node = reader


def _reshapes(reader: fx.Node, node: fx.Node) -> bool:
    """Whether `reader` is `node` in another shape; `view` can also mean another dtype."""
    return (
        reader.op == "call_method"
        and reader.target in _RESHAPES
        and reader.args[0] is node
        and not any(isinstance(a, torch.dtype) for a in (*reader.args, *reader.kwargs.values()))
    )


def _rewrite(attention: fx.Node, chain: _Chain) -> None:
    _, scale, dtype = chain.quant.args
    assert isinstance(dtype, torch.dtype)
    attention.update_kwarg("output_scale", scale)
    chain.output.update_kwarg("dtype", dtype)
    value = value_of(chain.output)
    assert isinstance(value, torch.Tensor)
    chain.output.meta["example_value"] = value.to(dtype)
    for node in chain.reshapes:
        # Done again, so that what is a view of the output's memory still is.
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        node.meta["example_value"] = getattr(torch.Tensor, str(node.target))(*args, **kwargs)
    last = (chain.output, *chain.reshapes)[-1]
    chain.quant.replace_all_uses_with(last)
    chain.quant.graph.erase_node(chain.quant)


def _calls(node: fx.Node, op: str) -> bool:
    return node.op == "call_function" and op in op_names(node.target)


def _argument(node: fx.Node, name: str) -> object:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}[name]


def _miss(node: fx.Node, expected: str, found: str, matched: int) -> NearMiss:
    return NearMiss(node=node.name, expected=expected, found=found, matched=matched)
