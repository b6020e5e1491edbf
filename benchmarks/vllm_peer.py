"""The same model through vLLM's compile backend and through vllmc: starts, steps, space, memory.

    python benchmarks/vllm_peer.py [--layers 2 8 32] [--named-layers 8] [--sides vllm vllmc]
                                   [--runs 3] [--json FILE]

Needs vLLM 0.32 or 0.33 (docs/vllm.md says how to have it on a CPU). Every sample is a fresh
process, and the sides take turns: `vllm` as it is by default (the whole model as one file), with
`pieces` one file for each piece (VLLM_USE_AOT_COMPILE=0), `vllmc` with `support_torch_compile`.
A cold start has empty caches, a warm one those of the cold start before it. A start of each that
is not counted has the C++ headers precompiled that all later ones find. Results are held against
the plain forward in every process: it fails where they differ. Medians.

The first call has 16 tokens. What a side needs for it is imported before: all of vLLM, and with it
Inductor and Transformers; of vllmc for a cold start the same, for a warm one what a hit imports.
Inside of it, by each side's own account:

- `dynamo`: vLLM's "Dynamo bytecode transform time", which includes making its key; vllmc's stage
  `capture`, which includes cutting the graph.
- `compile`: from the first piece to the last: vLLM's "Compiling a graph for compile range", and
  vllmc's compile units. vLLM writes the one file of a whole model after that.
- `load`: what vLLM says that a stored model, or its pieces, took; the same for vllmc, from looking
  for the program until it is linked.

The rest is keys, writing, and the first step. Steps are of the main thread's processor time, with
one thread. Memory is the most that the process had at once, C++ compilers not counted, and what
it had before the first call.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import in_fresh_process, summary, write_report

SIDES = ("vllm", "vllm pieces", "vllmc")
NAMES = ("outside", "strings", "layer_name")
STATES = ("cold", "warm")
FIRST = 16
STEP_SIZES = (1, 16)
PARTS = ("dynamo", "compile", "load")
STEPS = 100
STEP_SECONDS = 1.0
MAX_TOKENS = 2048
FOUND = "%s: %s, %.1f s"
"""What vllmc logs of a program that it found, as the logger has it."""
FOR_A_MISS = (
    "torch._inductor.codegen.cpp",
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "vllmc.core.graph.capture",
    "vllmc.core.graph.plan",
    "vllmc.core.models.building",
)
FOR_A_HIT = (
    "vllmc.core.declare.decorator",
    "vllmc.core.job",
    "vllmc.core.models.live_model",
    "vllmc.core.pipeline",
)


def main() -> None:
    """Runs the comparison, or one sample of it (`--one`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--named-layers", type=int, nargs="*", default=[8])
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=SIDES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--names", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--state", choices=STATES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM is not installed: docs/vllm.md says how to have it on a CPU")
    if options.one:
        print(json.dumps(measure(options.one, options.layers[0], options.names, options.state)))
        return
    models = [(depth, "outside") for depth in options.layers]
    models += [(depth, way) for depth in options.named_layers for way in NAMES[1:]]
    rows = compare(models, options.sides, options.runs)
    print(table(rows))
    if options.json:
        write_report(options.json, options.runs, rows)


def compare(
    models: Sequence[tuple[int, str]], sides: Sequence[str], runs: int
) -> list[dict[str, Any]]:
    """A row for each model, side and state."""
    samples: dict[tuple[int, str, str, str], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        for side in sides:
            starts(side, (2, "outside"), Path(place))
        for run in range(runs):
            for depth, names in models:
                for side in sides:
                    for state, sample in starts(side, (depth, names), Path(place)).items():
                        samples[depth, names, side, state].append(sample)
                        told = f"run {run}, {depth} layers, {names}, {side} {state}: {sample}"
                        print(told, file=sys.stderr, flush=True)
    keys = ("layers", "names", "side", "state")
    return [{**dict(zip(keys, of, strict=True)), **summary(s)} for of, s in samples.items()]


def starts(side: str, model: tuple[int, str], place: Path) -> dict[str, dict[str, float]]:
    """A cold start and then a warm one, which finds what the side keeps and nothing else.

    The libraries of vLLM's pieces are in Inductor's directory alone: there it is kept, and counted.
    """
    depth, names = model
    found = {}
    with tempfile.TemporaryDirectory(dir=place) as caches:
        for state in STATES:
            words = ["--one", side, "--layers", str(depth), "--names", names, "--state", state]
            variables = {
                "TMPDIR": str(place),
                "VLLM_CACHE_ROOT": f"{caches}/vllm",
                "VLLM_TARGET_DEVICE": "cpu",
                "VLLM_USE_AOT_COMPILE": str(int(side != "vllm pieces")),
            }
            found[state] = in_fresh_process(__file__, words, Path(caches), variables)
            if side != "vllm pieces":
                shutil.rmtree(f"{caches}/inductor", ignore_errors=True)
            files = (path for path in Path(caches).rglob("*") if path.is_file())
            found[state]["bytes"] = sum(path.stat().st_size for path in files)
    return found


def measure(side: str, depth: int, names: str, state: str) -> dict[str, float]:
    """One start, and steps after it."""
    began = time.perf_counter()
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = of_vllmc if side == "vllmc" else of_vllm
    imported = time.perf_counter() - began
    with torch.no_grad(), make(depth, names, state) as (model, plain, account):
        before = resident()
        imported += account.pop("imports")
        started = time.perf_counter()
        model(*arguments(FIRST))
        first = time.perf_counter() - started
        for tokens in (*STEP_SIZES, 33):
            torch.testing.assert_close(
                model(*arguments(tokens)), plain(*arguments(tokens)), rtol=1e-3, atol=1e-4
            )
        steps = {f"step_{tokens}": step(model, tokens) for tokens in STEP_SIZES}
    return {
        "imports": imported,
        "first": first,
        **account,
        **steps,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before_mb": before,
    }


Forward = Callable[..., Any]
Made = tuple[Forward, Forward, dict[str, float]]


@contextlib.contextmanager
def of_vllm(depth: int, names: str, state: str) -> Iterator[Made]:  # noqa: ARG001
    """The model compiled by vLLM, its plain forward, and what vLLM's log tells in numbers.

    The CPU platform asks for another mode, which is set back, and the pass manager needs vLLM's C
    extensions: it is left out, with all passes that it would run.
    """
    began = time.perf_counter()
    from peer_model import ATTENTION, Llama, define_ops
    from transformers import AutoConfig

    # vLLM registers configs that a newer Transformers has itself.
    register = AutoConfig.register
    AutoConfig.register = staticmethod(lambda *a, **k: register(*a, **{**k, "exist_ok": True}))
    import vllm.logger  # noqa: F401
    from vllm.compilation.backends import VllmBackend
    from vllm.compilation.counter import compilation_counter
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import (
        CompilationConfig,
        CompilationMode,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.forward_context import set_forward_context
    from vllm.utils.torch_utils import LayerName

    imports = time.perf_counter() - began
    config = VllmConfig(
        compilation_config=CompilationConfig(splitting_ops=[ATTENTION], cudagraph_mode=0)
    )
    compilation = config.compilation_config
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.backend = "inductor"
    compilation.compile_sizes = []
    config.scheduler_config.max_num_batched_tokens = MAX_TOKENS
    VllmBackend.configure_post_pass = lambda self: None  # noqa: ARG005
    account = empty_account(imports)

    def read(text: str, numbers: Sequence[float]) -> None:
        if "Dynamo bytecode transform time" in text:
            account["dynamo"] = numbers[-1]
        elif "Compiling a graph for compile range" in text:
            account["compile"] = numbers[-1]
            account["artifacts"] = compilation_counter.num_compiled_artifacts_saved
        elif "Directly load the compiled graph(s)" in text or (
            "torch.compile took" in text and not account["dynamo"]
        ):
            account["load"] = numbers[-1]
        elif "collected artifacts" in text:
            account["artifacts"] = numbers[1]

    follow("vllm", read)
    define_ops(str if names == "strings" else LayerName)
    named = str if names == "strings" else LayerName
    with set_current_vllm_config(config):
        decorated = support_torch_compile(dynamic_arg_dims={"ids": 0, "positions": 0})(Llama)
        model = decorated(layers=depth, named=named, updates=names != "outside").eval()
        with set_forward_context({}, vllm_config=config):
            yield model, model.forward, account


def empty_account(imports: float) -> dict[str, float]:
    """What a side is to tell of its start."""
    return {"imports": imports, **dict.fromkeys((*PARTS, "artifacts"), 0.0)}


def follow(logger: str, read: Callable[[str, Sequence[float]], None]) -> None:
    """Has `read` called with each message from INFO up, and the numbers in it, unrounded."""

    class Follower(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            arguments = record.args if isinstance(record.args, tuple) else ()
            read(record.msg, [x for x in arguments if isinstance(x, int | float)])

    logging.getLogger(logger).addHandler(Follower())
    logging.getLogger(logger).setLevel(logging.INFO)


@contextlib.contextmanager
def of_vllmc(depth: int, names: str, state: str) -> Iterator[Made]:
    """The model compiled by vllmc, its plain forward, and what vllmc tells in numbers."""
    began = time.perf_counter()
    for module in (*FOR_A_HIT, *(FOR_A_MISS if state == "cold" else ())):
        importlib.import_module(module)
    from peer_model import ATTENTION, Llama, define_ops

    from vllmc.core import CompileRange, CompileSpec, compiling, plainly, support_torch_compile
    from vllmc.core.events import SilentObserver, UnitOutcome
    from vllmc.kernels.layer_name import LayerName

    imports = time.perf_counter() - began
    account = empty_account(imports)

    class Clock(SilentObserver):
        """Tells capturing, which ends where the first unit begins, and compiling apart."""

        def stage(self, name: str) -> None:  # noqa: ARG002
            self.began = time.perf_counter()

        def unit_started(self, *_: object) -> None:
            account["dynamo"] = account["dynamo"] or time.perf_counter() - self.began

        def unit_finished(self, _: str, outcome: UnitOutcome, *__: object) -> None:
            account["compile"] = time.perf_counter() - self.began - account["dynamo"]
            account["artifacts"] += outcome == "compiled"

    def read(text: str, numbers: Sequence[float]) -> None:
        if "loaded and linked" in text or (text == FOUND and not account["dynamo"]):
            account["load"] += numbers[-1]

    follow("vllmc", read)
    define_ops(str if names == "strings" else LayerName)
    named = str if names == "strings" else LayerName
    spec = CompileSpec(
        device="auto",
        dtype="auto",
        ranges=(CompileRange(1, MAX_TOKENS),),
        splitting_ops=(ATTENTION,),
    )
    with compiling(spec, observer=Clock()):
        decorated = support_torch_compile(dynamic_arg_dims={"ids": {0: "t"}, "positions": {0: "t"}})
        model = decorated(Llama)(layers=depth, named=named, updates=names != "outside").eval()

    def plain(*given: Any) -> Any:
        with plainly():
            return model(*given)

    yield model, plain, account


def arguments(tokens: int) -> tuple[Any, Any]:
    """The ids and positions of so many tokens."""
    import torch

    return torch.arange(tokens) * 7 % 1000, torch.arange(tokens)


def step(model: Forward, tokens: int) -> float:
    """Seconds of the main thread's processor time for a call."""
    given = arguments(tokens)
    laps: list[float] = []
    while len(laps) < STEPS or sum(laps) < STEP_SECONDS:
        began = time.thread_time()
        model(*given)
        laps.append(time.thread_time() - began)
    return statistics.median(laps)


def resident() -> float:
    """MB of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| layers | names | | | first call | dynamo | compile | load | artifacts | size "
        "| step, 1 token | step, 16 | memory, before | imports |",
        "|---:|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["first_spread"]
        parts = [f"{row[name]:.2f} s" if row[name] else "-" for name in PARTS]
        parts.append(f"{row['artifacts']:.0f}" if row["artifacts"] else "-")
        lines.append(
            f"| {row['layers']} | {row['names']} | {row['side']} | {row['state']} "
            f"| {row['first']:.2f} s ({low:.2f} to {high:.2f}) | {' | '.join(parts)} "
            f"| {row['bytes'] / 1e6:.2f} MB | {steps(row)} "
            f"| {row['memory_mb']:.0f}, {row['before_mb']:.0f} MB | {row['imports']:.1f} s |"
        )
    return "\n".join(lines)


def steps(row: Mapping[str, Any]) -> str:
    """The cells of a row for its steps."""
    return " | ".join(
        "{:.2f} ms ({:.2f} to {:.2f})".format(
            *(1e3 * x for x in (row[f"step_{n}"], *row[f"step_{n}_spread"]))
        )
        for n in STEP_SIZES
    )


if __name__ == "__main__":
    main()
