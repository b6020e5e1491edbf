"""Time to the first output, cold and warm: eager, stock torch.compile and vllmc.

    python benchmarks/startup.py [--layers 32] [--own-layers 2 8 80] [--runs 5] [--json FILE]

Every measurement is a fresh process, and the alternatives take turns. A cold run has empty
caches; a warm one those of the cold run before it. Times run from the first call to its end, and
for vllmc also importing it; importing torch and Transformers and building the model are not
counted. Of vllmc the time till the program is linked is told as well, before its first step.
Medians, and ratios to stock torch.compile. With `--own-layers` vllmc alone is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import Headline, headline, in_fresh_process, summary, write_report

ALTERNATIVES = ("eager", "stock", "vllmc")
PROMPT_TOKENS = 16
STEPS = 30
# Building the model needs these; they bring torch along.
IMPORTED_TO_BUILD = (
    "transformers.models.llama.modeling_llama",
    "vllmc.core.models.building",
    "vllmc.core.models.transformers_model",
)
IMPORTED_FOR_A_HIT = ("vllmc.core.cache.store", "vllmc.core.job", "vllmc.core.pipeline")


def main() -> None:
    """Runs the comparison, or one measurement of it (`--one`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[32])
    parser.add_argument("--own-layers", type=int, nargs="*", default=[2, 8, 80])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=ALTERNATIVES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.layers[0])))
        return
    alternatives: dict[int, Sequence[str]] = dict.fromkeys(options.own_layers, ("vllmc",))
    alternatives |= dict.fromkeys(options.layers, ALTERNATIVES)
    samples = compare(alternatives, options.runs)
    rows = summarize(samples)
    print(table(rows))
    if options.json:
        write_report(options.json, options.runs, rows, headlines(samples, options.layers))


Start = Callable[[], None]
Step = Callable[[int], Any]
Samples = dict[tuple[int, str, str], list[dict[str, float]]]


def compare(alternatives: Mapping[int, Sequence[str]], runs: int) -> Samples:
    """`(layers, alternative, "cold" or "warm") -> one sample per run`."""
    samples: Samples = defaultdict(list)
    for run in range(runs):
        for depth in alternatives:
            for alternative in alternatives[depth]:
                with tempfile.TemporaryDirectory() as caches:
                    for state in ("cold", "warm"):
                        sample = in_fresh_process(
                            __file__,
                            ["--one", alternative, "--layers", str(depth)],
                            Path(caches),
                        )
                        samples[depth, alternative, state].append(sample)
                        print(
                            f"{depth} layers, run {run}, {alternative} {state}: {sample}",
                            file=sys.stderr,
                            flush=True,
                        )
    return samples


def model_config(layers: int) -> Any:
    """A Llama with hidden size 256 in float32."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=32000,
    )


def measure(alternative: str, layers: int) -> dict[str, float]:
    """Seconds to the first output and per step, and peak memory in MB."""
    for name in IMPORTED_TO_BUILD:
        importlib.import_module(name)
    imported = time.perf_counter()
    for name in IMPORTED_FOR_A_HIT if alternative == "vllmc" else ():
        importlib.import_module(name)
    imported = time.perf_counter() - imported
    start, step = (
        vllmc_step(layers) if alternative == "vllmc" else transformers_step(alternative, layers)
    )
    started = time.perf_counter()
    start()
    linked = time.perf_counter() - started + imported
    step(PROMPT_TOKENS)
    first = time.perf_counter() - started + imported
    times = {}
    for tokens in (1, PROMPT_TOKENS):
        for _ in range(3):
            step(tokens)
        laps = []
        for _ in range(STEPS):
            lap = time.perf_counter()
            step(tokens)
            laps.append(time.perf_counter() - lap)
        times[tokens] = statistics.median(laps)
    return {
        "first": first,
        "linked": linked,
        "step_1": times[1],
        "step_16": times[PROMPT_TOKENS],
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def transformers_step(alternative: str, layers: int) -> tuple[Start, Step]:
    """A forward of the model as Transformers builds it, plain or under stock `torch.compile`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(layers), dtype=torch.float32).eval()
    call = model
    if alternative == "stock":
        call = torch.compile(model, fullgraph=True, dynamic=True)

    def step(tokens: int) -> torch.Tensor:
        ids = torch.ones(1, tokens, dtype=torch.int64)
        positions = torch.arange(tokens)[None]
        with torch.no_grad():
            return call(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits

    # Both do everything in their first step.
    return lambda: None, step


def vllmc_step(layers: int) -> tuple[Start, Step]:
    """What obtains and links vllmc's program, and the same forward with it."""
    import torch

    from vllmc.core.cache.store import Store
    from vllmc.core.events import SilentObserver
    from vllmc.core.job import make_job
    from vllmc.core.models.transformers_model import ConfigSource, TransformersModel
    from vllmc.core.pipeline import obtain_program, open_program
    from vllmc.core.spec import CompileSpec
    from vllmc.kernels.forward_context import (
        AttentionMetadata,
        ForwardContext,
        SequenceSpan,
        forward_context,
    )
    from vllmc.kernels.kv_cache import BlockTable, KVCacheSpec, LayerCache

    cache = Path(os.environ["VLLMC_CACHE_DIR"])
    model = TransformersModel("bench", model_config(layers), ConfigSource(label="bench"), None)
    spec = CompileSpec(dtype="float32")
    entry = model.build("real", CompileSpec())
    table = BlockTable.of([0], PROMPT_TOKENS, "cpu")
    state: dict[str, Any] = {}

    def start() -> None:
        job = make_job(model, spec, environment=dict(os.environ), cache_dir=cache, origins={})
        program = open_program(obtain_program(job, Store(cache), SilentObserver()), entry)
        state["program"] = program
        state["caches"] = {
            site.layer: LayerCache.allocate(
                KVCacheSpec(
                    layer_name=site.layer,
                    num_kv_heads=site.kv_heads,
                    key_size=site.key_size,
                    value_size=site.value_size,
                ),
                slots=PROMPT_TOKENS,
                dtype=torch.float32,
                device="cpu",
            )
            for site in program.layout.attention
        }

    def step(tokens: int) -> torch.Tensor:
        span = SequenceSpan(query_start=0, query_len=tokens, total_len=tokens, table=table)
        metadata = AttentionMetadata(slots=torch.arange(tokens), sequences=(span,))
        with (
            torch.no_grad(),
            forward_context(ForwardContext(metadata=metadata, caches=state["caches"])),
        ):
            logits: torch.Tensor = state["program"](
                torch.ones(1, tokens, dtype=torch.int64),
                torch.arange(tokens)[None],
                torch.tensor([tokens - 1]),
            )
            return logits

    return start, step


def summarize(samples: Samples) -> list[dict[str, Any]]:
    """Medians with their spread, and ratios to stock in the same state, where it was measured."""
    rows: list[dict[str, Any]] = []
    for (depth, alternative, state), group in samples.items():
        row = {"layers": depth, "alternative": alternative, "state": state, **summary(group)}
        if stock := samples.get((depth, "stock", state)):
            for name in ("first", "step_1", "step_16"):
                row[f"{name}_ratio"] = row[name] / statistics.median(s[name] for s in stock)
        rows.append(row)
    return rows


def headlines(samples: Samples, layers: Sequence[int]) -> list[Headline]:
    """Cold and warm starts of the most layers that stock was measured with, and how they grow."""
    many = max(layers)
    depths = sorted({depth for depth, _, _ in samples})
    few, middle, most = depths[0], depths[len(depths) > 1], depths[-1]
    warm = samples[many, "vllmc", "warm"]
    first = statistics.median(sample["first"] for sample in warm)
    return [
        headline(
            f"warm start, {many} layers, seconds till linked, beyond torch and the model",
            [sample["linked"] for sample in warm],
            f"importing vllmc, the key, loading, linking; with the first 16 tokens {first:.2f} s",
            0.25,
        ),
        *(
            compared(
                f"{state} start, {many} layers, of stock's",
                samples[many, "vllmc", state],
                samples[many, "stock", state],
                at_most,
            )
            for state, at_most in (("warm", 0.05), ("cold", 0.25))
        ),
        compared(
            f"warm start till linked, {most} layers to {few}",
            samples[most, "vllmc", "warm"],
            samples[few, "vllmc", "warm"],
            1.5,
            "linked",
        ),
        compared(
            f"warm start with the first step, {most} layers to {few}",
            samples[most, "vllmc", "warm"],
            samples[few, "vllmc", "warm"],
        ),
        compared(
            f"cold start, {most} layers to {middle}",
            samples[most, "vllmc", "cold"],
            samples[middle, "vllmc", "cold"],
            1.3,
        ),
    ]


def compared(
    what: str,
    ours: Sequence[Mapping[str, float]],
    others: Sequence[Mapping[str, float]],
    at_most: float | None = None,
    name: str = "first",
) -> Headline:
    """One group of samples to another, run by run."""
    ratios = [one[name] / other[name] for one, other in zip(ours, others, strict=True)]
    medians = [statistics.median(sample[name] for sample in group) for group in (ours, others)]
    return headline(what, ratios, "{:.2f} s of {:.2f} s".format(*medians), at_most)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| layers | | | first output | of stock | step, 1 token | of stock "
        "| step, 16 tokens | of stock | memory |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["first_spread"]
        lines.append(
            f"| {row['layers']} | {row['alternative']} | {row['state']} "
            f"| {row['first']:.2f} s ({low:.2f} to {high:.2f}) | {ratio(row, 'first')} "
            f"| {row['step_1'] * 1e3:.2f} ms | {ratio(row, 'step_1')} "
            f"| {row['step_16'] * 1e3:.2f} ms | {ratio(row, 'step_16')} "
            f"| {row['memory_mb']:.0f} MB |"
        )
    return "\n".join(lines)


def ratio(row: Mapping[str, Any], name: str) -> str:
    """The ratio to stock; empty where stock was not measured."""
    return f"{row[f'{name}_ratio']:.3f}" if f"{name}_ratio" in row else ""


if __name__ == "__main__":
    main()
