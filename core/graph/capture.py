"""Capture: one full graph of a model, with everything later stages need to know about it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary

import sympy
import torch
import torch.fx as fx

from vllmc.core.errors import VllmcError
from vllmc.core.graph.inputs import find_attribute, read_source
from vllmc.core.graph.layout import AttentionSite, GraphInput
from vllmc.core.graph.normalize import normalize, value_of
from vllmc.core.graph.piece import SymbolRole
from vllmc.core.graph.split import op_names
from vllmc.core.models.attention import check_windows
from vllmc.core.models.model import Model
from vllmc.core.spec import ATTENTION_OP, CompileSpec
from vllmc.core.torch_compat.capture import CaptureError, capture_full_graph, mark_dimension
from vllmc.kernels.layer_name import LayerName

# Distinct, and neither 0 nor 1, so that no two sizes are taken for one.
_EXAMPLE_TOKENS = 17
_EXAMPLE_ROWS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A model's graph, normalised.

    `inputs` describes the placeholders in order. `roles` says what the symbols among their sizes
    count. `functions` are the qualified names of the traced functions by their source file.
    """

    graph: fx.Graph
    inputs: tuple[GraphInput, ...]
    roles: Mapping[sympy.Symbol, SymbolRole]
    attention: tuple[AttentionSite, ...]
    functions: Mapping[str, tuple[str, ...]]


def capture(model: Model, entry: torch.nn.Module, spec: CompileSpec) -> Capture:
    """Captures `entry`, the built `model`. Its weights may be fake.

    Raises `VllmcError` (`unsupported-model`) naming the module and line that stood in the way,
    or the layers whose attention does not go through the attention op.
    """
    try:
        raw = capture_full_graph(entry, _example_args(spec), spec.dynamic_shapes)
    except CaptureError as error:
        raise _unsupported(
            model.name, error.reason, **{"in": _culprit(error.frames) or "an unknown place"}
        ) from error
    graph = raw.module.graph
    _refuse_constants(model, graph)
    normalize(graph)
    inputs = tuple(
        _resolve(entry, read_source(raw.sources[node.name]))
        for node in graph.nodes
        if node.op == "placeholder"
    )
    _check_positions(model, inputs)
    sites = _attention_sites(graph, inputs)
    _check_attention(model, sites)
    functions: dict[str, set[str]] = {}
    for code in raw.code:
        functions.setdefault(code.co_filename, set()).add(code.co_qualname)
    return Capture(
        graph=graph,
        inputs=inputs,
        roles=_roles(graph, inputs),
        attention=sites,
        functions={file: tuple(sorted(names)) for file, names in sorted(functions.items())},
    )


def _example_args(spec: CompileSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`input_ids` and `position_ids` `[1, T]`, `logits_indices` `[B]`, with `T` and `B` marked."""
    ids, positions = (
        torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64, device=spec.device) for _ in range(2)
    )
    rows = torch.zeros(_EXAMPLE_ROWS, dtype=torch.int64, device=spec.device)
    for tensor, dim, shape_id in ((ids, 1, "tokens"), (positions, 1, "tokens"), (rows, 0, "rows")):
        mark_dimension(
            tensor,
            dim,
            kind=spec.dynamic_shapes,
            shape_id=shape_id,
            low=1,
            high=max(spec.max_tokens, _EXAMPLE_TOKENS),
        )
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
    )


def _roles(graph: fx.Graph, inputs: Sequence[GraphInput]) -> dict[sympy.Symbol, SymbolRole]:
    roles: dict[sympy.Symbol, SymbolRole] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, given in zip(placeholders, inputs, strict=True):
        value = value_of(node)
        if given.kind == "activation" and isinstance(value, torch.Tensor):
            role: SymbolRole = "rows" if given.name == "logits_indices" else "tokens"
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    roles[size.node.expr] = role
    return roles


def _attention_sites(graph: fx.Graph, inputs: Sequence[GraphInput]) -> tuple[AttentionSite, ...]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = {
        node: given.name
        for node, given in zip(placeholders, inputs, strict=True)
        if given.kind == "layer-name"
    }
    sites = []
    for node in graph.nodes:
        if node.op != "call_function" or ATTENTION_OP not in op_names(node.target):
            continue
        key, value, layer, window = node.args[1], node.args[2], node.args[4], node.args[6]
        key_shape, value_shape = value_of(key).shape, value_of(value).shape
        sites.append(
            AttentionSite(
                layer=layer if isinstance(layer, str) else names[layer],
                kv_heads=int(key_shape[2]),
                key_size=int(key_shape[3]),
                value_size=int(value_shape[3]),
                window=window,
            )
        )
    return tuple(sites)


def _check_attention(model: Model, sites: Sequence[AttentionSite]) -> None:
    """Refuses a graph in which some layer attends, or keeps state, outside the attention op."""
    expected = model.info.layers
    if not sites or (expected is not None and len(sites) != expected):
        raise _unsupported(
            model.name,
            f"{len(sites)} of its {expected or 'unknown number of'} layers attend through the "
            "Transformers attention interface",
            hint="vllmc needs every layer to call the attention function of its configuration",
        )
    if len({site.layer for site in sites}) != len(sites):
        raise _unsupported(model.name, "a layer attends more than once in one step")
    check_windows(
        model.name,
        model.info.layer_types,
        [site.window for site in sites],
        sliding_window=model.info.sliding_window,
    )


def _check_positions(model: Model, inputs: Sequence[GraphInput]) -> None:
    """Refuses a model that counts positions by itself: a flattened batch has several sequences."""
    if not any(given.kind == "activation" and given.name == "position_ids" for given in inputs):
        raise _unsupported(
            model.name,
            "it does not use the position_ids that it is given",
            hint="vllmc runs several sequences as one batch, so each token brings its position",
        )


def _refuse_constants(model: Model, graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "get_attr":
            raise _unsupported(
                model.name,
                f"its forward makes the tensor or subgraph '{node.target}' while it is traced",
                hint="make it a buffer of the module",
            )


def _culprit(frames: Sequence[FrameSummary]) -> str:
    """The innermost frame outside torch, as `Class.function (file:line): source`."""
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith("<")]
    if not own:
        return ""
    frame = own[-1]
    place = "/".join(Path(frame.filename).parts[-3:])
    owner = _enclosing_class(frame.filename, frame.lineno or 0)
    function = f"{owner}.{frame.name}" if owner else frame.name
    return f"{function} ({place}:{frame.lineno}): {(frame.line or '').strip()}"


def _enclosing_class(file: str, line: int) -> str:
    try:
        module = ast.parse(Path(file).read_text())
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
    return next(
        (
            node.name
            for node in module.body
            if isinstance(node, ast.ClassDef) and node.lineno <= line <= (node.end_lineno or 0)
        ),
        "",
    )


def _unsupported(name: str, cause: str, *, hint: str = "", **context: object) -> VllmcError:
    return VllmcError(
        "unsupported-model",
        f"the model '{name}' cannot be captured in one graph: {cause}",
        context=context,
        hint=hint or "docs/models.md lists what is known to work",
    )
