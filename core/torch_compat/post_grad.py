"""Inductor's post-grad point: a graph of ATen ops, about to be lowered, and how one is made."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.fx as fx
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


class _Hook(CustomGraphPass):
    """What Inductor calls with each graph."""

    def __init__(self, run: Callable[[fx.Graph], None], before: Any) -> None:
        self._run = run
        self._before = before
        # It stands for the hook in the keys of Inductor's own cache, which bundles go through.
        # What is found there is not compiled, and `run` would see nothing of it.
        self._identity = secrets.token_hex(16)

    def __call__(self, graph: fx.Graph) -> None:
        if self._before is not None:
            self._before(graph)
        self._run(graph)

    def uuid(self) -> str:
        return self._identity


@contextmanager
def at_post_grad(run: Callable[[fx.Graph], None]) -> Iterator[None]:
    """Within it Inductor hands `run` each graph that it compiles, to change it in place.

    Nodes may be left in any order: Inductor sorts them. A pass that is set there already runs
    first. Nothing that Inductor compiled before is taken from its own cache.
    """
    before = inductor_config.post_grad_custom_post_pass
    with inductor_config.patch(post_grad_custom_post_pass=_Hook(run, before)):
        yield


def decomposed(function: Callable[..., Any], examples: Sequence[torch.Tensor]) -> fx.Graph:
    """What `function` of `examples` is in the ops that Inductor lowers."""
    with torch.no_grad():
        traced = make_fx(functionalize(function), select_decomp_table(), tracing_mode="fake")
        module = traced(*examples)
    graph: fx.Graph = module.graph
    graph.eliminate_dead_code()
    return graph


def readable(graph: fx.Graph) -> str:
    """The graph as Python, with the dtype, shape and strides of each value."""
    module = fx.GraphModule(torch.nn.Module(), graph)
    text: str = module.print_readable(
        print_output=False, include_stride=True, include_device=False, expanded_def=True
    )
    return text


def insert_call(
    graph: fx.Graph, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] = MappingProxyType({})
) -> fx.Node:
    """Adds a call of `op` at the graph's insertion point, with its example value.

    Arguments are nodes and constants, keyword arguments constants.
    """
    node = graph.call_function(op, tuple(args), dict(kwargs))
    values = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    # An op that makes a constant is given none.
    given = [n.meta["val"] for n in graph.find_nodes(op="placeholder")]
    with detect_fake_mode((values, given)):
        node.meta["val"] = op(*values, **kwargs)
    return node


def never_empty(node: Any) -> bool:
    """Whether the tensor `node` is known to have an element, whatever its sizes are."""
    return statically_known_true(node.meta["val"].numel() > 0)
