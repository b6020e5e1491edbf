"""A model captured with and without tracing layers that are alike once."""

from __future__ import annotations

from typing import Any

import pytest

from vllmc.core.errors import VllmcError
from vllmc.core.graph import capture, repeats
from vllmc.core.graph.plan import Plan, make_plan
from vllmc.core.job import resolve_spec
from vllmc.core.models.model import Model
from vllmc.core.models.resolve import resolve
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.capture import capture_full_graph
from vllmc.core.torch_compat.config import applied, vllmc_overrides
from vllmc.core.torch_compat.stand_ins import stands_for


def with_layers(directory: str, layers: int) -> Model:
    """The model of `directory` with that many layers, or its own number where it insists on it."""
    try:
        model = resolve(directory, layers=layers)
        model.factors()
        build(model)
    except (VllmcError, IndexError):
        return resolve(directory)
    return model


def build(model: Model) -> Any:
    spec = spec_of(model)
    return model.build("fake", device="cpu", dtype=spec.dtype, layer_names=spec.layer_names, seed=0)


def spec_of(model: Model) -> CompileSpec:
    return resolve_spec(CompileSpec(dtype="float32"), model)


def plans(model: Model) -> tuple[Plan, Plan, int]:
    """The plan of each, and how many layers were stood in for in the last attempt."""
    spec, stood_in = spec_of(model), [0]

    def counting(*args: Any) -> Any:
        raw = capture_full_graph(*args)
        stood_in.append(sum(stands_for(node) is not None for node in raw.module.graph.nodes))
        return raw

    with applied(vllmc_overrides(spec)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "capture_full_graph", counting)
        repeating = make_plan(capture.capture(model, build(model), spec), spec)
        patch.setattr(capture, "capture_repeating", capture_full_graph)
        whole = make_plan(capture.capture(model, build(model), spec), spec)
    return repeating, whole, stood_in[-1]


def told(plan: Plan) -> tuple[object, ...]:
    """All that a plan says but for the graphs, whose digests stand for them."""
    return plan.layout, plan.counts, [(u.piece.digest, u.names) for u in plan.unique]
