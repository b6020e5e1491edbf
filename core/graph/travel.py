"""A piece as plain data, for another process to compile.

What arrives has the digest of what was sent, or is refused: what is compiled there is what the key
says here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from vllmc.core.cache.key import JsonValue
from vllmc.core.errors import VllmcError
from vllmc.core.graph.literals import decode, decode_constant, encode
from vllmc.core.graph.piece import (
    OpaqueInput,
    Piece,
    PieceInput,
    SizeInput,
    TensorInput,
    digest_of,
)
from vllmc.core.graph.targets import custom_ops, find_target, target_name
from vllmc.core.torch_compat.opaque import real_value
from vllmc.core.torch_compat.ops import registrations
from vllmc.core.torch_compat.shapes import exact_text, parse_exact
from vllmc.kernels.layer_name import LayerName


def pack_piece(piece: Piece) -> dict[str, Any]:
    """`piece` as data of plain types.

    Raises `VllmcError` (`cannot-travel`, `unsupported-model`) for what has no such form: a
    function without a name, an opaque value that is no layer's name.
    """
    names = {node: node.name for node in piece.graph.nodes}
    nodes = [
        {
            "op": node.op,
            "name": node.name,
            "target": target_name(node),
            "args": [encode(a, names) for a in node.args],
            "kwargs": {key: encode(value, names) for key, value in node.kwargs.items()},
        }
        for node in piece.graph.nodes
        if node.op not in ("placeholder", "output")
    ]
    (outputs,) = piece.graph.output_node().args
    return {
        "digest": piece.digest,
        "modules": _modules(piece),
        "inputs": [_pack_input(given) for given in piece.inputs],
        "names": [node.name for node in piece.graph.find_nodes(op="placeholder")],
        "roles": list(piece.roles),
        "nodes": nodes,
        "outputs": encode(outputs, names),
    }


def unpack_piece(data: Mapping[str, Any]) -> Piece:
    """The piece that `pack_piece` wrote; its ops must be registered.

    Raises `VllmcError`: `unknown-op`, and `cannot-travel` where another piece came out.
    """
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    for name in data["names"]:
        values[name] = graph.placeholder(name)
    for row in data["nodes"]:
        values[row["name"]] = graph.create_node(
            row["op"],
            row["target"] if row["op"] == "call_method" else find_target(row["target"]),
            tuple(decode(a, values) for a in row["args"]),
            {key: decode(value, values) for key, value in row["kwargs"].items()},
            name=row["name"],
        )
    outputs = decode(data["outputs"], values)
    graph.output(outputs)
    inputs = tuple(_unpack_input(row) for row in data["inputs"])
    digest = digest_of(graph, inputs, data["roles"])
    if digest != data["digest"]:
        raise VllmcError(
            "cannot-travel",
            "a piece became another one on its way to a worker",
            context={"sent": data["digest"], "arrived": digest},
        )
    return Piece(
        graph=graph,
        inputs=inputs,
        roles=tuple(data["roles"]),
        outputs=len(outputs),
        digest=digest,
    )


def _pack_input(given: PieceInput) -> dict[str, JsonValue]:
    match given:
        case TensorInput():
            return {
                "dtype": encode(given.dtype, {}),
                "device": given.device,
                "shape": [exact_text(e) for e in given.shape],
                "stride": [exact_text(e) for e in given.stride],
            }
        case SizeInput():
            return {"value": exact_text(given.value)}
        case OpaqueInput():
            name = real_value(given.example)
            if not isinstance(name, LayerName):
                raise VllmcError(
                    "cannot-travel",
                    f"an input of a piece is a {given.type_name}, which no other process is given",
                )
            return {"layer_name": name.value, "type": given.type_name}


def _unpack_input(row: Mapping[str, Any]) -> PieceInput:
    if "layer_name" in row:
        return OpaqueInput(type_name=row["type"], example=LayerName(row["layer_name"]))
    if "value" in row:
        return SizeInput(value=parse_exact(row["value"]))
    dtype = decode_constant(row["dtype"])
    assert isinstance(dtype, torch.dtype)
    return TensorInput(
        dtype=dtype,
        device=row["device"],
        shape=tuple(parse_exact(text) for text in row["shape"]),
        stride=tuple(parse_exact(text) for text in row["stride"]),
    )


def _modules(piece: Piece) -> list[str]:
    """The modules that register the piece's custom ops, as they are called in this process."""
    files = {f for op in custom_ops(piece.graph.nodes) for f, _ in registrations(op)}
    found = {
        name
        for name, module in tuple(sys.modules.items())
        if getattr(module, "__file__", None) in files and name != "__main__"
    }
    return sorted(found)
