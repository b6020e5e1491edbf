"""The checks of `vllmc doctor` on packages, device, compiler and variables. Imports no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Final

from vllmc.core.diagnose.doctor_facts import Facts, Gpu, Package
from vllmc.core.diagnose.doctor_table import Finding, found
from vllmc.core.torch_compat.version import LACKING, NEWEST, spelled

ROOM_TO_COMPILE: Final = 500 * 10**6
_ADDRESS: Final = r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])"
_SHORTEST_HOST: Final = 4


def check_packages(facts: Facts) -> Iterator[Finding]:
    """Whether the packages that every key names are there, new enough, and whole."""
    for package in facts.packages:
        name, version = package.name, package.file_version or package.version
        install = f"pip install '{name}>={package.oldest}'"
        if version is None:
            yield found("package-missing", f"{name} is not installed", install)
        elif not _reaches(version, package.oldest):
            yield found(
                "package-outdated",
                f"{name} is {version}, and vllmc needs {package.oldest} or later"
                + (f": it has no {LACKING}" if name == "torch" else ""),
                f"{install} --upgrade",
            )
        elif name == "torch" and not _reaches(spelled(NEWEST), version):
            yield found(
                "torch-newer",
                f"torch is {version}, and vllmc was tested with {package.oldest} to "
                f"{spelled(NEWEST)}",
                f"pip install 'torch<={spelled(NEWEST)}.99', if vllmc warm fails",
            )
        if _is_mixed(package):
            yield found(
                "package-mixed",
                f"{name} says that it is {package.file_version or 'nothing'}, and its metadata "
                f"{package.version or 'nothing'}",
                f"pip install --force-reinstall {name}=={package.version or version}",
            )


def _reaches(version: str, oldest: str) -> bool:
    """Whether the minor version of the one is that of the other, or later."""
    numbers = [[int(part) for part in re.findall(r"\d+", text)[:2]] for text in (version, oldest)]
    return numbers[0] >= numbers[1]


def _is_mixed(package: Package) -> bool:
    """Whether files and metadata disagree; either may leave out the build (`+cpu`)."""
    if package.version is None and package.file_version is None:
        return False
    if package.version is None or package.file_version is None:
        return True
    release, _, build = package.version.partition("+")
    file_release, _, file_build = package.file_version.partition("+")
    return release != file_release or bool(build and file_build and build != file_build)


def check_device(facts: Facts) -> Iterator[Finding]:
    """Whether torch can use the GPUs that there are."""
    device = facts.device
    names = ", ".join(gpu.name for gpu in device.gpus) or "a GPU's driver"
    if device.hidden:
        what = "CUDA_VISIBLE_DEVICES lets no GPU be seen"
        yield found("gpu-hidden", what, "unset CUDA_VISIBLE_DEVICES")
    elif device.torch_sees_gpu is None and device.torch_failure:
        what = f"torch could not be asked for the GPU: {device.torch_failure}"
        yield found("torch-does-not-start", what, "python -c 'import torch'")
    elif device.torch_sees_gpu is False:
        reason = device.torch_failure or f"built for {device.toolkit}, driver {device.driver}"
        what = f"{names} is here, and torch cannot use it: {reason}"
        fix = "docker run --gpus all ..." if facts.container else "nvidia-smi"
        yield found("gpu-not-usable", what, f"{fix}; or update the driver")
    elif device.toolkit is None and device.gpus:
        what = f"{names} is here, and torch is built for the CPU alone"
        yield found("torch-without-gpu", what, "pip install --force-reinstall torch")
    elif device.toolkit is not None and not device.gpus:
        yield found("no-gpu", f"torch is built for {device.toolkit}; no GPU was found", "")
    elif device.torch_sees_gpu:
        yield from _check_architectures(facts)


def _check_architectures(facts: Facts) -> Iterator[Finding]:
    built = facts.device.architectures
    for gpu in facts.device.gpus:
        if not runs_on(gpu, built):
            yield found(
                "gpu-not-in-torch",
                f"{gpu.name} has capability {gpu.capability}, and torch has {', '.join(built)}",
                "install a build of torch for it: https://pytorch.org/get-started/locally",
            )


def runs_on(gpu: Gpu, architectures: tuple[str, ...]) -> bool:
    """Whether one of CUDA's architectures runs on a GPU; true where none of them is CUDA's.

    Code for `sm_80` runs on 8.0 and later minors of 8; `compute_80` is compiled for any later GPU.
    """
    major, minor = (int(part) for part in gpu.capability.split("."))
    built = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name) for name in architectures]
    known = [(match[1], int(match[2]), int(match[3])) for match in built if match]
    return not known or any(
        (major, minor) >= (on, least) and (major == on or kind == "compute")
        for kind, on, least in known
    )


def check_compiler(facts: Facts) -> Iterator[Finding]:
    """Whether what is missing could be compiled."""
    compiler = facts.compiler
    if compiler.program is None:
        filled = any(layer.programs for layer in facts.layers)
        kind = "no-compiler-for-misses" if filled else "no-compiler"
        yield found(kind, "no C++ compiler was found", "apt-get install g++")
    if facts.device.torch_sees_gpu and compiler.c_program is None:
        yield found("no-c-compiler", "no C compiler was found", "apt-get install gcc")
    program = compiler.program or compiler.c_program
    if program is not None and not compiler.python_headers:
        what = f"{program} is here, and Python.h is not"
        yield found("no-python-headers", what, "apt-get install python3-dev")


def check_loading(facts: Facts) -> Iterator[Finding]:
    """Whether kernels can be loaded as vllmc does it."""
    if not facts.memory_files:
        what = "a file in memory could not be made and mapped as code"
        yield found("kernels-cannot-be-loaded", what, "mount /proc, and allow memfd_create")


def check_temporary(facts: Facts) -> Iterator[Finding]:
    """Whether Inductor has a place to compile in."""
    place = facts.temporary
    if place is None:
        what = "no directory for temporary files can be written to"
        yield found("no-temporary-directory", what, "export TMPDIR=DIR")
        return
    another = "export TORCHINDUCTOR_CACHE_DIR=DIR"
    if not place.writable:
        what = f"{place.path} cannot be written to"
        yield found("temporary-directory-not-writable", what, another)
    if place.mount is not None and "noexec" in place.mount.options:
        what = f"{place.path} lies on {place.mount.point}, which is mounted noexec"
        yield found("temporary-directory-noexec", what, another)
    if place.space is not None and place.space.free_bytes < ROOM_TO_COMPILE:
        what = f"{place.path} has {place.space.free_bytes // 10**6} MB left"
        yield found("temporary-directory-full", what, another)


def check_variables(facts: Facts) -> Iterator[Finding]:
    """Whether variables say what was meant, and the same at each start."""
    for name, meant in facts.unknown_variables.items():
        fix = f"did you mean {meant}?" if meant else f"unset {name}"
        yield found("unknown-variable", f"vllmc knows no variable {name}", fix)
    for name in facts.empty_variables:
        yield found("empty-variable", f"{name} is set to nothing", f"unset {name}")
    for name, value in facts.variables.items():
        if local := _what_differs(facts, value):
            what = f"{name}={shlex.quote(value)} holds {local}"
            yield found("variable-differs-each-start", what, f"unset {name}")
    if facts.variables:
        what = f"set: {', '.join(facts.variables)}"
        yield found("variables-in-key", what, "vllmc inspect-key MODEL shows what they set")


def _what_differs(facts: Facts, value: str) -> str:
    """What of `value` is of this start alone; "" where nothing is."""
    if re.search(_ADDRESS, value):
        return "an address"
    if len(facts.host) >= _SHORTEST_HOST and facts.host in value:
        return "this host's name"
    if re.search(r"(?<![\w/])/(?:var/)?tmp/", value):
        return "a path in a temporary directory"
    return ""


def check_config(facts: Facts) -> Iterator[Finding]:
    """Whether the options come from a file that another start may not read."""
    if facts.config_file is not None and not facts.config_named:
        what = f"{facts.config_file} was found in the working directory"
        yield found("config-by-directory", what, f"export VLLMC_CONFIG={facts.config_file}")


def check_hub(facts: Facts) -> Iterator[Finding]:
    """Whether models of the hub can be had at all."""
    if facts.hub.offline and not facts.hub.exists:
        what = f"HF_HUB_OFFLINE is set, and there is no {facts.hub.path}"
        yield found("hub-offline-empty", what, "export HF_HOME=DIR, or unset HF_HUB_OFFLINE")
