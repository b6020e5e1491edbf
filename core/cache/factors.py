"""The factors of a program's and a unit's cache key, all but the model, the graph and the range.

`factor_table` says what they are, and docs/cache-key.md is made from both.
"""

from __future__ import annotations

import hashlib
import importlib
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
import xxhash

from vllmc.core.cache.factor_table import CUDA_ENVIRONMENT, ENVIRONMENT, NO_FACTORS
from vllmc.core.cache.key import Factor, JsonValue
from vllmc.core.cache.redaction import hide, redact
from vllmc.core.errors import VllmcError
from vllmc.core.graph.passes.manager import identity
from vllmc.core.passes import PASSES, default_passes
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat import system
from vllmc.core.torch_compat.config import (
    Overrides,
    cxx_candidates,
    snapshot,
    vllmc_overrides,
)
from vllmc.core.torch_compat.config_scope import EXCLUDED

# One factor each, so that a diff names the package. Relative to the directory of vllmc.core or
# vllmc.kernels; what only displays, stores or explains is not here.
_CODE: Final[Sequence[tuple[str, str, tuple[str, ...]]]] = (
    ("core.declare", "vllmc.core", ("declare/**/*.py",)),
    ("core.graph", "vllmc.core", ("graph/**/*.py",)),
    ("core.compiler", "vllmc.core", ("compiler/**/*.py",)),
    ("core.models", "vllmc.core", ("models/**/*.py",)),
    ("core.torch_compat", "vllmc.core", ("torch_compat/**/*.py",)),
    ("core.runtime", "vllmc.core", ("runtime/program*.py", "runtime/loader*.py")),
    ("core.pipeline", "vllmc.core", ("pipeline.py",)),
    ("kernels", "vllmc.kernels", ("**/*.py",)),
)

UNIT_GROUPS: Final = frozenset({"environment", "system", "inductor", "functorch", "passes"})
"""The groups that a single artifact depends on whole."""

UNIT_FACTORS: Final = frozenset(
    {
        ("versions", "python"),
        ("versions", "python_abi"),
        ("versions", "torch"),
        ("versions", "torch_key"),
        ("versions", "triton"),
        ("code", "core.graph"),
        ("code", "core.compiler"),
        ("code", "core.torch_compat"),
        ("code", "kernels"),
        ("spec", "dtype"),
        ("spec", "device"),
        ("spec", "dynamic_shapes"),
        ("spec", "backend"),
    }
)
"""(group, name) of the factors of other groups that it depends on."""

Origins = Mapping[tuple[str, str], str]


def program_factors(
    *,
    spec: CompileSpec,
    model_factors: Iterable[Factor],
    environment: Mapping[str, str],
    cache_dir: Path | None,
    option_origins: Origins,
) -> tuple[Factor, ...]:
    """Every factor of a program's key, known before anything is captured.

    `environment` is what the process was started with; `cache_dir` is where slow answers are
    remembered. `option_origins` says where the user's values came from, by (group, name): an
    option's in group `inductor` or `functorch`, a field of the spec in group `spec`. Secrets are
    redacted (`redaction`). Raises `UsageError` for options that torch does not have, `VllmcError`
    (`no-device`).
    """
    overrides = vllmc_overrides(spec)
    return (
        *_environment(spec, environment),
        *_versions(cache_dir),
        *_system(spec, overrides, environment, cache_dir),
        *_code(),
        *_configs(overrides, environment, option_origins),
        *_spec(spec, option_origins),
        *_passes(spec, option_origins),
        *model_factors,
    )


def unit_factors(program_factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """Those of a program's factors that a single artifact depends on.

    Neither model nor sources, list of ranges or Dynamo's settings: what they come to is in the
    piece's graph, whose digest and range are factors of the unit's own.
    """
    return tuple(
        factor
        for factor in program_factors
        if factor.group in UNIT_GROUPS or factor.identity in UNIT_FACTORS
    )


def check_in_force(factors: Iterable[Factor], spec: CompileSpec, *, code: bool = False) -> None:
    """Raises `VllmcError` (`config-changed`) unless compiling here and now is what `factors` say.

    With `code`, vllmc's own files count too: a process that starts later may read others.

    Overrides of torch's configs are local to a thread, and its switches global to the process: a
    key made in one place must not name what is compiled in another.
    """
    overrides = vllmc_overrides(spec)
    now = [*_configs(overrides, {}, {}), *_torch_state(spec), *(_code() if code else ())]
    known = {factor.identity: factor for factor in factors}
    changed = [f for f in now if known.get(f.identity, f).digest != f.digest]
    if not changed:
        return
    first = changed[0]
    raise VllmcError(
        "config-changed",
        f"{first.group}.{first.name} is another here than where the key was made",
        context={
            "options": [f"{f.group}.{f.name}" for f in changed],
            "in the key": known[first.identity].value,
            "here": redact(first.name, first.value, random=True),
        },
        hint="make the job and compile it in one thread, under the same torch options",
    )


def excluded() -> tuple[tuple[str, str], ...]:
    """(name, reason) of each thing that is no factor, though it might seem to be one."""
    options = [(f"{group}.{name}", reason) for (group, name), reason in EXCLUDED.items()]
    return (*sorted(options), *sorted(NO_FACTORS.items()))


def _environment(spec: CompileSpec, environment: Mapping[str, str]) -> Iterator[Factor]:
    names = [*ENVIRONMENT, *(CUDA_ENVIRONMENT if spec.device != "cpu" else ())]
    for name in sorted(names):
        value = environment.get(name)
        yield hide(
            Factor(
                group="environment",
                name=name,
                value=value and _content(value),
                origin="default" if value is None else f"env:{name}",
                is_default=value is None,
            )
        )
    yield from _torch_state(spec)


def _torch_state(spec: CompileSpec) -> Iterator[Factor]:
    for name, state in system.torch_state(spec.device).items():
        yield _probed("environment", f"torch.{name}", state)


def _content(value: str) -> str:
    """`value`, or the digest of the file that it names: paths differ between machines."""
    if not Path(value).is_absolute():
        return value
    try:
        return f"file:{xxhash.xxh3_128_hexdigest(Path(value).read_bytes())}"
    except OSError:
        return "file:unreadable"


def _versions(cache_dir: Path | None) -> Iterator[Factor]:
    abi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    implementation = sys.implementation.name
    yield _probed(
        "versions", "python", f"{implementation} {sys.version_info.major}.{sys.version_info.minor}"
    )
    yield _probed("versions", "python_abi", str(abi))
    yield _probed("versions", "torch", str(torch.__version__))
    yield _probed("versions", "torch_key", system.torch_key_hex(cache_dir))
    yield _probed("versions", "triton", system.triton_version())
    yield _probed("versions", "transformers", system.transformers_version())
    yield _probed("versions", "python_full", platform.python_version(), affects_key=False)


def _system(
    spec: CompileSpec,
    overrides: Overrides,
    environment: Mapping[str, str],
    cache_dir: Path | None,
) -> Iterator[Factor]:
    for name, value in system.device_properties(spec.device).items():
        yield _probed("system", f"device_{name}", value)
    march = dict(overrides.inductor).get("cpp.march")
    assert march is None or isinstance(march, str)
    yield _probed("system", "cpu_capability", system.cpu_capability())
    yield _probed("system", "cpu_features", list(system.cpu_features(march=march)))
    compiler = system.cxx_compiler(
        cxx_candidates(overrides), search_path=environment.get("PATH", ""), cache=cache_dir
    )
    yield _probed("system", "cxx_compiler", compiler, affects_key=False)


def _code() -> Iterator[Factor]:
    for name, package, patterns in _CODE:
        root = Path(importlib.import_module(package).__path__[0])
        files = {file for pattern in patterns for file in root.glob(pattern)}
        hasher = hashlib.sha256()
        for file in sorted(files):
            content = file.read_bytes()
            relative = file.relative_to(root).as_posix()
            hasher.update(f"{relative}\0{len(content)}\0".encode())
            hasher.update(content)
        yield _probed("code", name, hasher.hexdigest())


def _configs(
    overrides: Overrides, environment: Mapping[str, str], origins: Origins
) -> Iterator[Factor]:
    for group in ("inductor", "functorch", "dynamo"):
        for entry in snapshot(group, overrides, environment=environment, option_origins=origins):
            yield hide(
                Factor(
                    group=group,
                    name=entry.name,
                    value=entry.value,
                    origin=entry.origin,
                    is_default=entry.is_default,
                )
            )


def _spec(spec: CompileSpec, origins: Origins) -> Iterator[Factor]:
    # Their order, and saying one twice, mean nothing.
    values: Mapping[str, Callable[[CompileSpec], JsonValue]] = {
        "device": lambda s: s.device,
        "dtype": lambda s: s.dtype,
        "ranges": lambda s: [str(r) for r in sorted(s.ranges)],
        "sizes": lambda s: [*sorted(set(s.sizes))],
        "dynamic_shapes": lambda s: s.dynamic_shapes,
        "layer_names": lambda s: s.layer_names,
        "experts": lambda s: s.experts,
        "splitting_ops": lambda s: [*sorted(set(s.splitting_ops))],
        "split_kv_update": lambda s: s.split_kv_update,
        "quantize": lambda s: s.quantize,
        "backend": lambda s: s.backend,
    }
    default = CompileSpec()
    for name, value_of in values.items():
        yield Factor(
            group="spec",
            name=name,
            value=value_of(spec),
            origin=origins.get(("spec", name), "default"),
            is_default=value_of(spec) == value_of(default),
        )


def _passes(spec: CompileSpec, origins: Origins) -> Iterator[Factor]:
    """One for each pass that there is, None where it does not run."""
    choices = {choice.name: choice for choice in spec.chosen_passes}
    defaults = {choice.name: choice for choice in default_passes(spec.device)}
    for name in PASSES:
        choice = choices.get(name)
        yield Factor(
            group="passes",
            name=name,
            value=None if choice is None else identity(choice),
            origin=origins.get(("passes", name), "default"),
            is_default=choice == defaults.get(name),
        )


def _probed(group: str, name: str, value: JsonValue, *, affects_key: bool = True) -> Factor:
    return Factor(group=group, name=name, value=value, origin="probe", affects_key=affects_key)
