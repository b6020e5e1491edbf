"""What a call of a declared module costs beside its program, and what its checks cost.

    python benchmarks/declared.py [--runs 7] [--json FILE]

A tiny module with two tensor arguments, and one with 300 parameters: the call, the linked program
called with the same tensors, the plain forward, and the look at whether tensors and modules are
still those that the program is bound to. In this process, with one thread, each of so many laps in
turns. Microseconds of processor time, medians with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import summary, write_report

CALLS = 2000


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [{"what": name, **measure(size, options.runs)} for name, size in MODULES.items()]
    for row in rows:
        print(json.dumps(row))
    if options.json:
        write_report(options.json, options.runs, rows)


MODULES = {"2 parameters": 0, "300 parameters": 149}


def measure(layers: int, runs: int) -> dict[str, Any]:
    """Medians of `runs` laps of each of the four."""
    import torch

    from vllmc.core import compiling, plainly, support_torch_compile
    from vllmc.core.declare.held import Held

    torch.set_num_threads(1)

    @support_torch_compile(dynamic_arg_dims={"ids": {0: "tokens"}, "positions": {0: "tokens"}})
    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(32, 8)
            self.scale = torch.nn.Parameter(torch.ones(8))
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(layers))

        def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(ids) * self.scale * positions[:, None]
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    with tempfile.TemporaryDirectory() as cache, compiling(cache_dir=cache), torch.no_grad():
        model = Tiny().eval()
        ids, positions = torch.arange(4), torch.arange(4)
        model(ids, positions)
        (program,) = vars(model)["_vllmc_compiled"]._programs.values()
        held = Held(model)
        samples = []
        for _ in range(runs):
            sample = {
                "call_us": lap(model, ids, positions),
                "program_us": lap(program, ids, positions),
                "held_us": lap(held.is_there),
            }
            with plainly():
                sample["plain_us"] = lap(model.forward, ids, positions)
            sample["beside_program_us"] = sample["call_us"] - sample["program_us"]
            samples.append(sample)
    return summary(samples)


def lap(step: Callable[..., Any], *arguments: Any) -> float:
    """Microseconds of processor time for a call."""
    began = time.process_time()
    for _ in range(CALLS):
        step(*arguments)
    return (time.process_time() - began) / CALLS * 1e6


if __name__ == "__main__":
    main()
