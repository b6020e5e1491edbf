"""Ops that write to their arguments write to memory that is there: generated code copies nothing.

Autograd's functionalisation makes of such an op one that returns what it would have written, and
Inductor undoes that. These tests read what it generated.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vllmc.core.compiler.container import unpack
from vllmc.core.spec import ATTENTION_OP

pytestmark = pytest.mark.slow

SLOTS = 64
OPS = ("store", "store_both", "turn", "fill")


@pytest.fixture(scope="module")
def writing() -> Iterator[Any]:
    """`torch.ops.vllmc_writes`: ops that fill an output, caches, and parts of a projection."""
    library = torch.library.Library("vllmc_writes", "DEF")
    tags = (torch.Tag.pt2_compliant_tag,)

    def store(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        cache.index_copy_(0, slots, x)

    def store_both(
        x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        keys.index_copy_(0, slots, x)
        values.index_copy_(0, slots, x * 2)

    def turn(first: torch.Tensor, second: torch.Tensor) -> None:
        first.neg_()
        second.mul_(3)

    def fill(x: torch.Tensor, output: torch.Tensor) -> None:
        output.copy_(x * 2)

    for schema, function in {
        "store(Tensor x, Tensor(a!) cache, Tensor slots) -> ()": store,
        "store_both(Tensor x, Tensor(a!) keys, Tensor(b!) values, Tensor slots) -> ()": store_both,
        "turn(Tensor(a!) first, Tensor(b!) second) -> ()": turn,
        "fill(Tensor x, Tensor(a!) output) -> ()": fill,
    }.items():
        name = library.define(schema, tags=tags)
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vllmc_writes::{name}", lambda *_: None, lib=library)
    yield torch.ops.vllmc_writes
    library._destroy()


class Entry(torch.nn.Module):
    """Calls `function` with itself, rows `[T, 8]` and their slots `[T]`; it holds caches."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.embedding = torch.nn.Embedding(32, 8)
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(SLOTS, 8))
        self.register_buffer("caches", torch.zeros(2, SLOTS, 8))
        self.requires_grad_(False)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_indices: torch.Tensor
    ) -> torch.Tensor:
        return self.function(self, self.embedding(input_ids)[0], position_ids[0])[logits_indices]


def into_a_cache(ops: Any) -> Callable[..., torch.Tensor]:
    def run(entry: Entry, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ops.store(entry.linear(x), entry.cache, slots)
        return x * 2 + entry.cache.sum()

    return run


def into_halves_of_a_cache(ops: Any) -> Callable[..., torch.Tensor]:
    def run(entry: Entry, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        keys, values = entry.caches.unbind(0)
        ops.store_both(entry.linear(x), keys, values, slots)
        return x * 2

    return run


def into_chosen_parts_of_a_cache(ops: Any) -> Callable[..., torch.Tensor]:
    def run(entry: Entry, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ops.store_both(entry.linear(x), entry.caches[0], entry.caches[1], slots)
        return x * 2

    return run


def twice_into_a_cache(ops: Any) -> Callable[..., torch.Tensor]:
    def run(entry: Entry, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ops.store(x, entry.cache, slots)
        ops.store(entry.linear(x), entry.cache, slots)
        return x * 2

    return run


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (into_a_cache, (SLOTS, 8)),
        (into_halves_of_a_cache, (2, SLOTS, 8)),
        (into_chosen_parts_of_a_cache, (2, SLOTS, 8)),
        (twice_into_a_cache, (SLOTS, 8)),
    ],
)
def test_a_cache_is_written_where_it_is(
    link_toy: Any, writing: Any, case: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    toy = link_toy(Entry(case(writing)), backend="inductor", splitting_ops=(ATTENTION_OP,))
    code = Code(toy)
    assert shape not in code.allocated
    stores = [call for call in code.ops if call.name != "fill"]
    assert stores
    for call in stores:
        caches = call.args[1:-1]
        assert caches
        assert all(cache.startswith("arg") for cache in caches), "a copy is written to"
    toy.check(5, 1)


def test_parts_of_a_projection_are_changed_where_they_are(link_toy: Any, writing: Any) -> None:
    def run(entry: Entry, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        first, second, rest = entry.linear(x).split([2, 2, 4], dim=-1)
        writing.turn(first, second)
        return torch.cat([second, first, rest], -1)

    toy = link_toy(Entry(run), backend="inductor", splitting_ops=(ATTENTION_OP,))
    code = Code(toy)
    (turn,) = code.ops
    assert len(set(turn.args)) == 1, "both are parts of one tensor"
    toy.check(5, 1)


def test_an_output_is_filled_where_it_was_allocated(link_toy: Any, writing: Any) -> None:
    def run(entry: Entry, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        output = torch.empty(x.shape[0], 4, 2)
        writing.fill(entry.linear(x).view(-1, 4, 2), output)
        return output.view(-1, 8) + 1

    toy = link_toy(Entry(run), backend="inductor", splitting_ops=(ATTENTION_OP,))
    code = Code(toy)
    (fill,) = code.ops
    assert fill.args[1] not in code.given_to_kernels_before(fill)
    toy.check(5, 1)


class Code:
    """What a toy's only piece was compiled to, read."""

    def __init__(self, toy: Any) -> None:
        (made,) = toy.artifacts.values()
        tree = ast.parse(unpack(made.artifact).text("wrapper.py"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = [(ast.unparse(call.func), call) for call in calls]
        self.allocated = {
            tuple(getattr(size, "value", None) for size in call.args[0].elts)
            for name, call in names
            if name.startswith("empty_strided") and isinstance(call.args[0], ast.Tuple)
        }
        self.calls = [
            Written(name, tuple(map(memory, call.args)), call.lineno) for name, call in names
        ]
        self.ops = [call for call in self.calls if call.name in OPS]

    def given_to_kernels_before(self, op: Written) -> set[str]:
        """The memory that kernels of Inductor's were given before `op` is called."""
        kernels = [c for c in self.calls if c.name.startswith("cpp_") and c.line < op.line]
        return {given for kernel in kernels for given in kernel.args}


class Written:
    """A call, and the memory of each argument."""

    def __init__(self, function: str, args: tuple[str, ...], line: int) -> None:
        self.name = function.removeprefix("torch.ops.vllmc_writes.").removesuffix(".default")
        self.args = args
        self.line = line


def memory(argument: ast.expr) -> str:
    """The buffer or input that an argument is, or is a view of."""
    if isinstance(argument, ast.Call):
        return memory(argument.args[0])
    return ast.unparse(argument)
