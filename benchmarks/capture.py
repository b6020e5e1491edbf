"""How capture grows with the layers: equal ones traced once, and all of them traced.

    python benchmarks/capture.py [--layers 8 32 80] [--runs 5] [--json FILE]

A Llama with hidden size 256 in float32, without weights. Every measurement is a fresh process, the
two ways take turns; processor time of `capture` and of cutting the graph into pieces, with a small
model captured before, so that imports are not counted. Medians, smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import Headline, headline, in_fresh_process, summary, write_report

WAYS = ("once", "all")


def main() -> None:
    """Runs the comparison, or one measurement of it (`--one`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 80])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.layers[0])))
        return
    samples: dict[tuple[int, str], list[dict[str, float]]] = defaultdict(list)
    for run in range(options.runs):
        for layers in options.layers:
            for way in WAYS:
                samples[layers, way].append(
                    in_fresh_process(__file__, ["--one", way, "--layers", str(layers)])
                )
        print(f"run {run + 1} of {options.runs}", file=sys.stderr, flush=True)
    rows = [{"layers": n, "traced": way, **summary(group)} for (n, way), group in samples.items()]
    grown = growth(samples, min(options.layers), max(options.layers))
    print(table(rows))
    print(f"{grown.what}: {grown.value:.1f} ({grown.figures})")
    if options.json:
        write_report(options.json, options.runs, rows, [grown])


def measure(way: str, layers: int) -> dict[str, float]:
    """Processor seconds of capture and of the plan, and peak memory in MB."""
    from transformers import LlamaConfig

    from vllmc.core.graph import capture
    from vllmc.core.graph.plan import make_plan
    from vllmc.core.models.transformers_model import ConfigSource, TransformersModel
    from vllmc.core.spec import CompileSpec
    from vllmc.core.torch_compat.capture import capture_full_graph
    from vllmc.core.torch_compat.config import applied, vllmc_overrides

    if way == "all":
        capture.capture_repeating = capture_full_graph
    spec = CompileSpec(dtype="float32")
    seconds = {}
    for depth in (2, layers):
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=depth,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=32000,
        )
        model = TransformersModel("bench", config, ConfigSource(label="bench"), None)
        entry = model.build("fake", CompileSpec())
        with applied(vllmc_overrides(spec)):
            started = time.process_time()
            captured = capture.capture(model, entry, spec)
            seconds["capture"] = time.process_time() - started
            make_plan(captured, spec)
            seconds["plan"] = time.process_time() - started - seconds["capture"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**seconds, "total": seconds["capture"] + seconds["plan"], "memory_mb": peak}


def growth(samples: dict[tuple[int, str], list[dict[str, float]]], few: int, many: int) -> Headline:
    """Milliseconds that a layer adds, from the smallest to the largest number of layers."""
    grown = [
        1e3 * (large["total"] - small["total"]) / (many - few)
        for small, large in zip(samples[few, "once"], samples[many, "once"], strict=True)
    ]
    what = "capture and cutting, ms for each further layer"
    return headline(what, grown, f"from {few} to {many} layers", 10.0)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| layers | traced | capture | cutting | memory |", "|---:|---|---:|---:|---:|"]
    for row in rows:
        low, high = row["capture_spread"]
        lines.append(
            f"| {row['layers']} | {row['traced']} | {row['capture']:.2f} s ({low:.2f} to "
            f"{high:.2f}) | {row['plan']:.2f} s | {row['memory_mb']:.0f} MB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
