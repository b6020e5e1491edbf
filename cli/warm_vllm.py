"""`vllmc warm --check --vllm DIR -- ARGS`: whether `vllm serve ARGS` would find what it needs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from vllmc.cli import report
from vllmc.cli.output import Output
from vllmc.cli.render import facts, short_key
from vllmc.cli.warm_rows import PREDICTED_CODES, Head, empty_row
from vllmc.core.diagnose.foreign_files import Unreadable, clean
from vllmc.core.diagnose.vllm_recorded_format import PRINTED
from vllmc.core.errors import VllmcError

if TYPE_CHECKING:
    from vllmc.core.diagnose.vllm_prediction import Foreseen
    from vllmc.core.diagnose.vllm_recorded import Start

Row = dict[str, Any]

_STYLES = {"would-hit": "bold green", "would-miss": "bold yellow", "unknown": "bold yellow"}
_MODULE = "vllmc.core.vllm_plugin.start"


def check_vllm(directory: Path, arguments: Sequence[str], output: Output) -> int:
    """Predicts the start, prints it, and returns the exit code."""
    from vllmc.core.diagnose.vllm_cache import read_caches
    from vllmc.core.diagnose.vllm_prediction import foresee

    began = time.perf_counter()
    if not directory.is_dir():
        raise VllmcError(
            "not-readable",
            f"{directory} is no directory",
            hint="--vllm takes VLLM_CACHE_ROOT (~/.cache/vllm)",
        )
    start = _asked(arguments)
    try:
        caches = read_caches(directory)
    except VllmcError as error:
        # An empty cache is what a first start finds.
        if error.code != "no-vllm-cache":
            raise
        caches = ()
    row = _row(start, foresee(start, caches), time.perf_counter() - began)
    output.data(row, lambda: _report(row))
    return PREDICTED_CODES.get(row["outcome"], 0)


def _asked(arguments: Sequence[str]) -> Start:
    """What vLLM would hash of a start, asked in a process of its own."""
    from vllmc.core.diagnose.vllm_recorded import read_start

    if importlib.util.find_spec("vllm") is None:
        raise VllmcError(
            "no-vllm",
            "vLLM is not installed in this environment, and only it knows what its arguments mean",
            hint="install vllmc in vLLM's environment, and run vllmc there",
        )
    command = [sys.executable, "-m", _MODULE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    lines = [line for line in done.stdout.splitlines() if line.startswith(PRINTED)]
    # What the parser of the arguments says of them is the last line on stderr.
    said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    cause = clean(said[-1])
    if lines:
        try:
            return read_start(lines[-1].removeprefix(PRINTED))
        except Unreadable as error:
            cause = str(error)
    raise VllmcError(
        "vllm-refused",
        "vLLM makes no config of these arguments",
        context={"cause": cause},
        hint="try them with vllm serve; they stand behind --",
    )


def _row(start: Start, found: Foreseen, seconds: float) -> Row:
    from vllmc.core.diagnose.vllm_prediction import not_known

    row = empty_row(Head(name=start.model, attempts=1), start.model, None, found.outcome)
    changes = [change.to_json() for change in found.changes]
    miss = {"nearest_key": None, "nearest_model": None, "changes": changes}
    return row | {
        "program": "hit" if found.outcome == "would-hit" else "miss",
        "seconds": row["seconds"] | {"total": round(seconds, 4)},
        "reason": found.reason,
        "miss": None if found.outcome == "would-hit" else miss,
        "vllm": {
            "key": found.key,
            "trees": list(start.trees),
            "not_known": list(not_known(start)),
        },
    }


def _report(row: Row) -> RenderableType:
    outcome, vllm = row["outcome"], row["vllm"]
    verdict = Text.assemble((outcome, _STYLES[outcome]), f"  {row['reason']}")
    lines = [("model", row["model"])]
    if vllm["key"]:
        lines.append(("vLLM's key", short_key(vllm["key"])))
    parts: list[RenderableType] = [verdict, facts(*lines)]
    if row["miss"] is not None and row["miss"]["changes"]:
        changes = row["miss"]["changes"]
        parts += ["", Text(f"what differs from {short_key(vllm['key'])}, the nearest entry:")]
        parts += [report.changes_table(changes), *report.restores(changes)]
    parts += report.notes([f"not known: {what}" for what in vllm["not_known"]])
    return Group(*parts)
