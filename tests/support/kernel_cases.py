"""Random tensors for kernels, what results must be near to, and memory that shows what is written.

References are float64; what they are compared with is computed in float32 and rounded once, so that
it is off by half a unit in the last place of its dtype, and by a few of float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn.functional import gelu, silu

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.float8_e4m3fn, torch.int8)
LAYOUTS = ("dense", "padded", "transposed", "spread")
STRIDED = tuple(zip((*FLOATING, torch.float32), LAYOUTS, strict=True))
T = TypeVar("T")
EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Draw:
    """A source of random choices and tensors, which a seed decides."""

    generator: torch.Generator

    def below(self, bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=self.generator))

    def one_of(self, choices: tuple[T, ...]) -> T:
        return choices[self.below(len(choices))]

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
        """Normal numbers, by `layout` dense, or with other strides than a dense tensor's."""
        if layout == "padded":
            return self._normal((*shape[:-1], shape[-1] + 5), dtype)[..., 2:-3]
        if layout == "spread":
            return self._normal((*shape[:-1], shape[-1] * 2), dtype)[..., ::2]
        if layout == "transposed" and len(shape) > 1:
            return self._normal((shape[1], shape[0], *shape[2:]), dtype).transpose(0, 1)
        return self._normal(shape, dtype)

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)


def draws(count: int) -> Iterator[Draw]:
    """`count` sources, always the same."""
    for seed in range(count):
        yield Draw(torch.Generator().manual_seed(seed))


def rows_shape(draw: Draw, width: int) -> tuple[int, ...]:
    """`[..., width]`, of up to three dimensions: one row, a few, one in eight times none."""
    rows = draw.one_of((0, 1, 1, 2, 2, 3, 5, 9))
    return draw.one_of(((rows, width), (1, rows, width), (rows, 2, width), (width,)))


def exact_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
) -> torch.Tensor:
    """RMSNorm in float64."""
    wide = x.double()
    factor = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return wide * factor * (weight_offset + weight.double())


def exact_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """A gated activation in float64: "silu", "gelu" or "gelu_tanh"."""
    wide = gate.double()
    if kind == "silu":
        return silu(wide) * up.double()
    return gelu(wide, approximate="none" if kind == "gelu" else "tanh") * up.double()


def exact_rotation(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotary embedding in float64."""
    size, wide = cos.shape[-1], x.double()
    out = wide.clone()
    c, s = cos.double()[:, :, None], sin.double()[:, :, None]
    halves = (slice(0, size // 2), slice(size // 2, size))
    i, j = (slice(0, size, 2), slice(1, size, 2)) if interleaved else halves
    out[..., i] = wide[..., i] * c[..., i] - wide[..., j] * s[..., i]
    out[..., j] = wide[..., j] * c[..., j] + wide[..., i] * s[..., j]
    return out


def assert_near(got: torch.Tensor, exact: torch.Tensor, slack: torch.Tensor) -> None:
    """`got` is `exact` (float64) but for rounding to its dtype, and `slack`."""
    info = torch.finfo(got.dtype)
    half = torch.clamp(exact.abs(), min=info.smallest_normal) * info.eps / 2
    error = (got.double() - exact).abs()
    worst = (error / (half + slack)).max() if error.numel() else torch.zeros(())
    assert got.shape == exact.shape
    assert float(worst) <= 1.0, f"the error is {float(worst)} of what is allowed"


def assert_quantized(
    q: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, *, slack: float = 2 * EPS32
) -> None:
    """`q` is the number of its dtype that is nearest to `values / scale`, or as near as another.

    The quotient is float32, so that a value in the middle of two may go to either.
    """
    largest = 127.0 if q.dtype is torch.int8 else 448.0
    exact = (values.double() / scale.double()).clamp(-largest, largest)
    if q.dtype is torch.int8:
        step = torch.ones_like(exact)
    else:
        step = torch.exp2(exact.abs().clamp(min=2.0**-6).log2().floor() - 3)
    error = (q.double() - exact).abs()
    assert q.shape == values.shape
    assert bool((error <= step / 2 + slack * exact.abs()).all())


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many values of their dtype are at most between elements of quantised tensors, plus 1."""
    difference = (_place(a) - _place(b)).abs()
    return int(difference.max()) if difference.numel() else 0


def assert_same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Results are equal; on a GPU, where another kernel may round otherwise, within one step."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is b.dtype
        assert a.shape == b.shape
        if a.device.type == "cpu":
            assert torch.equal(a.float(), b.float())
        elif a.dtype in QUANTIZED:
            assert steps_apart(a, b) <= 1
        else:
            torch.testing.assert_close(a, b)


def _place(q: torch.Tensor) -> torch.Tensor:
    """Where each element stands in the row of all values of its dtype."""
    if q.dtype is torch.int8:
        return q.int()
    bits = q.contiguous().view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


@dataclass(frozen=True, slots=True)
class Poisoned:
    """A contiguous `tensor` to write to, that holds no number, amid memory that is not written."""

    tensor: torch.Tensor
    around: tuple[torch.Tensor, torch.Tensor]
    poison: float

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype) -> Poisoned:
        poison = float("nan") if dtype.is_floating_point else 77.0
        count = torch.Size(shape).numel()
        memory = torch.full((count + 64,), poison).to(dtype)
        return Poisoned(memory[32 : 32 + count].view(shape), (memory[:32], memory[-32:]), poison)

    def written(self) -> torch.Tensor:
        """The tensor, every element of which must have been written, and nothing beside it."""
        edges = torch.cat([edge.float() for edge in self.around])
        same = edges.isnan() if self.poison != self.poison else edges == self.poison
        assert bool(same.all()), "written beside the result"
        if self.tensor.is_floating_point():
            assert not bool(self.tensor.float().isnan().any()), "not all of the result is written"
        return self.tensor
