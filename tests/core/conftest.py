"""Toy programs: a function of a few tensors, captured, cut, compiled and linked as a model is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vllmc.core.compiler.protocol import Compiled
from vllmc.core.compiler.registry import find_compiler
from vllmc.core.declare.calls import Call, describe_call
from vllmc.core.declare.dims import declare
from vllmc.core.graph.capture import Capture, trace
from vllmc.core.graph.layout import Layout
from vllmc.core.graph.plan import Plan, make_plan, plan_units, unit_ranges
from vllmc.core.obtain import ANY_RANGE, range_name
from vllmc.core.runtime.loader import PieceCallable, load_artifact
from vllmc.core.runtime.program import Program, Variant, link
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.core.torch_compat.config import applied, vllmc_overrides

ToyFunction = Callable[["ToyEntry", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(entry, hidden [1, T, 8], positions [1, T], rows [B]) -> tensor`."""


class ToyEntry(torch.nn.Module):
    """An embedding of ids below 32, then whatever `function` computes of it."""

    def __init__(self, function: ToyFunction, names: Sequence[object] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.names = list(names)
        self.embedding = torch.nn.Embedding(32, 8)
        self.linear = torch.nn.Linear(8, 8)
        self.requires_grad_(False)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_indices: torch.Tensor,
    ) -> torch.Tensor:
        return self.function(self, self.embedding(input_ids), position_ids, logits_indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """A toy from beginning to end. `artifacts` are by piece and range."""

    entry: torch.nn.Module
    captured: Capture
    plan: Plan
    artifacts: dict[tuple[str, str], Compiled]
    program: Program

    def check(self, *token_counts: int) -> None:
        """The linked program computes what the module does, at each number of tokens."""
        for tokens in token_counts:
            args = batch(tokens)
            with torch.no_grad():
                expected = self.entry(*args)
                result = self.program(*args)
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def toy_call(entry: torch.nn.Module) -> Call:
    """How a toy is called: `[1, T]`, `[1, T]`, `[B]`."""
    dims = {
        "input_ids": {1: "tokens"},
        "position_ids": {1: "tokens"},
        "logits_indices": {0: "rows"},
    }
    values = dict(zip(dims, batch(4), strict=True))
    return describe_call(declare(type(entry).forward, dims, None, ["rows"]), values)


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and up to three rows; the same for the same number of tokens."""
    generator = torch.Generator().manual_seed(tokens)
    return (
        torch.randint(0, 32, (1, tokens), generator=generator),
        torch.arange(tokens)[None],
        torch.arange(min(tokens, 3)),
    )


def _isolated(piece: PieceCallable) -> PieceCallable:
    """Runs `piece` as freely as a compiler may: every input and output is memory of its own."""

    def call(args: list[Any]) -> Sequence[Any]:
        own = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        outputs = piece(list(own))
        for given, changed in zip(args, own, strict=True):
            if isinstance(given, torch.Tensor) and not torch.equal(given, changed):
                given.copy_(changed)
        return [o.clone() if isinstance(o, torch.Tensor) else o for o in outputs]

    return call


@pytest.fixture(scope="session")
def toy_batch() -> Callable[[int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """See `batch`."""
    return batch


@pytest.fixture(scope="session", autouse=True)
def _deprecated_import() -> None:
    """torch.utils.mkldnn, which Inductor imports, uses what torch itself deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch.utils.mkldnn  # noqa: F401


@pytest.fixture(scope="session")
def ops() -> Iterator[Any]:
    """`torch.ops.vllmc_test`: `cut` copies, `fill` triples in place, `pair` returns two tensors."""
    library = torch.library.Library("vllmc_test", "DEF")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("cut(Tensor x) -> Tensor", tags=tags)
    library.define("fill(Tensor(a!) x) -> ()", tags=tags)
    library.define("pair(Tensor x, float[] factors=[]) -> (Tensor, Tensor)", tags=tags)
    library.define("named(Tensor x, str name) -> Tensor", tags=tags)

    def fill(x: torch.Tensor) -> None:
        x.mul_(3)

    def pair(x: torch.Tensor, factors: Sequence[float] = ()) -> tuple[torch.Tensor, torch.Tensor]:
        return x * sum(factors), x + 1

    library.impl("cut", torch.clone, "CompositeExplicitAutograd")
    library.impl("fill", fill, "CompositeExplicitAutograd")
    library.impl("pair", pair, "CompositeExplicitAutograd")
    library.impl("named", lambda x, name: x * len(name), "CompositeExplicitAutograd")
    for name, fake in {
        "cut": torch.empty_like,
        "fill": lambda x: None,
        "pair": lambda x, factors=(): (torch.empty_like(x), torch.empty_like(x)),
        "named": lambda x, name: torch.empty_like(x),
    }.items():
        torch.library.register_fake(f"vllmc_test::{name}", fake, lib=library)
    yield torch.ops.vllmc_test
    library._destroy()


@pytest.fixture(scope="session")
def toy_spec() -> Callable[..., CompileSpec]:
    """A spec of the range 1:64 that splits at `cut`, `fill` and `pair`, with changes."""

    def make(**changes: Any) -> CompileSpec:
        fields: dict[str, Any] = {
            "ranges": (CompileRange(1, 64),),
            "splitting_ops": ("vllmc_test::cut", "vllmc_test::fill", "vllmc_test::pair"),
            "backend": "eager",
        }
        return CompileSpec(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def trace_toy(
    ops: Any, toy_spec: Callable[..., CompileSpec]
) -> Callable[..., tuple[Capture, CompileSpec]]:
    """Captures a toy: `trace_toy(function, names=(), **changes of the spec)`."""

    def make(
        function: ToyFunction, *, names: Sequence[object] = (), **changes: Any
    ) -> tuple[Capture, CompileSpec]:
        spec, entry = toy_spec(**changes), ToyEntry(function, names)
        with applied(vllmc_overrides(spec)):
            return trace("toy", entry, toy_call(entry), spec), spec

    return make


@pytest.fixture(scope="session")
def link_toy(ops: Any, toy_spec: Callable[..., CompileSpec]) -> Callable[..., Toy]:
    """Takes a toy all the way: `link_toy(function, isolated=False, **changes of the spec)`.

    Or an entry of one's own, called as a toy is, in place of the function.
    """

    def make(
        function: ToyFunction | torch.nn.Module, *, isolated: bool = False, **changes: Any
    ) -> Toy:
        spec = toy_spec(**changes)
        entry = function if isinstance(function, torch.nn.Module) else ToyEntry(function)
        compiler = find_compiler(spec.backend)
        with applied(vllmc_overrides(spec)):
            captured = trace("toy", entry, toy_call(entry), spec)
            plan = make_plan(captured, spec)
            artifacts = {
                (names[0], range_name(unit)): compiler.compile(unit, spec)
                for names, unit in plan_units(plan, spec)
            }
        loaded = {place: load_artifact(made.artifact) for place, made in artifacts.items()}
        if isolated:
            loaded = {place: _isolated(piece) for place, piece in loaded.items()}
        # Through JSON, as a record keeps it.
        layout = Layout.from_json(json.loads(json.dumps(plan.layout.to_json())))
        variants = [
            Variant(
                range=given,
                pieces=tuple(
                    loaded.get((piece, str(given))) or loaded[piece, ANY_RANGE]
                    for piece in layout.pieces
                ),
            )
            for given in unit_ranges(spec)
        ]
        return Toy(
            entry=entry,
            captured=captured,
            plan=plan,
            artifacts=artifacts,
            program=link(layout, entry, variants),
        )

    return make
