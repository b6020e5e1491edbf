"""Patterns: graphs of a few nodes with inputs, and where in a graph one of them occurs.

A pattern is what tracing an example gives, so that it has the form that decomposition gives the
model's own code, in whatever torch is installed. Its inputs stand for whatever there is in their
place: a node, or a constant such as a layer's name that was not hoisted. Torch's own matcher
(`torch._inductor.pattern_matcher`) does not say why something is no match, and this one does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.fx as fx

from vllmc.core.graph.passes.report import NearMiss

_COMMUTATIVE: Final = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A traced example: the first result of `graph` is what is looked for.

    Other results may be read by the rest of the graph too; what lies between may not. `numbers`
    are those of the example that stand for any number, by their names.
    """

    graph: fx.Graph
    numbers: Mapping[float, str]

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """What the example returns."""
        (results,) = self.graph.output_node().args
        assert isinstance(results, (list, tuple))
        return tuple(node for node in results if isinstance(node, fx.Node))


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """`inputs` and numbers of the pattern by their names; `results` are the nodes of its results.

    `nodes` are all that it is made of, each after those that it reads.
    """

    inputs: Mapping[str, Any]
    results: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


def find_match(pattern: Pattern, root: fx.Node, reader: fx.Node) -> Match | NearMiss:
    """Whether `root` computes the pattern for `reader`, which alone reads it."""
    search = _Search(pattern)
    state = search.unify(pattern.results[0], root, _State())
    if state is None:
        assert search.closest is not None, "a match that fails fails somewhere"
        return search.closest
    results = tuple(state.nodes[node] for node in pattern.results)
    inside = {*state.nodes.values(), reader} - set(results[1:])
    for node in [n for n in state.nodes.values() if n in inside]:
        if others := [user for user in node.users if user not in inside | set(results)]:
            return NearMiss(
                node=node.name,
                expected="nothing else to read it",
                found=f"{_told(others[0])} reads it",
                matched=len(state.nodes) + 1,
            )
    ordered = tuple(state.nodes[node] for node in pattern.graph.nodes if node in state.nodes)
    return Match(inputs=state.inputs, results=results, nodes=ordered)


def closest(misses: Iterable[NearMiss]) -> NearMiss | None:
    """The miss at which most had matched."""
    return max(misses, key=lambda miss: miss.matched, default=None)


@dataclass(slots=True)
class _State:
    """What the nodes and inputs of a pattern were found to be, so far."""

    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(dict(self.nodes), dict(self.inputs))


class _Search:
    """One attempt to find a pattern; `closest` is where it got furthest and failed."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self.closest: NearMiss | None = None

    def unify(self, wanted: fx.Node, found: Any, state: _State) -> _State | None:
        """`state` with what `wanted` and all that it reads was found to be, or None."""
        if wanted.op == "placeholder":
            return self._bind(str(wanted.target), found, state)
        if wanted in state.nodes:
            return state if state.nodes[wanted] is found else self._fail(wanted, found, state)
        if not isinstance(found, fx.Node) or found.target is not wanted.target:
            return self._fail(wanted, found, state)
        if len(found.args) != len(wanted.args) or found.kwargs.keys() != wanted.kwargs.keys():
            return self._fail(wanted, found, state)
        for args in self._orders(found):
            pairs = [*zip(wanted.args, args, strict=True)]
            pairs += [(value, found.kwargs[name]) for name, value in wanted.kwargs.items()]
            attempt = state.copy()
            attempt.nodes[wanted] = found
            if (after := self._unify_all(pairs, found, attempt)) is not None:
                return after
        return None

    def _unify_all(
        self, pairs: list[tuple[Any, Any]], owner: fx.Node, state: _State
    ) -> _State | None:
        # Inputs take anything, so what is particular goes first.
        for wanted, found in sorted(pairs, key=lambda pair: _is_input(pair[0])):
            after = (
                self.unify(wanted, found, state)
                if isinstance(wanted, fx.Node)
                else self._constant(wanted, found, owner, state)
            )
            if after is None:
                return None
            state = after
        return state

    def _constant(self, wanted: Any, found: Any, owner: fx.Node, state: _State) -> _State | None:
        if isinstance(wanted, float) and (name := self._pattern.numbers.get(wanted)) is not None:
            if isinstance(found, (int, float)):
                return self._bind(name, found, state)
        elif wanted == found:
            return state
        return self._miss(owner.name, repr(wanted), _told(found), state)

    def _bind(self, name: str, found: Any, state: _State) -> _State | None:
        if name in state.inputs and state.inputs[name] is not found:
            return self._miss(_named(found), f"{name} as before", _told(found), state)
        state.inputs[name] = found
        return state

    def _orders(self, found: fx.Node) -> list[tuple[Any, ...]]:
        straight = found.args
        swaps = found.target in _COMMUTATIVE and not found.kwargs and len(straight) == 2
        return [straight, straight[::-1]] if swaps else [straight]

    def _fail(self, wanted: fx.Node, found: Any, state: _State) -> _State | None:
        return self._miss(_named(found), str(wanted.target), _told(found), state)

    def _miss(self, node: str, expected: str, found: str, state: _State) -> _State | None:
        """Remembers the failure, where it is the closest so far."""
        if self.closest is None or len(state.nodes) > self.closest.matched:
            self.closest = NearMiss(
                node=node, expected=expected, found=found, matched=len(state.nodes)
            )
        return None


def _is_input(wanted: Any) -> bool:
    return isinstance(wanted, fx.Node) and wanted.op == "placeholder"


def _named(value: Any) -> str:
    return value.name if isinstance(value, fx.Node) else repr(value)


def _told(value: Any) -> str:
    """What a node calls, or what else there is."""
    if not isinstance(value, fx.Node):
        return repr(value)
    return "an input of the piece" if value.op == "placeholder" else str(value.target)
