"""What passes gain or cost in a step of a quantised model.

    python benchmarks/passes.py [--layers 4] [--runs 15] [--tokens 1 8 128] [MODEL:MODE:DTYPE ...]

One model, compiled with a CPU's default passes, with a GPU's, and with `shared-quant` alone:
both are compared with the same ops one after the other. Steps are timed in turns, in processor time
of one thread; printed are the ratios of their medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vllmc.core.cache.store import Store
from vllmc.core.events import SilentObserver
from vllmc.core.job import make_job, resolve_spec
from vllmc.core.models.built import build_model
from vllmc.core.models.resolve import resolve
from vllmc.core.passes import chosen, default_passes
from vllmc.core.pipeline import obtain_program, open_program
from vllmc.core.runtime.program import Program
from vllmc.core.spec import CompileSpec
from vllmc.kernels.forward_context import (
    AttentionMetadata,
    ForwardContext,
    SequenceSpan,
    forward_context,
)
from vllmc.kernels.kv_cache import BlockTable, LayerCache

CASES = (
    "tiny-llama:int8-dynamic:float32",
    "tiny-llama:fp8-static:bfloat16",
    "smollm2-135m:int8-dynamic:bfloat16",
    "smollm2-135m:int8-dynamic:float32",
)
PASSES = {
    "default": default_passes("cpu"),
    "fused": default_passes("cuda"),
    "apart": chosen(["shared-quant"], ["all"], "cpu"),
}
BLOCKS, BLOCK_SIZE = 64, 16


def main() -> None:
    """Prints a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("case", "passes", *(f"{count} tokens" for count in given.tokens), sep="\t")
    for case in given.cases:
        with TemporaryDirectory() as directory:
            programs = compiled(case, given.layers, Path(directory))
        dtype = getattr(torch, case.rpartition(":")[2])
        found = [ratios(programs, count, given.runs, dtype) for count in given.tokens]
        for label in found[0]:
            values = (f"{one[label]:.2f}" for one in found)
            print(case, label, *values, sep="\t", flush=True)


def compiled(case: str, layers: int, cache: Path) -> dict[str, Program]:
    """The model of a case, compiled with each set of passes and linked with the same weights."""
    name, mode, dtype = case.split(":")
    model = resolve(name, layers=layers)
    programs, entry = {}, None
    for label, passes in PASSES.items():
        spec = CompileSpec(dtype=dtype, quantize=mode, passes=passes)  # type: ignore[arg-type]
        spec = resolve_spec(spec, model)
        job = make_job(model, spec, environment=dict(os.environ), cache_dir=cache, origins={})
        ready = obtain_program(job, Store(cache), SilentObserver())
        entry = entry or build_model(model, spec, "real")
        programs[label] = open_program(ready, entry)
    return programs


def ratios(
    programs: dict[str, Program], tokens: int, runs: int, dtype: torch.dtype
) -> dict[str, float]:
    """The median step of each to that of the same ops one after the other."""
    args = (torch.arange(tokens)[None], torch.arange(tokens)[None], torch.tensor([tokens - 1]))
    seconds: dict[str, list[float]] = {label: [] for label in programs}
    with torch.no_grad(), forward_context(context(programs["apart"], tokens, dtype)):
        for _ in range(runs + 1):
            for label, program in programs.items():
                started = time.process_time()
                program(*args)
                seconds[label].append(time.process_time() - started)
    # The first of each is not like the others.
    medians = {label: statistics.median(values[1:]) for label, values in seconds.items()}
    return {n: median / medians["apart"] for n, median in medians.items() if n != "apart"}


def context(program: Program, tokens: int, dtype: torch.dtype) -> ForwardContext:
    """One sequence of so many new tokens, and caches of zeros."""
    table = BlockTable.of(range(BLOCKS), BLOCK_SIZE, "cpu")
    span = SequenceSpan(query_start=0, query_len=tokens, total_len=tokens, table=table)
    slots = BLOCKS * BLOCK_SIZE
    caches = {
        site.layer: LayerCache(
            torch.zeros(slots, site.kv_heads, site.key_size, dtype=dtype),
            torch.zeros(slots, site.kv_heads, site.value_size, dtype=dtype),
        )
        for site in program.layout.attention
    }
    metadata = AttentionMetadata(slots=torch.arange(tokens), sequences=(span,))
    return ForwardContext(metadata=metadata, caches=caches)


if __name__ == "__main__":
    main()
