"""Runs passes over a graph, in their order, and says what each did."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeAlias

import torch.fx as fx

from vllmc.core.cache.key import JsonValue
from vllmc.core.graph.passes.report import NearMiss, PassReport
from vllmc.core.passes import PASSES, PassChoice, Stage
from vllmc.core.ranges import CompileRange

GraphPass: TypeAlias = Callable[[fx.Graph], tuple[int, NearMiss | None]]
"""Changes a graph in place: how many matches it found, and the closest of what is none."""

_DIGITS: Final = 16
_HERE: Final = Path(__file__).parent


def passes_at(
    stage: Stage, choices: Iterable[PassChoice], compiled: CompileRange | None = None
) -> tuple[PassChoice, ...]:
    """Those of `choices` that work at `stage` for a unit of the range, as they are to run."""
    by_name = {choice.name: choice for choice in choices}
    found = [by_name[name] for name, info in PASSES.items() if name in by_name]
    return tuple(c for c in found if PASSES[c.name].stage == stage and c.applies_to(compiled))


def run_passes(graph: fx.Graph, choices: Iterable[PassChoice]) -> tuple[PassReport, ...]:
    """Runs passes on `graph`, one after the other."""
    return tuple(_run(graph, choice.name) for choice in choices)


def _run(graph: fx.Graph, name: str) -> PassReport:
    before = len(graph.nodes)
    run = _implementation(name)
    started = time.perf_counter()
    matches, missed = run(graph)
    return PassReport(
        name=name,
        matches=matches,
        nodes_before=before,
        nodes_after=len(graph.nodes),
        seconds=time.perf_counter() - started,
        missed=missed,
    )


# What works at Inductor's post-grad point imports Inductor, which capture does without.
def _implementation(name: str) -> GraphPass:
    match name:
        case "attention-quant":
            from vllmc.core.graph.passes.attention import quantize_attention

            return quantize_attention
        case "no-ops":
            from vllmc.core.graph.passes.no_ops import drop_no_ops

            return drop_no_ops
        case "shared-quant":
            from vllmc.core.graph.passes.shared import share_quants

            return share_quants
        case "norm-quant":
            from vllmc.core.graph.passes.fusions import NORM_QUANT

            return NORM_QUANT.run
        case "activation-quant":
            from vllmc.core.graph.passes.fusions import ACTIVATION_QUANT

            return ACTIVATION_QUANT.run
        case "expand-quant":
            from vllmc.core.graph.passes.expanded import expand_quants

            return expand_quants
    raise AssertionError(f"{name} is in the catalogue and has no implementation")


def identity(choice: PassChoice) -> dict[str, JsonValue]:
    """What a pass is, beside its name, as far as it changes what it makes of a graph."""
    info = PASSES[choice.name]
    source = (_HERE / f"{info.module}.py").read_bytes()
    return {
        "version": info.version,
        "source": hashlib.sha256(source).hexdigest()[:_DIGITS],
        "tokens": None if choice.tokens is None else str(choice.tokens),
    }
