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

from vllmc.kernels.experts import Experts
from vllmc.kernels.forward_context import AttentionMetadata, DeviceTables, SequenceSpan
from vllmc.kernels.kv_cache import BlockTable, LayerCache
from vllmc.kernels.triton import (
    activation,
    attention,
    kv_cache,
    logprobs,
    matmul,
    moe,
    norm,
    quant,
    rotary,
)

DTYPES = (torch.float32, torch.bfloat16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)

pytestmark = pytest.mark.slow


class Driver:
    """A GPU of compute capability `arch` / 10, which kernels are compiled for and not run on."""

    # Of what is served GPUs for desktops have the least (compute capability 8.6 and 8.9).
    max_shared_mem = 99 * 1024

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


@pytest.fixture(params=[pytest.param(80, marks=pytest.mark.thorough), 90])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    gpu = Driver(request.param)
    monkeypatch.setattr(driver, "_active", gpu)
    return gpu


def quantized(gpu: Driver, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A result for `x`, as launchers give it to kernels on this GPU."""
    out = torch.empty(x.shape, dtype=dtype)
    return out.view(torch.uint8) if gpu.arch < 89 and dtype is torch.float8_e4m3fn else out


@pytest.mark.parametrize(("width", "dtypes"), [(100, DTYPES), (20000, (torch.bfloat16,))])
def test_norms(gpu: Driver, width: int, dtypes: tuple[torch.dtype, ...]) -> None:
    scale, amax = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    weight = torch.ones(width)
    for dtype in dtypes:
        x = torch.ones(3, width, dtype=dtype)
        norm.launch(x, weight, 1e-6, 1.0, out=torch.empty_like(x))
        norm.launch(x, weight, 1e-6, 0.0, residual=x, total=torch.empty_like(x), amax=amax)
        for target in QUANTIZED:
            norm.launch(x, weight, 1e-6, 0.0, out=quantized(gpu, x, target), scale=scale)
    assert gpu.compiled == ["_norm_kernel"] * 4 * len(dtypes)


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
    assert gpu.compiled == ["_activation_kernel"] * 8


def test_quantisation(gpu: Driver) -> None:
    scale, amax = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for dtype in DTYPES:
        x = torch.ones(3, 300, dtype=dtype)
        quant.launch(x, amax=amax)
        for target in QUANTIZED:
            quant.launch(x, out=quantized(gpu, x, target), scale=scale)
    assert gpu.compiled == ["_quant_kernel"] * 6


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(gpu: Driver, interleaved: bool) -> None:
    for dtype in DTYPES:
        query = torch.ones(1, 8, 5, 96, dtype=dtype).transpose(1, 2)
        rotary.rotary_embedding(query, query, *torch.ones(2, 1, 5, 64), interleaved)
    assert gpu.compiled == ["_rotary_kernel"] * 2


def test_counts(gpu: Driver) -> None:
    for dtype in (*DTYPES, torch.int64):
        x = torch.ones(3, 300, dtype=dtype)
        logprobs.batched_count_greater_than(x, x[:, :1])
    assert gpu.compiled == ["_count_kernel"] * 3


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


@pytest.mark.parametrize("tokens", [1, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixtures_of_experts(gpu: Driver, dtype: torch.dtype, tokens: int) -> None:
    hidden, weights = torch.ones(tokens, 64, dtype=dtype), torch.ones(tokens, 2)
    ids = torch.zeros(tokens, 2, dtype=torch.int64)
    for gated in (True, False):
        experts = Experts(
            up=torch.ones(4, 96, 64, dtype=dtype),
            down=torch.ones(4, 64, 48 if gated else 96, dtype=dtype),
            gate=torch.relu,
            gated_silu=gated,
            up_bias=torch.ones(4, 96, dtype=dtype),
        )
        moe.mixture(experts, hidden, ids, weights)
    # The second product of both is one.
    assert gpu.compiled == ["_grouped_product"] * 3


def test_what_lies_side_by_side_is_read_in_words_of_16_bytes(gpu: Driver, tmp_path: Path) -> None:
    x, scale, weight = torch.ones(64, 1024, dtype=torch.bfloat16), torch.ones(1), torch.ones(1024)
    norm.rms_norm(x, weight, 1e-6)
    activation.silu_and_mul(x, x)
    quant.static_scaled_quant(x, scale, torch.int8)
    logprobs.batched_count_greater_than(x, x[:, :1])
    heads = x.view(64, 8, 128)
    rotary.rotary_embedding(heads[None], heads[None], *torch.ones(2, 1, 64, 128))
    numbers = torch.ones(64, 512).to(torch.int8)
    matmul.launch(numbers, numbers, (scale, scale), None, out=torch.empty(64, 64))
    kv_cache.store(LayerCache(heads, heads), torch.arange(64), heads[None], heads[None])
    attention.launch(heads, heads, heads, tables_of((8, 8)), out=heads.clone(), scale=1.0)
    matrices = x.view(2, 32, 1024)
    experts = Experts(up=matrices, down=matrices.mT, gate=torch.relu, gated_silu=False)
    moe.mixture(experts, x, torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1))
    code = {path.parent: path.read_text() for path in tmp_path.rglob("*.ptx")}
    assert len(code) == len(gpu.compiled)
    for text in code.values():
        entry = text.partition(".entry ")[2].partition("(")[0]
        assert "ld.global.v4" in text or "cp.async.cg" in text, entry


def test_another_number_of_rows_compiles_nothing(gpu: Driver) -> None:
    scale, weight = torch.ones(1), torch.ones(64)
    for rows in (5, 1, 2, 3, 16, 48):
        x = torch.ones(rows, 64)
        norm.rms_norm(x, weight, 1e-6)
        activation.silu_and_mul(x, x)
        quant.static_scaled_quant(x, scale, torch.int8)
        logprobs.batched_count_greater_than(x, x[:, :1])
        heads = x.view(1, rows, 4, 16)
        rotary.rotary_embedding(heads, heads, *torch.ones(2, 1, rows, 16))
        out = torch.empty(min(rows, 16), 64)
        a, b = torch.ones(len(out), 64).to(torch.int8), torch.ones(64, 64).to(torch.int8)
        matmul.launch(a, b, (scale, scale), None, out=out)
        keys = torch.ones(2 * rows, 4, 16)
        kv_cache.store(LayerCache(keys, keys), torch.arange(2 * rows), keys[None], keys[None])
        pairs = tables_of((2,) * rows)
        attention.launch(keys, keys, keys, pairs, out=keys.clone(), scale=1.0)
    assert len(gpu.compiled) == len(set(gpu.compiled)) == 8


def test_another_division_of_the_keys_compiles_nothing(gpu: Driver) -> None:
    query, keys = torch.ones(2, 32, 128), torch.ones(64, 8, 128)
    for splits in (2, 16, 64):
        blocks = attention.AttentionBlocks(m=16, n=32, rows=4, splits=splits, warps=4, stages=1)
        out, tables = torch.ones_like(query), tables_of((1, 1))
        attention.launch(query, keys, keys, tables, out=out, scale=1.0, blocks=blocks)
    assert sorted(gpu.compiled) == ["attention_kernel", "combining_kernel"]


# What a model may have: (query heads, key heads, size of keys, size of values).
HEADS = {
    "llama": (32, 8, 128, 128),
    "many to one key head": (71, 1, 64, 64),
    "gemma": (8, 4, 256, 256),
    "latent": (16, 16, 192, 128),
    "odd": (3, 3, 80, 72),
}
LARGEST = ("many to one key head", "gemma")


@pytest.mark.parametrize("model", HEADS)
def test_attention(gpu: Driver, model: str) -> None:
    heads, kv_heads, key_size, value_size = HEADS[model]
    ways: list[tuple[torch.dtype, tuple[int, ...], dict[str, Any]]] = [
        (torch.bfloat16, (4, 1), {"window": 5, "softcap": 2.0, "sinks": torch.ones(heads)})
    ]
    if model in LARGEST:
        ways += [(torch.float32, (4, 1), {}), (torch.float32, (1, 1), {})]
    for dtype, lengths, options in ways:
        keys = torch.ones(64, kv_heads, key_size, dtype=dtype)
        values = torch.ones(64, kv_heads, value_size, dtype=dtype)
        query = torch.ones(sum(lengths), heads, key_size, dtype=dtype)
        out = torch.ones(sum(lengths), heads, value_size, dtype=dtype)
        attention.launch(query, keys, values, tables_of(lengths), out=out, scale=1.0, **options)
    assert gpu.compiled == ["attention_kernel"] * len(ways)


def test_attention_in_other_forms(gpu: Driver) -> None:
    query = torch.ones(2, 32, 128, dtype=torch.float16)
    keys = torch.ones(64, 8, 128, dtype=torch.float16)
    step = (query, keys, keys, tables_of((1, 1)))
    attention.launch(*step, out=torch.ones_like(query), scale=1.0, causal=False, window=5)
    divided = attention.attention_blocks(
        group=4, head_bytes=256, one_each=True, programs=16, seen=4096, multiprocessors=132
    )
    assert divided.splits > 1
    attention.launch(*step, out=torch.ones_like(query), scale=1.0, blocks=divided)
    for target in QUANTIZED:
        out = quantized(gpu, query, target)
        attention.launch(*step, out=out, scale=1.0, output_scale=torch.ones(1))
        if out.dtype is target:
            attention.quantize_blocks(query, out=out, scales=torch.ones(2, 4))
    assert gpu.compiled.count("attention_kernel") == 4
    assert gpu.compiled.count("combining_kernel") == 1
    assert gpu.compiled.count("block_quant_kernel") == (2 if gpu.arch >= 89 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_to_the_cache(gpu: Driver, dtype: torch.dtype) -> None:
    cache = LayerCache(torch.ones(64, 8, 80, dtype=dtype), torch.ones(64, 8, 72, dtype=dtype))
    kv_cache.store(cache, torch.arange(3), cache.key[None, :3], cache.value[None, :3])
    assert gpu.compiled == ["_store_kernel"]


def tables_of(lengths: tuple[int, ...]) -> DeviceTables:
    """Sequences of so many tokens, all new, each in the first block."""
    table = BlockTable.of((0,), 16, "cpu")
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    spans = (
        SequenceSpan(query_start=start, query_len=length, total_len=length, table=table)
        for start, length in zip(starts, lengths, strict=True)
    )
    metadata = AttentionMetadata(slots=torch.empty(0), sequences=tuple(spans))
    return metadata.tables(torch.device("cpu"))
