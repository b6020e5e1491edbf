"""What the torch, the CPU, the GPU and the C++ compiler here are, as far as code depends on it.

Slow answers are remembered below the cache directory (`vllmc.core.cache.facts`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import pkgutil
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import FileFinder
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from vllmc.core.cache.facts import remembered
from vllmc.core.errors import VllmcError
from vllmc.core.torch_compat.compilers import compiler_version
from vllmc.core.torch_compat.minors import TORCH

if TYPE_CHECKING:
    from vllmc.core.cache.key import JsonValue

_X86_LEVELS: Final = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")
# The levels of the x86-64 ABI, as far as torch reports what they ask for.
_X86_LEVEL_3: Final = ("avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt")
_X86_LEVEL_4: Final = (
    *_X86_LEVEL_3,
    "avx512_f",
    "avx512_bw",
    "avx512_cd",
    "avx512_dq",
    "avx512_vl",
)
# What Inductor asks the CPU for beyond its level: torch/_inductor/cpu_vec_isa.py.
_X86_EXTENSIONS: Final = (
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
)


def torch_key_hex(cache: Path | None) -> str:
    """SHA-256 over torch's version and Python sources, as 64 hex digits: Inductor's `torch_key`.

    It reads all of torch (0.3 s), so it is remembered under the digest of the installed build's
    RECORD, which lists every file's digest; a torch edited in place is not noticed until then.
    Without `cache` or RECORD it is computed.
    """
    # Its directory's name need not end in torch.__version__: builds for CUDA leave `+cu130` out.
    records = list(Path(torch.__file__).parents[1].glob("torch-*.dist-info/RECORD"))
    try:
        [build] = [hashlib.sha256(record.read_bytes()).hexdigest() for record in records]
    except (OSError, ValueError):
        return _torch_key()
    return remembered(cache, f"torch_key-{build}", _torch_key)


def _torch_key() -> str:
    # What torch._inductor.codecache.torch_key computes, without its import of a second.
    root = Path(torch.__file__).parent
    hasher = hashlib.sha256(str(torch.__version__).encode())
    for name, file in _modules([str(root)], ""):
        hasher.update(name.encode())
        hasher.update(Path(file).read_bytes())
    for extra in TORCH.keyed_files:
        with contextlib.suppress(FileNotFoundError):
            hasher.update((root / "_inductor" / extra).read_bytes())
    return hasher.hexdigest()


def _modules(places: Sequence[str], prefix: str) -> Iterator[tuple[str, str]]:
    """The name and file of each module below `places`, a package before what is in it."""
    for module in sorted(pkgutil.iter_modules(places, prefix), key=lambda found: found.name):
        assert isinstance(module.module_finder, FileFinder)
        spec = module.module_finder.find_spec(module.name)
        assert spec is not None
        assert spec.origin is not None
        yield spec.name, spec.origin
        if spec.submodule_search_locations is not None:
            yield from _modules(spec.submodule_search_locations, f"{spec.name}.")


def triton_version() -> str | None:
    """The version of the installed Triton; None without one."""
    return _version("triton")


def transformers_version() -> str | None:
    """The version of the installed Transformers; None without one. Imports nothing."""
    return _version("transformers")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_capability() -> str:
    """The instruction set that torch's own kernels use (`AVX2`, `AVX512`, ...).

    It follows `ATEN_CPU_CAPABILITY`, and so does what Inductor picks.
    """
    return torch.backends.cpu.get_cpu_capability()


def portable_march() -> str | None:
    """The level of the x86-64 ABI that this CPU has, as a compiler's `-march`; None elsewhere.

    Not above what `cpu_capability` says.
    """
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return None
    has = torch.cpu.get_capabilities()
    capability = cpu_capability()
    if capability == "AVX512" and all(has[feature] for feature in _X86_LEVEL_4):
        return "x86-64-v4"
    if capability in ("AVX2", "AVX512") and all(has[feature] for feature in _X86_LEVEL_3):
        return "x86-64-v3"
    return "x86-64"


def runs_code_for(march: object) -> bool:
    """Whether this CPU surely runs what a compiler makes under `-march=march`."""
    if march in (None, "native"):
        return True
    here = portable_march()
    return here in _X86_LEVELS and march in _X86_LEVELS[: _X86_LEVELS.index(here) + 1]


def cpu_features(*, march: str | None) -> list[str]:
    """The features of this CPU that code compiled with `-march=march` may use, sorted.

    Under a fixed level those are what Inductor adds to it. Under `native` (None is Inductor's
    word for that) the compiler may use any feature, so all of them count, and code is shared only
    between like CPUs.
    """
    has = torch.cpu.get_capabilities()
    present = {name for name, value in has.items() if value is True}
    if march not in (None, "native") and has["architecture"] == "x86_64":
        present &= {*_X86_LEVEL_4, *_X86_EXTENSIONS}
    lengths = [f"{name}={value}" for name, value in has.items() if name.endswith("_max_length")]
    return sorted([*present, *lengths])


def device_properties(device: str) -> dict[str, JsonValue]:
    """What generated code depends on of a device (`cpu`, `cuda`, `cuda:N`), drivers left out.

    Raises `VllmcError` (`no-device`) for a GPU that is not there.
    """
    kind = torch.device(device)
    if kind.type == "cpu":
        return {"type": "cpu", "architecture": platform.machine(), "platform": sys.platform}
    if kind.type != "cuda" or not 0 <= (kind.index or 0) < torch.cuda.device_count():
        raise VllmcError(
            "no-device",
            f"there is no device '{device}' on this machine",
            context={"device": device, "cuda_devices": torch.cuda.device_count()},
            hint="--device cpu compiles for the CPU",
        )
    properties = torch.cuda.get_device_properties(kind)
    return {
        "type": "cuda",
        "architecture": platform.machine(),
        "platform": sys.platform,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "toolkit": torch.version.cuda or torch.version.hip,
    }


def torch_state(device: str) -> dict[str, JsonValue]:
    """Switches of torch itself, no config options, that change what is captured or generated.

    The settings are those of Inductor's own cache key (`FxGraphHashDetails` in
    torch/_inductor/codecache.py) and the ambient autocast.
    """
    kind = torch.device(device).type
    state: dict[str, JsonValue] = {
        "default_dtype": str(torch.get_default_dtype()),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill_uninitialized_memory": torch.utils.deterministic.fill_uninitialized_memory,
        "autocast": str(torch.get_autocast_dtype(kind))
        if torch.is_autocast_enabled(kind)
        else None,
        "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
    }
    if kind == "cuda":
        matmul = torch.backends.cuda.matmul
        state["cuda_matmul"] = [
            matmul.fp32_precision,
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
        ]
    return state


def cxx_compiler(
    candidates: Sequence[str | None], *, search_path: str, cache: Path | None
) -> str | None:
    """The first of `candidates` on `search_path`, with its version; None where there is none.

    Asking a compiler starts a process, so the answer is remembered under the program's path, size
    and time of change. Entries that are None (Inductor's word for a download) are passed over.
    """
    for candidate in filter(None, candidates):
        if (found := shutil.which(candidate, path=search_path)) is not None:
            program = Path(found)
            status = program.stat()
            facts = f"{program.resolve()}|{status.st_size}|{status.st_mtime_ns}"
            name = f"cxx-{hashlib.sha256(facts.encode()).hexdigest()}"
            version = remembered(cache, name, lambda: compiler_version(found))
            return f"{program.name}: {version}"
    return None
