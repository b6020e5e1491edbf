"""What a hit costs in the store: with few and many entries, bytes read, time to load, disk.

    python benchmarks/store.py [--runs 11] [--entries 10000] [--json FILE]

Two models are compiled by Inductor into a cache. It is copied, and one copy gets other entries:
links to its files under other names, which a hit does not read. Then hits of the first model in
both take turns, each in a fresh process; one hit before the measured ones imports what is needed.
What a hit reads is counted by the kernel (`/proc/self/io`), and is to be its record, its artifacts
and the source files that the record names, once. Each artifact is then opened and loaded, and
opened as it would be were it compressed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import Headline, headline, summary, write_report

if TYPE_CHECKING:
    from vllmc.core.cache.store import Store

MODELS = ("tiny-llama", "llama-3-70b")
VLLMC = "from vllmc.cli.app import entry_point; entry_point()"
FEW = 10
DISK_MEGABYTES = 2.0
REPEATS = 20


def main() -> None:
    """Runs the comparison, or one hit (`--hit`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hit", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hit:
        print(json.dumps(hit(options.hit)))
        return
    with tempfile.TemporaryDirectory() as directory:
        few, many = Path(directory) / "few", Path(directory) / "many"
        disk = warm(few)
        shutil.copytree(few, many)
        fill(few, FEW - len(MODELS))
        fill(many, options.entries - len(MODELS))
        caches = {f"{FEW} entries": few, f"{options.entries} entries": many}
        samples = compare(caches, options.runs)
        loads = [load for _ in range(options.runs) for load in [load_all(few)]]
    rows: list[dict[str, Any]] = [
        *({"hit": name, **summary(group)} for name, group in samples.items()),
        {"load": "one artifact", **summary(loads)},
        *disk,
    ]
    shown = headlines(samples, loads, disk)
    print(json.dumps(rows, indent=1))
    for line in shown:
        print(f"{line.what}: {line.figures}")
    if options.json:
        write_report(options.json, options.runs, rows, shown)


def warm(cache: Path) -> list[dict[str, Any]]:
    """Compiles the models; for each what the cache grew by, and the bytes of its unique pieces."""
    rows, before = [], 0
    for model in MODELS:
        line = ["warm", model, "--json", "-q", "--cache-dir", str(cache)]
        command = [sys.executable, "-c", VLLMC, *line]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        units = json.loads(done.stdout)["units"]
        total = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        sizes = [unit["bytes"] for unit in units]
        rows.append({"model": model, "bytes": total - before, "bytes_per_piece": sizes})
        before = total
    return rows


def fill(cache: Path, entries: int) -> None:
    """Adds programs, each with a use and three units, artifacts and codes, all of other names."""
    from vllmc.core.cache.store import Store

    store = Store(cache)
    places = store.layout
    record = next(store.readable_programs())
    units = [unit for unit in map(store.unit, (u.key for u in record.units)) if unit is not None]
    for entry in range(entries):
        link(places.program(record.key, record.id), places.program(name(entry), record.id))
        link(places.used(record.key), places.used(name(entry)))
        for number, unit in enumerate(units):
            other = name(entry, number)
            link(places.unit(unit.key), places.unit(other))
            link(places.blob(unit.artifact), places.blob(other))
            link(places.code(unit.code), places.code(other))


def name(*numbers: int) -> str:
    """A digest of `numbers`."""
    return hashlib.sha256(repr(numbers).encode()).hexdigest()


def link(source: Path, target: Path) -> None:
    """Makes `target` another name of `source`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)


def compare(caches: Mapping[str, Path], runs: int) -> dict[str, list[dict[str, float]]]:
    """One sample per run of each cache."""
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    for run in range(runs):
        for label, cache in caches.items():
            command = [sys.executable, __file__, "--hit", str(cache)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            samples[label].append(json.loads(done.stdout))
        print(f"run {run + 1} of {runs}", file=sys.stderr, flush=True)
    return samples


def hit(cache: Path) -> dict[str, float]:
    """Seconds of a hit of the first model, and what it reads to what there is to read."""
    from vllmc.core.cache.store import Store
    from vllmc.core.events import SilentObserver
    from vllmc.core.job import make_job, resolve_spec
    from vllmc.core.models.resolve import resolve
    from vllmc.core.pipeline import obtain_program
    from vllmc.core.spec import CompileSpec

    store, model = Store(cache), resolve(MODELS[0], cache=cache)
    environment = dict(os.environ)
    spec = resolve_spec(CompileSpec(), model)
    job = make_job(model, spec, environment=environment, cache_dir=cache, origins={})
    ready = obtain_program(job, store, SilentObserver())
    assert ready.outcome == "hit"
    read = bytes_read()
    obtain_program(job, store, SilentObserver())
    read = bytes_read() - read
    gc.collect()
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        obtain_program(job, store, SilentObserver())
        times.append(time.process_time() - started)
    record = store.layout.program(ready.record.key, ready.record.id)
    artifacts = {unit.artifact: len(unit.data) for unit in ready.units}
    whole = record.stat().st_size + sum(artifacts.values()) + source_bytes(store)
    return {"cpu": statistics.median(times), "read": read, "read_ratio": read / whole}


def source_bytes(store: Store) -> int:
    """The size of the source files that the records name."""
    import transformers

    package = Path(transformers.__file__).parent
    sources = {source for record in store.readable_programs() for source in record.sources}
    assert {source.package for source in sources} == {"transformers"}
    return sum((package / source.path).stat().st_size for source in sources)


def bytes_read() -> int:
    """What this process has read so far, from files or memory of them."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def load_all(cache: Path) -> dict[str, float]:
    """Milliseconds per artifact: reading, hashing, opening, loading; opening were it deflated."""
    from vllmc.core.cache.store import Store
    from vllmc.core.compiler.container import unpack
    from vllmc.core.runtime.loader import load_artifact

    store = Store(cache)
    digests = sorted({unit.artifact for unit in store.readable_units()})
    artifacts = {digest: store.read_artifact(digest) for digest in digests}
    deflated = {digest: zlib.compress(data, 6) for digest, data in artifacts.items()}

    def each(act: Callable[[str], object]) -> float:
        times = []
        for _ in range(REPEATS):
            started = time.process_time()
            for digest in digests:
                act(digest)
            times.append(time.process_time() - started)
        return 1e3 * statistics.median(times) / len(digests)

    return {
        "kilobytes": sum(map(len, artifacts.values())) / len(digests) / 1e3,
        "deflated_kilobytes": sum(map(len, deflated.values())) / len(digests) / 1e3,
        "read_and_verify": each(store.read_artifact),
        "hash": each(lambda digest: hashlib.sha256(artifacts[digest]).digest()),
        "open": each(lambda digest: unpack(artifacts[digest])),
        "load": each(lambda digest: load_artifact(artifacts[digest])),
        "inflate": each(lambda digest: zlib.decompress(deflated[digest])),
    }


def headlines(
    samples: Mapping[str, list[dict[str, float]]],
    loads: Sequence[dict[str, float]],
    disk: Sequence[Mapping[str, Any]],
) -> list[Headline]:
    """What the store is held to."""
    few, many = samples.values()
    pairs = zip(many, few, strict=True)
    growth = [one["cpu"] / other["cpu"] for one, other in pairs]
    reads = [sample["read_ratio"] for sample in many]
    loaded = [load["load"] for load in loads]
    inflating = [load["inflate"] / (load["open"] + load["load"]) for load in loads]
    large = disk[-1]
    megabytes = large["bytes"] / 1e6
    milliseconds = [1e3 * statistics.median(s["cpu"] for s in group) for group in (few, many)]
    per_piece = ", ".join(f"{size / 1e3:.0f}" for size in large["bytes_per_piece"])
    return [
        headline(
            "a hit among many entries, to one among few",
            growth,
            f"{milliseconds[1]:.1f} of {milliseconds[0]:.1f} ms",
            1.1,
        ),
        headline(
            "bytes that a hit reads, to those there are",
            reads,
            f"{statistics.median(s['read'] for s in many) / 1e3:.0f} kB",
            1.01,
        ),
        headline(
            "loading an artifact, ms",
            loaded,
            f"{statistics.median(loaded):.1f} ms for "
            f"{statistics.median(load['kilobytes'] for load in loads):.0f} kB",
        ),
        headline(
            "inflating it would add, to opening and loading it",
            inflating,
            f"{statistics.median(load['inflate'] for load in loads):.2f} ms",
        ),
        headline(
            f"disk of {large['model']}, MB",
            [megabytes],
            f"{megabytes:.2f} MB, its unique pieces {per_piece} kB",
            DISK_MEGABYTES,
        ),
    ]


if __name__ == "__main__":
    main()
