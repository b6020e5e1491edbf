"""A torch that is older than vllmc knows, one that is newer, and two that share a cache."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dressed import dress_torch

from vllmc.core.torch_compat.version import installed_torch, minor_of

LINKS = Path(__file__).parents[2] / "scripts" / "mypy_path"
MAIN = "import sys; from vllmc.cli.app import main; sys.exit(main(sys.argv[2:]))"
# The interpreter of an environment that has another torch, and what vllmc requires. Read at once:
# what tests run in says nothing of vllmc.
OTHER = os.environ.get("VLLMC_OTHER_PYTHON")

# A compiler that gets the tiny piece wrong: three times the softmax for twice.
WRONG = """#!/usr/bin/env bash
for word in "$@"; do
  case "$word" in
    *.cpp) sed -i -E 's/static_cast<float>\\(2(\\.0)?\\)/static_cast<float>(3.0)/g' "$word" ;;
  esac
done
exec g++ "$@"
"""


def behind() -> str:
    """The command line of a vllmc that knows torch up to the minor version before this one."""
    major, minor = minor_of(installed_torch())
    known = f"from vllmc.core.torch_compat import version; version.NEWEST = ({major}, {minor - 1})"
    return f"{known}; {MAIN}"


@pytest.fixture
def under(spawn: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a command line by the Python code that is given first."""

    def run(code: str, *words: str | Path, python: str = sys.executable, **env: str) -> Any:
        return spawn(*words, before=(python, "-c", code), env=env)

    return run


def first_on_path(directory: Path) -> str:
    return os.pathsep.join([str(directory), str(LINKS)])


@pytest.mark.parametrize("command", ["warm", "run", "inspect-key"])
def test_an_older_torch_is_refused_before_anything_is_done(
    command: str, tmp_path: Path, under: Any, cache: Path
) -> None:
    site = dress_torch(tmp_path / "site", "2.10.1+cu128")
    done = under(MAIN, command, "tiny-llama", PYTHONPATH=first_on_path(site))
    assert (done.code, done.error) == (1, "torch-too-old")
    assert "torch 2.10.1+cu128 is too old for vllmc, which needs 2.11 or later" in done.err
    assert "shape_id" in done.err
    assert "pip install 'torch>=2.11' --upgrade" in done.err
    assert "Traceback" not in done.err
    assert not cache.exists()


def test_a_doctor_says_why_an_older_torch_will_not_do(tmp_path: Path, under: Any) -> None:
    site = dress_torch(tmp_path / "site", "2.10.1+cu128")
    done = under(MAIN, "doctor", PYTHONPATH=first_on_path(site))
    assert "torch is 2.10.1+cu128, and vllmc needs 2.11 or later" in done.out
    assert "shape_id" in done.out


def test_a_decorated_class_is_told_of_an_older_torch(tmp_path: Path, under: Any) -> None:
    site = dress_torch(tmp_path / "site", "2.10.1+cu128")
    code = "from vllmc.core import support_torch_compile"
    done = under(code, PYTHONPATH=first_on_path(site))
    assert "torch-too-old: torch 2.10.1+cu128 is too old" in done.err.splitlines()[-2]


def test_commands_without_torch_do_without_a_new_one(tmp_path: Path, under: Any) -> None:
    site = dress_torch(tmp_path / "site", "2.10.1+cu128")
    assert under(MAIN, "models", PYTHONPATH=first_on_path(site)).code == 0


@pytest.mark.slow
def test_nothing_but_vllmc_speaks_while_it_compiles_and_ends(spawn: Any) -> None:
    """Neither what torch deprecates, nor what Triton's binding counts at exit."""
    told = spawn("warm", "tiny-llama").err.splitlines()
    assert "capture" in told
    own = re.compile(r"(resolve|capture|split|link|store)$|piece_\d+ for \S+ tokens: compiled, ")
    # What a torch for CUDA says of a machine that has the toolkit and no GPU is its own.
    strange = [x for x in told if not own.search(x) and "No CUDA runtime is found" not in x]
    assert strange == []
    assert spawn("warm", "tiny-llama", "-q").err == ""


@pytest.mark.slow
def test_a_newer_torch_compiles_with_a_warning_and_is_tried_once(
    tmp_path: Path, under: Any, cache: Path
) -> None:
    done = under(behind(), "warm", "tiny-llama", "--backend", "eager", "--json")
    assert done.code == 0, done.err
    assert done.json["outcome"] == "compiled"
    warnings = [line for line in done.err.splitlines() if line.startswith("warning[torch-newer]")]
    assert len(warnings) == 1
    assert f"torch {installed_torch()} is newer than vllmc knows" in warnings[0]
    assert len(list(cache.rglob("self_check-*"))) == 1

    # A hit compiles nothing, and has nothing to say.
    again = under(behind(), "warm", "tiny-llama", "--backend", "eager", "--json")
    assert again.json["outcome"] == "hit"
    assert "torch-newer" not in again.err

    # It passed: with a compiler that would now fail it is not tried again.
    more = ("--compile-range", "1:16")
    wrong = wrong_compiler(tmp_path)
    done = under(behind(), "warm", "tiny-llama", "--backend", "eager", "--json", *more, CXX=wrong)
    assert done.code == 0, done.err
    assert "warning[torch-newer]" in done.err


@pytest.mark.slow
def test_a_newer_torch_that_gives_other_numbers_is_refused(
    tmp_path: Path, under: Any, cache: Path
) -> None:
    scratch = tmp_path / "inductor"
    done = under(
        behind(),
        "warm",
        "tiny-llama",
        "--backend",
        "eager",
        CXX=wrong_compiler(tmp_path),
        TORCHINDUCTOR_CACHE_DIR=str(scratch),
    )
    assert (done.code, done.error) == (1, "torch-unknown")
    assert f"torch {installed_torch()} is newer than vllmc knows" in done.err
    assert "for 1 rows it gives" in done.err
    assert "pip install 'torch<=" in done.err
    assert "Traceback" not in done.err
    assert not list(cache.rglob("self_check-*"))


def wrong_compiler(directory: Path) -> str:
    program = directory / "g++-wrong"
    program.write_text(WRONG)
    program.chmod(0o755)
    return str(program)


@pytest.mark.torch_matrix
@pytest.mark.skipif(OTHER is None, reason="VLLMC_OTHER_PYTHON names no other environment")
def test_artifacts_never_cross_builds_of_torch(under: Any, cache: Path) -> None:
    def warm(python: str | None, *flags: str) -> Any:
        words = ("warm", "tiny-llama", "--json", *flags)
        return under(MAIN, *words, python=python, PYTHONPATH=str(LINKS))

    here = warm(sys.executable).json
    assert here["counts"]["compiled"] == 3

    # There it is a miss, which names torch.
    foretold = warm(OTHER, "--check")
    assert foretold.code == 3
    changes = {(c["group"], c["name"]): c for c in foretold.json["miss"]["changes"]}
    torch = changes["versions", "torch"]
    assert torch["before"] == installed_torch()
    assert torch["after"] != torch["before"]
    assert torch["affects_key"]
    assert foretold.json["miss"]["nearest_key"] == here["key"]
    there = warm(OTHER).json
    assert there["counts"] == {"hit": 0, "dup": 0, "compiled": 3}
    assert there["program"] == "miss"
    assert there["key"] != here["key"]

    # Both are kept, and each is found by its own.
    listed = under(MAIN, "cache", "ls", "--json", PYTHONPATH=str(LINKS)).json
    assert {entry["key"] for entry in listed["entries"]} == {here["key"], there["key"]}
    for python, key in ((sys.executable, here["key"]), (OTHER, there["key"])):
        again = warm(python).json
        assert (again["outcome"], again["program"], again["key"]) == ("hit", "hit", key)
