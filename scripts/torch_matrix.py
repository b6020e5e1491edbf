"""Runs the tests under each minor version of torch, and puts the figures in a page of docs/.

For each minor a virtual environment of 5 to 7 GB is made, used and deleted, one after the other:

    scripts/torch-matrix                                  all minors, all tests of the default run
    scripts/torch-matrix --minor 2.11 --minor 2.15        these
    scripts/torch-matrix --python 2.14=.venv214/bin/python --minor 2.14 tests/core tests/cli

`--python` names the interpreter of an environment that is there, with torch, what vllmc requires
and what its tests do; it is left as it is. A row of the table stays until its minor is run again.
The exit code is 1 where a test failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "torch-versions.md"
LINKS: Final = ROOT / "scripts" / "mypy_path"
MINORS: Final = ("2.11", "2.12", "2.13", "2.14", "2.15")
# Pinned for one torch: another brings its own Triton, and 2.11 wants an older setuptools.
UNPINNED: Final = ("torch", "triton", "setuptools")
# Triton 3.6, which is that of torch 2.11, cannot interpret kernels with a newer one.
OLDER: Final = {"2.11": {"numpy": "numpy<2.4"}}
BEGIN: Final = "<!-- results: scripts/torch-matrix -->\n"
END: Final = "<!-- end of results -->\n"
HEAD: Final = (
    "| torch | Triton | Python | tests | passed | failed | skipped | cold, s | hit, s | date |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)
_ASK: Final = (
    "import json, platform, torch, triton; "
    "print(json.dumps([torch.__version__, triton.__version__, platform.python_version()]))"
)
_WARM: Final = "from vllmc.cli.app import entry_point; entry_point()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of the tests under one torch. `failed` are the names of those that did."""

    torch: str
    triton: str
    python: str
    tests: str
    passed: int
    failed: tuple[str, ...]
    skipped: int
    cold: float
    hit: float
    date: str


def main() -> int:
    """Runs the minors that are asked for, and writes the page after each."""
    options = _options()
    known = dict(given.split("=", 1) for given in options.python)
    ended = 0
    for minor in options.minor or MINORS:
        try:
            with _environment(minor, known.get(minor)) as python:
                outcome = run(python, options.tests, options.other)
        except subprocess.CalledProcessError as error:
            print(f"torch {minor}: {error}", file=sys.stderr)
            ended = 1
            continue
        print(f"torch {minor}: {outcome}", flush=True)
        PAGE.write_text(updated(PAGE.read_text("utf-8"), minor, outcome), encoding="utf-8")
        ended = max(ended, bool(outcome.failed))
    return ended


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", help="what pytest runs; default: all of tests/")
    parser.add_argument("--minor", action="append", choices=MINORS, help="default: all")
    parser.add_argument(
        "--python", action="append", default=[], metavar="MINOR=PATH", help="an environment to use"
    )
    parser.add_argument(
        "--other",
        default=sys.executable,
        metavar="PATH",
        help="the interpreter that shares a cache with each, to see that artifacts do not cross; "
        "default: the one that runs this",
    )
    return parser.parse_args()


@contextmanager
def _environment(minor: str, python: str | None) -> Iterator[str]:
    """The interpreter to use: `python`, or that of an environment that is gone afterwards."""
    if python is not None:
        yield str(Path(python).absolute())
        return
    with tempfile.TemporaryDirectory(prefix=f"torch-{minor}-") as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        python = f"{place}/bin/python"
        constraints = Path(place, "constraints.txt")
        pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        constraints.write_text("\n".join(unpinned(pins, minor)) + "\n", encoding="utf-8")
        wanted = [f"torch=={minor}.*", "-e", f"{ROOT}[dev]"]
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        subprocess.run([*install, *wanted], check=True)
        yield python


def unpinned(pins: Iterable[str], minor: str) -> Iterator[str]:
    """The lines of a constraints file for a minor: without those that are for one torch alone."""
    older = OLDER.get(minor, {})
    for pin in pins:
        name = pin.partition("==")[0]
        if name not in UNPINNED:
            yield older.get(name, pin)


def run(python: str, tests: Sequence[str], other: str) -> Outcome:
    """Runs the tests by an interpreter. Raises `CalledProcessError` where it lacks something."""
    torch, triton, version = _ask(python)
    environment = _variables(python)
    if Path(other).exists() and _has_another_torch(other, torch):
        environment["VLLMC_OTHER_PYTHON"] = other
    with tempfile.TemporaryDirectory(prefix="vllmc-matrix-") as place:
        cold, hit = _times(python, environment | {"VLLMC_CACHE_DIR": f"{place}/cache"})
        report = Path(place, "report.xml")
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-n", "2", "--dist", "loadfile", "--show-capture=no"]
        command += [f"--junitxml={report}", f"--basetemp={place}/tests"]
        done = subprocess.run([*command, *tests], cwd=ROOT, env=environment, check=False)
        if not report.is_file():
            raise subprocess.CalledProcessError(done.returncode, done.args)
        passed, failed, skipped = counted(report)
    return Outcome(
        torch=torch,
        triton=triton,
        python=version,
        tests=", ".join(tests) or "all",
        passed=passed,
        failed=failed,
        skipped=skipped,
        cold=cold,
        hit=hit,
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    )


def _ask(python: str) -> list[str]:
    asked = subprocess.run(
        [python, "-W", "ignore", "-c", _ASK], check=True, capture_output=True, text=True
    )
    found: list[str] = json.loads(asked.stdout.splitlines()[-1])
    return found


def _has_another_torch(python: str, torch: str) -> bool:
    try:
        return _ask(python)[0] != torch
    except subprocess.CalledProcessError:
        return False


def _variables(python: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLLMC_", "VIRTUAL_ENV"))}
    path = os.pathsep.join([str(Path(python).parent), kept.get("PATH", os.defpath)])
    return kept | {"PATH": path, "PYTHONPATH": str(LINKS), "HF_HUB_OFFLINE": "1"}


def _times(python: str, environment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of `vllmc warm tiny-llama` as it tells them, cold and of a hit: the best of three."""
    cold, *hits = (_warm(python, environment) for _ in range(4))
    return cold, min(hits)


def _warm(python: str, environment: Mapping[str, str]) -> float:
    command = [python, "-c", _WARM, "warm", "tiny-llama", "--json"]
    done = subprocess.run(
        command, env=dict(environment), cwd=ROOT, check=True, capture_output=True, text=True
    )
    seconds: float = json.loads(done.stdout)["seconds"]["total"]
    return seconds


def counted(report: Path) -> tuple[int, tuple[str, ...], int]:
    """How many tests of a JUnit report passed, the names of those that did not, and the skipped."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, tuple(failed), skipped


def updated(page: str, minor: str, outcome: Outcome) -> str:
    """The page with this outcome as the minor's row; the others stay."""
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = dict(_rows(table))
    rows[minor] = _row(outcome)
    ordered = sorted(rows.items(), key=lambda item: [int(part) for part in item[0].split(".")])
    return f"{before}{BEGIN}{HEAD}{''.join(row for _, row in ordered)}{END}{after}"


def _rows(table: str) -> Iterator[tuple[str, str]]:
    for line in table.splitlines(keepends=True):
        if found := re.match(r"\| (\d+\.\d+)\.", line):
            yield found[1], line


def _row(outcome: Outcome) -> str:
    # Within a table a bar ends the cell, also in code.
    named = "".join(f"<br>`{name}`".replace("|", r"\|") for name in outcome.failed)
    cells = (
        outcome.torch,
        outcome.triton,
        outcome.python,
        outcome.tests,
        str(outcome.passed),
        f"{len(outcome.failed)}{named}",
        str(outcome.skipped),
        f"{outcome.cold:.1f}",
        f"{outcome.hit:.3f}",
        outcome.date,
    )
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main())
