"""A piece in canonical form: what is compiled, and the digest that says two pieces are the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import sympy
import torch
import torch.fx as fx

from vllmc.core.cache.key import canonical_json, sha256_hex
from vllmc.core.graph.normalize import value_of
from vllmc.core.graph.split import Cut
from vllmc.core.graph.targets import custom_ops, target_name
from vllmc.core.torch_compat.opaque import is_opaque_value, opaque_type_name, real_value
from vllmc.core.torch_compat.ops import registrations

SymbolRole: TypeAlias = Literal["tokens", "rows", "other", "data"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """A tensor argument: `shape` and `stride` in elements, over the piece's own symbols."""

    dtype: torch.dtype
    device: str
    shape: tuple[sympy.Expr, ...]
    stride: tuple[sympy.Expr, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeInput:
    """An integer argument."""

    value: sympy.Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class OpaqueInput:
    """An argument that the compiler passes through to an op, such as a hoisted layer name."""

    type_name: str
    example: object


PieceInput: TypeAlias = TensorInput | SizeInput | OpaqueInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A compilable piece with every name dropped.

    Two pieces with one `digest` are the same program, whatever layer they came from. `roles`
    says of each symbol (`s0`, `s1`, ... in order of appearance) what it is: the number of `tokens`,
    which chooses the compile range; `rows`, from 1 to that number; an `other` size of the
    arguments, at least 1; or `data`, which only the values of tensors decide.
    """

    graph: fx.Graph
    inputs: tuple[PieceInput, ...]
    roles: tuple[SymbolRole, ...]
    outputs: int
    digest: str

    @property
    def module(self) -> fx.GraphModule:
        """A fresh module of the graph, for a compiler that takes ownership of it."""
        copy = fx.Graph()
        copy.output(copy.graph_copy(self.graph, {}))
        return fx.GraphModule({}, copy)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether any size varies with the token count, so that each range needs its own unit."""
        return "tokens" in self.roles


def symbol(index: int) -> sympy.Symbol:
    """The piece's own symbol number `index`."""
    return sympy.Symbol(f"s{index}", integer=True, nonnegative=True)


def canonical_piece(cut: Cut, roles: Mapping[sympy.Symbol, SymbolRole]) -> Piece:
    """Rewrites `cut` without names. `roles` knows the symbols of the whole graph's inputs.

    Raises what `target_name` raises.
    """
    symbols = _Symbols(roles)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inputs = tuple(_describe(node, symbols) for node in cut.inputs)
    for index, node in enumerate(cut.inputs):
        env[node] = graph.placeholder(f"a{index}")
    for index, node in enumerate(cut.nodes):
        fresh = graph.node_copy(node, lambda n: env[n])
        fresh._rename(f"n{index}")
        fresh.meta.clear()
        env[node] = fresh
    graph.output(tuple(env[node] for node in cut.outputs))
    return Piece(
        graph=graph,
        inputs=inputs,
        roles=tuple(symbols.roles),
        outputs=len(cut.outputs),
        digest=_digest(cut.inputs, cut.nodes, cut.outputs, inputs, symbols.roles),
    )


def digest_of_cut(cut: Cut, roles: Mapping[sympy.Symbol, SymbolRole]) -> str:
    """The digest of `canonical_piece(cut, roles)`, which is not made: most are there already."""
    symbols = _Symbols(roles)
    inputs = [_describe(node, symbols) for node in cut.inputs]
    return _digest(cut.inputs, cut.nodes, cut.outputs, inputs, symbols.roles)


class _Symbols:
    """Renames the whole graph's symbols to `s0`, `s1`, ... in order of appearance."""

    def __init__(self, roles: Mapping[sympy.Symbol, SymbolRole]) -> None:
        self._known = roles
        self._renamed: dict[sympy.Symbol, sympy.Symbol] = {}
        self.roles: list[SymbolRole] = []

    def rewrite(self, value: int | torch.SymInt) -> sympy.Expr:
        if not isinstance(value, torch.SymInt):
            return sympy.Integer(value)
        expr = value.node.expr
        free = _free_symbols(expr)
        for known in free:
            if known not in self._renamed:
                self._renamed[known] = symbol(len(self._renamed))
                self.roles.append(self._known.get(known, "data"))
        return _renamed(expr, tuple(self._renamed[known] for known in free))

    def rewrite_all(self, values: Iterable[int | torch.SymInt]) -> tuple[sympy.Expr, ...]:
        return tuple(self.rewrite(value) for value in values)


# The pieces of a model have few sizes between them, and SymPy takes its time over each.
@lru_cache(maxsize=4096)
def _free_symbols(expr: sympy.Expr) -> tuple[sympy.Symbol, ...]:
    return tuple(sorted(expr.free_symbols, key=str))


@lru_cache(maxsize=4096)
def _renamed(expr: sympy.Expr, names: tuple[sympy.Symbol, ...]) -> sympy.Expr:
    """`expr` with `names` for its symbols, in their order."""
    return expr.xreplace(dict(zip(_free_symbols(expr), names, strict=True)))


@lru_cache(maxsize=4096)
def _told(expr: sympy.Expr) -> str:
    return str(expr)


def _describe(node: fx.Node, symbols: _Symbols) -> PieceInput:
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return TensorInput(
            dtype=value.dtype,
            device=str(value.device),
            shape=symbols.rewrite_all(value.shape),
            stride=symbols.rewrite_all(value.stride()),
        )
    if isinstance(value, (int, torch.SymInt)):
        return SizeInput(value=symbols.rewrite(value))
    opaque = real_value(value)
    assert is_opaque_value(opaque), f"{node} holds a {type(value).__name__}"
    return OpaqueInput(type_name=opaque_type_name(opaque), example=value)


def digest_of(graph: fx.Graph, inputs: Sequence[PieceInput], roles: Sequence[SymbolRole]) -> str:
    """The digest of a piece that has this graph."""
    placeholders = graph.find_nodes(op="placeholder")
    nodes = [node for node in graph.nodes if node.op not in {"placeholder", "output"}]
    return _digest(placeholders, nodes, graph.output_node().args[0], inputs, roles)


def _digest(
    placeholders: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    outputs: object,
    inputs: Sequence[PieceInput],
    roles: Sequence[SymbolRole],
) -> str:
    """The digest of a piece: ops and wiring, constants, and what the inputs are."""
    order = {node: index for index, node in enumerate((*placeholders, *nodes))}
    told: dict[str, object] = {
        "inputs": [_row(i) for i in inputs],
        "roles": list(roles),
        "nodes": [
            [node.op, target_name(node), _text(node.args, order), _text(node.kwargs, order)]
            for node in nodes
        ],
        "outputs": _text(outputs, order),
    }
    if ops := _implementations(nodes):
        told["ops"] = ops
    return sha256_hex(canonical_json(told))


def _implementations(nodes: Iterable[fx.Node]) -> dict[str, object]:
    """Of each custom op, the digests of the files that implement it in Python, and the lines.

    A compiler may put an implementation into its code, and relies on what the fake one says.
    """
    found: dict[str, object] = {}
    for name in custom_ops(nodes):
        if places := registrations(name):
            found[name] = [[sha256_hex(Path(f).read_bytes()), line] for f, line in places]
    return found


def _row(given: PieceInput) -> list[object]:
    match given:
        case TensorInput():
            shape, stride = [*map(_told, given.shape)], [*map(_told, given.stride)]
            return ["tensor", str(given.dtype), given.device, shape, stride]
        case SizeInput():
            return ["size", _told(given.value)]
        case OpaqueInput():
            return ["opaque", given.type_name]


def _text(value: object, order: dict[fx.Node, int]) -> object:
    """A JSON form of a node's arguments that tells types apart and holds no address."""
    match value:
        case fx.Node():
            return {"node": order[value]}
        case list() | tuple():
            return [type(value).__name__, *(_text(v, order) for v in value)]
        case dict():
            return {"dict": {str(k): _text(v, order) for k, v in value.items()}}
        case slice():
            return {"slice": [_text(v, order) for v in (value.start, value.stop, value.step)]}
        case None | bool() | int() | str():
            return value
        case float():
            return {"float": value.hex()}
        case _:
            text = repr(value)
            assert " at 0x" not in text, f"{text} names an address"
            return {type(value).__name__: text}
