"""Gathers the facts for `vllmc doctor`. Imports no torch, changes nothing, and reads no variable
but those it is given.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import platform
import pwd
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllmc.core.cache.factor_table import CUDA_ENVIRONMENT, ENVIRONMENT
from vllmc.core.cache.redaction import redact
from vllmc.core.cache.trust import Trust
from vllmc.core.diagnose.doctor_facts import Facts, Hub, Layer, Mount, User
from vllmc.core.diagnose.doctor_places import Named, look_at, look_into_layer, read_mounts
from vllmc.core.diagnose.doctor_software import (
    has_memory_files,
    installed_version,
    look_at_compiler,
    look_at_device,
    look_at_packages,
)

_OURS: Final = "VLLMC_"
_PREFIXES: Final = ("TORCHINDUCTOR_", "TORCHDYNAMO_")
_OTHERS: Final = frozenset({*ENVIRONMENT, *CUDA_ENVIRONMENT, "ATEN_CPU_CAPABILITY"})
# They set what is no factor: torch.compat's config_scope says why.
_NOT_IN_KEYS: Final = frozenset(
    {
        "TORCHINDUCTOR_AUTOGRAD_CACHE",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCHINDUCTOR_COMPILE_THREADS",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES",
        "TORCHINDUCTOR_FX_GRAPH_CACHE",
        "TORCHINDUCTOR_WORKER_START",
    }
)
_CONTAINERS: Final = (("/run/.containerenv", "Podman"), ("/.dockerenv", "Docker"))
_CI: Final = (
    ("GITHUB_ACTIONS", "GitHub Actions"),
    ("GITLAB_CI", "GitLab CI"),
    ("BUILDKITE", "Buildkite"),
    ("JENKINS_URL", "Jenkins"),
    ("CI", "CI"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured:
    """What the settings say: the directories of the cache, the first of them to be written to; who
    is trusted; the config file, and whether it was named or found; the names of all variables of
    vllmc.
    """

    layers: Sequence[Named]
    trust: Trust
    config_file: Path | None
    config_named: bool
    known_variables: Sequence[str]


def gather(configured: Configured, environment: Mapping[str, str]) -> Facts:
    """The facts about this machine, under these settings and variables."""
    mounts = read_mounts()
    search_path = environment.get("PATH", os.defpath)
    file = configured.config_file
    temporary_files = _temporary_files()
    compiling = environment.get("TORCHINDUCTOR_CACHE_DIR") or temporary_files
    return Facts(
        vllmc=installed_version("vllmc"),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=f"{sys.platform} {platform.machine()}",
        packages=look_at_packages(),
        device=look_at_device(
            search_path=search_path, visible=environment.get("CUDA_VISIBLE_DEVICES")
        ),
        compiler=look_at_compiler(
            cxx=environment.get("CXX"), cc=environment.get("CC"), search_path=search_path
        ),
        memory_files=has_memory_files(),
        layers=_layers(configured, mounts),
        trust_unsigned=configured.trust.unsigned,
        temporary=None if compiling is None else look_at(Path(compiling).absolute(), mounts),
        temporary_files=temporary_files,
        user=_user(environment),
        host=platform.node(),
        container=_container(environment),
        started=_started(),
        ci=next((name for variable, name in _CI if _says_yes(environment.get(variable))), ""),
        config_file=None if file is None else str(file),
        config_named=configured.config_named,
        hub=_hub(environment),
        variables={
            name: str(redact(name, value, random=True))
            for name, value in sorted(environment.items())
            if (name.startswith(_PREFIXES) or name in _OTHERS) and name not in _NOT_IN_KEYS
        },
        unknown_variables=_unknown(environment, configured.known_variables),
        empty_variables=tuple(
            name for name in configured.known_variables if environment.get(name, "x").strip() == ""
        ),
    )


def _layers(configured: Configured, mounts: tuple[Mount, ...]) -> tuple[Layer, ...]:
    return tuple(
        look_into_layer(
            named, role="read" if index else "written", mounts=mounts, trust=configured.trust
        )
        for index, named in enumerate(configured.layers)
    )


def _temporary_files() -> str | None:
    try:
        # It tries to write in each candidate, as it does for Inductor.
        return tempfile.gettempdir()
    except FileNotFoundError:
        return None


def _user(environment: Mapping[str, str]) -> User:
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = None
    return User(
        uid=uid,
        name=name,
        home=environment.get("HOME") or None,
        sudo_user=environment.get("SUDO_USER", ""),
    )


def _container(environment: Mapping[str, str]) -> str:
    if environment.get("KUBERNETES_SERVICE_HOST"):
        return "Kubernetes"
    for file, name in _CONTAINERS:
        if os.path.lexists(file):
            return name
    # systemd-nspawn and LXC say so of themselves (systemd.io/CONTAINER_INTERFACE).
    return environment.get("container", "")


def _says_yes(value: str | None) -> bool:
    return (value or "0").lower() not in ("0", "false")


def _started() -> float | None:
    """When process 1 was started: proc_pid_stat(5), field 22, and `btime` of proc_stat(5)."""
    try:
        # The second field is a name in parentheses, which may hold anything.
        fields = Path("/proc/1/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(encoding="utf-8"), re.M)
        ticks = int(fields[19])
    except (OSError, UnicodeDecodeError, IndexError, ValueError):
        return None
    return int(boot[1]) + ticks / os.sysconf("SC_CLK_TCK") if boot else None


def _hub(environment: Mapping[str, str]) -> Hub:
    # As huggingface_hub.constants has it.
    home = Path(environment.get("HOME") or "~")
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    hub = Path(environment.get("HF_HOME") or cache / "huggingface") / "hub"
    path = Path(environment.get("HF_HUB_CACHE") or hub)
    with contextlib.suppress(RuntimeError):  # a home that nobody has
        path = path.expanduser()
    offline = environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return Hub(path=str(path), exists=os.access(path, os.R_OK | os.X_OK), offline=offline)


def _unknown(environment: Mapping[str, str], known: Sequence[str]) -> dict[str, str]:
    # The beginning, which all share, would make any name resemble any other.
    ends = [name.removeprefix(_OURS) for name in known]
    unknown = {}
    for name in sorted(environment):
        if name.startswith(_OURS) and name not in known:
            near = difflib.get_close_matches(name.removeprefix(_OURS), ends, n=1)
            unknown[name] = f"{_OURS}{near[0]}" if near else ""
    return unknown
