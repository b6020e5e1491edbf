"""Cold starts: how they grow with layers and with a model's size, and what workers do for them.

    python benchmarks/cold.py [--runs 5] [--json FILE]

Every measurement is `vllmc warm` in a fresh process with an empty cache of its own and an empty
TORCHINDUCTOR_CACHE_DIR, without weights; the alternatives take turns. The C++ header that Inductor
precompiles stays from run to run, except in the alternative that says so. `time` is the command's
own total, from the miss to the stored program; `processor` is that of all its processes, imports
included. `memory` is the largest sum of their proportional set sizes (a page that several share
counts once), looked at every 50 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import Headline, headline, summary, write_report

COMMAND = (sys.executable, "-c", "from vllmc.cli.app import entry_point; entry_point()")
RANGES = ("--compile-range", "1:1", "--compile-range", "2:64", "--compile-range", "65:8192")
LAYERED = ("llama-3.2-1b", "--layers")
CASES: Mapping[str, tuple[str, ...]] = {
    "8 layers": (*LAYERED, "8"),
    "32 layers": (*LAYERED, "32"),
    "80 layers": (*LAYERED, "80"),
    "llama-3.2-1b": ("llama-3.2-1b",),
    "llama-3-70b": ("llama-3-70b",),
    "llama-3-70b, --jobs 2": ("llama-3-70b", "--jobs", "2"),
    "llama-3.2-1b, no header yet": ("llama-3.2-1b",),
    "9 units, --jobs 1": ("llama-3.2-1b", "--layers", "2", *RANGES, "--jobs", "1"),
    "9 units, --jobs 2": ("llama-3.2-1b", "--layers", "2", *RANGES, "--jobs", "2"),
    "2 models in one call": ("llama-3.2-1b", "llama-3-70b"),
}
LOOK_SECONDS = 0.05
MEBIBYTE = 1 << 20


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    samples = compare(options.only, options.runs)
    rows = [{"case": case, **summary(group)} for case, group in samples.items()]
    shown = find_headlines(samples)
    print(table(rows))
    for line in shown:
        print(f"{line.what}: {line.value:.2f} ({line.figures})")
    if options.json:
        write_report(options.json, options.runs, rows, shown)


def compare(cases: Sequence[str], runs: int) -> dict[str, list[dict[str, float]]]:
    """One sample for each case and run."""
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for run in range(runs):
        for case in cases:
            with tempfile.TemporaryDirectory() as caches:
                samples[case].append(measure(case, Path(caches)))
            print(f"run {run}, {case}: {samples[case][-1]}", file=sys.stderr, flush=True)
    return samples


def measure(case: str, caches: Path) -> dict[str, float]:
    """One command with all caches below `caches`."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    if "no header" in case:
        environment["TMPDIR"] = str(caches)
    line = [*COMMAND, "warm", *CASES[case], "--json", "-q", "--cache-dir", str(caches / "vllmc")]
    before, started = spent(), time.perf_counter()
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_bytes, family(process.pid))))
        time.sleep(LOOK_SECONDS)
    wall = time.perf_counter() - started
    assert process.stdout is not None
    said: dict[str, Any] = json.loads(process.stdout.read())
    if process.returncode:
        raise SystemExit(f"{case} failed: {said['error']}")
    rows = said.get("results", [said])
    return {
        "time": sum(row["seconds"]["total"] for row in rows),
        "capture": sum(row["seconds"]["capture"] for row in rows),
        "compile": sum(row["seconds"]["compile"] for row in rows),
        "wall": wall,
        "processor": spent() - before,
        "memory_mb": peak / MEBIBYTE,
    }


def spent() -> float:
    """Processor seconds of the processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def family(process: int) -> list[int]:
    """A process and all below it."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                children[int(fields[1])].append(int(entry.name))
    found = [process]
    for member in found:
        found += children[member]
    return found


def proportional_bytes(process: int) -> int:
    """Its pages, each divided by the number of processes that share it; 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def find_headlines(samples: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Headline]:
    """What has a target, and what workers gain, as far as it was measured."""
    found = []
    for what, case, base, at_most in (
        ("cold start, 80 layers of 8", "80 layers", "8 layers", 1.3),
        ("cold start, llama-3-70b of llama-3.2-1b", "llama-3-70b", "llama-3.2-1b", 2.0),
        ("cold start, 2 jobs of 1", "9 units, --jobs 2", "9 units, --jobs 1", None),
    ):
        if case in samples and base in samples:
            pairs = zip(samples[case], samples[base], strict=True)
            ratios = [one["time"] / other["time"] for one, other in pairs]
            times = [statistics.median(s["time"] for s in samples[c]) for c in (case, base)]
            found.append(headline(what, ratios, f"{times[0]:.1f} s of {times[1]:.1f} s", at_most))
    if "llama-3-70b" in samples:
        sizes = [sample["memory_mb"] / 1000 for sample in samples["llama-3-70b"]]
        found.append(
            headline(
                "memory of a cold start of llama-3-70b, in GB",
                sizes,
                "all processes, shared pages once",
                1.0,
            )
        )
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | time | capture | compile | whole process | processor | memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["time_spread"]
        lines.append(
            f"| {row['case']} | {row['time']:.1f} s ({low:.1f} to {high:.1f}) "
            f"| {row['capture']:.1f} s | {row['compile']:.1f} s | {row['wall']:.1f} s "
            f"| {row['processor']:.1f} s | {row['memory_mb']:.0f} MB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
