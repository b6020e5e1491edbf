"""Our cuts of a graph beside those of vLLM's `split_graph`, of random graphs that Dynamo captured.

Needs vLLM 0.32 or 0.33; docs/vllm.md says how to have it without a GPU. Where ours differ from
vLLM's on purpose, `_as_ours` or `_unlike_vllm` says in what and why, and a test below shows it.
"""

from __future__ import annotations

import importlib.util
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeAlias

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmc.core.graph.aliases import views_of_written
from vllmc.core.graph.normalize import is_symbolic, normalize, symbols_of, value_of
from vllmc.core.graph.piece import canonical_piece
from vllmc.core.graph.split import Cut, split, splits_at
from vllmc.core.torch_compat.capture import RawCapture, capture_full_graph, mark_dimension

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

Kind: TypeAlias = Literal["unbacked", "backed"]
Instruction: TypeAlias = tuple[str, int, int]
Program: TypeAlias = tuple[Instruction, ...]

NAMES = (
    # First, because vLLM parts it from a splitting op that follows: see `_as_ours`.
    "vllmc_beside::pair",
    "vllmc_beside::cut",
    "vllmc_beside::put",
    "vllmc_beside::scale.by",
    "aten::relu",
    "aten::neg.default",
    "aten::mul.Tensor",
    "vllmc_beside::absent",
)
READING = (
    "cut", "pair", "scale", "relu", "neg", "mul", "add", "linear", "norm", "unused", "topk",
    "chunk", "narrow", "view", "index_select", "where",
)  # fmt: skip
SIZES = ("divide_by_size", "view_by_size", "size_of_joined", "whole_size")
ROOM = ("put", "put_new_empty", "put_strided", "put_aten", "put_two")
WRITING = ("add_", "write_narrow", "write_items", "write_out", "iadd")
INDEXING = ("slice", "last_column", "pick", "setitem", "pick_computed")
TOKENS = (1, 2, 17)


@pytest.fixture(scope="session")
def vllm_backends() -> ModuleType:
    """vLLM's module that splits. Importing vLLM sets variables, which other tests do without."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.compilation.backends as module
    os.environ.clear()
    os.environ.update(before)
    return module


@pytest.fixture(scope="session")
def beside() -> Iterator[Any]:
    """`cut` copies, `put` writes a triple into a buffer, `pair` returns two, `scale.by` scales."""
    library = torch.library.Library("vllmc_beside", "DEF")
    library.define("cut(Tensor x) -> Tensor")
    library.define("put(Tensor x, Tensor(a!) out) -> ()")
    library.define("pair(Tensor x) -> (Tensor, Tensor)")
    library.define("scale.by(Tensor x, float factor) -> Tensor")

    def put(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x * 3)

    for name, function, fake in (
        ("cut", torch.clone, torch.empty_like),
        ("put", put, lambda x, out: None),
        ("pair", lambda x: (x * 2, x + 1), lambda x: (torch.empty_like(x), torch.empty_like(x))),
        ("scale.by", lambda x, factor: x * factor, lambda x, factor: torch.empty_like(x)),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vllmc_beside::{name}", fake, lib=library)
    yield torch.ops.vllmc_beside
    library._destroy()


class Interpreted(torch.nn.Module):
    """Runs a program: instructions over the tensors `[T, 8]` that were made so far."""

    def __init__(self, ops: Any, program: Program) -> None:
        super().__init__()
        self.ops, self.program = ops, program
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(8, 8, generator=generator))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [x]
        for kind, first, second in self.program:
            self._run(kind, made, made[first % len(made)], made[second % len(made)])
        return torch.cat(made, -1)

    def _run(self, kind: str, made: list[Any], a: torch.Tensor, b: torch.Tensor) -> None:
        ops = self.ops
        match kind:
            case "cut":
                made.append(ops.cut(a))
            case "pair":
                made.extend(ops.pair(a))
            case "scale":
                made.append(ops.scale.by(a, 0.5))
            case "relu":
                made.append(torch.ops.aten.relu(a))
            case "neg":
                made.append(torch.ops.aten.neg.default(a))
            case "mul":
                made.append(torch.ops.aten.mul.Tensor(a, b))
            case "add":
                made.append(a + b)
            case "linear":
                made.append(torch.nn.functional.linear(a, self.weight))
            case "norm":
                made.append(a / (1 + a.abs().sum(-1, keepdim=True)))
            case "unused":
                torch.tanh(a)
            case "topk":
                values, indices = torch.topk(a, 8)
                made.append(values + indices)
            case "chunk":
                left, right = a.chunk(2, -1)
                made.append(torch.cat([right, left], -1))
            case "narrow":
                made.append(torch.cat([a.narrow(1, 2, 4), b.narrow(1, 0, 4)], -1))
            case "view":
                made.append(a.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8))
            case "index_select":
                made.append(a.index_select(1, torch.arange(7, -1, -1)))
            case "where":
                made.append(torch.where(a > b, a, 0.5))
            case "divide_by_size":
                made.append(a / (a.shape[0] * 2 + 1))
            case "view_by_size":
                made.append(a.view(a.shape[0] * 2, 4).view(b.size(0), 8))
            case "size_of_joined":
                both = ops.cut(torch.cat([a, b]))
                size = both.shape[0] + 1
                made.append(ops.cut(both).view(2, a.shape[0], 8).sum(0) / size)
            case "whole_size":
                made.append(a.reshape(b.shape) + a.new_zeros(b.size()))
            case "put":
                made.append(self._put(a, torch.empty_like(b)))
            case "put_new_empty":
                made.append(self._put(a, b.new_empty(8, a.shape[0]).t()))
            case "put_strided":
                made.append(self._put(a, torch.empty_strided((a.shape[0], 8), (8, 1))))
            case "put_aten":
                made.append(self._put(a, torch.ops.aten.empty_like.default(b)))
            case "put_two":
                out, other = b.new_empty(b.shape), torch.empty(a.shape)
                made.extend((self._put(a, out), self._put(b, other)))
            case "add_":
                made.append(a.add_(1))
            case "write_narrow":
                a.narrow(1, 0, 4).mul_(0.5)
            case "write_items":
                left, _ = a.chunk(2, -1)
                made.append(ops.cut(b))
                left.add_(1)
            case "write_out":
                torch.add(a, 1, out=a)
            case "iadd":
                a += b.clone()
            case "slice":
                made.append(torch.cat([a[:, :4], b[:, 4:]], -1))
            case "last_column":
                made.append(a * b[:, -1:])
            case "pick":
                made.append(a[:, [7, 0, 3, 1, 2, 4, 6, 5]])
            case "setitem":
                a[:, 1] = b[:, 2] + 1
            case "pick_computed":
                made.append(a[:, torch.argsort(b.sum(0))])
            case _:
                raise AssertionError(kind)

    def _put(self, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self.ops.put(a, out)
        return out


class Plain(torch.nn.Module):
    """Runs a function of a tensor `[T, 8]`."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of either: names of nodes, in order; `inputs` and `outputs` but for sizes."""

    splitting: bool
    nodes: tuple[str, ...]
    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A graph as captured; each of its nodes has its name in `meta`, which all copies keep."""

    module: torch.nn.Module
    raw: RawCapture

    def copy(self) -> fx.GraphModule:
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.raw.module.graph, {}))
        return fx.GraphModule(self.raw.module, graph)

    def normalised(self) -> fx.Graph:
        graph = self.copy().graph
        normalize(graph)
        return graph

    def arguments(self, tokens: int) -> list[Any]:
        """What the graph is given, in its order, for that many tokens."""
        found: list[Any] = []
        for node in self.raw.module.graph.find_nodes(op="placeholder"):
            if is_symbolic(node):
                found.append(tokens)
            elif "weight" in self.raw.sources[node.name]:
                found.append(self.module.weight)
            else:
                found.append(self.given(tokens))
        return found

    def given(self, tokens: int) -> torch.Tensor:
        return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens))


def _capture(module: torch.nn.Module, kind: Kind = "backed") -> Subject:
    x = torch.zeros(17, 8)
    mark_dimension(x, 0, kind=kind, shape_id="tokens", low=1, high=64)
    raw = capture_full_graph(module, {"x": x}, kind)
    for node in raw.module.graph.nodes:
        node.meta["called"] = node.name
    return Subject(module=module, raw=raw)


def _called(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(node.meta["called"] for node in nodes if "called" in node.meta)


def _ours(cuts: Sequence[Cut], left_out: frozenset[str]) -> list[Piece]:
    return [
        Piece(
            splitting=cut.splitting,
            nodes=tuple(name for name in _called(cut.nodes) if name not in left_out),
            inputs=frozenset(_called([n for n in cut.inputs if not is_symbolic(n)])),
            outputs=frozenset(_called(cut.outputs)),
        )
        for cut in cuts
    ]


def _theirs(items: Sequence[Any], left_out: frozenset[str] = frozenset()) -> list[Piece]:
    found = []
    for item in items:
        graph = item.graph.graph
        inner = [n for n in graph.nodes if n.op not in {"placeholder", "output"}]
        placeholders = [n for n in graph.find_nodes(op="placeholder") if not is_symbolic(n)]
        ends = [n for n in graph.output_node().all_input_nodes if not is_symbolic(n)]
        found.append(
            Piece(
                splitting=item.is_splitting_graph,
                nodes=tuple(name for name in _called(inner) if name not in left_out),
                inputs=frozenset(node.name for node in placeholders),
                outputs=frozenset(_called(ends)),
            )
        )
    return found


def _item(tensor: torch.Tensor, key: object) -> torch.Tensor:
    return tensor[key]  # type: ignore[index]


def _unlike_vllm(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with what is taken out of a tensor called by another name than `getitem`.

    vLLM moves every `getitem` into the piece of what it takes from. For the item of a tuple so do
    we. Out of a tensor it is an operation of its own, which may copy, after writes to the tensor
    and with a key that was computed since: ours stays in its place.
    """
    for node in module.graph.find_nodes(op="call_function", target=operator.getitem):
        if isinstance(value_of(node), torch.Tensor) and isinstance(
            value_of(node.args[0]), torch.Tensor
        ):
            node.target = _item
    return module


def _sizes(graph: fx.Graph) -> frozenset[str]:
    """The sizes of a captured graph, and what is computed of sizes alone."""
    known = {s for n in graph.find_nodes(op="placeholder") for s in symbols_of(value_of(n))}
    return frozenset(
        node.name
        for node in graph.nodes
        if node.op != "placeholder"
        and (is_symbolic(node) or isinstance(value_of(node), torch.Size))
        and symbols_of(value_of(node)) <= known
    )


def _allocates(node: fx.Node) -> bool:
    return (
        node.target in {torch.empty, torch.empty_like, torch.empty_strided}
        or (node.op == "call_method" and node.target == "new_empty")
        or node.target is torch.ops.aten.empty_like.default
    )


def _as_ours(
    graph: fx.Graph, theirs: Sequence[Piece], repeated: frozenset[str]
) -> list[tuple[bool, tuple[str, ...]]]:
    """What we make of the captured `graph`, read off vLLM's pieces.

    - What is `repeated`, sizes and views of written memory, is in each of our pieces that needs
      it, so that neither crosses a cut. In vLLM it is a node like others: it can be a piece of its
      own, and part two splitting ops that follow each other.
    - A piece that only allocates joins the one before, whatever that is. In vLLM it goes to the
      last one that is compiled, and only if it is one node, whose inputs that piece has.
    - Splitting pieces side by side are one. vLLM parts them where an item of a tuple, a size or
      an allocation stood between.
    """
    order = [n for n in graph.nodes if n.op not in {"placeholder", "output"}]
    order = [n for n in order if n.name not in repeated]
    home = {name: index for index, piece in enumerate(theirs) for name in piece.nodes}
    opened = 0
    for node in order:
        if _allocates(node) and home[node.name] < opened:
            home[node.name] = opened
        opened = max(opened, home[node.name])
    found: list[tuple[bool, list[fx.Node]]] = []
    for index, piece in enumerate(theirs):
        nodes = [node for node in order if home[node.name] == index]
        if not nodes:
            continue
        joins = not piece.splitting and all(map(_allocates, nodes))
        if found and (joins or found[-1][0] == piece.splitting):
            found[-1][1].extend(nodes)
        else:
            found.append((piece.splitting, nodes))
    return [(splitting, tuple(sorted(n.name for n in nodes))) for splitting, nodes in found]


def _run_cuts(graph: fx.Graph, cuts: Sequence[Cut], arguments: Sequence[Any]) -> Any:
    """Runs each piece as the program that is compiled of it."""
    env: dict[Any, Any] = dict(zip(graph.find_nodes(op="placeholder"), arguments, strict=True))
    for cut in cuts:
        results = canonical_piece(cut, {}).module(*(env[node] for node in cut.inputs))
        env |= dict(zip(cut.outputs, results, strict=True))
    ((end,),) = graph.output_node().args
    return env[end]


def _check_numbers(
    subject: Subject, graph: fx.Graph, cuts: Sequence[Cut], whole: fx.GraphModule | None = None
) -> None:
    """Our pieces compute what the module does, to the bit, and so does vLLM's `whole`."""
    for tokens in TOKENS:
        expected = subject.module(subject.given(tokens))
        results = [_run_cuts(graph, cuts, subject.arguments(tokens))]
        if whole is not None:
            results += whole(*subject.arguments(tokens))
        for result in results:
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def _programs(*kinds: str) -> st.SearchStrategy[Program]:
    instruction = st.tuples(st.sampled_from(kinds), st.integers(0, 7), st.integers(0, 7))
    return st.lists(instruction, min_size=1, max_size=10).map(tuple)


def _names(*names: str) -> st.SearchStrategy[list[str]]:
    """Few of the names, or all but a few: then splitting ops follow each other."""
    few = st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=3)
    return few | few.map(lambda out: [name for name in names if name not in out])


_KINDS = st.sampled_from(("backed", "unbacked"))
_SETTINGS = settings(
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@_SETTINGS
@given(program=_programs(*READING), names=_names(*NAMES[1:]), kind=_KINDS)
def test_of_what_only_reads_both_make_the_same_pieces(
    vllm_backends: Any, beside: Any, program: Program, names: list[str], kind: Kind
) -> None:
    subject = _capture(Interpreted(beside, program), kind)
    graph = subject.normalised()
    assert not views_of_written(graph)
    cuts = split(graph, splits_at(names))
    whole, items = vllm_backends.split_graph(subject.copy(), names)
    # An unbacked size brings the assertion that it is not negative, and what that asks.
    sizes = _sizes(subject.raw.module.graph)
    assert _ours(cuts, sizes) == _theirs(items, sizes)
    _check_numbers(subject, graph, cuts, whole)


@_SETTINGS
@given(
    program=_programs(*READING[:9], *SIZES, *ROOM, *WRITING, *INDEXING, "cut", "pair", *ROOM),
    names=_names(*NAMES),
    kind=_KINDS,
)
def test_of_any_graph_both_make_the_same_pieces_but_for_what_is_said_here(
    vllm_backends: Any, beside: Any, program: Program, names: list[str], kind: Kind
) -> None:
    subject = _capture(Interpreted(beside, program), kind)
    graph = subject.normalised()
    cuts = split(graph, splits_at(names))
    whole, items = vllm_backends.split_graph(_unlike_vllm(subject.copy()), names)
    captured = subject.raw.module.graph
    repeated = _sizes(captured) | {*_called([*views_of_written(graph)])}
    assert not any(repeated.intersection(_called(cut.inputs)) for cut in cuts)
    ours = _ours(cuts, repeated)
    assert [(piece.splitting, tuple(sorted(piece.nodes))) for piece in ours] == _as_ours(
        captured, _theirs(items), repeated
    )
    _check_numbers(subject, graph, cuts, whole)


SPLITTING = ("vllmc_beside::cut", "vllmc_beside::put", "vllmc_beside::pair")


def _kinds_of(pieces: Sequence[Any]) -> str:
    """`s` for each splitting piece and `c` for each compiled one."""
    return "".join("s" if piece.splitting else "c" for piece in pieces)


def _two_puts(ops: Any, x: torch.Tensor) -> torch.Tensor:
    first = torch.empty_like(x)
    ops.put(x, first)
    second = torch.empty_like(first)
    ops.put(first, second)
    return second + 1


def _put_after_pair(ops: Any, x: torch.Tensor) -> torch.Tensor:
    left, right = ops.pair(x)
    return ops.cut(left) + right


def _room_like_a_result(ops: Any, x: torch.Tensor) -> torch.Tensor:
    y = ops.cut(x)
    out = torch.empty_like(y)
    ops.put(y, out)
    return out + 1


def _size_between(ops: Any, x: torch.Tensor) -> torch.Tensor:
    y = ops.cut(x)
    size = y.shape[0] * 2 + 1
    return ops.cut(y) / size


@pytest.mark.parametrize(
    ("function", "theirs", "ours"),
    [
        # The second allocation goes to the first piece, which has what it is made like.
        (_two_puts, "cssc", "csc"),
        (_room_like_a_result, "scsc", "sc"),
        (_put_after_pair, "ssc", "sc"),
        (_size_between, "scsc", "sc"),
    ],
)
def test_splitting_ops_that_vllm_parts_share_a_piece_of_ours(
    vllm_backends: Any, beside: Any, function: Any, theirs: str, ours: str
) -> None:
    subject = _capture(Plain(lambda x: function(beside, x)))
    graph = subject.normalised()
    cuts = split(graph, splits_at(SPLITTING))
    whole, items = vllm_backends.split_graph(subject.copy(), list(SPLITTING))
    assert (_kinds_of(_theirs(items)), _kinds_of(cuts)) == (theirs, ours)
    _check_numbers(subject, graph, cuts, whole)


def test_what_is_picked_of_a_tensor_after_a_write_is_what_was_written(
    vllm_backends: Any, beside: Any
) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = x + 1
        beside.put(x, out)
        return out[:, [0, 2]]

    subject = _capture(Plain(function))
    graph = subject.normalised()
    _check_numbers(subject, graph, split(graph, splits_at(SPLITTING)))
    # vLLM copies the columns in the piece that made `out`, before the splitting op writes to it.
    whole, _ = vllm_backends.split_graph(subject.copy(), list(SPLITTING))
    x = subject.given(2)
    (theirs,) = whole(*subject.arguments(2))
    assert torch.equal(theirs, (x + 1)[:, [0, 2]])
    assert not torch.equal(theirs, function(x))


def test_a_key_that_is_computed_after_what_it_picks_from_is_no_cycle(
    vllm_backends: Any, beside: Any
) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = beside.cut(x)
        return y[:, torch.argsort(x.sum(0))]

    subject = _capture(Plain(function))
    graph = subject.normalised()
    _check_numbers(subject, graph, split(graph, splits_at(SPLITTING)))
    with pytest.raises((KeyError, RuntimeError), match=r"argsort|cycle exists"):
        vllm_backends.split_graph(subject.copy(), list(SPLITTING))


@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: y + torch.full(x.shape, 2.0),
        lambda y, x: torch.reshape(y, x.shape),
        lambda y, x: y + torch.ones(size=x.shape),
        lambda y, x: y + torch.ops.aten.ones.default(x.shape),
    ],
)
def test_a_whole_size_may_be_any_argument(vllm_backends: Any, beside: Any, function: Any) -> None:
    subject = _capture(Plain(lambda x: function(beside.cut(x), x)))
    graph = subject.normalised()
    _check_numbers(subject, graph, split(graph, splits_at(SPLITTING)))
    # vLLM puts the numbers in the place of the size, one by one: right for `view(*size)` alone.
    with pytest.raises((RuntimeError, TypeError)):
        vllm_backends.split_graph(subject.copy(), list(SPLITTING))[0](*subject.arguments(2))


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("aten::mul.Tensor", "csc", "csc"),
        # vLLM knows an overload that is not the default one by its whole name only.
        ("aten::mul", "c", "csc"),
        # It takes one name more, that of the overload twice.
        ("aten::mul.Tensor.Tensor", "csc", "c"),
        ("aten::relu", "cscsc", "cscsc"),
        # A call that chose no overload has no overload's name, in either.
        ("aten::relu.default", "csc", "csc"),
        ("torch.relu", "c", "csc"),
        ("torch.Tensor.sigmoid", "c", "csc"),
    ],
)
def test_the_names_by_which_an_op_splits(
    vllm_backends: Any, name: str, theirs: str, ours: str
) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = torch.ops.aten.mul.Tensor(x + 1, x)
        x = torch.ops.aten.relu(x - 1) + 1
        x = torch.ops.aten.relu.default(x * 2).sigmoid()
        return torch.relu(x - 1) + 1

    subject = _capture(Plain(function))
    cuts = split(subject.normalised(), splits_at([name]))
    _, items = vllm_backends.split_graph(subject.copy(), [name])
    assert (_kinds_of(_theirs(items)), _kinds_of(cuts)) == (theirs, ours)
