"""`benchmarks/vllm_peer.py`: what it says without vLLM, and that each side tells its figures.

Reading vLLM's own figures hangs on its messages, which may be others in another release.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_peer.py"
IS_THERE = importlib.util.find_spec("vllm") is not None


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(IS_THERE, reason="vLLM is installed")
def test_without_vllm_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 1
    assert done.stderr == "vLLM is not installed: docs/vllm.md says how to have it on a CPU\n"


@pytest.mark.vllm
@pytest.mark.skipif(not IS_THERE, reason="vLLM is not installed")
@pytest.mark.parametrize("side", ["vllm", "vllm pieces", "vllmc"])
def test_each_side_tells_what_a_start_consisted_of(side: str, tmp_path: Path) -> None:
    told = {}
    for state in ("cold", "warm"):
        done = run(
            *("--one", side, "--layers", "1", "--names", "layer_name", "--state", state),
            VLLM_CACHE_ROOT=str(tmp_path / "vllm"),
            VLLMC_CACHE_DIR=str(tmp_path / "vllmc"),
            VLLM_TARGET_DEVICE="cpu",
            VLLM_USE_AOT_COMPILE=str(int(side != "vllm pieces")),
        )
        assert done.returncode == 0, done.stderr
        told[state] = json.loads(done.stdout.splitlines()[-1])
    cold, warm = told["cold"], told["warm"]
    assert cold["artifacts"] == 2
    assert min(cold["dynamo"], cold["compile"], warm["load"]) > 0
    assert cold["dynamo"] + cold["compile"] < cold["first"]
    assert warm["load"] < warm["first"]
    assert warm["compile"] == 0
