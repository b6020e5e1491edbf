"""Makes the traces beside this file: `python tests/core/diagnose/traces/make.py`.

Each is what torch wrote under `TORCH_TRACE`, cut down to what is read: a whole one has 600 key
components for each lookup, and megabytes of graphs. Paths of the machine are replaced, so that
a trace says the same wherever it was made. `cold` filled the caches that `warm`, `option` and
`moved` met; the others began with none. In `detailed` and `changed` AOTAutograd logged its key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CASES = ("cold", "warm", "option", "moved", "detailed", "changed", "frozen", "disabled")
DETAILS = {"TORCH_LOGS": "+torch._functorch._aot_autograd.autograd_cache"}
SETTINGS = {
    "detailed": DETAILS,
    "changed": DETAILS,
    "disabled": {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
}
ENTRIES = ("str", "dynamo_start", "dynamo_output_graph", "compilation_metrics")
ARTIFACTS = re.compile(r"torch_version|recompile_reasons|.*_cache_.*")
METRICS = ("compile_id", "co_name", "co_filename", "co_firstlineno")
FUNCTORCH = ("donated_buffer", "activation_memory_budget", "treat_parameters_as_free_to_save")
COMPONENT = re.compile(r"\[\w+\] inductor_config(?:_comms)?\[(?P<option>[^\]]+)\]")
OPTIONS = (
    "debug",
    "max_autotune",
    "epilogue_fusion",
    "fx_passes_numeric_check",
    "freezing",
    "cpp.cxx",
)


def main() -> None:
    """Runs every case and writes its trace."""
    with tempfile.TemporaryDirectory() as place:
        for case in CASES:
            shared = case in ("cold", "warm", "option", "moved")
            run(case, Path(place), "caches" if shared else f"caches-{case}")
            [log] = (Path(place) / case).iterdir()
            target = HERE / case
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            text = reduced(log.read_text(encoding="utf-8"), Path(place))
            (target / "dedicated_log_torch_trace_0.log").write_text(text, encoding="utf-8")


def run(case: str, place: Path, caches: str) -> None:
    """Runs the program under TORCH_TRACE, in a process of its own."""
    environment = {
        **os.environ,
        "TORCH_TRACE": str(place / case),
        "TORCHINDUCTOR_CACHE_DIR": str(place / caches),
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
        **SETTINGS.get(case, {}),
    }
    command = [sys.executable, str(HERE / "program.py"), case]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)


def reduced(text: str, place: Path) -> str:
    """The entries that are read, with less in them, and no path of this machine."""
    kept = []
    for entry in re.split(r"\n(?!\t)", text.rstrip("\n")):
        head, *payload = entry.split("\n")
        prefix, _, header = head.partition("] ")
        data = json.loads(header)
        if (small := shortened(data, "\n".join(line[1:] for line in payload))) is not None:
            if small:
                data["has_payload"] = hashlib.md5(small.encode()).hexdigest()
            lines = [f"{prefix}] {json.dumps(data)}", *(f"\t{line}" for line in small.split("\n"))]
            kept.append("\n".join(lines if small else lines[:1]))
    packages = sysconfig.get_path("purelib")
    whole = "\n".join(kept) + "\n"
    for path, name in ((str(HERE), "/app"), (packages, "/site"), (str(place), "/tmp")):
        whole = whole.replace(path, name)
    return whole


def shortened(data: dict[str, Any], payload: str) -> str | None:
    """The payload to keep; None drops the entry. Shortens `data` in place."""
    if "chromium_event" in data:
        return payload if "fx_graph_cache_disabled" in payload else None
    if "compilation_metrics" in data:
        metrics = data["compilation_metrics"]
        functorch = json.loads(metrics["functorch_config"])
        data["compilation_metrics"] = {
            **{name: metrics[name] for name in METRICS},
            "functorch_config": json.dumps({name: functorch[name] for name in FUNCTORCH}),
        }
        return payload
    if "artifact" in data:
        if not ARTIFACTS.fullmatch(data["artifact"]["name"]):
            return None
        return without_options(payload) if "_cache_" in data["artifact"]["name"] else payload
    return payload if any(kind in data for kind in ENTRIES) else None


def without_options(payload: str) -> str:
    """The payload of a cache's entry with few of Inductor's options among its components."""
    info = json.loads(payload)
    for name in ("cache_bypass_traceback", "triton_bundler_meta"):
        info.pop(name, None)
    if "components" in info:
        info["components"] = [
            line
            for line in info["components"]
            if (match := COMPONENT.match(line)) is None or match["option"] in OPTIONS
        ]
    return json.dumps(info)


if __name__ == "__main__":
    main()
