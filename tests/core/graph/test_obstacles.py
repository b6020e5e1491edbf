from __future__ import annotations

from typing import Any

import pytest
import torch

from vllmc.core.graph.plan import make_plan


def causes(trace_toy: Any, function: Any) -> dict[str, str]:
    """Why pieces cannot be recorded, by their names."""
    layout = make_plan(*trace_toy(function)).layout
    return {layout.pieces[found.piece]: found.cause for found in layout.obstacles}


def test_pieces_of_plain_ops_can_be_recorded(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        # An op between the pieces may write to what a piece made.
        made = entry.linear(x)
        ops.fill(made)
        return (made + x)[0, rows]

    assert causes(trace_toy, function) == {}


def test_sizes_that_depend_on_values_cannot_be_recorded(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        found = ops.cut(x)[0]
        return found[found[:, 0] > 0]

    assert causes(trace_toy, function) == {"piece_2": "its sizes depend on the values of tensors"}


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x.__setitem__(0, 0.0)])
def test_a_piece_that_writes_to_what_it_is_given_cannot_be_recorded(
    trace_toy: Any, ops: Any, write: Any
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        given = ops.cut(x)
        write(given)
        return given[0] * 2

    [(name, cause)] = causes(trace_toy, function).items()
    assert name == "piece_2"
    assert cause.endswith("writes to what the piece is given")


def test_a_piece_that_writes_to_what_it_made_can_be_recorded(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        made = ops.cut(x) * 2
        made.add_(1)
        return made[0]

    assert causes(trace_toy, function) == {}


def test_an_op_that_says_so_cannot_be_recorded(trace_toy: Any, ops: Any) -> None:
    library = torch.library.Library("vllmc_test_unsafe", "DEF")
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    library.define("waits(Tensor x) -> Tensor", tags=tags)
    library.impl("waits", torch.clone, "CompositeExplicitAutograd")
    torch.library.register_fake("vllmc_test_unsafe::waits", torch.empty_like, lib=library)

    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return torch.ops.vllmc_test_unsafe.waits(ops.cut(x))[0]

    try:
        assert causes(trace_toy, function) == {
            "piece_2": "vllmc_test_unsafe::waits may not be recorded"
        }
    finally:
        library._destroy()


def test_attention_inside_a_piece_cannot_be_recorded_and_storing_keys_can(
    trace_toy: Any, ops: Any
) -> None:
    """Where sequences lie is told by the forward context: another step's graph would not hear."""

    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        heads = ops.cut(x)[:, :, None]
        stored = torch.ops.vllmc.unified_kv_cache_update(heads, heads, "layer")
        output = torch.empty_like(ops.cut(heads))
        torch.ops.vllmc.unified_attention_with_output(
            heads, heads, heads, output, "layer", 1.0, kv_cache_dummy_dep=stored
        )
        return output[0, rows]

    assert causes(trace_toy, function) == {
        "piece_4": "vllmc::unified_attention_with_output may not be recorded"
    }
