"""The kernel of products of quantised matrices, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import EPS32, FLOATING, QUANTIZED, Poisoned, assert_near, draws

from vllmc.kernels import matmul as plain
from vllmc.kernels.triton import matmul

SCALES = (torch.tensor([0.03]), torch.tensor([0.7]))


def test_a_product_is_that_of_float64_for_any_shape_and_dtype() -> None:
    for draw in draws(200):
        count, width = draw.one_of((1, 2, 15, 16, 17, 65)), draw.one_of((1, 7, 32, 65))
        depth, dtype = draw.one_of((1, 15, 64, 129)), draw.one_of(QUANTIZED)
        rows, weight = (
            (draw.tensor((n, depth), torch.float32, "dense") * 30).clamp(-127, 127).to(dtype)
            for n in (count, width)
        )
        out_dtype = draw.one_of(FLOATING)
        bias = draw.one_of((None, draw.tensor((width,), out_dtype, "dense")))
        out = Poisoned.of((count, width), out_dtype)
        matmul.launch(rows, weight, SCALES, bias, out=out.tensor)
        a, b = rows.double(), weight.double()
        scale = SCALES[0].double() * SCALES[1].double()
        added = torch.zeros(()) if bias is None else bias.double()
        size = scale * (a.abs() @ b.abs().t()) + added.abs()
        # Sums of whole numbers are exact; those of fp8 are off by a part for every product.
        slack = (4 + (0 if dtype is torch.int8 else depth)) * EPS32 * size
        assert_near(out.written(), scale * (a @ b.t()) + added, slack)


def test_the_op_returns_what_the_kernel_writes() -> None:
    a = torch.randint(-99, 99, (2, 3, 24)).to(torch.int8)
    weight = torch.randint(-99, 99, (10, 24)).to(torch.int8)
    for rows in (a, a[:, :0]):
        args = (rows, weight, *SCALES, torch.randn(10), torch.float32)
        torch.testing.assert_close(matmul.scaled_mm(*args), plain.scaled_mm(*args))


def test_shapes_that_torch_takes_are_its(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(matmul, "launch")
    a = torch.randint(-99, 99, (20, 24)).to(torch.int8)
    weight = torch.randint(-99, 99, (16, 24)).to(torch.int8)
    args = (a, weight, *SCALES, None, torch.bfloat16)
    assert torch.equal(matmul.scaled_mm(*args), plain.scaled_mm(*args))
