"""All benchmarks with a target, one after the other: one table, the ratios first, and JSON.

    python benchmarks/suite.py [--runs 5] [--only startup steps] [--json FILE]

Each script runs by itself, in fresh processes with the alternatives in turns (see there), and says
which of its figures have a target. What a script prints goes to standard error. On a machine with
nothing else to do it takes about an hour and a half; `taskset -c 0` keeps it off other cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import machine

SCRIPTS = ("startup", "capture", "cold", "commands", "steps", "store")


def main() -> None:
    """Runs the scripts and prints their headlines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    before = machine()
    reports = {name: run(name, options.runs) for name in options.only}
    rows = [{"of": name, **row} for name, found in reports.items() for row in found["headlines"]]
    print(table(rows))
    if options.json:
        report = {"machine": before, "runs": options.runs, "headlines": rows, "reports": reports}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if missed := [row["what"] for row in rows if is_met(row) is False]:
        print(f"\nNot met: {'; '.join(missed)}.")


def run(name: str, runs: int) -> dict[str, Any]:
    """The report of one script."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "report.json"
        script = Path(__file__).with_name(f"{name}.py")
        command = [sys.executable, str(script), "--runs", str(runs), "--json", str(path)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        report: dict[str, Any] = json.loads(path.read_text())
        return report


def is_met(row: dict[str, Any]) -> bool | None:
    """Whether the median meets its target; None where there is none."""
    return None if row["at_most"] is None else row["value"] <= row["at_most"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The headlines as Markdown."""
    lines = ["| | median | spread | at most | | |", "|---|---:|---:|---:|---|---|"]
    for row in rows:
        met = {True: "met", False: "**not met**", None: ""}[is_met(row)]
        target = "" if row["at_most"] is None else f"{row['at_most']:g}"
        lines.append(
            f"| {row['what']} | {row['value']:.3g} | {row['low']:.3g} to {row['high']:.3g} "
            f"| {target} | {met} | {row['figures']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
