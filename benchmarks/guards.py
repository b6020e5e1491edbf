"""What `vllmc run --guards check` adds to a step.

    python benchmarks/guards.py [--layers 2 32] [--runs 5] [--json FILE]

tiny-llama, made by Python code so that its record holds Python values to look at, compiled by
Inductor and run with one sequence. Every sample is a fresh process, in which workloads with and
without the check take turns; nothing breaks a guard. Medians, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import summary, write_report

NEW_TOKENS = 100
LAPS = 9
CALLS = 500


def make() -> Any:
    """tiny-llama with as many layers as the environment says."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vllmc.core.models.presets import find_preset

    preset = find_preset("tiny-llama")
    assert preset is not None
    config = AutoConfig.for_model(**preset.config)
    config.num_hidden_layers = int(os.environ["GUARDS_LAYERS"])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def main() -> None:
    """Runs the benchmark, or one sample of it (`--one`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 32])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(sample(options.one)))
        return
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as cache:
            samples = [in_fresh_process(cache, layers) for _ in range(options.runs)]
        rows.append({"layers": layers, **summary(samples)})
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        write_report(options.json, options.runs, rows)


def in_fresh_process(cache: str, layers: int) -> dict[str, float]:
    """One sample, for whose program `cache` is searched."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", cache],
        env={**os.environ, "GUARDS_LAYERS": str(layers)},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def sample(cache: Path) -> dict[str, float]:
    """Processor time of a step with and without the check, and of the check alone."""
    import torch

    from vllmc.core.cache.store import Store
    from vllmc.core.events import SilentObserver
    from vllmc.core.graph.layout import Layout
    from vllmc.core.job import make_job
    from vllmc.core.models.module_model import ModuleModel
    from vllmc.core.pipeline import obtain_program, open_program
    from vllmc.core.runtime.guards import GuardCheck
    from vllmc.core.runtime.program import Program
    from vllmc.core.runtime.sampler import SamplingParams
    from vllmc.core.runtime.workload import Limits, run_workload
    from vllmc.core.spec import CompileSpec

    torch.set_num_threads(1)
    model = ModuleModel("guards:make", make)
    job = make_job(model, CompileSpec(), environment={}, cache_dir=cache, origins={})
    ready = obtain_program(job, Store(cache), SilentObserver())
    entry = model.build("real", CompileSpec())
    began = time.process_time()
    check = GuardCheck(Layout.from_json(ready.record.program), ready.record.guarded, entry)
    begun = time.process_time() - began
    limits = Limits(vocab_size=1000, max_position=None, dtype=torch.float32, device="cpu")
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)

    def step(program: Program) -> float:
        began = time.process_time()
        run_workload(program, [[1]], params, limits)
        return (time.process_time() - began) / NEW_TOKENS * 1e3

    plain, checked = open_program(ready, entry), open_program(ready, entry, check)
    step(plain)
    laps = [(step(plain), step(checked)) for _ in range(LAPS)]
    began = time.process_time()
    for _ in range(CALLS):
        check([1, 1])
    alone = (time.process_time() - began) / CALLS * 1e3
    assert check.broken == ()
    return {
        "values": len(ready.record.guarded),
        "step_ms": statistics.median(a for a, _ in laps),
        "checked_step_ms": statistics.median(b for _, b in laps),
        "ratio": statistics.median(b / a for a, b in laps),
        "check_ms": alone,
        "start_ms": begun * 1e3,
    }


if __name__ == "__main__":
    main()
