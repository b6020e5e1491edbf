"""One decoder through vLLM's backend and through vllmc, in one process, and as it is.

Needs vLLM 0.32 or 0.33; docs/vllm.md says how to have it without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PROGRAM = Path(__file__).parents[1] / "support" / "beside_vllm.py"


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [("eager", 0.0), pytest.param("inductor", 1e-5, marks=pytest.mark.thorough)],
)
def test_both_compute_what_the_module_does_and_refuse_the_same_batches(
    tmp_path: Path, backend: str, tolerance: float
) -> None:
    variables = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CACHE_ROOT": str(tmp_path),
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_USE_MEGA_AOT_ARTIFACT": "0",
        "VLLM_USE_STANDALONE_COMPILE": "1",
        "VLLMC_PLUGIN": "0",
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), backend],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    for refused, code in (("0", "zero-tokens"), ("65", "size-out-of-range")):
        theirs, ours = rows.pop(refused)
        assert f"Shape: {refused} out of considered ranges" in theirs
        assert ours.startswith(f"{code}: ")
    assert list(rows) == ["1", "2", "4", "8", "9", "17", "64"]
    for theirs, ours in rows.values():
        assert theirs <= tolerance
        assert ours <= tolerance
