"""What `vllmc doctor` looks at, as values: checks are functions of these. Imports no torch.

None stands for what could not be found out, wherever nothing else is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["directory", "missing", "not-a-directory", "unreachable"]
Role: TypeAlias = Literal["written", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """The mount that a path lies on, as `/proc/self/mountinfo` has it.

    `root` is the directory of the file system that is mounted at `point`; that of a volume names
    what made it. `kind` is the type (`ext4`, `overlay`, `fuse.gcsfuse`).
    """

    point: str
    root: str
    kind: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Room on a file system: what this user may still take, and all there is.

    Both counts of inodes are 0 where the file system has no fixed number of them.
    """

    free_bytes: int
    total_bytes: int
    free_inodes: int
    total_inodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A directory that is, or would be made.

    `state` is `unreachable` where the path leads through what this user may not enter, and
    `reason` says why it is no directory. `resolved` is the path without links. `existing` is the
    deepest directory on the way that there is; mount and space are its own, and `writable` says
    whether this user may make files in it. `owner` (a user id) and `mode` (the permission bits)
    are the directory's own.
    """

    path: str
    state: State
    reason: str
    resolved: str
    existing: str
    owner: int | None
    mode: int | None
    readable: bool
    writable: bool
    mount: Mount | None
    space: Space | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A directory of the cache, and who named it.

    `given` is what was typed or set, before `~` and the working directory; empty for the default.
    The first layer is `written`, all others are only `read`. `newest` is when the newest of its
    `programs` was written, in unix seconds. Of its records `untrusted` ones would be refused unless
    unsigned ones are asked for. Of its files `unreadable` ones, or a directory of such, are closed
    to this user. `leftovers` are files that processes which died left behind a day ago or earlier,
    of `leftover_bytes` bytes.
    """

    place: Place
    given: str
    origin: str
    role: Role
    programs: int
    newest: float | None
    untrusted: int
    unreadable: int
    leftovers: int
    leftover_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An installed package that vllmc needs, and the oldest version that will do.

    `version` is what its metadata says. `file_version` is what its own module says, which is read
    without importing it; None where no module says it.
    """

    name: str
    oldest: str
    version: str | None
    file_version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU: its name, and its compute capability (`9.0`)."""

    name: str
    capability: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The GPUs here, and what torch makes of them.

    `toolkit` is what torch is built for (`CUDA 13.0`, `ROCm 7.0`); None for the CPU alone. `hidden`
    says whether `CUDA_VISIBLE_DEVICES` lets no GPU be seen. `driver` is the version of NVIDIA's.
    `gpus` are those that torch sees, or those that `nvidia-smi` lists where torch sees none. torch
    is asked only where there is a driver and a torch for it: `torch_sees_gpu` is None where it was
    not, and `torch_failure` is why it could not answer. `architectures` are those that its kernels
    are built for (`sm_90`, `compute_90`).
    """

    toolkit: str | None
    hidden: bool
    driver: str | None
    gpus: tuple[Gpu, ...]
    torch_sees_gpu: bool | None
    torch_failure: str
    architectures: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """The C++ compiler that Inductor would run, the C compiler that Triton would, and whether there
    is what both include: the headers of Python.
    """

    program: str | None
    version: str | None
    c_program: str | None
    python_headers: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Who runs this: the effective user id, its name in the password file, and `HOME`.

    `sudo_user` is who became this user; empty where nobody did.
    """

    uid: int
    name: str | None
    home: str | None
    sudo_user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """The cache of the model hub, and whether models may only come from there."""

    path: str
    exists: bool
    offline: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that the checks look at.

    `layers` has at least one; `trust_unsigned` says that also what others may have written there
    is used. `temporary_files` is the directory of temporary files; None where
    none can be written to. `temporary` is where Inductor compiles: `TORCHINDUCTOR_CACHE_DIR`, else
    the same; None where there is neither. `memory_files` says
    whether a compiled kernel can be loaded from memory, as vllmc does. `container` and `ci` name
    the kind (`Kubernetes`, `GitHub Actions`), and are empty outside of one. `started` is when the
    container, or the machine, was started (its first process), in unix seconds. `config_named` says
    whether the config file was named, or only found in the working directory. `variables` are those
    that may be part of a key, with their values; `unknown_variables` are called as vllmc's are and
    mean nothing, each with the one that may be meant (or ""); `empty_variables` are set to nothing.
    """

    vllmc: str | None
    python: str
    platform: str
    packages: tuple[Package, ...]
    device: Device
    compiler: Compiler
    memory_files: bool
    layers: tuple[Layer, ...]
    trust_unsigned: bool
    temporary: Place | None
    temporary_files: str | None
    user: User
    host: str
    container: str
    started: float | None
    ci: str
    config_file: str | None
    config_named: bool
    hub: Hub
    variables: Mapping[str, str]
    unknown_variables: Mapping[str, str]
    empty_variables: tuple[str, ...]
