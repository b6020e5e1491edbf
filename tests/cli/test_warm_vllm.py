"""`warm --check --vllm` where there is no vLLM, and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

without_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vLLM is installed"
)


@without_vllm
def test_without_vllm_it_says_where_to_run_it(vllmc: Any, workplace: Path) -> None:
    done = vllmc("warm", "--check", "--vllm", str(workplace), "--json", "--", "org/model")
    assert done.code == 1
    assert done.json["error"]["code"] == "no-vllm"
    assert "in vLLM's environment" in done.json["error"]["hint"]


def test_a_directory_that_is_not_there_is_said(vllmc: Any, workplace: Path) -> None:
    done = vllmc("warm", "--check", "--vllm", str(workplace / "none"), "--json", "--", "x")
    assert (done.code, done.json["error"]["code"]) == (1, "not-readable")


def test_it_predicts_and_warms_nothing(vllmc: Any, workplace: Path) -> None:
    done = vllmc("warm", "--vllm", str(workplace), "--json", "--", "org/model")
    assert done.code == 2
    assert "compiles nothing" in done.json["error"]["message"]


@pytest.mark.parametrize(
    "words",
    [
        ("--dtype", "bfloat16"),
        ("-O", "max_autotune=true"),
        ("--layers", "2"),
        ("--from", "warm.toml"),
        ("--summary", "page.md"),
        ("--force",),
    ],
)
def test_options_that_shape_no_start_of_vllm_s_are_refused(
    vllmc: Any, workplace: Path, words: tuple[str, ...]
) -> None:
    done = vllmc("warm", "--check", *words, "--vllm", str(workplace), "--json", "--", "x")
    assert done.code == 2
    assert "exclude each other" in done.json["error"]["message"]
