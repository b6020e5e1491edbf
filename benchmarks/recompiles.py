"""What it costs to watch for recompiles, and to read a log of 200 MB.

    python benchmarks/recompiles.py [--runs 7] [--megabytes 200] [--json FILE]

Watching: a small model under `torch.compile`, in fresh processes. Nothing compiles again: what is
measured is a call, in turns within a block of `watch_recompiles` and without one, and the part of
the first compilation (of the graph, whose C++ an earlier process has compiled) that torch spends
on making records for the watcher, as torch itself counts it. Reading: `vllmc recompiles` in a
fresh process, on logs that are made here of what torch wrote. Medians, with the smallest and
largest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import summary, write_report

LOGS = Path(__file__).parents[1] / "tests" / "core" / "diagnose" / "recompiles"
CALLS = 1000
LAPS = 25
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
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(watch()))
        return
    rows = watching(options.runs) + reading(options.runs, options.megabytes)
    for row in rows:
        print(json.dumps(row))
    if options.json:
        write_report(options.json, options.runs, rows)


def watching(runs: int) -> list[dict[str, Any]]:
    """Watched and plain calls, and what the first compilation took, in so many processes."""
    with tempfile.TemporaryDirectory() as caches:
        samples = [in_fresh_process(caches) for _ in range(runs + 1)]
    return [{"what": "a watched model", **summary(samples[1:])}]


def in_fresh_process(caches: str) -> dict[str, float]:
    """One sample; Inductor's C++ may be found in `caches`, and no graph is."""
    done = subprocess.run(
        [sys.executable, __file__, "--one"],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": caches,
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        },
        stdout=subprocess.PIPE,
        check=True,
    )
    sample: dict[str, float] = json.loads(done.stdout)
    print(sample, file=sys.stderr, flush=True)
    return sample


def watch() -> dict[str, float]:
    """Processor time of calls, with and without the watcher, and the first compilation's parts."""
    import torch
    from torch._dynamo.utils import get_compilation_metrics

    from vllmc.core import watch_recompiles

    torch.set_num_threads(1)
    # The first compilation of a process imports what the next ones have.
    torch.compile(lambda x: x + 1)(torch.ones(2))
    model = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU()) for _ in range(8))
    )
    step, x = torch.compile(model), torch.ones(4, 32)
    plain, watched = [], []
    with torch.no_grad():
        with watch_recompiles():
            step(x)
        for _ in range(LAPS):
            plain.append(lap(step, x))
            with watch_recompiles() as report:
                watched.append(lap(step, x))
            assert report.first_compilations == 0
    [*_, metrics] = get_compilation_metrics()
    compiling = metrics.entire_frame_compile_time_s or 0.0
    recording = metrics.structured_logging_overhead_s or 0.0
    assert recording > 0, "the watcher had nothing to watch"
    return {
        "plain_call_us": statistics.median(plain),
        "watched_call_us": statistics.median(watched),
        "call_ratio": statistics.median(b / a for a, b in zip(plain, watched, strict=True)),
        "first_compilation_s": compiling,
        "recording_s": recording,
        "recording_share": recording / compiling,
    }


def lap(step: Callable[[Any], Any], x: Any) -> float:
    """Microseconds of processor time for a call."""
    began = time.process_time()
    for _ in range(CALLS):
        step(x)
    return (time.process_time() - began) / CALLS * 1e6


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
