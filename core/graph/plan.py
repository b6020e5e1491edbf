"""The plan of a program: its cuts, its unique pieces, and the layout that links them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypedDict

import torch
import torch.fx as fx

from vllmc.core.cache.key import JsonValue
from vllmc.core.compiler.protocol import Unit
from vllmc.core.errors import VllmcError
from vllmc.core.graph.capture import Capture
from vllmc.core.graph.layout import Layout, Obstacle, OpStep, UnitStep
from vllmc.core.graph.literals import encode
from vllmc.core.graph.normalize import value_of
from vllmc.core.graph.obstacles import obstacle
from vllmc.core.graph.piece import Piece, canonical_piece, digest_of_cut
from vllmc.core.graph.split import Cut, split, splits_at
from vllmc.core.graph.targets import nearest_names, target_name
from vllmc.core.spec import ATTENTION_OP, CompileSpec, unit_ranges
from vllmc.core.torch_compat.shapes import is_contiguous


@dataclass(frozen=True, slots=True, kw_only=True)
class UniquePiece:
    """A piece that is compiled once, and the names of all pieces that are it."""

    piece: Piece
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to compile and how to run it."""

    pieces: int
    splitting: int
    unique: tuple[UniquePiece, ...]
    layout: Layout

    @property
    def counts(self) -> dict[str, int]:
        """The `pieces` object of `warm --json`."""
        return {
            "total": self.pieces,
            "splitting": self.splitting,
            "compilable": self.pieces - self.splitting,
            "unique": len(self.unique),
        }


def make_plan(captured: Capture, spec: CompileSpec) -> Plan:
    """Cuts the captured graph and finds which pieces are the same program.

    Raises `VllmcError` (`no-splitting-op`) when none of the splitting ops occurs, but for the
    default one: what does not attend is one piece.
    """
    cuts = split(captured.graph, splits_at(spec.splitting_ops))
    asked = set(spec.splitting_ops) - {ATTENTION_OP}
    if asked and not any(cut.splitting for cut in cuts):
        raise _no_splitting_op(captured.graph, spec)
    pieces: dict[str, Piece] = {}
    names: dict[str, list[str]] = {}
    digests: dict[str, str] = {}
    obstacles: list[Obstacle] = []
    for cut in cuts:
        if not cut.splitting:
            digest = digest_of_cut(cut, captured.roles)
            if digest not in pieces:
                if (cause := obstacle(cut, captured.roles)) is not None:
                    obstacles.append(Obstacle(piece=len(pieces), cause=cause))
                pieces[digest] = canonical_piece(cut, captured.roles)
            names.setdefault(digest, []).append(cut.name)
            digests[cut.name] = digest
    order = {digest: index for index, digest in enumerate(pieces)}
    return Plan(
        pieces=len(cuts),
        splitting=sum(cut.splitting for cut in cuts),
        unique=tuple(UniquePiece(piece=pieces[d], names=tuple(names[d])) for d in pieces),
        layout=Layout(
            arguments=captured.arguments,
            pieces=tuple(names[digest][0] for digest in pieces),
            ranges=tuple(str(r) for r in unit_ranges(spec)),
            inputs=captured.inputs,
            attention=captured.attention,
            experts=captured.experts,
            demands=captured.assumptions.demands,
            promises=captured.assumptions.promises,
            written=captured.written,
            obstacles=tuple(obstacles),
            **_steps(captured, cuts, {name: order[d] for name, d in digests.items()}),
        ),
    )


def _no_splitting_op(graph: fx.Graph, spec: CompileSpec) -> VllmcError:
    calls = [node for node in graph.nodes if node.op in {"call_function", "call_method"}]
    near = list(dict.fromkeys(n for op in spec.splitting_ops for n in nearest_names(op, calls)))
    return VllmcError(
        "no-splitting-op",
        "none of the splitting ops occurs in the graph",
        context={"splitting_ops": list(spec.splitting_ops), "nearest": near},
        hint=f"did you mean --splitting-op {near[0]}?"
        if near
        else "leave --splitting-op out to split at the attention op",
    )


def plan_units(plan: Plan, spec: CompileSpec) -> tuple[tuple[tuple[str, ...], Unit], ...]:
    """Every compile unit of the plan, with the names of the pieces that share it."""
    ranges = unit_ranges(spec)
    return tuple(
        (unique.names, Unit(piece=unique.piece, range=r))
        for unique in plan.unique
        for r in (ranges if unique.piece.depends_on_tokens else ranges[-1:])
    )


class _Steps(TypedDict):
    steps: tuple[UnitStep | OpStep, ...]
    result: JsonValue


def _steps(captured: Capture, cuts: Sequence[Cut], piece_of: Mapping[str, int]) -> _Steps:
    placeholders = captured.graph.find_nodes(op="placeholder")
    names = {node: f"p{index}" for index, node in enumerate(placeholders)}
    results = [n for cut in cuts for n in (cut.nodes if cut.splitting else cut.outputs)]
    names |= {node: f"v{index}" for index, node in enumerate(results)}
    read = frozenset(node for cut in cuts if not cut.splitting for node in cut.inputs)
    steps: list[UnitStep | OpStep] = []
    for cut in cuts:
        if cut.splitting:
            steps += _op_steps(cut, names)
        else:
            steps.append(
                UnitStep(
                    piece=piece_of[cut.name],
                    args=tuple(names[node] for node in cut.inputs),
                    results=tuple(names[node] for node in cut.outputs),
                )
            )
            steps += [step for n in cut.outputs if n in read for step in _relaid(n, names[n])]
    (outputs,) = captured.graph.output_node().args
    assert isinstance(outputs, (list, tuple))
    found = [encode(output, names) for output in outputs]
    return _Steps(steps=tuple(steps), result=_filled(captured.result, found))


def _filled(result: JsonValue, outputs: Sequence[JsonValue]) -> JsonValue:
    """What a call returns, with the values of the graph's `outputs` in their places."""
    match result:
        case {"output": int(index)}:
            return outputs[index]
        case {"argument": int(index)}:
            return {"ref": f"a{index}"}
        case dict():
            return {key: _filled(value, outputs) for key, value in result.items()}
        case list():
            return [_filled(value, outputs) for value in result]
    return result


def _relaid(node: fx.Node, name: str) -> list[OpStep]:
    """Steps that lay a piece's result out as captured: it nearly always is, and stays as it is.

    Inductor keeps the strides of results, except those that hold an unbacked size. The pieces that
    read such a result are compiled for the captured ones.
    """
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return []
    if not any(isinstance(stride, torch.SymInt) for stride in value.stride()):
        return []
    dims = range(value.dim())
    order = next((o for o in permutations(dims) if is_contiguous(value.permute(o))), None)
    if order is None:
        # One with gaps or repetitions, which `Program` refuses where a piece gave another.
        return []
    back = sorted(dims, key=order.__getitem__)
    methods = [("permute", order), ("contiguous", ()), ("permute", back)]
    return [
        OpStep(target=f"call_method:{method}", args=({"ref": name}, *args), kwargs={}, result=name)
        for method, args in (methods[1:2] if order == tuple(dims) else methods)
    ]


def _op_steps(cut: Cut, names: Mapping[fx.Node, str]) -> list[OpStep]:
    return [
        OpStep(
            target=f"{node.op}:{target_name(node)}",
            args=tuple(encode(a, names) for a in node.args),
            kwargs={key: encode(value, names) for key, value in node.kwargs.items()},
            result=names[node],
        )
        for node in cut.nodes
    ]
