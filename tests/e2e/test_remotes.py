"""`--remote`: what the cache lacks is pulled, and nothing about a remote fails a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WARM = ("warm", "--backend", "eager", "--json", "-q")


def vllmc(directory: Path, cache: str, *words: str, **variables: str):
    return subprocess.run(
        [sys.executable, "-c", "from vllmc.cli.app import entry_point; entry_point()", *words],
        cwd=directory,
        env={**os.environ, "VLLMC_CACHE_DIR": str(directory / cache), **variables},
        capture_output=True,
        text=True,
    )


def test_a_program_is_pulled_before_it_is_compiled(tmp_path):
    assert vllmc(tmp_path, "one", *WARM).returncode == 0
    assert vllmc(tmp_path, "one", "cache", "push", "remote").returncode == 0
    remote = str(tmp_path / "remote")

    done = vllmc(tmp_path, "two", *WARM, "--trust-unsigned", VLLMC_REMOTE=remote)
    assert json.loads(done.stdout)["outcome"] == "hit"
    assert done.stderr == ""

    # Refused where nobody signed it, and then compiled.
    done = vllmc(tmp_path, "three", *WARM, "--remote", remote)
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (0, "compiled")
    assert done.stderr.count("warning[") == 1
    assert "warning[untrusted]" in done.stderr

    done = vllmc(
        tmp_path, "four", "run", "--backend", "eager", "--fail-on-miss", "--remote", remote
    )
    assert done.returncode == 4
    assert "error[untrusted]" in done.stderr


@pytest.mark.parametrize("where", ["http://127.0.0.1:9/cache", "/nowhere", "gs://bucket"])
def test_a_remote_that_is_down_fails_nothing(where, tmp_path):
    done = vllmc(tmp_path, "cache", *WARM, "--remote", where)
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (0, "compiled")
    assert done.stderr.count("warning[") == (0 if where == "/nowhere" else 1), done.stderr
