"""Makes the logs and traces beside this file: `python tests/core/diagnose/recompiles/make.py`.

They are what torch wrote of the programs in tests/support/recompiling.py: NAME.log under
TORCH_LOGS=recompiles, NAME.verbose.log under recompiles_verbose, and NAME/ under TORCH_TRACE, cut
down to what is read. Paths of the machine are replaced.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROGRAM = HERE.parents[2] / "support" / "recompiling.py"
NAMES = (
    *("shape_0_1", "shape", "dtype", "layout", "counter", "number", "string", "object_id"),
    *("global_state", "index_width", "kind", "other", "graph_break"),
)
METRICS = ("compile_id", "entire_frame_compile_time_s", "fail_type", "fail_reason")
KEPT = re.compile(
    r'"(str|dynamo_start|compilation_metrics)": |"name": "(recompile_reasons|dynamo_gr)'
)


def main() -> None:
    """Runs every program three times."""
    for name in NAMES:
        for logs, suffix in (("recompiles", ".log"), ("recompiles_verbose", ".verbose.log")):
            said = run(name, {"TORCH_LOGS": f"{logs},graph_breaks"})
            (HERE / f"{name}{suffix}").write_text(said, encoding="utf-8")
        with tempfile.TemporaryDirectory() as place:
            run(name, {"TORCH_TRACE": place})
            [log] = Path(place).iterdir()
            (HERE / name).mkdir(exist_ok=True)
            text = reduced(log.read_text(encoding="utf-8"))
            (HERE / name / "dedicated_log_torch_trace_0.log").write_text(text, encoding="utf-8")


def run(name: str, environment: dict[str, str]) -> str:
    """What a program, in a process of its own, wrote to stderr."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), name],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return without_paths(done.stderr)


def reduced(text: str) -> str:
    """The entries that are read, with less in them."""
    kept = []
    for entry in re.split(r"\n(?!\t)", text.rstrip("\n")):
        head, *payload = entry.split("\n")
        if not KEPT.search(head):
            continue
        prefix, _, header = head.partition("] ")
        data = json.loads(header)
        if metrics := data.get("compilation_metrics"):
            data["compilation_metrics"] = {name: metrics.get(name) for name in METRICS}
            payload = []
        kept.append("\n".join([f"{prefix}] {json.dumps(data)}", *payload]))
    return without_paths("\n".join(kept) + "\n")


def without_paths(text: str) -> str:
    """`text` without the paths of this machine, of which torch shows the last parts too."""
    text = text.replace(str(PROGRAM.parent), "/app").replace(sysconfig.get_path("purelib"), "/site")
    return re.sub(r"[\w/]*tests/support/", "/app/", text)


if __name__ == "__main__":
    main()
