"""What vllmc's plugin adds to a start of vLLM's: `python benchmarks/vllm_plugin.py`.

Needs vLLM 0.32 or 0.33 (docs/vllm.md says how to have it on a CPU). Compiles a toy decoder with
vLLM's own backend, cold and then warm, each in a process of its own, as pieces and as a whole
model, and prints the milliseconds that were spent in the plugin: loading it, and then all that it
does (importing its modules, reading the traced files, writing), of time that passed and of the
processor's. The wrappers around vLLM's functions cost a call each, which is not counted.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CORE = Path(__file__).parents[1] / "core"
PROGRAM = Path(__file__).parents[1] / "tests" / "core" / "diagnose" / "vllm" / "program.py"
CASES = (("pieces", "0"), ("whole model", "1"))
STARTS = ("cold", "warm", "warm")


def main() -> None:
    """Runs every case in processes of their own and prints a table."""
    print(f"{'case':14} {'start':6} {'load ms':>8} {'rest ms':>8} {'CPU ms':>8}")
    # Installed packages are compiled when they are installed.
    compileall.compile_dir(CORE, quiet=1)
    for case, whole in CASES:
        with tempfile.TemporaryDirectory() as place:
            for start in STARTS:
                found = timed(place, whole)
                times = " ".join(f"{found[name]:8.1f}" for name in ("load", "rest", "cpu"))
                print(f"{case:14} {start:6} {times}", flush=True)


def timed(place: str, whole: str) -> dict[str, float]:
    """The milliseconds that one start spends in the plugin."""
    environment = {
        **os.environ,
        "VLLM_CACHE_ROOT": place,
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_USE_STANDALONE_COMPILE": "1",
        "VLLM_USE_AOT_COMPILE": whole,
        "VLLM_USE_MEGA_AOT_ARTIFACT": whole,
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, "--start"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def start() -> None:
    """Runs the toy with the plugin's own blocks timed."""
    # The plugin is loaded when vLLM's config is, as it is in a server.
    sys.argv[1:] = []
    program = runpy.run_path(str(PROGRAM))
    before, used = time.perf_counter(), time.thread_time()
    from vllmc.core.vllm_plugin import register

    register()
    spent = {
        "load": (time.perf_counter() - before) * 1e3,
        "cpu": (time.thread_time() - used) * 1e3,
        "rest": 0.0,
    }

    from vllmc.core.vllm_plugin import hooks

    @contextlib.contextmanager
    def timing(what: str) -> Iterator[None]:
        begun, used = time.perf_counter(), time.thread_time()
        with quietly(what):
            yield
        spent["rest"] += (time.perf_counter() - begun) * 1e3
        spent["cpu"] += (time.thread_time() - used) * 1e3

    quietly = hooks.quietly
    hooks.quietly = timing
    program["main"]()
    print(json.dumps(spent))


if __name__ == "__main__":
    start() if sys.argv[1:] else main()
