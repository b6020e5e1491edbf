"""What the benchmarks have in common: medians with their spread, the machine, the report."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One line of the suite's table: a measured ratio (or number) beside what it is to be.

    `value` is the median, `low` and `high` the smallest and largest sample; `figures` are the
    numbers behind it, in words (`0.12 s of 7.6 s`). `at_most` is the target, None for a number
    that is only reported.
    """

    what: str
    value: float
    low: float
    high: float
    figures: str
    at_most: float | None = None


def headline(
    what: str, values: Sequence[float], figures: str, at_most: float | None = None
) -> Headline:
    """The headline of one value per run."""
    return Headline(
        what=what,
        value=statistics.median(values),
        low=min(values),
        high=max(values),
        figures=figures,
        at_most=at_most,
    )


def row_headline(
    row: Mapping[str, Any], name: str, what: str, figures: str, at_most: float | None = None
) -> Headline:
    """The headline of the value `name` in a row that `summary` made."""
    low, high = row[f"{name}_spread"]
    return Headline(
        what=what, value=row[name], low=low, high=high, figures=figures, at_most=at_most
    )


def in_fresh_process(
    script: str,
    words: Sequence[str],
    caches: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, float]:
    """What a script of this folder prints last, as JSON; all caches lie below `caches`, if given.

    `variables` are set beside. Raises `SystemExit` with what it said where it fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    if caches is not None:
        environment |= {
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "VLLMC_CACHE_DIR": str(caches / "vllmc"),
        }
    command = [sys.executable, script, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    sample: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return sample


def summary(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The median of each value, and the smallest and largest as `<name>_spread`."""
    row: dict[str, Any] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        row[name] = statistics.median(values)
        row[f"{name}_spread"] = [min(values), max(values)]
    return row


def write_report(
    path: Path, runs: int, rows: Sequence[dict[str, Any]], headlines: Sequence[Headline] = ()
) -> None:
    """Writes the rows, what they depend on, and what the suite shows of them, as JSON."""
    report = {
        "machine": machine(),
        "runs": runs,
        "headlines": [asdict(headline) for headline in headlines],
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures depend on; the load is that of the minutes before."""
    import torch
    import transformers

    return {
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
