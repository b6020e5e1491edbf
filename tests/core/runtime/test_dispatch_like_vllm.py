"""Which compiled code a batch runs on, in ours and in vLLM's `PiecewiseBackend`.

Needs vLLM 0.32 or 0.33; docs/vllm.md says how to have it without a GPU. vLLM's config makes the
ranges and sizes of what it is given, and they are ours too. Both are then called: what is called
in the end says for which range it is there.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.graph.layout import Layout
from vllmc.core.obtain import ANY_RANGE
from vllmc.core.runtime.program import Program, Variant, link
from vllmc.core.spec import ATTENTION_OP, CompileRange, CompileSpec, open_ended, unit_ranges

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

LARGEST = 400
Picked = tuple[int, int] | None
"""The range or size, or None where a call is refused."""


class Runnables:
    """What vLLM loads for each range: a function that says which."""

    def __contains__(self, key: str) -> bool:
        return True

    def __getitem__(self, key: str) -> Callable[..., Any]:
        return lambda *_: (key,)


class Vllm:
    """vLLM's config, and its dispatch for what is set in it."""

    def __init__(self) -> None:
        from vllm.compilation.piecewise_backend import PiecewiseBackend
        from vllm.config import CompilationConfig, VllmConfig

        self._backend = PiecewiseBackend
        self._config = VllmConfig(compilation_config=CompilationConfig(cudagraph_mode=0))
        self._compilation = self._config.compilation_config

    def set(self, endpoints: Sequence[int], most: int, sizes: Sequence[int]) -> None:
        """As a start of vLLM would, of the options of these names."""
        self._config.scheduler_config.max_num_batched_tokens = most
        self._compilation.compile_ranges_endpoints = list(endpoints)
        self._config._set_compile_ranges()
        self._compilation.compile_sizes = list(sizes)
        self._compilation.post_init_cudagraph_sizes()

    @property
    def ranges(self) -> tuple[CompileRange, ...]:
        found = self._compilation.get_compile_ranges()
        return tuple(CompileRange(r.start, r.end) for r in found)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._compilation.compile_sizes)

    def dispatch(self, *, encoder: bool = False, symbolic: bool = True) -> Any:
        """A piece, whose argument is the number of tokens where it is `symbolic`."""
        return self._backend(
            None,
            self._config,
            piecewise_compile_index=0,
            total_piecewise_compiles=1,
            sym_shape_indices=[0] if symbolic else [],
            vllm_backend=SimpleNamespace(is_encoder=encoder),
            returns_tuple=True,
            compiled_runnables=Runnables(),
        )

    def pick(self, dispatch: Any, tokens: int) -> Picked:
        try:
            (text,) = dispatch(tokens)
        except AssertionError as error:
            if "out of considered ranges" not in str(error):
                raise
            return None
        start, end = text.strip("()").split(", ")
        return int(start), int(end)


@pytest.fixture(scope="module")
def vllm() -> Vllm:
    """Importing vLLM sets variables, which other tests do without."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Vllm()
    os.environ.clear()
    os.environ.update(before)
    return made


@pytest.fixture(scope="module")
def toy(link_toy: Any) -> Any:
    """A program of one piece."""
    made = link_toy(lambda entry, x, positions, rows: x[0] + 1, splitting_ops=(ATTENTION_OP,))
    assert made.plan.pieces == 1
    return made


def linked(toy: Any, spec: CompileSpec, layout: Layout | None = None) -> Program:
    """The program with a piece that returns the ends of its range."""
    return link(
        layout or toy.plan.layout,
        toy.entry,
        [
            Variant(range=r, pieces=(lambda _, r=r: [torch.tensor([r.start, r.end])],))
            for r in unit_ranges(spec)
        ],
    )


def pick(program: Program, tokens: int) -> Picked:
    ids = torch.ones(1, tokens, dtype=torch.int64)
    try:
        start, end = program(ids, ids, torch.zeros(1, dtype=torch.int64)).tolist()
    except VllmcError as error:
        if error.code not in {"zero-tokens", "size-out-of-range"}:
            raise
        return None
    return start, end


_COUNTS = st.integers(1, LARGEST)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    endpoints=st.lists(_COUNTS, max_size=4),
    most=_COUNTS,
    sizes=st.lists(_COUNTS, max_size=4),
    encoder=st.booleans(),
    others=st.lists(st.integers(0, LARGEST + 50), max_size=4),
)
def test_a_batch_runs_on_what_vllm_would_run_it_on(
    vllm: Vllm, toy: Any, endpoints: list[int], most: int,
    sizes: list[int], encoder: bool, others: list[int],
) -> None:  # fmt: skip
    vllm.set(endpoints, most, sizes)
    dispatch = vllm.dispatch(encoder=encoder)
    spec = CompileSpec(ranges=vllm.ranges, sizes=vllm.sizes)
    program = linked(toy, open_ended(spec) if encoder else spec)
    ends = {0, *others, *(n + step for n in (*endpoints, most, *sizes) for step in (-1, 0, 1))}
    for tokens in sorted(ends):
        assert pick(program, tokens) == vllm.pick(dispatch, tokens), tokens


def test_a_batch_beyond_all_ranges_names_them_where_vllm_asserts(vllm: Vllm, toy: Any) -> None:
    vllm.set([8], 64, [100])
    program = linked(toy, CompileSpec(ranges=vllm.ranges, sizes=vllm.sizes))
    with pytest.raises(AssertionError, match="out of considered ranges"):
        vllm.dispatch()(65)
    with pytest.raises(VllmcError) as caught:
        program.variant(65)
    assert caught.value.context["ranges"] == ["1:8", "9:64", "100"]


def test_a_compile_size_of_zero_is_refused_where_vllm_takes_it(vllm: Vllm) -> None:
    vllm.set([], 64, [0])
    assert vllm.pick(vllm.dispatch(), 0) == (0, 0)
    with pytest.raises(UsageError, match="below 1"):
        CompileSpec(ranges=vllm.ranges, sizes=vllm.sizes)


def test_one_token_of_a_backed_size_has_code_of_its_own(vllm: Vllm, toy: Any) -> None:
    # Such a size is taken to be neither 0 nor 1: vLLM drops the guard that says so.
    vllm.set([], 64, [])
    spec = CompileSpec(ranges=vllm.ranges, dynamic_shapes="backed")
    program = linked(toy, spec)
    dispatch = vllm.dispatch()
    found = [(vllm.pick(dispatch, n), pick(program, n)) for n in (1, 2, 64)]
    assert found == [((1, 64), (1, 1)), ((1, 64), (2, 64)), ((1, 64), (2, 64))]


def test_a_static_graph_runs_on_the_one_code_that_it_has(vllm: Vllm, toy: Any) -> None:
    shapes = [(1, 5), (1, 5), (1,)]
    fixed = zip(toy.plan.layout.arguments, shapes, strict=True)
    arguments = tuple(replace(a, shape=shape) for a, shape in fixed)
    static = replace(toy.plan.layout, arguments=arguments, demands=())
    vllm.set([], 64, [])
    program = linked(toy, CompileSpec(ranges=vllm.ranges), static)
    assert pick(program, 5) == (1, 64) == vllm.pick(vllm.dispatch(symbolic=False), 5)
    # The code is the same for all ranges. vLLM has a copy for each, and runs none of two.
    vllm.set([4], 64, [])
    assert pick(linked(toy, CompileSpec(ranges=vllm.ranges), static), 5) is not None
    with pytest.raises(AssertionError, match="exactly one compiled range_entry"):
        vllm.dispatch(symbolic=False)(5)


def test_a_piece_without_sizes_is_compiled_once_where_vllm_cannot_tell_its_copies_apart(
    vllm: Vllm, link_toy: Any, ops: Any
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        y = ops.cut(entry.linear.weight * 2)
        z = y * 3
        return (ops.cut(x) + ops.cut(z).sum())[0]

    vllm.set([4], 8, [])
    toy = link_toy(function, ranges=vllm.ranges)
    toy.check(1, 4, 5, 8)
    assert [r for _, r in toy.artifacts].count(ANY_RANGE) == 1
    with pytest.raises(AssertionError, match="exactly one compiled range_entry"):
        vllm.dispatch(symbolic=False)()
