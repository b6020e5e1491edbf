"""What kernels and decode steps take on a GPU, beside what the same GPU can do and torch does.

    python benchmarks/gpu.py [--json FILE] [--parts kernels steps] [--small]

- ceilings: a copy of a large tensor, and products of large matrices in bfloat16 and fp8;
- `kernels`: our ops on tensors larger than any cache, as a share of the ceiling that limits each,
  beside torch's own op, and beside `torch.compile` of the op's definition;
- `steps`: a decode step of a Llama of about a billion parameters in bfloat16, for 1, 8 and 64
  sequences of 512 tokens: eager, stock `torch.compile`, vllmc, and vllmc with CUDA graphs.

Times are medians of laps between CUDA events, for steps of the clock with the GPU idle before and
after. `--small` takes tiny tensors on whatever device there is: it shows that all of this runs, and
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Headline, write_report
from torch.nn import functional

from vllmc.kernels import activation, attention, norm, quant
from vllmc.kernels import matmul as _matmul  # noqa: F401  (defines the op)
from vllmc.kernels.forward_context import (
    AttentionMetadata,
    ForwardContext,
    SequenceSpan,
    forward_context,
)
from vllmc.kernels.kv_cache import BlockTable, LayerCache
from vllmc.kernels.layer_name import LayerName

BLOCK = 16
LAPS = 30
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes of everything that is measured."""

    rows: int
    width: int
    square: int
    sequences: int
    context: int
    prompt: int
    hidden: int
    layers: int
    batches: tuple[int, ...]
    step_context: int


LARGE = Shapes(
    rows=16384,
    width=8192,
    square=8192,
    sequences=64,
    context=4096,
    prompt=4096,
    hidden=2048,
    layers=16,
    batches=(1, 8, 64),
    step_context=512,
)
SMALL = Shapes(
    rows=4,
    width=64,
    square=64,
    sequences=2,
    context=32,
    prompt=32,
    hidden=64,
    layers=2,
    batches=(1, 2),
    step_context=32,
)


def main() -> None:
    """Measures, prints a table for each part, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        raise SystemExit(
            "There is no GPU here, and these figures are of one.\n"
            "--small shows on a CPU that the benchmark runs; benchmarks/suite.py measures a CPU."
        )
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    shapes = SMALL if options.small else LARGE
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        ceilings = measure_ceilings(shapes, device)
        print(f"{name_of(device)}, torch {torch.__version__}", file=sys.stderr, flush=True)
        rows.append({"part": "ceilings", "device": name_of(device), **ceilings})
        print(ceilings_table(ceilings), flush=True)
        for part in options.parts:
            found = PARTS[part](shapes, device, ceilings)
            rows += [{"part": part, **row} for row in found]
            print(f"\n{TABLES[part](found)}", flush=True)
    if options.json:
        headlines = [headline_of(row) for row in rows if row["part"] == "steps"]
        write_report(options.json, LAPS, rows, headlines)


def name_of(device: str) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name(device) if device != "cpu" else "CPU"


def seconds(call: Callable[[], object], device: str, laps: int = LAPS) -> list[float]:
    """What each lap takes on the device, after some to warm up."""
    for _ in range(5):
        call()
    if device == "cpu":
        return [wall(call, device) for _ in range(laps)]
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(laps)]
    torch.cuda.synchronize()
    for start, end in marks:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def wall(call: Callable[[], object], device: str) -> float:
    """What one call takes by the clock, the device idle before and after."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_ceilings(shapes: Shapes, device: str) -> dict[str, float]:
    """Bytes per second of a copy; operations per second of products in bfloat16 and fp8."""
    source = torch.empty(shapes.rows, shapes.width, 4, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copying = statistics.median(seconds(lambda: target.copy_(source), device))
    size = shapes.square
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    multiplying = statistics.median(seconds(lambda: a @ b.t(), device))
    scale = torch.ones(1, device=device)
    low, other = a.to(FP8), b.to(FP8)
    fp8 = partial(fp8_matmul, low, other, scale)
    return {
        "bytes": 2 * source.nbytes / copying,
        "bfloat16": 2 * size**3 / multiplying,
        "fp8": 2 * size**3 / statistics.median(seconds(fp8, device)),
    }


def fp8_matmul(a: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`vllmc::scaled_mm` of two fp8 matrices: where it can be, torch's own fp8 product."""
    result: torch.Tensor = torch.ops.vllmc.scaled_mm(a, weight, scale, scale, None, torch.bfloat16)
    return result


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op: what it reads and writes (or computes) at least, and the alternatives to it."""

    name: str
    call: Callable[[], object]
    limit: str
    amount: float
    torch: tuple[str, Callable[[], object]] | None = None
    compiled: Callable[[], object] | None = None


def measure_kernels(
    shapes: Shapes, device: str, ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each op."""
    rows = []
    for case in (*row_cases(shapes, device), *attention_cases(shapes, device)):
        own = seconds(case.call, device)
        taken = statistics.median(own)
        row: dict[str, Any] = {
            "name": case.name,
            "seconds": taken,
            "seconds_spread": [min(own), max(own)],
            "limit": case.limit,
            "rate": case.amount / taken,
            "share": case.amount / taken / ceilings[case.limit],
            "torch": None,
            "torch_name": None,
            "compiled": None,
        }
        if case.torch is not None:
            row["torch_name"] = case.torch[0]
            row["torch"] = statistics.median(seconds(case.torch[1], device))
        if case.compiled is not None:
            row["compiled"] = statistics.median(seconds(case.compiled, device))
        rows.append(row)
    return rows


def row_cases(shapes: Shapes, device: str) -> list[Case]:
    """Ops on rows: what they read and write is what limits them."""
    shape = (shapes.rows, shapes.width)
    x, y = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2))
    weight = torch.randn(shapes.width, device=device).to(torch.bfloat16)
    scale = torch.full((1,), 0.01, device=device)
    ops, full, eps = torch.ops.vllmc, x.nbytes, 1e-6

    def both(function: Any, *args: Any) -> Callable[[], object]:
        # The function that defines the op is made of torch's own ops.
        return partial(torch.compile(function), *args)

    return [
        Case(
            name="rms_norm",
            call=partial(ops.rms_norm, x, weight, eps),
            limit="bytes",
            amount=2 * full,
            torch=("F.rms_norm", partial(functional.rms_norm, x, weight.shape, weight, eps)),
            compiled=both(norm.rms_norm, x, weight, eps),
        ),
        Case(
            name="fused_add_rms_norm",
            call=partial(ops.fused_add_rms_norm, x, y, weight, eps),
            limit="bytes",
            amount=4 * full,
            compiled=both(norm.fused_add_rms_norm, x, y, weight, eps),
        ),
        Case(
            name="rms_norm_static_quant",
            call=partial(ops.rms_norm_static_quant, x, weight, eps, 0.0, scale, FP8),
            limit="bytes",
            amount=1.5 * full,
            compiled=both(norm.rms_norm_static_quant, x, weight, eps, 0.0, scale, FP8),
        ),
        Case(
            name="silu_and_mul",
            call=partial(ops.silu_and_mul, x, y),
            limit="bytes",
            amount=3 * full,
            compiled=both(activation.silu_and_mul, x, y),
        ),
        Case(
            name="silu_and_mul_static_quant",
            call=partial(ops.silu_and_mul_static_quant, x, y, scale, FP8),
            limit="bytes",
            amount=2.5 * full,
            compiled=both(activation.silu_and_mul_static_quant, x, y, scale, FP8),
        ),
        Case(
            name="static_scaled_quant",
            call=partial(ops.static_scaled_quant, x, scale, FP8),
            limit="bytes",
            amount=1.5 * full,
            compiled=both(quant.static_scaled_quant, x, scale, FP8),
        ),
        Case(
            name="dynamic_scaled_quant",
            call=partial(ops.dynamic_scaled_quant, x, FP8),
            limit="bytes",
            amount=2.5 * full,
            compiled=both(quant.dynamic_scaled_quant, x, FP8),
        ),
        int8_case(shapes, device),
    ]


def int8_case(shapes: Shapes, device: str) -> Case:
    """A product of int8, held against fp8's ceiling, beside the same in bfloat16."""
    size = shapes.square
    a, b = torch.randint(-127, 128, (2, size, size), device=device).to(torch.int8)
    wide = a.to(torch.bfloat16), b.to(torch.bfloat16).t()
    scale = torch.full((1,), 0.01, device=device)
    return Case(
        name="scaled_mm, int8",
        call=partial(torch.ops.vllmc.scaled_mm, a, b, scale, scale, None, torch.bfloat16),
        limit="fp8",
        amount=2 * size**3,
        torch=("bfloat16 matmul", partial(torch.matmul, *wide)),
    )


def attention_cases(shapes: Shapes, device: str) -> list[Case]:
    """Attention of a decode step, which reads the cache, and of a prompt, which multiplies."""
    heads, kv_heads, size = 32, 8, 128
    rand = partial(torch.randn, device=device)
    decode = batch(shapes.sequences, shapes.context, 1, device)
    prompt = batch(1, shapes.prompt, shapes.prompt, device)
    cases = []
    for name, (metadata, slots), count, length in (
        ("attention, decode", decode, shapes.sequences, 1),
        ("attention, prompt", prompt, 1, shapes.prompt),
    ):
        cache = LayerCache(*(rand(slots, kv_heads, size).to(torch.bfloat16) for _ in range(2)))
        context = ForwardContext(metadata=metadata, caches={"layer": cache})
        query = rand(1, count * length, heads, size).to(torch.bfloat16)
        key, value = (rand(1, count * length, kv_heads, size).to(torch.bfloat16) for _ in range(2))
        total = shapes.context if length == 1 else shapes.prompt
        dense = [
            rand(count, n, m, size).to(torch.bfloat16)
            for n, m in ((heads, length), (kv_heads, total), (kv_heads, total))
        ]
        sdpa = partial(
            functional.scaled_dot_product_attention,
            *dense,
            is_causal=length > 1,
            enable_gqa=True,
        )
        cases.append(
            Case(
                name=name,
                call=partial(attend, context, query, key, value, torch.empty_like(query)),
                limit="bytes" if length == 1 else "bfloat16",
                amount=2 * cache.key.nbytes
                if length == 1
                # Half of the scores are masked.
                else 4 * heads * size * total * total / 2,
                torch=("SDPA", sdpa),
            )
        )
    return cases


def attend(context: ForwardContext, *tensors: torch.Tensor) -> None:
    """The op, in its context."""
    with forward_context(context):
        attention.unified_attention_with_output(*tensors, LayerName("layer"), 128**-0.5)


def batch(count: int, total: int, new: int, device: str) -> tuple[AttentionMetadata, int]:
    """`count` sequences of `total` tokens, the last `new` of them of this step; and all slots."""
    each = -(-total // BLOCK)
    tables = [BlockTable.of(range(n * each, (n + 1) * each), BLOCK, device) for n in range(count)]
    slots = [slot for table in tables for slot in table.slots[total - new : total]]
    spans = tuple(
        SequenceSpan(query_start=n * new, query_len=new, total_len=total, table=table)
        for n, table in enumerate(tables)
    )
    metadata = AttentionMetadata(slots=torch.tensor(slots, device=device), sequences=spans)
    return metadata, count * each * BLOCK


def measure_steps(
    shapes: Shapes, device: str, _ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each batch size: what a decode step takes, in seconds, by who runs it."""
    from transformers import LlamaConfig

    from vllmc.core.cache.store import Store
    from vllmc.core.events import SilentObserver
    from vllmc.core.job import make_job, resolve_spec
    from vllmc.core.models.transformers_model import ConfigSource, TransformersModel
    from vllmc.core.pipeline import obtain_program, open_program
    from vllmc.core.runtime.cuda_graphs import PLAIN_STEPS, recorder_for
    from vllmc.core.spec import CompileSpec

    config = LlamaConfig(
        hidden_size=shapes.hidden,
        intermediate_size=4 * shapes.hidden,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.hidden // 64,
        num_key_value_heads=max(1, shapes.hidden // 256),
        vocab_size=32000,
    )
    model = TransformersModel("bench", config, ConfigSource(label="bench"), None)
    spec = resolve_spec(CompileSpec(device=device, dtype="bfloat16"), model)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        job = make_job(model, spec, environment=dict(os.environ), cache_dir=cache, origins={})
        ready = obtain_program(job, Store(cache), SilentObserver())
    entry = model.build("real", spec)
    program = open_program(ready, entry)
    calls: dict[str, Callable[..., Any]] = {
        "eager": entry,
        "stock": torch.compile(entry, fullgraph=True, dynamic=True),
        "vllmc": program,
    }
    if (recorder := recorder_for(device)) is not None:
        calls["graphs"] = open_program(ready, entry, recorder=recorder, graph_sizes=shapes.batches)
    for count in shapes.batches:
        metadata, slots = batch(count, shapes.step_context, 1, device)
        caches = {
            site.layer: LayerCache(
                *(
                    torch.zeros(slots, site.kv_heads, size, dtype=torch.bfloat16, device=device)
                    for size in (site.key_size, site.value_size)
                )
            )
            for site in program.layout.attention
        }
        args = (
            torch.arange(count, device=device)[None] + 1,
            torch.full((1, count), shapes.step_context - 1, device=device),
            torch.arange(count, device=device),
        )
        context = ForwardContext(metadata=metadata, caches=caches)
        expected = step(entry, context, *args)
        row: dict[str, Any] = {"batch": count}
        for name, call in calls.items():
            for _ in range(PLAIN_STEPS + 3):
                found = step(call, context, *args)
            check(name, found, expected)
            laps = [wall(partial(step, call, context, *args), device) for _ in range(LAPS)]
            row[name] = statistics.median(laps)
            row[f"{name}_spread"] = [min(laps), max(laps)]
        rows.append(row)
    return rows


def step(call: Callable[..., Any], context: ForwardContext, *args: torch.Tensor) -> Any:
    """A call as an engine makes it: the batch's layout is new to each, and copied to the device."""
    with forward_context(replace(context, metadata=replace(context.metadata))):
        return call(*args)


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises `SystemExit` where logits differ by more than bfloat16 lets them."""
    error = float((found - expected).float().norm() / expected.float().norm())
    if not error < 0.05:
        raise SystemExit(f"{name} gives other logits than eager: relative error {error:.3f}")


def ceilings_table(ceilings: Mapping[str, float]) -> str:
    """The ceilings as Markdown."""
    return "\n".join(
        [
            "| ceiling, measured in this run | |",
            "|---|---:|",
            f"| copy | {ceilings['bytes'] / 1e9:.0f} GB/s |",
            f"| matmul, bfloat16 | {ceilings['bfloat16'] / 1e12:.1f} TFLOP/s |",
            f"| matmul, fp8 | {ceilings['fp8'] / 1e12:.1f} TFLOP/s |",
        ]
    )


def kernels_table(rows: list[dict[str, Any]]) -> str:
    """The ops as Markdown."""
    lines = [
        "| op | ms | rate | of the ceiling | torch's own, ms | torch.compile, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        rate = (
            f"{row['rate'] / 1e9:.0f} GB/s"
            if row["limit"] == "bytes"
            else f"{row['rate'] / 1e12:.1f} TFLOP/s"
        )
        own = "" if row["torch"] is None else f"{row['torch'] * 1e3:.3f} ({row['torch_name']})"
        compiled = "" if row["compiled"] is None else f"{row['compiled'] * 1e3:.3f}"
        lines.append(
            f"| {row['name']} | {row['seconds'] * 1e3:.3f} | {rate} | {row['share']:.0%} "
            f"| {own} | {compiled} |"
        )
    return "\n".join(lines)


def steps_table(rows: list[dict[str, Any]]) -> str:
    """The steps as Markdown, in milliseconds."""
    names = [name for name in ("eager", "stock", "vllmc", "graphs") if name in rows[0]]
    titles = {
        "eager": "eager",
        "stock": "torch.compile",
        "vllmc": "vllmc",
        "graphs": "vllmc, CUDA graphs",
    }
    lines = [
        f"| sequences, ms a decode step | {' | '.join(titles[name] for name in names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for row in rows:
        cells = " | ".join(f"{row[name] * 1e3:.2f}" for name in names)
        lines.append(f"| {row['batch']} | {cells} |")
    return "\n".join(lines)


def headline_of(row: Mapping[str, Any]) -> Headline:
    """A decode step of vllmc's, with graphs where there are any, to stock's."""
    name = "graphs" if "graphs" in row else "vllmc"
    low, high = row[f"{name}_spread"]
    return Headline(
        what=f"a decode step of {row['batch']} on a GPU, to stock torch.compile",
        value=row[name] / row["stock"],
        low=low / row["stock"],
        high=high / row["stock"],
        figures=f"{row[name] * 1e3:.2f} ms of {row['stock'] * 1e3:.2f} ms",
    )


PARTS: dict[str, Callable[[Shapes, str, Mapping[str, float]], list[dict[str, Any]]]] = {
    "kernels": measure_kernels,
    "steps": measure_steps,
}
TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "kernels": kernels_table,
    "steps": steps_table,
}


if __name__ == "__main__":
    main()
