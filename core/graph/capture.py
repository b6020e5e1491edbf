"""Capture: one full graph of a model, with everything later stages need to know about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import sympy
import torch
import torch.fx as fx

from vllmc.core.cache.key import JsonValue
from vllmc.core.declare.calls import Call
from vllmc.core.declare.containers import leaves
from vllmc.core.errors import UsageError
from vllmc.core.graph.assumptions import Assumptions, check_assumptions
from vllmc.core.graph.call import example_arguments, role_of, sizes_in, symbols_of_sizes
from vllmc.core.graph.inputs import find_attribute, read_source
from vllmc.core.graph.layout import Argument, AttentionSite, ExpertsSite, GraphInput
from vllmc.core.graph.normalize import normalize, value_of
from vllmc.core.graph.passes.report import PassReport
from vllmc.core.graph.piece import SymbolRole
from vllmc.core.graph.repeats import capture_repeating
from vllmc.core.graph.results import NumberMark, describe
from vllmc.core.graph.side_effects import left_behind
from vllmc.core.graph.suitability import check_graph, check_module, place_of_node
from vllmc.core.graph.targets import custom_ops, op_names, schemas_of
from vllmc.core.models.errors import unsupported_model
from vllmc.core.models.expert_modules import expert_tensors, has_experts
from vllmc.core.models.model import Model
from vllmc.core.models.place import place_of_frames
from vllmc.core.spec import ATTENTION_OP, EXPERTS_OP, CompileSpec
from vllmc.core.torch_compat.capture import (
    CaptureError,
    RawCapture,
    freezes_weights,
)
from vllmc.core.torch_compat.ops import registrations
from vllmc.kernels.layer_name import LayerName

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

    `arguments` are what a call brings, `result` what it returns (see `results.describe`). `inputs`
    describes the placeholders in order. `roles` says what the symbols among their sizes are, and
    `assumptions` what is taken for granted of them. `written` are the arguments, by path, that it
    writes to. `functions` are the qualified names of the
    traced functions by their source file, and `guarded` the expressions of the Python values that
    the graph depends on. `passes` is what they did to the graph since.
    """

    graph: fx.Graph
    arguments: tuple[Argument, ...]
    result: JsonValue
    inputs: tuple[GraphInput, ...]
    assumptions: Assumptions
    roles: Mapping[sympy.Symbol, SymbolRole]
    attention: tuple[AttentionSite, ...]
    experts: tuple[ExpertsSite, ...]
    written: tuple[str, ...]
    functions: Mapping[str, tuple[str, ...]]
    guarded: tuple[str, ...]
    passes: tuple[PassReport, ...] = ()


def capture(model: Model, entry: torch.nn.Module, spec: CompileSpec) -> Capture:
    """Captures `entry`, the built `model`. Its weights may be fake.

    Raises what `trace` raises, and `unsupported-model` for what `suitability` refuses.
    """
    call = model.call(entry)
    if not model.runs_in_engine:
        return trace(model.name, entry, call, spec)
    check_module(model, entry)
    captured = trace(model.name, entry, call, spec)
    check_graph(model, entry, captured.graph, captured.inputs, captured.attention)
    return captured


def trace(name: str, entry: torch.nn.Module, call: Call, spec: CompileSpec) -> Capture:
    """Captures the `call` of `entry`, whatever it computes; `name` is for errors.

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
    examples = example_arguments(call, spec)
    try:
        raw = capture_repeating(entry, examples, spec.dynamic_shapes)
    except CaptureError as error:
        raise unsupported_model(name, error.reason, place=place_of_frames(error.frames)) from error
    graph = raw.module.graph
    _refuse_uncuttable(name, graph)
    result = _result(name, entry, examples, raw)
    changed = {node.name for node in graph.find_nodes(op="placeholder") if _is_written(node)}
    normalize(graph)
    paths = {argument.path for argument in call.arguments}
    inputs = tuple(
        _resolve(entry, read_source(raw.sources[node.name], paths))
        for node in graph.find_nodes(op="placeholder")
    )
    written = tuple(
        given.name
        for node, given in zip(graph.find_nodes(op="placeholder"), inputs, strict=True)
        if given.kind == "activation" and node.name in changed
    )
    sizes = sizes_in(graph, inputs, call)
    assumptions = check_assumptions(name, graph, raw.guards, sizes, call, spec)
    functions: dict[str, set[str]] = {}
    for code in raw.code:
        functions.setdefault(code.co_filename, set()).add(code.co_qualname)
    ops = {name: places for name in custom_ops(graph.nodes) if (places := registrations(name))}
    for name_of_op, places in ops.items():
        for file, _ in places:
            functions.setdefault(file, set()).add(name_of_op)
    return Capture(
        graph=graph,
        arguments=call.arguments,
        result=result,
        inputs=inputs,
        assumptions=assumptions,
        roles={symbol: role_of(size, call) for symbol, size in symbols_of_sizes(sizes).items()},
        attention=_attention_sites(graph, inputs),
        experts=_experts_sites(name, entry, graph, inputs),
        written=written,
        functions={file: tuple(sorted(names)) for file, names in sorted(functions.items())},
        guarded=(*raw.guarded, *(f"O[{name_of_op!r}]" for name_of_op in ops)),
    )


def _resolve(entry: torch.nn.Module, given: GraphInput) -> GraphInput:
    if given.kind != "attribute":
        return given
    found = find_attribute(entry, given.name)
    if isinstance(found, LayerName):
        return GraphInput(kind="layer-name", name=found.value)
    assert isinstance(found, torch.Tensor), f"{given.name} is a {type(found).__name__}"
    return _tensor_input(given.name, found)


def _tensor_input(name: str, tensor: torch.Tensor) -> GraphInput:
    return GraphInput(
        kind="attribute",
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
    )


def _result(
    name: str, entry: torch.nn.Module, examples: Mapping[str, object], raw: RawCapture
) -> JsonValue:
    """What the call returns. Raises `unsupported-model` where it leaves something behind."""
    (outputs,) = raw.module.graph.output_node().args
    assert isinstance(outputs, (list, tuple))
    # Tensors for tensors: a class may look at what it is given.
    marks = [
        torch.empty(0) if isinstance(value_of(output), torch.Tensor) else NumberMark()
        for output in outputs
    ]
    tensors = [leaf for n, value in examples.items() for _, leaf in leaves(n, value)]
    tensors = [leaf for leaf in tensors if isinstance(leaf, torch.Tensor)]
    known: dict[int, JsonValue] = {id(t): {"argument": i} for i, t in enumerate(tensors)}
    known |= {id(mark): {"output": index} for index, mark in enumerate(marks)}
    before = [(n, dict(leaves(n, value))) for n, value in examples.items()]
    with left_behind(entry) as left:
        result = raw.replay(marks)
    for n, held in before:
        after = dict(leaves(n, examples[n]))
        if held.keys() != after.keys() or any(held[path] is not after[path] for path in held):
            left.append(f"the argument {n}")
    described = describe(result, known)
    if left:
        returned = set(_outputs_in(described))
        kept = [node for index, node in enumerate(outputs) if index not in returned]
        raise unsupported_model(
            name,
            f"its forward changes {left[0]}, besides what it returns",
            place=place_of_node(kept[0]) if kept and isinstance(kept[0], fx.Node) else None,
            hint="a compiled call runs none of its Python: return what must be kept",
        )
    return described


def _outputs_in(result: JsonValue) -> Iterator[int]:
    """The numbers of the graph's outputs in what a call returns."""
    match result:
        case {"output": int(index)}:
            yield index
        case dict():
            yield from (i for value in result.values() for i in _outputs_in(value))
        case list():
            yield from (i for value in result for i in _outputs_in(value))


def _is_written(node: fx.Node) -> bool:
    value = value_of(node)
    # Views count with what they are views of.
    return isinstance(value, torch.Tensor) and value._version > 0


def _calls_by_layer(
    name: str, graph: fx.Graph, inputs: Sequence[GraphInput]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The calls of vllmc's op `name` (`namespace::name`): the layer, and the arguments by name."""
    placeholders = graph.find_nodes(op="placeholder")
    names = {
        node: given.name
        for node, given in zip(placeholders, inputs, strict=True)
        if given.kind == "layer-name"
    }
    for node in graph.nodes:
        if node.op == "call_function" and name in op_names(node.target):
            parameters = [a.name for a in schemas_of(node.target)[0].arguments]
            given = {**dict(zip(parameters, node.args, strict=False)), **node.kwargs}
            layer = given["layer_name"]
            yield layer if isinstance(layer, str) else names[layer], given


def _experts_sites(
    name: str, entry: torch.nn.Module, graph: fx.Graph, inputs: Sequence[GraphInput]
) -> tuple[ExpertsSite, ...]:
    layers = dict.fromkeys(layer for layer, _ in _calls_by_layer(EXPERTS_OP, graph, inputs))
    modules = dict(entry.named_modules())
    for layer in layers:
        if not has_experts(modules.get(layer)):
            raise unsupported_model(
                name, f"it calls {EXPERTS_OP} for the layer '{layer}', where it has no experts"
            )
    return tuple(
        ExpertsSite(
            layer=layer,
            tensors=tuple(
                _tensor_input(f"{layer}.{tensor}", getattr(modules[layer], tensor))
                for tensor in expert_tensors(modules[layer])
            ),
        )
        for layer in layers
    )


def _attention_sites(graph: fx.Graph, inputs: Sequence[GraphInput]) -> tuple[AttentionSite, ...]:
    sites = []
    for layer, given in _calls_by_layer(ATTENTION_OP, graph, inputs):
        window = given.get("sliding_window")
        _, _, kv_heads, key_size = _shape(given["key"])
        *_, value_size = _shape(given["value"])
        sites.append(
            AttentionSite(
                layer=layer,
                kv_heads=int(kv_heads),
                key_size=int(key_size),
                value_size=int(value_size),
                window=window,
                causal=given.get("causal", True),
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
