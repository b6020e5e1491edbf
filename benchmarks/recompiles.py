"""What it costs to watch for recompiles, and to read a log of 200 MB.

    python benchmarks/recompiles.py [--runs 7] [--megabytes 200] [--json FILE]

Watching: a small model under `torch.compile`, in a block of `watch_recompiles` or not; every
sample is a fresh process with empty caches, and the two take turns. Nothing compiles again: what
is measured is the first compilation, and the calls that follow. Reading: `vllmc recompiles` in a
fresh process, on logs that are made here of what torch wrote. Medians, with the smallest and
largest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import summary, write_report

LOGS = Path(__file__).parents[1] / "tests" / "core" / "diagnose" / "recompiles"
CALLS = 2000
LAPS = 15
FRAMES = 50
# What other programs write, and torch itself about other things.
OTHERS = (
    '10.0.3.7 - - [21/Nov/2026:17:38:44 +0000] "POST /v1/completions HTTP/1.1" 200 5127\n',
    "INFO 11-21 17:38:44 [loggers.py:127] Engine 000: Avg prompt throughput: 512.3 tokens/s, "
    "Running: 4 reqs, Waiting: 0 reqs, GPU KV cache usage: 12.1%\n",
    "V1121 17:38:44.725000 18488 torch/_dynamo/output_graph.py:1505] [3/1] [__graph_code]      "
    'l_x_ = L_x_; return torch.ops.aten.add.Tensor(l_x_, 1)  # File "/app/model.py":12\n',
    "I1121 17:38:45.000000 18488 torch/_inductor/config.py:700] [0/0] compiling 12 kernels\n",
)
PROGRAM = "from vllmc.cli.app import entry_point; entry_point()"


def main() -> None:
    """Runs both benchmarks, or one sample of the first (`--one`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=("plain", "watched"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(calls(watched=options.one == "watched")))
        return
    rows = watching(options.runs) + reading(options.runs, options.megabytes)
    for row in rows:
        print(json.dumps(row))
    if options.json:
        write_report(options.json, options.runs, rows)


def watching(runs: int) -> list[dict[str, Any]]:
    """The first compilation and a call, plain and watched, and the ratios of their medians."""
    samples: dict[str, list[dict[str, float]]] = {"plain": [], "watched": []}
    for _ in range(runs):
        for kind, taken in samples.items():
            with tempfile.TemporaryDirectory() as caches:
                done = subprocess.run(
                    [sys.executable, __file__, "--one", kind],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches},
                    stdout=subprocess.PIPE,
                    check=True,
                )
            taken.append(json.loads(done.stdout))
            print(kind, taken[-1], file=sys.stderr, flush=True)
    rows = [{"what": kind, **summary(taken)} for kind, taken in samples.items()]
    ratios = {name: rows[1][name] / rows[0][name] for name in samples["plain"][0]}
    return [*rows, {"what": "watched / plain", **ratios}]


def calls(*, watched: bool) -> dict[str, float]:
    """Processor seconds of the first compilation, and microseconds of a call after it."""
    import torch

    from vllmc.core import watch_recompiles

    torch.set_num_threads(1)
    # The first compilation of a process imports what the next ones have.
    torch.compile(lambda x: x + 1)(torch.ones(2))
    model = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()) for _ in range(8))
    )
    step, x = torch.compile(model), torch.ones(4, 32)
    laps = []
    with torch.no_grad(), watch_recompiles() if watched else contextlib.nullcontext():
        began = time.process_time()
        step(x)
        compiled = time.process_time() - began
        for _ in range(LAPS):
            began = time.process_time()
            for _ in range(CALLS):
                step(x)
            laps.append((time.process_time() - began) / CALLS * 1e6)
    return {"first_call_s": compiled, "call_us": statistics.median(laps)}


def reading(runs: int, megabytes: int) -> list[dict[str, Any]]:
    """Reading a log in which a fifth are recompiles, one of nothing else, and an empty one."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "program.log"
        for what, share, size in (
            ("a log, one fifth recompiles", 0.2, megabytes),
            ("a log of nothing but recompiles", 1.0, megabytes),
            ("an empty log", 0.0, 0),
        ):
            written = write_log(log, size * 1_000_000, share)
            samples = [read(log, written) for _ in range(runs)]
            rows.append({"what": what, "recompiles": written, **summary(samples)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def read(log: Path, recompiles: int) -> dict[str, float]:
    """Seconds and the most memory of one reading, which must find every recompile."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "recompiles", "--json", str(log)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    rows = json.load(process.stdout)["recompiles"]
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    found = sum(row["count"] for row in rows)
    if process.returncode or found != recompiles:
        raise SystemExit(f"exit code {process.returncode}, {found} recompiles of {recompiles}")
    return {"seconds": seconds, "processor_s": usage.ru_utime, "peak_mb": usage.ru_maxrss / 1024}


def write_log(path: Path, size: int, share: float) -> int:
    """Writes about `size` bytes, of which `share` are recompiles; returns how many these are."""
    others, written, recompiles = itertools.cycle(OTHERS), 0, 0
    inside = 0
    with path.open("w", encoding="utf-8") as log:
        for block in blocks():
            if written >= size:
                return recompiles
            while inside > share * written:
                written += log.write(next(others))
            # Lines of others come between those of a block too.
            head, *rest = block
            text = head + (next(others) if share < 1 else "") + "".join(rest)
            length = log.write(text)
            written += length
            inside += length
            recompiles += 1
    return recompiles


def blocks() -> Iterator[list[str]]:
    """Recompiles as torch wrote them, of other values, frames and processes each time."""
    kinds = [recompile for name in ("counter", "shape", "string") for recompile in of_log(name)]
    for number, lines in zip(itertools.count(), itertools.cycle(kinds)):
        frame, process = number % FRAMES, 18000 + number % 8
        text = "".join(lines)
        text = re.sub(r"(?m)^V(\S+ \S+) \d+", rf"V\1 {process}", text)
        text = re.sub(r"\.py:\d+\n", f".py:{frame + 1}\n", text)
        text = re.sub(r"(self\.step == |layers\.)\d+", rf"\g<1>{number}", text)
        yield text.splitlines(keepends=True)


def of_log(name: str) -> Iterator[list[str]]:
    """The recompiles in a log of tests/core/diagnose/recompiles, each as its lines."""
    lines: list[str] = []
    for line in (LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines(keepends=True):
        if "__recompiles]" not in line:
            continue
        if "Recompiling function" in line and lines:
            yield lines
            lines = []
        lines.append(line)
    yield lines


if __name__ == "__main__":
    main()
