"""Capture of models whose layers repeat: what is alike is traced once.

Dynamo's time grows with the layers, and most of them give the same nodes. So the first of those
that look alike is traced, each of the others becomes one node (`torch_compat.stand_ins`), and what
was traced takes that node's place. That this is the graph which a full capture gives follows from
what Dynamo says itself, and is checked before anything is copied:

- the layers have the same classes, and tensors of the same form;
- every Python value that Dynamo guarded on in the layer that it traced is the same in the other,
  where the other has it: had the other been traced, each decision would have been the same;
- both are called in the same way: the same constants, tensors of the same form, one tensor and
  shared memory in the same places, and no list or dictionary that others could write to;
- the process is in the same state: of torch, and of all Python objects that were there before;
- what was traced reads nothing else of the graph, writes to no memory but its own, makes no number
  that is known only when it runs, asks of no module which one it is, and no one looks into it.

What fails a check is traced by itself; where too much fails, all of it is.
"""

from __future__ import annotations

import ast
import operator
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
import torch.fx as fx

from vllmc.core.cache.key import JsonValue
from vllmc.core.errors import VllmcError
from vllmc.core.graph.aliases import memory_of, written_memory
from vllmc.core.graph.inputs import find_attribute, read_source
from vllmc.core.graph.layers import Layers, find_layers, look
from vllmc.core.graph.normalize import expression_of, is_symbolic, symbols_of, value_of
from vllmc.core.models.guarded import is_in_the_tree, is_of_the_tree, read_guarded
from vllmc.core.models.lookups import Lookups
from vllmc.core.spec import DynamicShapes
from vllmc.core.syntax import parse_expression
from vllmc.core.torch_compat.capture import CaptureError, RawCapture, capture_full_graph
from vllmc.core.torch_compat.stand_ins import (
    Traced,
    begins,
    call_of,
    called,
    ends,
    result_of,
    standing_in,
    stands_for,
)

_ATTEMPTS: Final = 3
_SELF: Final = "L['self']"


def capture_repeating(
    entry: torch.nn.Module, arguments: Mapping[str, object], kind: DynamicShapes
) -> RawCapture:
    """As `capture_full_graph`, tracing one of the layers that are alike. Raises what it raises."""
    layers = find_layers(entry)
    for _ in range(_ATTEMPTS):
        if not layers.models:
            break
        try:
            with standing_in(layers.modules, layers.models) as traced:
                raw = capture_full_graph(entry, arguments, kind)
        except CaptureError:
            # The layers are not in its frames: the whole capture says what is in the way.
            break
        found = _Trace(entry, raw, layers, traced)
        if (better := found.regrouped()) == layers:
            return found.expanded()
        layers = better
    return capture_full_graph(entry, arguments, kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Body:
    """A layer that was traced: its nodes, what they take from around them, and where it ends."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    end: fx.Node


class _Trace:
    """A capture in which layers are stood in for."""

    def __init__(
        self, entry: torch.nn.Module, raw: RawCapture, layers: Layers, traced: Traced
    ) -> None:
        self._entry, self._layers, self._traced = entry, layers, traced
        self._raw, self._graph = raw, raw.module.graph
        self._bodies = _bodies(self._graph)
        self._written = written_memory(self._graph)
        self._firsts = frozenset(layers.models.values())
        self._sources = {number: _source_of(path) for number, path in enumerate(layers.paths)}
        # What the graph takes from each layer, in the order of the graph's inputs, and where below
        # the layer it is.
        self._taken = {
            number: self._placeholders_of(number) for number in {*self._firsts, *layers.models}
        }
        self._paths = {
            first: [*map(_path_below, self._taken[first].values())] for first in self._firsts
        }
        self._modules = {*map(id, entry.modules())}

    def regrouped(self) -> Layers:
        """The layers as they must be grouped for each group to be traced alike."""
        calls: dict[int, set[Hashable]] = defaultdict(set)
        for node in self._graph.nodes:
            if (number := called(node)) is not None:
                calls[number].add(_told(call_of(node), self._written))
        values = self._guarded_values()
        sound = {first for first in self._firsts if self._is_sound(first)}

        def known(number: int) -> Hashable:
            inputs = tuple(look(tensor) for tensor in self._inputs(number))
            state = frozenset(self._traced.states[number])
            return frozenset(calls[number]), state, inputs, values[number]

        def tell(number: int) -> Hashable:
            first = self._layers.first[number]
            if first not in self._firsts or number not in calls:
                return None
            # Someone else looks into a layer that is stood in for.
            if number != first and self._taken[number]:
                return number
            # What is known to be like a layer that cannot stand for others cannot either.
            if first not in sound and known(number) == known(first):
                return number
            return known(number)

        return self._layers.regrouped(tell)

    def _is_sound(self, first: int) -> bool:
        """Whether what was traced of a layer can stand for others."""
        body = self._bodies.get(first)
        if body is None or self._sources[first] not in self._raw.guarded:
            return False
        if self._asks_for_modules(first):
            return False
        # One state: it left everything as it found it.
        if len(self._traced.states[first]) > 1 or _containers(call_of(body.end)):
            return False
        given, results = _nodes(call_of(body.end)), _nodes(result_of(body.end))
        inner, held = {*body.nodes}, _memory((*body.inputs, *given))
        sizes = {s for n in (*body.inputs, *given) for s in symbols_of(value_of(n))}
        inputs = [id(t) for number in self._layers.group(first) for t in self._inputs(number)]
        return (
            all(n in given or n.op == "placeholder" or is_symbolic(n) for n in body.inputs)
            and inner.isdisjoint(given)
            and inner.issuperset(results)
            and all(inner.issuperset(n.users) or n in results or is_symbolic(n) for n in body.nodes)
            and held.isdisjoint(_memory(results))
            and self._written.isdisjoint(held | _memory(results))
            and all(symbols_of(value_of(node)) <= sizes for node in body.nodes)
            and len({*inputs}) == len(inputs)
        )

    def _asks_for_modules(self, first: int) -> bool:
        """Whether a module is looked at otherwise than in its place in the model's tree.

        Then it may be asked whether it is another one, and what is so of one layer is not of all.
        """
        source = self._sources[first]
        if any(
            e.startswith(source) and is_in_the_tree(parse_expression(e))
            for e in self._raw.identities
        ):
            return True
        trees = [parse_expression(e) for e in self._raw.guarded if source in e or _SELF not in e]
        lookups = Lookups(self._entry)
        places = []
        for tree in trees:
            if isinstance(tree, ast.Compare) and isinstance(tree.ops[0], ast.Is):
                places.append(lookups.add(tree.left))
            elif not is_of_the_tree(tree):
                places.append(lookups.add(tree))
        values, _ = lookups.read()
        return any(self._holds_a_module(values[place]) for place in places)

    def _holds_a_module(self, value: object) -> bool:
        held = value if isinstance(value, (list, tuple, set, frozenset, dict)) else (value,)
        inner = held.values() if isinstance(held, dict) else ()
        return any(id(item) in self._modules for item in (*held, *inner))

    def _placeholders_of(self, number: int) -> dict[fx.Node, str]:
        source = self._sources[number]
        return {
            node: found.removeprefix(source)
            for node in self._graph.find_nodes(op="placeholder")
            if (found := self._raw.sources[node.name]).startswith((f"{source}.", f"{source}["))
        }

    def _inputs(self, number: int) -> list[object]:
        """What the graph takes from a layer, or would if it had been traced. None: not there."""
        layer = self._layers.modules[number]
        return [_attribute(layer, path) for path in self._paths[self._layers.first[number]]]

    def _guarded_values(self) -> dict[int, Hashable]:
        """What the values are, in each layer, on which the trace of the first one like it hangs."""
        wanted: dict[int, list[str]] = {}
        for first in self._firsts:
            group = self._layers.group(first)
            differing = self._differing(first, group)
            wanted |= {n: [self._of(e, first, n) for e in differing] for n in group}
        found = read_guarded((e for own in wanted.values() for e in own), self._entry)
        return {
            number: tuple(self._unplaced(found.get(e), number) for e in own)
            for number, own in wanted.items()
        }

    def _differing(self, first: int, group: Sequence[int]) -> list[str]:
        """The expressions in the trace of `first` whose values are not one object in all layers."""
        source, layers = self._sources[first], self._layers.modules
        # What `find_layers` has seen to be alike is not looked at again.
        asked = [e for e in self._guarded(first) if not is_of_the_tree(parse_expression(e))]
        lookups = Lookups(layers[first])
        places = [lookups.add(parse_expression(e.replace(source, _SELF))) for e in asked]
        readings = [lookups.read(layers[number]) for number in group]
        return [
            expression
            for expression, place in zip(asked, places, strict=True)
            # Within the layer nothing else can be looked up.
            if _SELF in expression.replace(source, "")
            or len({(id(values[place]), place in failed) for values, failed in readings}) > 1
        ]

    def _guarded(self, first: int) -> list[str]:
        """The expressions in which the trace of a layer looked at that layer."""
        return [e for e in self._raw.guarded if self._sources[first] in e]

    def _of(self, expression: str, first: int, number: int) -> str:
        return expression.replace(self._sources[first], self._sources[number])

    def _unplaced(self, value: JsonValue, number: int) -> str:
        """A value without the path of its layer, by which it may say what it is one with."""
        text = value if isinstance(value, str) else repr(value)
        dotted = f"self.{self._layers.paths[number]}."
        return text.replace(self._sources[number], "@").replace(dotted, "@.")

    def expanded(self) -> RawCapture:
        """The capture with what was traced in place of each node that stands for a layer."""
        sources, guarded = dict(self._raw.sources), {*self._raw.guarded}
        places = _Places(self._graph)
        inputs: dict[int, dict[fx.Node, fx.Node]] = {}
        marks = []
        for node in list(self._graph.nodes):
            if (number := stands_for(node)) is not None:
                first = self._layers.first[number]
                if number not in inputs:
                    own = {n: self._sources[number] + s for n, s in self._taken[first].items()}
                    inputs[number] = places.add(own)
                    sources |= {inputs[number][n].name: source for n, source in own.items()}
                    # Of a class, which both have, Dynamo tells once.
                    told = f"type({self._sources[first]}"
                    asked = (e for e in self._guarded(first) if told not in e)
                    guarded.update(self._of(e, first, number) for e in asked)
                _expand(node, self._bodies[first], inputs[number])
            elif begins(node) is None and ends(node) is None:
                places.use(node)
                continue
            marks.append(node)
        for node in reversed(marks):
            self._graph.erase_node(node)
        self._drop_unused()
        return replace(self._raw, sources=sources, guarded=tuple(sorted(guarded)))

    def _drop_unused(self) -> None:
        """Removes what no layer uses of all that the layers were given, as Dynamo does."""
        for node in reversed(self._graph.nodes):
            if is_symbolic(node) and not node.users and node.op != "placeholder":
                self._graph.erase_node(node)
        sizes: set[Hashable] = set()
        for node in self._graph.find_nodes(op="placeholder"):
            value = value_of(node)
            known = isinstance(value, torch.SymInt) and expression_of(value) in sizes
            if not node.users and (known or isinstance(value, torch.Tensor)):
                self._graph.erase_node(node)
            elif isinstance(value, torch.SymInt):
                sizes.add(expression_of(value))


class _Places:
    """Where the inputs of a layer belong among those of a graph: in the order of first use."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._rank = {n: (i, 0) for i, n in enumerate(graph.find_nodes(op="placeholder"))}
        self._last = next(iter(self._rank), None)

    def use(self, node: fx.Node) -> None:
        """Notes that the graph has come to `node`. Conditions on sizes stand before their turn."""
        for source in node.all_input_nodes:
            if source.op == "placeholder" and not is_symbolic(source):
                self._last = max(self._last or source, source, key=self._rank.__getitem__)

    def add(self, wanted: Mapping[fx.Node, str]) -> dict[fx.Node, fx.Node]:
        """For each of the inputs another like it, with a source of its own."""
        added = {}
        for like, source in wanted.items():
            assert self._last is not None, "it follows one that it is like"
            with self._graph.inserting_after(self._last):
                node = self._graph.placeholder(re.sub(r"\W+", "_", source).lower())
            node.meta, node.type = dict(like.meta), like.type
            index, count = self._rank[self._last]
            self._rank[node] = (index, count + 1)
            added[like] = self._last = node
        return added


def _source_of(path: str) -> str:
    """How Dynamo names the module at the dotted `path` below the entry."""
    return _SELF + "".join(f"._modules[{name!r}]" for name in path.split("."))


def _path_below(source: str) -> str | None:
    """The dotted path of what Dynamo names `source` below a module."""
    try:
        return read_source(_SELF + source).name
    except VllmcError:
        return None


def _attribute(module: torch.nn.Module, path: str | None) -> object:
    try:
        return None if path is None else find_attribute(module, path)
    except KeyError:
        return None


def _bodies(graph: fx.Graph) -> dict[int, _Body]:
    """The layers that were traced once."""
    open_: dict[int, list[fx.Node]] = {}
    bodies: dict[int, list[_Body]] = defaultdict(list)
    for node in graph.nodes:
        if (number := begins(node)) is not None:
            open_[number] = []
        elif (number := ends(node)) is not None:
            nodes = open_.pop(number)
            inputs = dict.fromkeys(n for inner in nodes for n in inner.all_input_nodes)
            outer = tuple(n for n in inputs if n not in {*nodes})
            bodies[number].append(_Body(nodes=tuple(nodes), inputs=outer, end=node))
        else:
            for nodes in open_.values():
                nodes.append(node)
    return {number: found[0] for number, found in bodies.items() if len(found) == 1}


def _expand(node: fx.Node, body: _Body, inputs: Mapping[fx.Node, fx.Node]) -> None:
    """Puts a copy of `body` before `node`, with other `inputs`, and lets it replace `node`."""
    copies = dict(zip(_nodes(call_of(body.end)), _nodes(call_of(node)), strict=True))
    copies = {n: n for n in body.inputs} | copies | dict(inputs)
    with node.graph.inserting_before(node):
        for inner in body.nodes:
            copies[inner] = node.graph.node_copy(inner, copies.__getitem__)
    _replace(node, fx.node.map_arg(result_of(body.end), copies.__getitem__))


def _replace(node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    for user in list(node.users):
        # What is not used as it is was taken apart.
        assert user.target is operator.getitem, user
        _replace(user, result[user.args[1]])
        node.graph.erase_node(user)


def _containers(call: Any) -> bool:
    """Whether a call gives a layer something that it could write to and another could read."""
    args, kwargs = call
    return any(map(_is_container, (*args, *kwargs.values())))


def _is_container(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(map(_is_container, value))
    return isinstance(value, (list, dict))


def _nodes(value: Any) -> list[fx.Node]:
    """The nodes in nested arguments, in order, as often as they occur."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def _memory(nodes: Iterable[fx.Node]) -> frozenset[int]:
    return frozenset(memory for node in nodes for memory in memory_of(node))


def _told(call: Any, written: frozenset[int]) -> Hashable:
    """A call's arguments as a layer can tell them apart."""
    nodes = list(dict.fromkeys(_nodes(call)))
    memory = list(dict.fromkeys(m for node in nodes for m in sorted(memory_of(node))))

    def tell(value: Any) -> Hashable:
        match value:
            case fx.Node():
                own = memory_of(value)
                return (
                    nodes.index(value),
                    # Which of the graph's inputs it is plays a part where the layer looks itself.
                    value.name if value.op == "placeholder" else None,
                    look(value_of(value)),
                    frozenset(map(memory.index, own)),
                    own.isdisjoint(written),
                )
            case tuple() | list():
                return type(value), *map(tell, value)
            case dict():
                return dict, *((name, tell(item)) for name, item in value.items())
            case slice():
                return slice, tell(value.start), tell(value.stop), tell(value.step)
        return type(value), repr(value)

    return tell(call)
