"""Torch's configs, read as cache key factors and overridden, in one place.

`applied` is the only function that overrides them. `snapshot` enters it, and compilation must:
then a key describes the very settings that its code was generated under.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from torch.utils._config_module import _UNSET_SENTINEL

from vllmc.core.torch_compat.config_modules import import_config, present_config, value_of
from vllmc.core.torch_compat.config_scope import CAPTURE, EXCLUDED
from vllmc.core.torch_compat.config_source import default_without_environment, variables_of
from vllmc.core.torch_compat.config_values import canonical, stable
from vllmc.core.torch_compat.minors import TORCH
from vllmc.core.torch_compat.options import MODULES, OptionGroup, check_option, option_names
from vllmc.core.torch_compat.system import portable_march

if TYPE_CHECKING:
    from vllmc.core.cache.key import JsonValue
    from vllmc.core.spec import CompileSpec, OptionValue

Group: TypeAlias = Literal["inductor", "functorch", "dynamo"]

_CAPTURE_PREFIXES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "compiler.": "torch.compiler.config",
        "symbolic_shapes.": "torch.fx.experimental._config",
        "": "torch._dynamo.config",
    }
)

_STORE: Final = (
    "vllmc's store takes the place of torch's caches: a hit in one of them would leave it unclear "
    "what was compiled, and with what"
)
VLLMC_SETS: Final[Mapping[tuple[Group, str], tuple[OptionValue, str]]] = MappingProxyType(
    {
        ("inductor", "cpp.vec_isa_ok"): (
            True,
            "Inductor would compile and load a test program to learn whether the compiler can "
            "build for this CPU's instruction set: half of a process's first compile. What the "
            "CPU can do is a factor of its own, and a compiler that cannot build for it fails "
            "with its own message",
        ),
        ("inductor", "cpp.dynamic_threads"): (
            True,
            "else the number of threads of the compiling machine is baked into parallel regions "
            "and reduction buffers (`num_threads(2)`); so the code asks OpenMP when it runs",
        ),
        ("inductor", "cpp.threads"): (
            8,
            "even so Inductor weighs how many loops to share out among how many threads. -1 is "
            "this machine's number; 1 would leave out the `omp single` around serial parts of a "
            "parallel region. With 8, a row of 4096 elements (8 x `cpp.min_chunk_size`) is worth "
            "sharing",
        ),
        ("inductor", "aot_inductor.enable_line_tables"): (
            False,
            "debug information names the directory that was compiled in, so that the bytes of an "
            "artifact would depend on it, and is half of them",
        ),
        ("inductor", "fx_graph_cache"): (False, _STORE),
        ("inductor", "fx_graph_remote_cache"): (False, _STORE),
        ("functorch", "enable_autograd_cache"): (False, _STORE),
        ("functorch", "enable_remote_autograd_cache"): (False, _STORE),
    }
)
"""(group, name) of the options that vllmc sets, with the value and the reason.

Beside them `cpp.march`, whose value depends on the machine.
"""

_ONE_THREAD: Final = threading.RLock()
_NO_ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType({})
_NO_ORIGINS: Final[Mapping[tuple[str, str], str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """The options that compilation runs under, sorted by name; the others stay as torch has them.

    `chosen` are the (group, name) of those that the user gave; the rest are vllmc's own.
    """

    inductor: tuple[tuple[str, OptionValue], ...]
    functorch: tuple[tuple[str, OptionValue], ...]
    chosen: frozenset[tuple[str, str]]

    def of(self, group: Group) -> dict[str, OptionValue]:
        """The overrides of one config; vllmc overrides none of Dynamo's."""
        if group == "dynamo":
            return {}
        return dict(self.inductor if group == "inductor" else self.functorch)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigEntry:
    """One setting: `origin` as in `Factor`, `is_default` against torch's default without variables.

    Values that are not JSON stand as stable texts, see `config_values.stable`.
    """

    name: str
    value: JsonValue
    is_default: bool
    origin: str


def vllmc_overrides(spec: CompileSpec) -> Overrides:
    """What vllmc sets, and over it the user's `-O` options.

    Options that this torch lacks are left out of vllmc's own. Raises `UsageError`
    (`unknown-option`, `bad-option`) for the user's.
    """
    inductor, functorch = _own("inductor"), _own("functorch")
    # Inductor compiles with -march=native, so that the code would be this very CPU model's. A
    # level of the x86-64 ABI and the features that Inductor adds to it make code for all that
    # have them, and those are what `cpu_features` then puts in the key.
    if "cpp.march" in option_names("inductor") and (march := portable_march()) is not None:
        inductor["cpp.march"] = march
    inductor |= {name: check_option("inductor", name, value) for name, value in spec.inductor}
    functorch |= {name: check_option("functorch", name, value) for name, value in spec.functorch}
    return Overrides(
        inductor=tuple(sorted(inductor.items())),
        functorch=tuple(sorted(functorch.items())),
        chosen=frozenset(
            [("inductor", name) for name, _ in spec.inductor]
            + [("functorch", name) for name, _ in spec.functorch]
        ),
    )


def _own(group: OptionGroup) -> dict[str, OptionValue]:
    names = option_names(group)
    return {n: value for (g, n), (value, _) in VLLMC_SETS.items() if g == group and n in names}


@contextlib.contextmanager
def applied(
    overrides: Overrides, *, config: Callable[[str], Any] = import_config
) -> Iterator[None]:
    """Runs a block under the overrides; `config` finds the modules that they are set in.

    They are context-local in torch: a thread started within the block does not see them and
    enters `applied` itself, so that threads may compile under different options. Where an older
    torch keeps them for the whole process, one thread at a time is in such a block.
    """
    inductor, functorch = config(MODULES["inductor"]), config(MODULES["functorch"])
    with (
        contextlib.nullcontext() if TORCH.local_overrides else _ONE_THREAD,
        inductor.patch(dict(overrides.inductor)),
        functorch.patch(dict(overrides.functorch)),
    ):
        yield


def snapshot(
    group: Group,
    overrides: Overrides,
    *,
    environment: Mapping[str, str] = _NO_ENVIRONMENT,
    option_origins: Mapping[tuple[str, str], str] = _NO_ORIGINS,
) -> tuple[ConfigEntry, ...]:
    """Every setting of a config that is a factor, under `overrides`, sorted by name.

    Inductor's and functorch's configs are whole, private options and those that torch's own cache
    key ignores included, but for `EXCLUDED`; of Dynamo's only `CAPTURE`. `environment` is what the
    process was started with; `option_origins` says where the user's options came from (`flag` for
    those it lacks). Imports no compiler: see `config_modules`.
    """
    given = overrides.of(group)
    entries = []
    with applied(overrides, config=present_config):
        for name, module_name, key in _settings(group):
            set_by: str | None
            if (group, name) in overrides.chosen:
                set_by = option_origins.get((group, name), "flag")
            else:
                set_by = "vllmc" if name in given else None
            entries.append(_entry(name, module_name, key, set_by, environment))
    return tuple(entries)


def cxx_candidates(overrides: Overrides) -> tuple[str | None, ...]:
    """The C++ compilers that Inductor tries under `overrides`, in order; None is a download."""
    with applied(overrides, config=present_config):
        cxx = present_config(MODULES["inductor"]).cpp.cxx
    return tuple(cxx) if isinstance(cxx, (list, tuple)) else (cxx,)


def _settings(group: Group) -> Iterator[tuple[str, str, str]]:
    """(Name of the factor, module, name in the module) of each setting that counts."""
    if group == "dynamo":
        for name in sorted(CAPTURE):
            prefix = next(p for p in _CAPTURE_PREFIXES if name.startswith(p))
            module_name, key = _CAPTURE_PREFIXES[prefix], name.removeprefix(prefix)
            if key in present_config(module_name)._config:
                yield name, module_name, key
        return
    module_name = MODULES[group]
    for key, entry in sorted(present_config(module_name)._config.items()):
        # An alias names an option that is listed itself.
        if entry.alias is None and (group, key) not in EXCLUDED:
            yield key, module_name, key


def _entry(
    name: str,
    module_name: str,
    key: str,
    set_by: str | None,
    environment: Mapping[str, str],
) -> ConfigEntry:
    module = present_config(module_name)
    registered = module._config[key]
    value = stable(value_of(module, key))
    variables = variables_of(module_name, key, environment)
    default = default_without_environment(module_name, key) if variables else registered.default
    # A variable that forces an option beats every override (torch/utils/_config_module.py).
    if variables and (set_by is None or registered.env_value_force is not _UNSET_SENTINEL):
        origin = f"env:{variables[0]}"
    else:
        origin = set_by or "default"
    return ConfigEntry(
        name=name,
        value=value,
        is_default=canonical(value) == canonical(stable(default)),
        origin=origin,
    )
