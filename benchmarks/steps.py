"""What a step costs: vllmc beside stock torch.compile, its dispatch, its engine, and `generate`.

    python benchmarks/steps.py [--runs 5] [--layers 32] [--parts step ...] [--json FILE]

- `step`: one decode step of 1 and of 8 sequences with 32 tokens each (hidden size 256): the
  program, stock `torch.compile(fullgraph=True, dynamic=True)` of the very module that vllmc
  compiles, with vllmc's attention op, and that module eager. They take turns, step by step.
- `dispatch`: a step of a small model (hidden size 64), and the same calls of Inductor's own
  functions and of the attention op, called as the program calls it, one after the other, with
  their arguments at hand. What the program takes more, by piece; less than nothing where it spares
  work that those functions do.
- `engine`: the share of generating 64 tokens that passes outside the program (hidden size 256).
- `generate`: decoding 64 tokens after a prompt of 16 with vllmc's engine, and with Transformers'
  `generate` on a static cache with its forward compiled by torch, of the same weights. The tokens
  are the same. Prefill is taken off: it is a generation of one token.

A Llama in float32. Every run is a fresh process on one core with one thread; times are processor
time of that process. A run's figure is a median of many laps, and a ratio is taken within one run;
shown are medians of the runs. The first run compiles, into caches that all share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from measuring import Headline, in_fresh_process, row_headline, summary, write_report

CONTEXT = 32
PROMPT = tuple(range(1, 17))
NEW_TOKENS = 64
BLOCK = 16


def main() -> None:
    """Runs the comparison, or one process of it (`--one`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.layers)))
        return
    samples: dict[str, list[dict[str, float]]] = {part: [] for part in options.parts}
    with tempfile.TemporaryDirectory() as caches:
        for run in range(options.runs):
            for part, group in samples.items():
                group.append(
                    in_fresh_process(
                        __file__, ["--one", part, "--layers", str(options.layers)], Path(caches)
                    )
                )
                print(f"run {run}, {part}: {group[-1]}", file=sys.stderr, flush=True)
    rows = [{"part": part, **summary(group)} for part, group in samples.items()]
    shown = [line for row in rows for line in HEADLINES[row["part"]](row)]
    print(table(shown))
    if options.json:
        write_report(options.json, options.runs, rows, shown)


def measure(part: str, layers: int) -> dict[str, float]:
    """The figures of one run, on one core."""
    import torch

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with torch.no_grad():
        return PARTS[part](layers)


class Bench:
    """A Llama of some layers, its program, and what both share."""

    def __init__(self, hidden: int, layers: int) -> None:
        from transformers import LlamaConfig

        from vllmc.core.cache.store import Store
        from vllmc.core.events import SilentObserver
        from vllmc.core.job import make_job
        from vllmc.core.models.transformers_model import ConfigSource, TransformersModel
        from vllmc.core.pipeline import obtain_program, open_program
        from vllmc.core.spec import CompileSpec

        self.config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=32000 if hidden >= 256 else 1000,
        )
        cache = Path(os.environ["VLLMC_CACHE_DIR"])
        model = TransformersModel("bench", self.config, ConfigSource(label="bench"), None)
        spec = CompileSpec(dtype="float32")
        self.entry = model.build("real", spec)
        job = make_job(model, spec, environment=dict(os.environ), cache_dir=cache, origins={})
        self.ready = obtain_program(job, Store(cache), SilentObserver())
        self.program = open_program(self.ready, self.entry)

    def decode(self, sequences: int) -> tuple[Any, tuple[Any, ...]]:
        """The forward context and the arguments of a decode step, over caches of zeros."""
        import torch

        from vllmc.kernels.forward_context import AttentionMetadata, ForwardContext, SequenceSpan
        from vllmc.kernels.kv_cache import BlockTable, LayerCache

        each = CONTEXT // BLOCK
        tables = [
            BlockTable.of(range(n * each, (n + 1) * each), BLOCK, "cpu") for n in range(sequences)
        ]
        metadata = AttentionMetadata(
            slots=torch.tensor([table.slots[-1] for table in tables]),
            sequences=tuple(
                SequenceSpan(query_start=row, query_len=1, total_len=CONTEXT, table=table)
                for row, table in enumerate(tables)
            ),
        )
        slots = sequences * CONTEXT
        caches = {
            site.layer: LayerCache(
                torch.zeros(slots, site.kv_heads, site.key_size),
                torch.zeros(slots, site.kv_heads, site.value_size),
            )
            for site in self.program.layout.attention
        }
        ids = torch.arange(sequences)[None] + 1
        positions = torch.full((1, sequences), CONTEXT - 1)
        return ForwardContext(metadata=metadata, caches=caches), (
            ids,
            positions,
            torch.arange(sequences),
        )


def in_turns(calls: Mapping[str, Callable[[], object]], laps: int) -> dict[str, float]:
    """The median of the processor time of each, in seconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for lap in range(laps + 3):
        for name, call in calls.items():
            started = time.process_time_ns()
            call()
            if lap >= 3:
                times[name].append((time.process_time_ns() - started) / 1e9)
    return {name: statistics.median(taken) for name, taken in times.items()}


def measure_step(layers: int) -> dict[str, float]:
    """Seconds of a step of each alternative, and their ratios to stock."""
    import torch

    from vllmc.kernels.forward_context import forward_context

    bench = Bench(256, layers)
    stock = torch.compile(bench.entry, fullgraph=True, dynamic=True)
    sample: dict[str, float] = {}
    for tokens in (8, 1):
        context, args = bench.decode(tokens)
        alternatives = {"vllmc": bench.program, "stock": stock, "eager": bench.entry}
        calls = {name: partial(call, *args) for name, call in alternatives.items()}
        with forward_context(context):
            expected = bench.entry(*args)
            for call in calls.values():
                torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
            taken = in_turns(calls, laps=60)
        sample |= {f"{name}_{tokens}": seconds for name, seconds in taken.items()}
        sample |= {
            f"{name}_{tokens}_ratio": taken[name] / taken["stock"] for name in ("vllmc", "eager")
        }
    return sample


def measure_dispatch(layers: int) -> dict[str, float]:
    """Microseconds by piece that the program takes more than its calls one after the other."""
    from vllmc.kernels.forward_context import forward_context

    bench = Bench(64, layers)
    context, args = bench.decode(1)
    with forward_context(context):
        calls = direct_calls(bench, args)

        def bare() -> None:
            for function, given in calls:
                function(list(given))

        taken = in_turns({"program": lambda: bench.program(*args), "bare": bare}, laps=300)
    pieces = bench.ready.record.pieces["compilable"]
    return {**taken, "microseconds": (taken["program"] - taken["bare"]) / pieces * 1e6}


DirectCall: TypeAlias = tuple[Callable[[list[Any]], object], list[Any]]


def direct_calls(bench: Bench, args: tuple[Any, ...]) -> list[DirectCall]:
    """Each call of a step with its list of arguments: Inductor's `call` of a piece, or an op."""
    import torch

    from vllmc.core.graph.layout import UnitStep
    from vllmc.core.runtime import program as linking
    from vllmc.core.runtime.loader import load_artifact
    from vllmc.kernels.attention import past_dispatcher
    from vllmc.kernels.layer_name import LayerName

    layout, calls = bench.program.layout, []
    artifacts = {unit.pieces[0]: unit for unit in bench.ready.units}
    loaded = [load_artifact(artifacts[name].data) for name in layout.pieces]
    # As the program calls it: torch's dispatcher is no part of ours.
    attend = past_dispatcher(torch.ops.vllmc.unified_attention_with_output.default)

    def recorded(piece: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        def call(given: list[Any]) -> Any:
            calls.append((piece, list(given)))
            return piece(given)

        return call

    variant = linking.Variant(
        range=bench.program.ranges[0], pieces=tuple(recorded(piece) for piece in loaded)
    )
    linking.link(layout, bench.entry, [variant])(*args)
    # Between two pieces comes an attention op: its sizes are those of any layer.
    site = layout.attention[0]
    heads = bench.config.num_attention_heads
    tensors = [
        torch.randn(1, args[0].shape[1], count, size)
        for count, size in (
            (heads, site.key_size),
            (site.kv_heads, site.key_size),
            (site.kv_heads, site.value_size),
            (heads, site.value_size),
        )
    ]
    pieces = iter(list(calls))
    found: list[DirectCall] = []
    for step in layout.steps:
        if isinstance(step, UnitStep):
            found.append(next(pieces))
        elif step.target.startswith("call_function:"):
            name = LayerName(layout.attention[len(found) // 2].layer)
            options = (site.key_size**-0.5, None, None, None, True)
            found.append((lambda given: attend(*given), [*tensors, name, *options]))
    return found


def measure_engine(layers: int) -> dict[str, float]:
    """The share of generating that passes outside the program, with 1 and with 8 sequences."""
    bench = Bench(256, layers)
    sample = {}
    for sequences in (1, 8):
        inside = 0.0

        def step(*args: Any) -> Any:
            nonlocal inside
            started = time.process_time()
            logits = bench.program(*args)
            inside += time.process_time() - started
            return logits

        generate(bench, step, sequences, 4)
        shares = []
        for _ in range(3):
            inside = 0.0
            total, _ = generate(bench, step, sequences, NEW_TOKENS)
            shares.append((total - inside, total))
        outside, total = (statistics.median(column) for column in zip(*shares, strict=True))
        sample |= {
            f"share_{sequences}": outside / total,
            f"outside_{sequences}": outside / NEW_TOKENS,
            f"step_{sequences}": total / NEW_TOKENS,
        }
    return sample


def generate(
    bench: Bench, step: Callable[..., Any], sequences: int, new_tokens: int
) -> tuple[float, list[int]]:
    """Seconds that vllmc's engine takes to continue the prompt, and the first one's tokens."""
    from vllmc.core.runtime.engine import Engine, EngineConfig
    from vllmc.core.runtime.sampler import SamplingParams
    from vllmc.kernels.kv_cache import KVCacheSpec, blocks_needed

    engine = Engine(
        step,
        [
            KVCacheSpec(
                layer_name=site.layer,
                num_kv_heads=site.kv_heads,
                key_size=site.key_size,
                value_size=site.value_size,
            )
            for site in bench.program.layout.attention
        ],
        EngineConfig(
            vocab_size=bench.config.vocab_size,
            max_position=None,
            max_tokens_per_step=bench.program.max_tokens,
            token_counts=bench.program.ranges,
            num_blocks=sequences * blocks_needed(len(PROMPT) + new_tokens, BLOCK),
            block_size=BLOCK,
        ),
    )
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    started = time.process_time()
    result = engine.generate([PROMPT] * sequences, params)
    return time.process_time() - started, list(result.outputs[0].token_ids)


def measure_generate(layers: int) -> dict[str, float]:
    """Tokens per second of decoding with vllmc's engine and with Transformers' `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    bench = Bench(256, layers)
    model = AutoModelForCausalLM.from_config(bench.config, dtype=torch.float32).eval()
    model.load_state_dict(bench.entry.model.state_dict())
    model.generation_config.eos_token_id = None
    model.forward = torch.compile(model.forward, fullgraph=True)
    prompt = torch.tensor([PROMPT])

    def transformers(new_tokens: int) -> tuple[float, list[int]]:
        started = time.process_time()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
        )
        return time.process_time() - started, tokens[0, len(PROMPT) :].tolist()

    def ours(new_tokens: int) -> tuple[float, list[int]]:
        return generate(bench, bench.program, 1, new_tokens)

    # The first calls compile.
    expected, found = transformers(NEW_TOKENS)[1], ours(NEW_TOKENS)[1]
    assert found == expected, "vllmc and Transformers generate different tokens"
    transformers(1)
    rates: dict[str, list[float]] = {"vllmc": [], "transformers": []}
    for _ in range(9):
        for name, call in (("vllmc", ours), ("transformers", transformers)):
            seconds = call(NEW_TOKENS)[0] - call(1)[0]
            rates[name].append((NEW_TOKENS - 1) / seconds)
    # A generation takes seconds: neighbours are compared, not medians of the whole.
    pairs = zip(rates["transformers"], rates["vllmc"], strict=True)
    sample = {name: statistics.median(found) for name, found in rates.items()}
    return {**sample, "ratio": statistics.median(theirs / own for theirs, own in pairs)}


PARTS: dict[str, Callable[[int], dict[str, float]]] = {
    "step": measure_step,
    "dispatch": measure_dispatch,
    "engine": measure_engine,
    "generate": measure_generate,
}


def step_headlines(row: Mapping[str, Any]) -> list[Headline]:
    """A decode step to stock's."""
    return [
        row_headline(
            row,
            f"vllmc_{tokens}_ratio",
            f"a decode step of {tokens}, to stock torch.compile on the same op",
            f"{row[f'vllmc_{tokens}'] * 1e3:.1f} ms of {row[f'stock_{tokens}'] * 1e3:.1f} "
            f"ms; eager {row[f'eager_{tokens}'] * 1e3:.1f} ms",
            1.0,
        )
        for tokens in (1, 8)
    ]


def dispatch_headlines(row: Mapping[str, Any]) -> list[Headline]:
    """Microseconds of dispatch by piece."""
    return [
        row_headline(
            row,
            "microseconds",
            "dispatch by piece beyond Inductor's functions, in microseconds",
            f"a step of {row['program'] * 1e3:.2f} ms, its bare calls {row['bare'] * 1e3:.2f} ms",
            5.0,
        )
    ]


def engine_headlines(row: Mapping[str, Any]) -> list[Headline]:
    """The engine's share of a step."""
    return [
        row_headline(
            row,
            f"share_{sequences}",
            f"the engine's share of a step of {sequences}",
            f"{row[f'outside_{sequences}'] * 1e3:.2f} ms of "
            f"{row[f'step_{sequences}'] * 1e3:.1f} ms",
            0.1,
        )
        for sequences in (1, 8)
    ]


def generate_headlines(row: Mapping[str, Any]) -> list[Headline]:
    """Decoding to Transformers'."""
    return [
        row_headline(
            row,
            "ratio",
            "decoding a token, to generate on a static cache compiled by torch",
            f"{row['vllmc']:.1f} tokens/s beside {row['transformers']:.1f}",
            1.0,
        )
    ]


HEADLINES: dict[str, Callable[[Mapping[str, Any]], list[Headline]]] = {
    "step": step_headlines,
    "dispatch": dispatch_headlines,
    "engine": engine_headlines,
    "generate": generate_headlines,
}


def table(shown: list[Headline]) -> str:
    """The headlines as Markdown."""
    lines = ["| | median | spread | target | |", "|---|---:|---|---:|---|"]
    for line in shown:
        lines.append(
            f"| {line.what} | {line.value:.3f} | {line.low:.3f} to {line.high:.3f} "
            f"| {line.at_most} | {line.figures} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
