"""A failure of the plugin's is one warning, and never vLLM's."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.vllm_plugin import quiet, register

ROOT = Path(__file__).parents[3]


def test_the_first_failure_is_told_and_the_others_are_silent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quiet.WARNED.clear()
    with caplog.at_level(logging.WARNING, "vllmc.vllm_plugin"):
        for number in range(3):
            with quiet.quietly("the file could not be written"):
                raise OSError(number, "no space")
    [record] = caplog.records
    assert "the file could not be written: OSError: [Errno 0] no space" in record.getMessage()
    assert "VLLMC_PLUGIN=0" in record.getMessage()


def test_without_vllm_it_warns_and_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet.WARNED.clear()
    monkeypatch.delenv("VLLMC_PLUGIN", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert len(caplog.records) == 1


def test_switched_off_it_does_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet.WARNED.clear()
    monkeypatch.setenv("VLLMC_PLUGIN", "0")
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()
    assert caplog.records == []


def test_loading_it_imports_neither_torch_nor_what_the_command_line_needs() -> None:
    code = (
        "import sys, vllmc.core.vllm_plugin as p, vllmc.core.vllm_plugin.hooks\n"
        "print(sorted({'torch', 'transformers', 'typer', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done: Any = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {
        "vllmc": "vllmc.core.vllm_plugin:register"
    }
