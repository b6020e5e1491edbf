"""How long the small commands and predictions take, beside Python alone and torch's import.

    python benchmarks/commands.py [--runs 11] [--records 1000] [--json FILE]

Every measurement is a fresh process, and the commands take turns; one turn before the first is
not counted, so that bytecode and files are in memory. The caches are made for the purpose: a small
one with two programs of the default model and one of llama-3-70b, and a large one whose records are
the first of these with other factors. Medians of wall and processor time, the ratio to
`python -c pass` first; for a prediction also what it takes beyond importing torch, in the same
turn. At its end a process that imported torch looks for garbage among torch's objects for a third
of a second, which vllmc leaves out: so does what its predictions are held against.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
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

PASS = "python -c pass"
TORCH = "python -c 'import torch'"
BARE_TORCH = "python -c 'import torch', less the search for garbage at exit"
MODEL_SECONDS = 0.3
"""What a prediction may take beyond importing torch."""

VLLMC = "from vllmc.cli.app import entry_point; entry_point()"
EAGER = ("--backend", "eager")


def main() -> None:
    """Runs the comparison, or one explanation (`--explain`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--explain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.explain:
        print(json.dumps(explain(options.explain)))
        return
    with tempfile.TemporaryDirectory() as directory:
        commands = prepare(Path(directory), options.records)
        samples = compare(commands, options.runs)
    rows, shown = summarize(samples), headlines(samples)
    print(table(rows))
    for line in shown:
        print(f"{line.what}: {line.figures}")
    if options.json:
        write_report(options.json, options.runs, rows, shown)


def prepare(directory: Path, records: int) -> dict[str, list[str]]:
    """Makes the caches and snapshots below `directory`; the commands to measure, by name."""
    small, large = directory / "small", directory / "large"
    one, two = (warmed(small, "tiny-llama", layers) for layers in ("2", "1"))
    warmed(small, "llama-3-70b", "80")
    keys = fill(small, large, one, records)
    snapshots = []
    for key in (one, two):
        path = directory / f"{key[:12]}.json"
        path.write_text(vllmc(["inspect-key", key, "--json", "--cache-dir", str(small)]))
        snapshots.append(str(path))
    commands: Mapping[str, tuple[str, ...]] = {
        "--help": (),
        "cache ls": (str(small),),
        "inspect-key KEY": (one, str(small)),
        "diff-config KEY KEY": (one, two, str(small)),
        "diff-config FILE FILE": (*snapshots, str(small)),
        f"cache ls, {records} records": (str(large),),
        f"inspect-key KEY, {records} records": (keys[0], str(large)),
        f"diff-config KEY KEY, {records} records": (*keys[:2], str(large)),
        "warm --check MODEL, a hit": ("tiny-llama", *EAGER, str(small)),
        "warm --check MODEL, a hit of llama-3-70b": ("llama-3-70b", *EAGER, str(small)),
        "inspect-key MODEL, a hit": ("tiny-llama", *EAGER, str(small)),
        f"inspect-key MODEL, a miss explained by {records} records": (
            *("tiny-llama", *EAGER, "--compile-range", "1:77", str(large)),
        ),
    }
    python = {
        PASS: [sys.executable, "-c", "pass"],
        TORCH: [sys.executable, "-c", "import torch"],
        BARE_TORCH: [sys.executable, "-c", "import gc, torch; gc.freeze()"],
        f"the nearest of {records} records, found in a process": [
            *(sys.executable, __file__, "--explain", str(large)),
        ],
    }
    return python | {
        f"vllmc {name}": [sys.executable, "-c", VLLMC, *words(name, given)]
        for name, given in commands.items()
    }


def words(name: str, given: Sequence[str]) -> list[str]:
    """The command line: the words of `name` that are typed, then `given`, the cache last."""
    typed = [word for word in name.split(",")[0].split() if not word.isupper()]
    return [*typed, *given[:-1], "--cache-dir", given[-1]] if given else typed


def vllmc(line: Sequence[str]) -> str:
    """What a command prints."""
    command = [sys.executable, "-c", VLLMC, *line]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def warmed(cache: Path, model: str, layers: str) -> str:
    """The key of a program that is stored now. Its model is predicted once without --layers."""
    line = ["warm", model, *EAGER, "--layers", layers, "--json", "-q", "--cache-dir", str(cache)]
    key: str = json.loads(vllmc(line))["key"]
    return key


def fill(small: Path, large: Path, key: str, records: int) -> list[str]:
    """Stores `records` programs: the one with this key, with other factors each. Their keys."""
    from vllmc.core.cache.key import key_of
    from vllmc.core.cache.record import encode
    from vllmc.core.cache.store import Store

    source, target = Store(small), Store(large)
    for unit in source.readable_units():
        target.put_artifact(source.read_artifact(unit.artifact))
        target.put_unit(unit)
    [record] = source.programs(key)
    chance = random.Random(0)
    keys = []
    for number in range(records):
        factors = list(record.factors)
        for index in chance.sample(range(len(factors)), 3):
            factors[index] = dataclasses.replace(
                factors[index], value=f"other {number}", origin="flag", is_default=False
            )
        other = dataclasses.replace(
            record,
            factors=tuple(factors),
            key=key_of(factors),
            model=record.model if number % 2 else f"model-{number % 20}",
            created=record.created - 60 * number,
        )
        # `put_program` waits for the disk, a thousand times.
        path = target.layout.program(other.key, other.id)
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(other))
        keys.append(other.key)
    return keys


def explain(cache: Path) -> dict[str, float]:
    """Seconds to find the nearest of all records to one of another range, and what differs."""
    from vllmc.core.cache.explain import by_distance, diff
    from vllmc.core.cache.store import Store

    store = Store(cache)
    given = next(store.readable_programs())
    wanted = tuple(
        dataclasses.replace(f, value=["1:77"]) if f.identity == ("spec", "ranges") else f
        for f in given.factors
    )
    wall, cpu = time.perf_counter(), time.process_time()
    key, id = by_distance(wanted, store.outlines(), given.model)[0]
    nearest = store.readable_program(key, id)
    assert nearest is not None
    assert diff(nearest.factors, wanted)
    assert "torch" not in sys.modules
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def compare(commands: Mapping[str, list[str]], runs: int) -> dict[str, list[dict[str, float]]]:
    """One sample per run of each command."""
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for run in range(-1, runs):
        for name, command in commands.items():
            sample = in_fresh_process(command)
            if run >= 0:
                samples[name].append(sample)
        print(f"run {run + 1} of {runs}", file=sys.stderr, flush=True)
    return samples


def in_fresh_process(command: Sequence[str]) -> dict[str, float]:
    """Seconds of wall and processor time, the process's own where it prints them."""
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["HF_HUB_OFFLINE"] = "1"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr}")
    if "--explain" in command:
        sample: dict[str, float] = json.loads(done.stdout)
        return sample
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu}


def summarize(samples: Mapping[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians with their spread, the ratio to Python alone, and what comes on top of torch."""
    rows = [{"command": name, **summary(group)} for name, group in samples.items()]
    alone, torch = (next(r for r in rows if r["command"] == name) for name in (PASS, BARE_TORCH))
    for row in rows:
        for time_ in ("wall", "cpu"):
            row[f"{time_}_ratio"] = row[time_] / alone[time_]
            row[f"{time_}_beyond_torch"] = row[time_] - torch[time_]
    return rows


def headlines(samples: Mapping[str, list[dict[str, float]]]) -> list[Headline]:
    """What the commands may take, by processor time, turn by turn."""
    lines = []
    for name, group in samples.items():
        if " MODEL, a hit" in name:
            values = differences(group, samples[BARE_TORCH])
            plain = statistics.median(differences(group, samples[TORCH]))
            took = statistics.median(values)
            figures = f"{took:.2f} s beyond importing torch, of {MODEL_SECONDS} s; {plain:+.2f} s"
            figures += " where that ends as it likes"
            limit = MODEL_SECONDS
        elif name.startswith("vllmc") and "MODEL" not in name and "ls," not in name:
            # Three times Python, and a tenth of a second.
            pairs = zip(group, samples[PASS], strict=True)
            values = [sample["cpu"] / (3 * alone["cpu"] + 0.1) for sample, alone in pairs]
            allowed = 3 * statistics.median(alone["cpu"] for alone in samples[PASS]) + 0.1
            took = statistics.median(sample["cpu"] for sample in group)
            figures, limit = f"{took:.3f} s of {allowed:.3f} s", 1.0
        else:
            continue
        lines.append(headline(name, values, figures, limit))
    return lines


def differences(
    samples: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]
) -> list[float]:
    """Processor time beyond that of `others`, turn by turn."""
    return [one["cpu"] - other["cpu"] for one, other in zip(samples, others, strict=True)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | of `python -c pass`, its processor time | wall | processor "
        "| beyond importing torch, its processor time |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["wall_spread"]
        beyond = f"{row['wall_beyond_torch']:.2f} s, {row['cpu_beyond_torch']:.2f} s"
        lines.append(
            f"| {row['command']} | {row['wall_ratio']:.1f}, {row['cpu_ratio']:.1f} "
            f"| {row['wall']:.3f} s ({low:.3f} to {high:.3f}) | {row['cpu']:.3f} s "
            f"| {beyond if ' MODEL' in row['command'] else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
