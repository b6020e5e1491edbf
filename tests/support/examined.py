"""Facts of a machine on which `vllmc doctor` finds nothing, to be changed by tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllmc.core.diagnose.doctor_facts import (
    Compiler,
    Device,
    Facts,
    Hub,
    Layer,
    Mount,
    Package,
    Place,
    Space,
    User,
)

PATH = "/data/vllmc"
STARTED = 1_700_000_000.0
DISK = Mount(point="/data", root="/", kind="ext4", options=("relatime", "rw"))
PLENTY = Space(
    free_bytes=10**11, total_bytes=10**12, free_inodes=10**6, total_inodes=10**7
)  # fmt: skip


def place(path: str = PATH, **changes: Any) -> Place:
    healthy = Place(
        path=path,
        state="directory",
        reason="",
        resolved=path,
        existing=path,
        owner=1000,
        mode=0o700,
        readable=True,
        writable=True,
        mount=DISK,
        space=PLENTY,
    )
    return replace(healthy, **changes)


def layer(*, at: Place | None = None, **changes: Any) -> Layer:
    healthy = Layer(
        place=at or place(),
        given=PATH,
        origin="env:VLLMC_CACHE_DIR",
        role="written",
        programs=3,
        newest=STARTED - 3600,
        untrusted=0,
        unreadable=0,
        leftovers=0,
        leftover_bytes=0,
    )
    return replace(healthy, **changes)


def device(**changes: Any) -> Device:
    healthy = Device(
        toolkit=None,
        hidden=False,
        driver=None,
        gpus=(),
        torch_sees_gpu=None,
        torch_failure="",
        architectures=(),
    )
    return replace(healthy, **changes)


def machine(**changes: Any) -> Facts:
    healthy = Facts(
        vllmc="0.1.0",
        python="CPython 3.12.1",
        platform="linux x86_64",
        packages=(
            Package(name="torch", oldest="2.11", version="2.13.0+cpu", file_version="2.13.0+cpu"),
        ),
        device=device(),
        compiler=Compiler(
            program="/usr/bin/g++", version="g++ 14", c_program="/usr/bin/gcc", python_headers=True
        ),
        memory_files=True,
        layers=(layer(),),
        trust_unsigned=False,
        temporary=place("/tmp", mode=0o1777, owner=0),
        temporary_files="/tmp",
        user=User(uid=1000, name="ada", home="/home/ada", sudo_user=""),
        host="pod-7d9f",
        container="",
        started=STARTED,
        ci="",
        config_file=None,
        config_named=False,
        hub=Hub(path="/home/ada/.cache/huggingface/hub", exists=True, offline=False),
        variables={},
        unknown_variables={},
        empty_variables=(),
    )
    return replace(healthy, **changes)
