from __future__ import annotations

import pytest
import torch

from vllmc.core.errors import VllmcError
from vllmc.core.graph.layout import ExpertsSite, GraphInput, Layout
from vllmc.core.runtime.memory import free_bytes, require_memory, weight_bytes


def weights_of(*rows: int, dtype: str = "float16") -> tuple[GraphInput, ...]:
    return tuple(
        GraphInput(kind="attribute", name=f"w{i}", dtype=dtype, shape=(n, 8), stride=(8, 1))
        for i, n in enumerate(rows)
    )


def layout(*rows: int, experts: int = 0, dtype: str = "float16") -> Layout:
    ids = GraphInput(kind="activation", name="input_ids")
    return Layout(
        pieces=(),
        ranges=(),
        inputs=(ids, *weights_of(*rows)),
        steps=(),
        arguments=(),
        result={"ref": "p0"},
        attention=(),
        experts=(ExpertsSite(layer="mlp", tensors=weights_of(experts)),),
    )


def test_weights_are_counted_in_bytes_of_their_dtype() -> None:
    assert weight_bytes(layout(3, 5), torch.float32) == (3 + 5) * 8 * 2


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_a_quantised_weight_counts_as_the_one_that_it_is_made_of(dtype: str) -> None:
    assert weight_bytes(layout(3, dtype=dtype), torch.bfloat16) == 3 * 8 * 2


def test_weights_of_experts_are_counted_though_no_input_of_the_graph() -> None:
    dtype = torch.float16
    assert weight_bytes(layout(3, experts=5), dtype) == weight_bytes(layout(3, 5), dtype)


def test_weights_that_do_not_fit_are_refused_before_they_are_allocated() -> None:
    require_memory(layout(4), "cpu", torch.float16)
    with pytest.raises(VllmcError) as caught:
        require_memory(layout(2**56), "cpu", torch.float16)
    assert caught.value.code == "not-enough-memory"
    assert caught.value.context["needed_bytes"] == 2**60
    assert caught.value.context["free_bytes"] == pytest.approx(free_bytes("cpu"), rel=0.5)
