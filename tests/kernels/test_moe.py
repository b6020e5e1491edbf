"""`vllmc::fused_moe` on a CPU, and through the op on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllmc.core.errors import VllmcError
from vllmc.kernels import moe as _moe  # noqa: F401  (defines the op)
from vllmc.kernels.experts import Experts
from vllmc.kernels.forward_context import AttentionMetadata, ForwardContext, forward_context
from vllmc.kernels.layer_name import LayerName

OP = torch.ops.vllmc.fused_moe
NAME = "layers.3.mlp"
METADATA = AttentionMetadata(slots=torch.empty(0, dtype=torch.int64), sequences=())


def gated_silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def clamped(x: torch.Tensor) -> torch.Tensor:
    """As gpt-oss: interleaved, clamped, and one more than the second."""
    gate, up = x[..., ::2].clamp(max=1.5), x[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def make(
    dtype: torch.dtype = torch.float32,
    *,
    gate: Callable[[torch.Tensor], torch.Tensor] = gated_silu,
    biased: bool = False,
    transposed: bool = False,
    device: str = "cpu",
    size: int = 10,
    width: int = 7,
) -> Experts:
    """Six experts of `width` for hidden states of `size`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.4).to(device, dtype)

    up, down = draw(6, 2 * width, size), draw(6, size, width)
    if transposed:
        up, down = (matrices.mT.contiguous().mT for matrices in (up, down))
    return Experts(
        up=up,
        down=down,
        gate=gate,
        gated_silu=gate is gated_silu,
        up_bias=draw(6, 2 * width) if biased else None,
        down_bias=draw(6, size) if biased else None,
    )


def routed(
    tokens: int,
    dtype: torch.dtype = torch.float32,
    topk: int = 3,
    device: str = "cpu",
    size: int = 10,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, size, generator=generator).to(device, dtype)
    ids = torch.rand(tokens, 6, generator=generator).topk(topk).indices.to(device)
    weights = torch.rand(tokens, topk, generator=generator).softmax(dim=-1).to(device, dtype)
    return hidden, ids, weights


def run(
    experts: Experts, *args: torch.Tensor, name: LayerName | str = NAME, held: str = NAME
) -> torch.Tensor:
    context = ForwardContext(metadata=METADATA, caches={}, experts={held: experts})
    with forward_context(context):
        result: torch.Tensor = OP(*args, name)
        return result


def looped(
    experts: Experts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Expert after expert, as Transformers' own loop goes."""
    result = torch.zeros_like(hidden)
    for expert in range(len(experts.up)):
        tokens, slots = torch.where(ids == expert)
        x = hidden[tokens] @ experts.up[expert].t()
        if experts.up_bias is not None:
            x = x + experts.up_bias[expert]
        x = experts.gate(x) @ experts.down[expert].t()
        if experts.down_bias is not None:
            x = x + experts.down_bias[expert]
        result.index_add_(0, tokens, (x * weights[tokens, slots, None]).to(result.dtype))
    return result


@pytest.mark.parametrize("tokens", [1, 2, 19, 300])
@pytest.mark.parametrize("transposed", [False, True])
# Rows that begin at 16 bytes each are multiplied by another function.
@pytest.mark.parametrize(("size", "width"), [(10, 7), (16, 8), (16, 7)])
@pytest.mark.parametrize(("gate", "biased"), [(gated_silu, False), (clamped, True)])
def test_float32_is_what_the_loop_over_experts_gives(
    tokens: int,
    transposed: bool,
    size: int,
    width: int,
    gate: Callable[[torch.Tensor], torch.Tensor],
    biased: bool,
) -> None:
    experts = make(gate=gate, biased=biased, transposed=transposed, size=size, width=width)
    args = routed(tokens, size=size)
    # Of vectorised functions the last bit hangs on where in the memory an element lies.
    torch.testing.assert_close(run(experts, *args), looped(experts, *args), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_many_rows_and_few_give_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    experts = make(dtype, size=16, width=8)
    hidden, ids, weights = routed(19, dtype, size=16)
    together = run(experts, hidden, ids, weights)
    single = [run(experts, *(t[[i]] for t in (hidden, ids, weights))) for i in range(19)]
    torch.testing.assert_close(together, torch.cat(single))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_added_up_in_float32(dtype: torch.dtype) -> None:
    experts = make(dtype, biased=True)
    hidden, ids, weights = routed(40, dtype, topk=6)
    result = run(experts, hidden, ids, weights)
    assert result.dtype == dtype
    # What each expert gives is rounded as in the loop; the sum is not.
    single = torch.stack(
        [
            run(experts, hidden, ids[:, [slot]], torch.ones(40, 1, dtype=dtype)).double()
            for slot in range(6)
        ],
        dim=1,
    )
    exact = (single * weights.double()[..., None]).sum(dim=1)
    half_ulp = torch.finfo(dtype).eps / 2
    allowed = half_ulp * exact.abs() + 1e-6
    assert ((result.double() - exact).abs() <= allowed).all()
    assert not torch.equal(result, looped(experts, hidden, ids, weights))


def test_weights_may_be_of_a_larger_dtype_and_ids_of_a_smaller_one() -> None:
    experts = make(torch.bfloat16)
    hidden, ids, weights = routed(9, torch.bfloat16)
    expected = run(experts, hidden, ids, weights)
    assert torch.equal(run(experts, hidden, ids.int(), weights.float()), expected)


def test_rows_may_lie_apart() -> None:
    hidden, ids, weights = routed(9)
    apart = [torch.stack((t, t), dim=-1)[..., 0] for t in (hidden, ids, weights)]
    assert not any(t.is_contiguous() for t in apart)
    assert torch.equal(run(make(), *apart), run(make(), hidden, ids, weights))


@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_that_no_token_has_are_not_read(tokens: int) -> None:
    experts = make(size=16, width=8)
    hidden, ids, weights = routed(tokens, size=16)
    ids = ids.clamp(1, 4)
    expected = run(experts, hidden, ids, weights)
    for expert in set(range(6)) - set(ids.flatten().tolist()):
        experts.up[expert], experts.down[expert] = float("nan"), float("nan")
    assert torch.equal(run(experts, hidden, ids, weights), expected)


def test_no_tokens_give_no_rows() -> None:
    assert run(make(), *routed(0)).shape == (0, 10)


def test_a_string_and_a_layer_name_name_the_same_layer() -> None:
    args = routed(4)
    assert torch.equal(run(make(), *args, name=LayerName(NAME)), run(make(), *args))


@pytest.mark.parametrize("overload", ["default", "str"])
def test_the_op_is_what_its_schema_and_its_fake_say(overload: str) -> None:
    name = LayerName(NAME) if overload == "default" else NAME
    context = ForwardContext(metadata=METADATA, caches={}, experts={NAME: make()})
    with forward_context(context):
        torch.library.opcheck(
            getattr(OP, overload),
            (*routed(5), name),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_without_a_forward_context_the_error_names_the_layer() -> None:
    with pytest.raises(VllmcError, match=NAME) as caught:
        OP(*routed(1), NAME)
    assert caught.value.code == "no-forward-context"


def test_a_layer_without_experts_is_named() -> None:
    with pytest.raises(VllmcError, match=NAME) as caught:
        run(make(), *routed(1), held="other")
    assert caught.value.code == "unknown-layer"
    assert caught.value.context["layers"] == ["other"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 8, 300])
@pytest.mark.parametrize(("gate", "biased"), [(gated_silu, False), (clamped, True)])
def test_a_gpu_gives_what_the_cpu_gives_in_float64(
    dtype: torch.dtype,
    tokens: int,
    gate: Callable[[torch.Tensor], torch.Tensor],
    biased: bool,
) -> None:
    there = make(dtype, gate=gate, biased=biased, transposed=biased, device="cuda")
    here = Experts(
        up=there.up.cpu().double(),
        down=there.down.cpu().double(),
        gate=gate,
        gated_silu=there.gated_silu,
        up_bias=None if there.up_bias is None else there.up_bias.cpu().double(),
        down_bias=None if there.down_bias is None else there.down_bias.cpu().double(),
    )
    args = routed(tokens, dtype, device="cuda")
    expected = run(here, *(t.cpu() if t.dtype == torch.int64 else t.cpu().double() for t in args))
    result = run(there, *args)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.cpu().double(), expected, rtol=4 * eps, atol=8 * eps)
