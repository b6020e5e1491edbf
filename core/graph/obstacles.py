"""What keeps a piece from being recorded as a CUDA graph, as far as its graph tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import sympy
import torch
import torch.fx as fx

from vllmc.core.graph.aliases import memory_of, overloads_of, written_arguments
from vllmc.core.graph.normalize import symbols_of, value_of
from vllmc.core.graph.piece import SymbolRole
from vllmc.core.graph.split import Cut
from vllmc.core.graph.targets import spelled

_TAGS: Final = (
    torch.Tag.cudagraph_unsafe,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)
# Of the forward context it reads the slots, which `runtime.cuda_graphs` keeps at their place.
_SAFE_HERE: Final = frozenset({"vllmc::unified_kv_cache_update"})
# Functions that write to their first argument, and are not named as torch names such.
_IN_PLACE: Final = frozenset(
    {"setitem", "__setitem__", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "iand"}
    | {"ior", "ixor", "ipow", "ilshift", "irshift", "imatmul"}
)
# Methods that wait for the device, to have values on the host.
_WAITING: Final = frozenset({"cpu", "item", "numpy", "tolist"})


def obstacle(cut: Cut, roles: Mapping[sympy.Symbol, SymbolRole]) -> str | None:
    """Why the piece that `cut` is cannot be recorded; None where nothing is known.

    `roles` knows the symbols of the whole graph's inputs: any other is a size that values decide.

    What is not seen here, such as an op that waits for the device, shows when it is recorded.
    """
    symbols = {s for node in (*cut.inputs, *cut.nodes) for s in symbols_of(value_of(node))}
    if any(roles.get(symbol, "data") == "data" for symbol in symbols):
        return "its sizes depend on the values of tensors"
    given = frozenset().union(*(memory_of(node) for node in cut.inputs))
    for node in cut.nodes:
        unsafe = any(tag in op.tags for op in overloads_of(node.target) for tag in _TAGS)
        if unsafe and spelled(node) not in _SAFE_HERE:
            return f"{spelled(node)} may not be recorded"
        if node.op == "call_method" and node.target in _WAITING:
            return f"{spelled(node)} waits for the device"
        if any(not given.isdisjoint(memory_of(argument)) for argument in _written(node)):
            return f"{spelled(node)} writes to what the piece is given"
    return None


def _written(node: fx.Node) -> tuple[fx.Node, ...]:
    """What the node writes to: by its schema, else by its name, as torch names such functions."""
    if overloads_of(node.target):
        return tuple(written_arguments(node))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    if node.op in {"call_method", "call_function"} and (in_place or name in _IN_PLACE):
        return tuple(node.all_input_nodes[:1])
    return ()
