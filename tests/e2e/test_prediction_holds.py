"""Predictions of one process, and what another then does: under random variables and flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

PROGRAM = "from vllmc.cli.app import entry_point; entry_point()"
Start = tuple[tuple[tuple[str, str], ...], tuple[str, ...]]

# What torch and vllmc read of the environment, and what neither may read.
_VARIABLES = st.sampled_from(
    (
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "1"),
        ("TORCHINDUCTOR_SIZE_ASSERTS", "0"),
        ("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1"),
        ("TORCHINDUCTOR_COMPILE_THREADS", "1"),
        ("TORCHINDUCTOR_CACHE_DIR", "/tmp/elsewhere"),
        ("TORCHINDUCTOR_DEBUG_COMPILE", "1"),
        ("TENSORIFY_PYTHON_SCALARS", "1"),
        ("VLLMC_DTYPE", "bfloat16"),
        ("HOSTNAME", "pod-1"),
        ("OMP_NUM_THREADS", "1"),
        ("PYTHONHASHSEED", "7"),
    )
)
_FLAGS = st.sampled_from(
    (
        ("--compile-range", "1:16"),
        ("--compile-range", "1:1", "--compile-range", "2:64"),
        ("--compile-size", "4"),
        ("--dtype", "bfloat16"),
        ("--layer-names", "baked"),
        ("--split-kv-update",),
        ("--dynamic-shapes", "backed"),
        ("--layers", "2"),
        ("-O", "max_autotune=true"),
        ("-O", "size_asserts=false"),
    )
)
_STARTS = st.tuples(
    st.lists(_VARIABLES, max_size=2, unique_by=lambda pair: pair[0]).map(tuple),
    st.lists(_FLAGS, max_size=1).map(lambda flags: tuple(word for f in flags for word in f)),
)


def vllmc(start: Start, *words: str, cwd: Path) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of `vllmc warm` in a process that starts as `start` says."""
    variables, flags = start
    command = ("warm", "tiny-llama", "--backend", "eager", "--json", *flags, *words)
    if "--layers" not in flags:
        command += ("--layers", "1")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(cwd),
            "HF_HUB_OFFLINE": "1",
            "VLLMC_CACHE_DIR": str(cwd / "cache"),
            **dict(variables),
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 50)
@given(st.lists(_STARTS, min_size=2, max_size=3, unique=True))
def test_a_prediction_of_one_process_holds_in_the_next(starts: Sequence[Start]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for start in (*starts, starts[0]):
            code, predicted = vllmc(start, "--check", cwd=Path(scratch))
            warmed = vllmc(start, cwd=Path(scratch))[1]
            event(f"{predicted['outcome']}, {warmed['outcome']}")
            assert predicted["key"] == warmed["key"]
            assert (code == 0) == (predicted["outcome"] == "would-hit")
            match predicted["outcome"]:
                case "would-hit":
                    assert warmed["outcome"] == "hit", "a wrong hit"
                case "would-miss":
                    assert warmed["outcome"] != "hit", "a wrong miss"
                case other:
                    assert other == "unknown"
        assert predicted["outcome"] == "would-hit", "it is as it was at first"
