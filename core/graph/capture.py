"""Capture: one full graph of a model, with everything later stages need to know about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType

import sympy
import torch
import torch.fx as fx

from vllmc.core.errors import UsageError
from vllmc.core.graph.assumptions import check_assumptions
from vllmc.core.graph.inputs import find_attribute, read_source
from vllmc.core.graph.layout import AttentionSite, GraphInput
from vllmc.core.graph.normalize import normalize, value_of
from vllmc.core.graph.piece import SymbolRole
from vllmc.core.graph.suitability import check_graph, check_module, place_of_node
from vllmc.core.graph.targets import custom_ops, op_names
from vllmc.core.models.errors import unsupported_model
from vllmc.core.models.model import Model
from vllmc.core.models.place import place_of_frames
from vllmc.core.spec import ATTENTION_OP, CompileSpec
from vllmc.core.torch_compat.capture import (
    CaptureError,
    capture_full_graph,
    freezes_weights,
    mark_dimension,
)
from vllmc.core.torch_compat.ops import registrations
from vllmc.kernels.layer_name import LayerName

# Distinct, and neither 0 nor 1, so that no two sizes are taken for one.
_EXAMPLE_TOKENS = 17
_EXAMPLE_ROWS = 3
# After these a tensor's example value no longer says what it was when a piece took it.
_RESHAPES_IN_PLACE = frozenset(
    {
        "as_strided_",
        "resize_",
        "resize_as_",
        "set_",
        "squeeze_",
        "swapaxes_",
        "swapdims_",
        "t_",
        "transpose_",
        "unsqueeze_",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A model's graph, normalised.

    `inputs` describes the placeholders in order. `roles` says what the symbols among their sizes
    count. `functions` are the qualified names of the traced functions by their source file, and
    `guarded` the expressions of the Python values that the graph depends on.
    """

    graph: fx.Graph
    inputs: tuple[GraphInput, ...]
    roles: Mapping[sympy.Symbol, SymbolRole]
    attention: tuple[AttentionSite, ...]
    functions: Mapping[str, tuple[str, ...]]
    guarded: tuple[str, ...]


def capture(model: Model, entry: torch.nn.Module, spec: CompileSpec) -> Capture:
    """Captures `entry`, the built `model`. Its weights may be fake.

    Raises what `trace` raises, and `unsupported-model` for what `suitability` refuses.
    """
    check_module(model, entry)
    captured = trace(model.name, entry, spec)
    check_graph(model, entry, captured.graph, captured.inputs, captured.attention)
    return captured


def trace(name: str, entry: torch.nn.Module, spec: CompileSpec) -> Capture:
    """Captures `entry`, whatever it computes; `name` is for errors.

    Raises `VllmcError`: `unsupported-model` naming the module and line that stood in the way,
    `range-not-covered` where the graph holds for a part of the spec's ranges only; `UsageError`
    (`bad-option`) where weights would become constants.
    """
    if freezes_weights():
        raise UsageError(
            "bad-option",
            "freezing puts the weights into the code, and vllmc keeps them out of every artifact",
            hint="leave out -O freezing (or TORCHINDUCTOR_FREEZING)",
        )
    try:
        raw = capture_full_graph(entry, _example_args(spec), spec.dynamic_shapes)
    except CaptureError as error:
        raise unsupported_model(name, error.reason, place=place_of_frames(error.frames)) from error
    graph = raw.module.graph
    _refuse_uncuttable(name, graph)
    normalize(graph)
    inputs = tuple(
        _resolve(entry, read_source(raw.sources[node.name]))
        for node in graph.nodes
        if node.op == "placeholder"
    )
    counted = tuple(_counted(graph, inputs))
    roles = {size: role for role, size in counted if isinstance(size, sympy.Symbol)}
    # A size that capture fixed is no longer among its guards.
    fixed = {sympy.Eq(sympy.Symbol(role), size) for role, size in counted if size not in roles}
    named: dict[sympy.Symbol, SymbolRole] = {sympy.Symbol(role): role for role, _ in counted}
    check_assumptions(name, graph, (*raw.guards, *fixed), roles | named, spec)
    functions: dict[str, set[str]] = {}
    for code in raw.code:
        functions.setdefault(code.co_filename, set()).add(code.co_qualname)
    ops = {name: places for name in custom_ops(graph) if (places := registrations(name))}
    for name_of_op, places in ops.items():
        for file, _ in places:
            functions.setdefault(file, set()).add(name_of_op)
    return Capture(
        graph=graph,
        inputs=inputs,
        roles=roles,
        attention=_attention_sites(graph, inputs),
        functions={file: tuple(sorted(names)) for file, names in sorted(functions.items())},
        guarded=(*raw.guarded, *(f"O[{name_of_op!r}]" for name_of_op in ops)),
    )


def _example_args(spec: CompileSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`input_ids` and `position_ids` `[1, T]`, `logits_indices` `[B]`, with `T` and `B` marked.

    `B` is unbacked in any case: a backed size would be taken for neither 0 nor 1.
    """
    ids, positions = (
        torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64, device=spec.device) for _ in range(2)
    )
    rows = torch.zeros(_EXAMPLE_ROWS, dtype=torch.int64, device=spec.device)
    high = max(spec.max_tokens, _EXAMPLE_TOKENS)
    for tensor in (ids, positions):
        mark_dimension(tensor, 1, kind=spec.dynamic_shapes, shape_id="tokens", low=1, high=high)
    mark_dimension(rows, 0, kind="unbacked", shape_id="rows", low=1, high=high)
    return ids, positions, rows


def _resolve(entry: torch.nn.Module, given: GraphInput) -> GraphInput:
    if given.kind != "attribute":
        return given
    found = find_attribute(entry, given.name)
    if isinstance(found, LayerName):
        return GraphInput(kind="layer-name", name=found.value)
    assert isinstance(found, torch.Tensor), f"{given.name} is a {type(found).__name__}"
    return GraphInput(
        kind="attribute",
        name=given.name,
        dtype=str(found.dtype).removeprefix("torch."),
        shape=tuple(found.shape),
        stride=tuple(found.stride()),
    )


def _counted(
    graph: fx.Graph, inputs: Sequence[GraphInput]
) -> Iterator[tuple[SymbolRole, sympy.Expr]]:
    """What each dimension that was marked counts, and what capture took it for."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, given in zip(placeholders, inputs, strict=True):
        value = value_of(node)
        if given.kind == "activation" and isinstance(value, torch.Tensor):
            size = value.shape[-1]
            role: SymbolRole = "rows" if given.name == "logits_indices" else "tokens"
            yield role, size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _attention_sites(graph: fx.Graph, inputs: Sequence[GraphInput]) -> tuple[AttentionSite, ...]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = {
        node: given.name
        for node, given in zip(placeholders, inputs, strict=True)
        if given.kind == "layer-name"
    }
    op = torch.ops.vllmc.unified_attention_with_output.default
    parameters = [argument.name for argument in op._schema.arguments]
    sites = []
    for node in graph.nodes:
        if node.op != "call_function" or ATTENTION_OP not in op_names(node.target):
            continue
        given = {**dict(zip(parameters, node.args, strict=False)), **node.kwargs}
        layer, window = given["layer_name"], given.get("sliding_window")
        _, _, kv_heads, key_size = _shape(given["key"])
        *_, value_size = _shape(given["value"])
        sites.append(
            AttentionSite(
                layer=layer if isinstance(layer, str) else names[layer],
                kv_heads=int(kv_heads),
                key_size=int(key_size),
                value_size=int(value_size),
                window=window,
            )
        )
    return tuple(sites)


def _shape(node: fx.Node) -> torch.Size:
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    return value.shape


def _refuse_uncuttable(name: str, graph: fx.Graph) -> None:
    """Refuses what a piece cannot hold, or what says something else in another process."""
    for node in graph.nodes:
        if node.op == "get_attr":
            raise unsupported_model(
                name,
                f"its forward makes the tensor or subgraph '{node.target}' while it is traced",
                place=place_of_node(node),
                hint="make it a buffer of the module",
            )
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise unsupported_model(
                name,
                f"it uses the higher-order op {node.target.name()}",
                place=place_of_node(node),
                hint="call a Triton kernel from an op of torch.library",
            )
        if node.op == "call_method" and node.target in _RESHAPES_IN_PLACE:
            raise unsupported_model(
                name,
                f"Tensor.{node.target} changes the shape of a tensor in place",
                place=place_of_node(node),
                hint=f"use the result of {str(node.target).removesuffix('_')} instead",
            )
        if node.op == "call_method" and _is_replaced(getattr(torch.Tensor, node.target, None)):
            raise unsupported_model(
                name,
                f"Tensor.{node.target} was replaced by a function that is not torch's, and "
                "capture would not look into it",
                place=place_of_node(node),
                hint="call that function instead",
            )


def _is_replaced(method: object) -> bool:
    if not isinstance(method, FunctionType):
        return False
    module: str = method.__globals__["__name__"]
    return module.partition(".")[0] != "torch"
