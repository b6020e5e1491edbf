from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vllmc.core.diagnose.doctor_software import (
    OLDEST,
    ask_torch,
    has_memory_files,
    installed_version,
    look_at_compiler,
    look_at_device,
    look_at_packages,
)

ROOT = Path(__file__).parents[3]


def program(directory: Path, name: str, script: str) -> Path:
    """A program of this name in a directory."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_oldest_versions_are_those_that_the_package_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, oldest in OLDEST:
        assert any(text.partition(";")[0].strip() == f"{name}>={oldest}" for text in asked)


def test_the_packages_here_are_found_by_their_files_and_their_metadata() -> None:
    import torch
    import transformers

    found = {package.name: package for package in look_at_packages()}
    assert found["torch"].file_version == str(torch.__version__)
    assert found["torch"].version == installed_version("torch")
    assert found["transformers"].file_version == transformers.__version__


def test_a_version_is_read_from_a_package_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('broken')\n")
    (tmp_path / "torch" / "version.py").write_text(
        "from typing import Optional\n__all__ = ['__version__', 'cuda']\n"
        "__version__ = '2.9.0+cu128'\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n"
    )
    script = (
        "from vllmc.core.diagnose.doctor_software import *; "
        "print(look_at_packages()[0].file_version, "
        "look_at_device(search_path='', visible='').toolkit)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2.9.0+cu128 CUDA 12.8\n"


def test_compilers_are_found_by_name_or_by_variable(tmp_path: Path) -> None:
    there = tmp_path / "bin"
    cxx = program(there, "g++", "echo 'g++ 14.2'; echo more")
    clang = program(there, "clang", "")
    mine = program(there, "mine", "exit 1")
    found = look_at_compiler(cxx=None, cc=None, search_path=str(there))
    assert (found.program, found.version) == (str(cxx), "g++ 14.2")
    assert found.c_program == str(clang)
    named = look_at_compiler(cxx="mine", cc="absent", search_path=str(there))
    assert (named.program, named.version) == (str(mine), "unknown version")
    assert named.c_program is None
    nothing = look_at_compiler(cxx=None, cc=None, search_path=str(tmp_path))
    assert (nothing.program, nothing.version, nothing.c_program) == (None, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory are Linux's")
def test_files_in_memory_can_be_run_here() -> None:
    assert has_memory_files()


def test_gpus_are_listed_by_nvidia_smi_also_for_a_torch_that_is_for_the_cpu(
    tmp_path: Path,
) -> None:
    rows = "NVIDIA H100 80GB HBM3, 9.0, 580.65\\nNVIDIA L4, 8.9, 580.65"
    program(tmp_path, "nvidia-smi", f"printf '{rows}\\n'")
    found = look_at_device(search_path=str(tmp_path), visible="0,1")
    assert found.driver == "580.65"
    assert [(gpu.name, gpu.capability) for gpu in found.gpus] == [
        ("NVIDIA H100 80GB HBM3", "9.0"),
        ("NVIDIA L4", "8.9"),
    ]
    assert not found.hidden


@pytest.mark.parametrize("script", ["echo broken >&2; exit 9", "echo 'No devices were found'"])
def test_an_nvidia_smi_that_knows_of_no_gpu_lists_none(tmp_path: Path, script: str) -> None:
    program(tmp_path, "nvidia-smi", script)
    found = look_at_device(search_path=str(tmp_path), visible=None)
    assert (found.driver, found.gpus) == (None, ())


def test_torch_says_of_itself_whether_it_can_use_a_gpu() -> None:
    import torch

    seen = ask_torch(sys.executable)
    assert seen["usable"] is torch.cuda.is_available()
    assert len(seen["gpus"]) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Traceback' >&2; echo 'ImportError: libcudnn.so.9' >&2; exit 1", "libcudnn.so.9"),
        ("kill -SEGV $$", "signal 11"),
        ("exit 7", "exited with 7"),
        ("echo no JSON", "said nothing"),
        ("true", "said nothing"),
    ],
)
def test_a_torch_that_cannot_be_asked_gives_the_reason(
    tmp_path: Path, script: str, reason: str
) -> None:
    seen = ask_torch(str(program(tmp_path, "python", script)))
    assert seen["usable"] is None
    assert reason in seen["reason"]
    assert ask_torch(str(tmp_path / "absent"))["usable"] is None
