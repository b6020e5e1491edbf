"""Every kernel is compiled, down to a GPU's machine code, on any machine: no GPU is needed for it.

Triton is given a driver that names the GPU and launches nothing. The launchers are called as they
are on a GPU, with tensors of the CPU, of which Triton looks at dtypes and alignment only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vllmc.kernels.triton import activation, logprobs, matmul, norm, quant, rotary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


class Driver:
    """A GPU of compute capability `arch` / 10, which kernels are compiled for and not run on."""

    # That of an A100 and of an H100: the least that is served.
    max_shared_mem = 163 * 1024

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.compiled: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": self.max_shared_mem},
            load_binary=self.load_binary,
        )

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert binary.startswith(b"\x7fELF")
        self.compiled.append(name)
        return object(), object(), 0, 0, 1024

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Compiled kernels are kept by device.

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None


@pytest.fixture(params=[80, 90])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    gpu = Driver(request.param)
    monkeypatch.setattr(driver, "_active", gpu)
    return gpu


def quantized(gpu: Driver, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A result for `x`, as launchers give it to kernels on this GPU."""
    out = torch.empty(x.shape, dtype=dtype)
    return out.view(torch.uint8) if gpu.arch < 89 and dtype is torch.float8_e4m3fn else out


@pytest.mark.parametrize("width", [100, 128, 4096, 20000])
def test_norms(gpu: Driver, width: int) -> None:
    scale, amax = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    weight = torch.ones(width)
    for dtype in DTYPES:
        x = torch.ones(3, width, dtype=dtype)
        norm.launch(x, weight, 1e-6, 1.0, out=torch.empty_like(x))
        norm.launch(x, weight, 1e-6, 0.0, residual=x, total=torch.empty_like(x), amax=amax)
        for target in QUANTIZED:
            norm.launch(x, weight, 1e-6, 0.0, out=quantized(gpu, x, target), scale=scale)
    assert gpu.compiled == ["_norm_kernel"] * 12


@pytest.mark.parametrize("activation_name", ["silu", "gelu", "gelu_tanh"])
def test_activations(gpu: Driver, activation_name: str) -> None:
    scale, amax = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for dtype in DTYPES:
        x = torch.ones(3, 300, dtype=dtype)
        activation.launch(x, x, activation_name, out=torch.empty_like(x))
        activation.launch(x, x, activation_name, amax=amax)
        for target in QUANTIZED:
            out = quantized(gpu, x, target)
            activation.launch(x, x, activation_name, out=out, scale=scale)
    assert gpu.compiled == ["_activation_kernel"] * 12


def test_quantisation(gpu: Driver) -> None:
    scale, amax = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for dtype in DTYPES:
        x = torch.ones(3, 300, dtype=dtype)
        quant.launch(x, amax=amax)
        for target in QUANTIZED:
            quant.launch(x, out=quantized(gpu, x, target), scale=scale)
    assert gpu.compiled == ["_quant_kernel"] * 9


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(gpu: Driver, interleaved: bool) -> None:
    for dtype in DTYPES:
        query = torch.ones(1, 8, 5, 96, dtype=dtype).transpose(1, 2)
        rotary.rotary_embedding(query, query, *torch.ones(2, 1, 5, 64), interleaved)
    assert gpu.compiled == ["_rotary_kernel"] * 3


def test_counts(gpu: Driver) -> None:
    for dtype in (*DTYPES, torch.float64, torch.int64):
        x = torch.ones(3, 300, dtype=dtype)
        logprobs.batched_count_greater_than(x, x[:, :1])
    assert gpu.compiled == ["_count_kernel"] * 5


@pytest.mark.parametrize("rows", [1, 100])
def test_products(gpu: Driver, rows: int) -> None:
    scales = (torch.ones(1), torch.ones(1))
    # Where the GPU has no fp8, what is quantised to it is multiplied by torch.
    for dtype in QUANTIZED if gpu.arch >= 89 else (torch.int8,):
        a, weight = torch.ones(rows, 200).to(dtype), torch.ones(300, 200).to(dtype)
        for bias in (None, torch.ones(300)):
            out = torch.empty(rows, 300, dtype=torch.bfloat16)
            matmul.launch(a, weight, scales, bias, out=out)
    assert gpu.compiled == ["_product_kernel"] * (4 if gpu.arch >= 89 else 2)
