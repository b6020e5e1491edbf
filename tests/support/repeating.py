"""A model captured with and without tracing layers that are alike once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from vllmc.core.errors import VllmcError
from vllmc.core.graph import capture, repeats
from vllmc.core.graph.plan import Plan, make_plan
from vllmc.core.job import resolve_spec
from vllmc.core.models.built import build_model
from vllmc.core.models.model import Model
from vllmc.core.models.resolve import resolve
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.capture import capture_full_graph
from vllmc.core.torch_compat.config import applied, vllmc_overrides
from vllmc.core.torch_compat.stand_ins import stands_for


def plans(directory: str, **changes: Any) -> tuple[Plan, Plan, int]:
    """Both plans of the model of `directory`, and how many layers were stood in for.

    `changes` are fields of the spec.

    Of a model whose two layers differ it is the plans of four layers, if it can have four.
    """
    model = resolve(directory)
    repeating, stood_in = _plan(model, changes)
    if not stood_in and (deeper := _with_four_layers(directory)) is not None:
        model = deeper
        repeating, stood_in = _plan(model, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "capture_repeating", capture_full_graph)
        whole, _ = _plan(model, changes)
    return repeating, whole, stood_in


def _with_four_layers(directory: str) -> Model | None:
    try:
        model = resolve(directory, layers=4)
        _build(model, _spec_of(model))
    except (VllmcError, IndexError):
        # Its configuration says something of each layer.
        return None
    return model


def _plan(model: Model, changes: Mapping[str, Any]) -> tuple[Plan, int]:
    spec, stood_in = replace(_spec_of(model), **changes), [0]

    def counting(*args: Any) -> Any:
        raw = capture_full_graph(*args)
        stood_in.append(sum(stands_for(node) is not None for node in raw.module.graph.nodes))
        return raw

    with applied(vllmc_overrides(spec)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "capture_full_graph", counting)
        return make_plan(capture.capture(model, _build(model, spec), spec), spec), stood_in[-1]


def _build(model: Model, spec: CompileSpec) -> Any:
    return build_model(model, spec)


def _spec_of(model: Model) -> CompileSpec:
    return resolve_spec(CompileSpec(dtype="float32"), model)


def told(plan: Plan) -> tuple[object, ...]:
    """All that a plan says but for the graphs, whose digests stand for them."""
    return plan.layout, plan.counts, [(u.piece.digest, u.names) for u in plan.unique]
