"""Strings given to custom ops that make pieces unique which would else be one program.

A name costs where its op lies inside a compiled piece: equal layers then give a piece each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from vllmc.core.graph.piece import digest_of
from vllmc.core.graph.plan import UniquePiece
from vllmc.core.graph.targets import schemas_of
from vllmc.core.torch_compat.ops import declared_by_signature

_OF_TORCH = ("aten::", "prims::")
_STRINGS = ("str", "Optional[str]")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedArgument:
    """An argument of the op `namespace::name` in whose strings otherwise equal pieces differ.

    `schema` is the op's, and `by_signature` says whether torch.library made it from the annotations
    of a function; `values` are the strings, each once, and `pieces` the names of the
    pieces that hold them, both in the order of the graph.
    """

    op: str
    argument: str
    schema: str
    by_signature: bool
    values: tuple[str, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPieces:
    """What strings did to a plan of `unique` pieces.

    `extra` are the pieces, each by its first name, that would not be there with equal strings. Of
    those that would be one the first is not among them: it would be compiled in any case.
    """

    unique: int
    extra: tuple[str, ...]
    arguments: tuple[NamedArgument, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A string in the arguments of a custom op, by position or keyword."""

    node: fx.Node
    index: int | str
    value: str
    schema: torch._C.FunctionSchema
    argument: str


def find_named_pieces(unique: Sequence[UniquePiece]) -> NamedPieces | None:
    """The pieces of a plan that only strings in custom ops tell apart; None where there are none.

    What counts is which strings are the same within a piece, not what they say: a piece that has
    one name twice and a piece that has two names would differ whatever the names were.
    """
    groups: dict[str, list[UniquePiece]] = {}
    for candidate in unique:
        if any(_strings(candidate.piece.graph)):
            groups.setdefault(_nameless_digest(candidate), []).append(candidate)
    shared = [group for group in groups.values() if len(group) > 1]
    if not shared:
        return None
    return NamedPieces(
        unique=len(unique),
        extra=tuple(one.names[0] for group in shared for one in group[1:]),
        arguments=_arguments(shared),
    )


def _nameless_digest(unique: UniquePiece) -> str:
    """The digest of the piece with its strings replaced by numbers, in order of appearance."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(unique.piece.graph, {}))
    numbers: dict[str, str] = {}
    for place in tuple(_strings(graph)):
        number = numbers.setdefault(place.value, str(len(numbers)))
        if isinstance(place.index, int):
            place.node.update_arg(place.index, number)
        else:
            place.node.update_kwarg(place.index, number)
    return digest_of(graph, unique.piece.inputs, unique.piece.roles)


def _arguments(groups: Sequence[Sequence[UniquePiece]]) -> tuple[NamedArgument, ...]:
    """The arguments whose strings differ within a group."""
    schemas: dict[tuple[str, str], str] = {}
    values: dict[tuple[str, str], dict[str, None]] = {}
    pieces: dict[tuple[str, str], dict[str, None]] = {}
    for group in groups:
        names = [name for one in group for name in one.names]
        # One digest, so the places are the same in every piece of the group.
        for places in zip(*(_strings(one.piece.graph) for one in group), strict=True):
            texts = dict.fromkeys(place.value for place in places)
            if len(texts) > 1:
                first = places[0]
                key = (first.schema.name, first.argument)
                schemas.setdefault(key, str(first.schema))
                values.setdefault(key, {}).update(texts)
                pieces.setdefault(key, {}).update(dict.fromkeys(names))
    return tuple(
        NamedArgument(
            op=op,
            argument=argument,
            schema=schema,
            by_signature=declared_by_signature(op),
            values=tuple(values[op, argument]),
            pieces=tuple(pieces[op, argument]),
        )
        for (op, argument), schema in schemas.items()
    )


def _strings(graph: fx.Graph) -> Iterator[_Place]:
    for node in graph.nodes:
        schemas = schemas_of(node.target)
        if not schemas or schemas[0].name.startswith(_OF_TORCH):
            continue
        for index, value in (*enumerate(node.args), *node.kwargs.items()):
            if not isinstance(value, str):
                continue
            for schema in schemas:
                if (argument := _string_argument(schema, index)) is not None:
                    yield _Place(
                        node=node, index=index, value=value, schema=schema, argument=argument
                    )
                    break


def _string_argument(schema: torch._C.FunctionSchema, index: int | str) -> str | None:
    """The name of the argument, if the schema has it and takes a string there."""
    for position, argument in enumerate(schema.arguments):
        if index in (position, argument.name) and str(argument.type) in _STRINGS:
            return str(argument.name)
    return None
