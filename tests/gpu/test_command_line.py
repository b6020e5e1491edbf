"""`vllmc warm` and `vllmc run --device cuda`, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graphed import NEW_TOKENS, PROMPTS

# torch warns of things on a GPU that it does not on a CPU.
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.filterwarnings("default")]

EXECUTABLE = Path(sysconfig.get_path("scripts")) / "vllmc"


def vllmc(place: Path, *words: str | Path) -> dict[str, Any]:
    """What a command says with `--json`; its caches lie below `place`."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TRITON_CACHE_DIR": str(place / "triton"),
        "VLLMC_CACHE_DIR": str(place / "vllmc"),
    }
    done = subprocess.run(
        [str(EXECUTABLE), *map(str, words), "--json", "--device", "cuda", "--dtype", "float32"],
        env=environment,
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


OPTIONS = [
    (),
    ("--split-kv-update",),
    ("--layer-names", "baked"),
    # Passes put ops into the artifacts that the model's own code does not import.
    ("--quantize", "fp8-dynamic"),
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_second_process_compiles_nothing_and_generates_the_same(
    cuda: str, subject: Callable[[str], Any], tmp_path: Path, option: tuple[str, ...]
) -> None:
    model = subject("llama")
    cold = vllmc(tmp_path, "warm", model.directory, *option)
    assert cold["counts"]["compiled"] > 0
    again = vllmc(tmp_path, "warm", model.directory, *option)
    assert again["counts"]["compiled"] == 0
    assert again["key"] == cold["key"]
    # Nothing but the artifacts is left to load from.
    for directory in ("inductor", "triton"):
        shutil.rmtree(tmp_path / directory, ignore_errors=True)
    prompts = [word for ids in PROMPTS for word in ("--prompt-ids", ",".join(map(str, ids)))]
    words = ("run", model.directory, *option, "--fail-on-miss", "--ignore-eos", *prompts)
    generated = []
    for graphs in ("piecewise", "none"):
        said = vllmc(tmp_path, *words, "--max-new-tokens", str(NEW_TOKENS), "--cuda-graphs", graphs)
        generated.append([tuple(row["token_ids"]) for row in said["outputs"]])
        assert said["recompiles"] == []
        recorded = said["cuda_graphs"]
        assert recorded is None if graphs == "none" else recorded["replayed_steps"] > 0
    assert generated[0] == generated[1]
    if "--quantize" not in option:
        assert generated[0] == model.expected
