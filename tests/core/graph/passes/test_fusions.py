"""Quantisation is fused with what it quantises, and computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.fx as fx
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from vllmc.core.graph.passes.expanded import expand_quants
from vllmc.core.graph.passes.fusions import ACTIVATION_QUANT, NORM_QUANT
from vllmc.core.torch_compat.post_grad import decomposed
from vllmc.kernels import quant as _quant  # noqa: F401  (defines the ops)

FP8, INT8, FP32 = torch.float8_e4m3fn, torch.int8, torch.float32
T, H = 7, 24
vllmc = torch.ops.vllmc


@dataclass(frozen=True, slots=True)
class Traced:
    """A graph of model code, the function that it was traced from, and what it is called with."""

    graph: fx.Graph
    function: Callable[..., Any]
    inputs: Sequence[torch.Tensor]

    def same_results(self) -> bool:
        """Whether the graph, as it is now, gives what the function does."""
        found = fx.Interpreter(fx.GraphModule({}, self.graph)).run(*self.inputs)
        wanted = self.function(*self.inputs)
        return all(_close(f, w) for f, w in zip(found, wanted, strict=True))

    def calls(self) -> list[str]:
        """The names of vllmc's ops in the graph."""
        targets = [str(node.target) for node in self.graph.nodes if node.op == "call_function"]
        return [t.removeprefix("vllmc.") for t in targets if t.startswith("vllmc.")]


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.dtype not in (FP8, INT8):
        return torch.allclose(found, wanted, rtol=1e-2, atol=1e-3)
    # Rounded once where the model's code rounds twice: a quantised value may be its neighbour.
    steps = (found.view(torch.int8).int() - wanted.view(torch.int8).int()).abs()
    return int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 0.25


SCALE = torch.full((1,), 0.02)


def quant(
    x: torch.Tensor, scale: torch.Tensor, mode: str, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    if mode == "static":
        return (vllmc.static_scaled_quant(x, scale, dtype),)
    return tuple(vllmc.dynamic_scaled_quant(x, dtype))


def trace(function: Callable[..., Any], *inputs: torch.Tensor) -> Traced:
    return Traced(decomposed(function, inputs), function, inputs)


def hidden(dtype: torch.dtype, count: int = 1, size: int = H) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, T, size).to(dtype) for _ in range(count)]


def calling(
    kind: Callable[..., torch.nn.Module],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A norm of that kind as a function of its input and weight."""
    norm = kind(H)
    return lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,))


def weight(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(H).to(dtype)


NORMS = [LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm, lambda size: torch.nn.RMSNorm(size, eps=1e-6)]
MODES = [("static", FP8), ("dynamic", FP8), ("static", INT8), ("dynamic", INT8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("mode", "to"), MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS, ids=["llama", "gemma", "olmo", "torch"])
def test_a_norm_and_its_quantisation_become_one_op(
    kind: Callable[..., torch.nn.Module], dtype: torch.dtype, mode: str, to: torch.dtype
) -> None:
    norm = calling(kind)
    traced = trace(
        lambda x, w, s: quant(norm(x, w), s, mode, to), *hidden(dtype), weight(dtype), SCALE
    )
    assert NORM_QUANT.run(traced.graph) == (1, None)
    assert traced.calls() == [f"rms_norm_{mode}_quant.default"]
    assert traced.same_results()


@pytest.mark.parametrize(("mode", "to"), MODES)
@pytest.mark.parametrize("kind", NORMS, ids=["llama", "gemma", "olmo", "torch"])
def test_the_residual_is_added_by_the_same_op(
    kind: Callable[..., torch.nn.Module], mode: str, to: torch.dtype
) -> None:
    norm = calling(kind)

    def block(
        x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        total = residual + x
        return (*quant(norm(total, w), s, mode, to), total * 2.0)

    dtype = torch.bfloat16
    traced = trace(block, *hidden(dtype, 2), weight(dtype), SCALE)
    assert NORM_QUANT.run(traced.graph) == (1, None)
    assert traced.calls() == [f"fused_add_rms_norm_{mode}_quant.default"]
    assert traced.same_results()


@pytest.mark.parametrize(("mode", "to"), MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "op"),
    [
        (torch.nn.functional.silu, "silu_and_mul"),
        (torch.nn.functional.gelu, "gelu_and_mul"),
        (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), "gelu_and_mul"),
    ],
    ids=["silu", "gelu", "gelu-tanh"],
)
def test_a_gated_activation_and_its_quantisation_become_one_op(
    activation: Callable[[torch.Tensor], torch.Tensor],
    op: str,
    dtype: torch.dtype,
    mode: str,
    to: torch.dtype,
) -> None:
    traced = trace(lambda g, u, s: quant(activation(g) * u, s, mode, to), *hidden(dtype, 2), SCALE)
    assert ACTIVATION_QUANT.run(traced.graph) == (1, None)
    assert traced.calls() == [f"{op}_{mode}_quant.default"]
    assert traced.same_results()


def test_what_the_rest_of_the_graph_reads_too_is_left_alone_and_told() -> None:
    norm = calling(LlamaRMSNorm)

    def routed(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = norm(x, w)
        return (*quant(normed, s, "static", FP8), normed.sigmoid())

    traced = trace(routed, *hidden(FP32), weight(FP32), SCALE)
    matches, missed = NORM_QUANT.run(traced.graph)
    assert matches == 0
    assert missed is not None
    assert missed.expected == "nothing else to read it"
    assert missed.found == "aten.sigmoid.default reads it"
    assert traced.same_results()


def test_a_norm_of_another_kind_is_told_with_the_node_that_differs() -> None:
    def cubic(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spread = torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6)
        return quant(w * (x * spread), s, "static", FP8)

    traced = trace(cubic, *hidden(FP32), weight(FP32), SCALE)
    matches, missed = NORM_QUANT.run(traced.graph)
    assert matches == 0
    assert missed is not None
    assert (missed.node, missed.expected, missed.found) == ("pow_1", "2", "3")


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_of_what_is_left_beside_what_is_fused_the_closest_is_told(order: tuple[int, ...]) -> None:
    def two(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        norms = [w * (x * torch.rsqrt(x.pow(n).mean(-1, keepdim=True) + 1e-6)) for n in order]
        return tuple(part for norm in norms for part in quant(norm, s, "static", FP8))

    matches, missed = NORM_QUANT.run(trace(two, *hidden(FP32), weight(FP32), SCALE).graph)
    assert matches == 1
    assert missed is not None
    assert (missed.expected, missed.found) == ("2", "3")


def test_what_is_no_norm_beside_one_is_no_miss() -> None:
    norm = calling(LlamaRMSNorm)

    def block(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gated = torch.nn.functional.silu(x @ x.mT) @ x
        quantised = (norm(x, w), x + 1.0, gated * 2.0)
        return tuple(part for y in quantised for part in quant(y, s, "static", FP8))

    traced = trace(block, *hidden(FP32), weight(FP32), SCALE)
    assert NORM_QUANT.run(traced.graph) == (1, None)
    # What an activation gives is multiplied before it is quantised.
    assert ACTIVATION_QUANT.run(traced.graph) == (0, None)


def test_a_graph_without_such_ops_is_no_miss() -> None:
    traced = trace(lambda x, s: quant(x + 1.0, s, "static", FP8), *hidden(FP32), SCALE)
    assert NORM_QUANT.run(traced.graph) == (0, None)
    assert ACTIVATION_QUANT.run(traced.graph) == (0, None)


def test_a_weight_of_another_shape_does_not_match() -> None:
    def scaled(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return quant(w * normed, s, "static", FP8)

    traced = trace(scaled, *hidden(FP32), torch.rand(T, 1), SCALE)
    matches, missed = NORM_QUANT.run(traced.graph)
    assert matches == 0
    assert missed is not None
    assert missed.expected == f"weight of torch.float32 [{H}]"
    assert missed.found == f"torch.float32 [{T}, 1]"
    assert traced.same_results()


def test_a_residual_of_another_dtype_is_added_by_itself() -> None:
    norm = calling(LlamaRMSNorm)

    def block(
        x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        total = residual + x
        return (*quant(norm(total, w), s, "static", FP8), total)

    half = hidden(torch.bfloat16)[0]
    traced = trace(block, half, *hidden(FP32), weight(FP32), SCALE)
    assert NORM_QUANT.run(traced.graph) == (1, None)
    assert traced.calls() == ["rms_norm_static_quant.default"]
    assert traced.same_results()


def test_a_residual_that_is_broadcast_is_added_by_itself() -> None:
    norm = calling(LlamaRMSNorm)
    traced = trace(
        lambda x, bias, w, s: quant(norm(x + bias, w), s, "static", FP8),
        *hidden(FP32),
        torch.rand(H),
        weight(FP32),
        SCALE,
    )
    assert NORM_QUANT.run(traced.graph) == (1, None)
    assert traced.calls() == ["rms_norm_static_quant.default"]
    assert traced.same_results()


@pytest.mark.parametrize("what", ["scale", "weight"])
def test_what_the_fused_op_takes_is_not_computed_from_what_it_gives(what: str) -> None:
    norm = calling(LlamaRMSNorm)

    def block(
        x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        total = residual + x
        if what == "scale":
            s = total.abs().amax().view(1) / 448
        else:
            w = total[0].mean(0)
        return (*quant(norm(total, w), s, "static", FP8), total)

    traced = trace(block, *hidden(FP32, 2), weight(FP32), SCALE)
    assert NORM_QUANT.run(traced.graph) == (1, None)
    assert traced.calls() == ["rms_norm_static_quant.default"]
    traced.graph.lint()
    assert traced.same_results()


def test_a_sum_that_lies_otherwise_in_memory_stays() -> None:
    norm = calling(LlamaRMSNorm)

    def block(
        x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, s: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        total = residual.mT + x.mT
        return (*quant(norm(total, w), s, "static", FP8), torch.as_strided(total, (4,), (2,)))

    across = [x.mT.contiguous() for x in hidden(FP32, 2)]
    traced = trace(block, *across, weight(FP32), SCALE)
    assert NORM_QUANT.run(traced.graph) == (1, None)
    assert traced.calls() == ["rms_norm_static_quant.default"]
    assert traced.same_results()


def test_patterns_are_traced_once_however_many_layers_there_are() -> None:
    from vllmc.core.graph.passes import fusions

    norm = calling(LlamaRMSNorm)

    def layers(count: int) -> fx.Graph:
        def run(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(
                part for i in range(count) for part in quant(norm(x + i, w), s, "static", FP8)
            )

        return trace(run, *hidden(FP32), weight(FP32), SCALE).graph

    assert NORM_QUANT.run(layers(2)) == (2, None)
    known = fusions._pattern.cache_info().currsize
    assert NORM_QUANT.run(layers(12)) == (12, None)
    assert fusions._pattern.cache_info().currsize == known


def test_arguments_given_by_name_are_left_alone() -> None:
    """None of them is lost."""
    graph = fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale")
    call = graph.call_function(
        vllmc.static_scaled_quant.default, (x,), {"scale": scale, "dtype": FP8}
    )
    graph.output((call,))
    for run in (NORM_QUANT.run, ACTIVATION_QUANT.run, expand_quants):
        assert run(graph) == (0, None)
    assert call.kwargs == {"scale": scale, "dtype": FP8}
