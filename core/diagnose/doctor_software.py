"""Looks at packages, compiler and GPU for `vllmc doctor`. Imports no torch: where a GPU makes it
worth the seconds, torch is asked in a process of its own, which may fail without harm.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, Final

from vllmc.core.diagnose.doctor_facts import Compiler, Device, Gpu, Package
from vllmc.core.torch_compat.compilers import compiler_version
from vllmc.core.torch_compat.version import OLDEST as OLDEST_TORCH
from vllmc.core.torch_compat.version import spelled

OLDEST: Final = (("torch", spelled(OLDEST_TORCH)), ("triton", "3.6"), ("transformers", "5.17"))
"""The packages whose versions are factors of every key, and the oldest that will do."""

_VERSION_FILES: Final = ("version.py", "__init__.py")
_QUERY: Final = ("--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
_QUERY_TIMEOUT_SECONDS: Final = 20
_TORCH_TIMEOUT_SECONDS: Final = 120
_DRIVERS: Final = ("/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg")

# Run by another interpreter: what torch sees, as one line of JSON.
_ASK_TORCH: Final = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    usable = torch.cuda.is_available()
count = torch.cuda.device_count() if usable else 0
found = [torch.cuda.get_device_properties(index) for index in range(count)]
print(json.dumps({
    "usable": usable,
    "reason": "; ".join(str(warning.message) for warning in caught),
    "gpus": [[gpu.name, f"{gpu.major}.{gpu.minor}"] for gpu in found],
    "architectures": torch.cuda.get_arch_list() if usable else [],
}))
"""


def look_at_packages() -> tuple[Package, ...]:
    """Those of `OLDEST` that vllmc asks for on this platform."""
    everywhere = sys.platform == "linux" and platform.machine() == "x86_64"
    return tuple(
        Package(
            name=name,
            oldest=oldest,
            version=installed_version(name),
            file_version=_in_file(name, r"__version__"),
        )
        for name, oldest in OLDEST
        if everywhere or name != "triton"
    )


def installed_version(name: str) -> str | None:
    """What the metadata of a distribution says; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_file(name: str, variable: str) -> str | None:
    """The text that a package's version module gives to `variable`, without running it."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # something else stands in for the module
        return None
    for place in (spec and spec.submodule_search_locations) or ():
        for file in _VERSION_FILES:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                text = (Path(place) / file).read_text(encoding="utf-8")
                if found := re.search(rf"^{variable}\b[^=\n]*=\s*[\"'](.+?)[\"']", text, re.M):
                    return found[1]
    return None


def look_at_compiler(*, cxx: str | None, cc: str | None, search_path: str) -> Compiler:
    """The compilers on `search_path`, and whether Python's headers are installed.

    `cxx` and `cc` are what `CXX` and `CC` say. Without them Inductor takes g++, and Triton gcc or
    clang (triton/runtime/build.py).
    """
    program = shutil.which(cxx or "g++", path=search_path)
    found = (shutil.which(name, path=search_path) for name in ([cc] if cc else ["gcc", "clang"]))
    return Compiler(
        program=program,
        version=compiler_version(program) if program else None,
        c_program=next(filter(None, found), None),
        python_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
    )


def has_memory_files() -> bool:
    """Whether a file in memory can be made, opened through `/proc` and mapped as code."""
    if sys.platform != "linux":
        return False
    try:
        descriptor = os.memfd_create("vllmc doctor")
        try:
            os.truncate(descriptor, mmap.PAGESIZE)
            with Path(f"/proc/self/fd/{descriptor}").open("rb") as file:
                code = mmap.PROT_READ | mmap.PROT_EXEC
                mmap.mmap(file.fileno(), mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=code).close()
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def look_at_device(*, search_path: str, visible: str | None) -> Device:
    """The GPUs that there are, and what torch makes of them.

    `visible` is what `CUDA_VISIBLE_DEVICES` says; None where it is not set.
    """
    hidden = visible is not None and visible.strip() in ("", "-1")
    cuda, hip = _in_file("torch", "cuda"), _in_file("torch", "hip")
    toolkit = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else None
    driver, gpus = _ask_nvidia_smi(shutil.which("nvidia-smi", path=search_path))
    here = bool(driver) or any(map(os.path.exists, _DRIVERS))
    if toolkit is None or hidden or not here:
        return Device(
            toolkit=toolkit,
            hidden=hidden,
            driver=driver,
            gpus=gpus,
            torch_sees_gpu=None,
            torch_failure="",
            architectures=(),
        )
    seen = ask_torch(sys.executable)
    return Device(
        toolkit=toolkit,
        hidden=False,
        driver=driver,
        gpus=tuple(Gpu(name=name, capability=found) for name, found in seen["gpus"]) or gpus,
        torch_sees_gpu=seen["usable"],
        torch_failure=seen["reason"],
        architectures=tuple(seen["architectures"]),
    )


def ask_torch(python: str) -> dict[str, Any]:
    """What torch says under an interpreter: usable, reason, gpus and architectures.

    `usable` is None where it could not say, and `reason` is then why.
    """
    answer, failure = _run([python, "-P", "-c", _ASK_TORCH], timeout=_TORCH_TIMEOUT_SECONDS)
    try:
        seen: dict[str, Any] = json.loads(answer.splitlines()[-1])
    except (IndexError, ValueError):
        reason = failure or "it said nothing"
        return {"usable": None, "reason": reason, "gpus": [], "architectures": []}
    return seen


def _ask_nvidia_smi(program: str | None) -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's version and the GPUs that it has, also those hidden from this process."""
    if program is None:
        return None, ()
    answer, _ = _run([program, *_QUERY], timeout=_QUERY_TIMEOUT_SECONDS)
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines()]
    rows = [row for row in rows if len(row) == 3]
    gpus = tuple(Gpu(name=name, capability=capability) for name, capability, _ in rows)
    return (rows[0][2] if rows else None), gpus


def _run(command: list[str], *, timeout: float) -> tuple[str, str]:
    """What a program printed, and how it failed: its last complaint, or "" where it did not."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"it took longer than {timeout:g} seconds"
    except OSError as error:
        return "", str(error)
    if done.returncode == 0:
        return done.stdout, ""
    if done.returncode < 0:
        return "", f"it was ended by signal {-done.returncode}"
    complaints = done.stderr.strip().splitlines()
    return "", complaints[-1][:300] if complaints else f"it exited with {done.returncode}"
