"""What of a key's factors can be set in this process: the spec, Inductor's and functorch's options.

Factors hold JSON, as records and snapshots do; here they become the values that they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

import torch

from vllmc.core.cache.key import Factor, JsonValue
from vllmc.core.errors import VllmcError
from vllmc.core.graph.passes.manager import identity
from vllmc.core.passes import PASSES, PassChoice
from vllmc.core.spec import (
    CompileRange,
    CompileSpec,
    DynamicShapes,
    ExpertsKind,
    LayerNames,
    OptionValue,
    Quantization,
)
from vllmc.core.torch_compat import system
from vllmc.core.torch_compat.options import OptionGroup, check_option

_WHY_NOT: Final = {
    "versions": "another version would have to be installed",
    "system": "it is what this machine is",
    "environment": "it is a state of the process, not an option",
    "code": "it is vllmc's own code",
    "dynamo": "vllmc sets none of Dynamo's options",
    "model": "what is compiled is the model that was named for the proof",
    "sources": "the source files are those that are here",
    "graph": "what is compiled is the model that was named for the proof",
    "range": "spec.ranges decides what ranges there are",
}
_OPTION_GROUPS: Final = ("inductor", "functorch")
# A path, or the source of a function or class: see `config_values.stable`.
_DIGEST: Final = re.compile(r"path:[0-9a-f]{64}|.*#[0-9a-f]{64}", re.DOTALL)
_DEVICE: Final = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A value for a field of the spec (group `spec`), or for an option of the group's config.

    That of a pass (group `passes`) is how it is to run, or None.
    """

    group: str
    name: str
    value: Any


def read_setting(factor: Factor) -> Setting:
    """What `factor` asks to be set. Raises `VllmcError` whose message says why it cannot be."""
    value: Any
    match factor.group:
        case "passes":
            value = _read_pass(factor.name, factor.value)
        case "spec":
            value = _read_field(factor.name, factor.value)
        case "inductor" | "functorch" as group:
            value = _read_option(group, factor.name, factor.value)
        case group:
            raise not_settable(_WHY_NOT.get(group, f"vllmc sets nothing of the group '{group}'"))
    return Setting(group=factor.group, name=factor.name, value=value)


def with_settings(spec: CompileSpec, settings: Iterable[Setting]) -> CompileSpec:
    """`spec` with all of `settings`. Raises `UsageError` for ranges that contradict each other."""
    fields: dict[str, Any] = {}
    options = {group: dict(getattr(spec, group)) for group in _OPTION_GROUPS}
    passes = {choice.name: choice for choice in spec.chosen_passes}
    for setting in settings:
        if setting.group == "passes":
            passes.pop(setting.name, None)
            passes |= {setting.name: setting.value} if setting.value else {}
        else:
            target = fields if setting.group == "spec" else options[setting.group]
            target[setting.name] = setting.value
    fields["passes"] = tuple(sorted(passes.values()))
    for group, values in options.items():
        fields[group] = tuple(sorted(values.items()))
    return replace(spec, **fields)


def not_settable(reason: str) -> VllmcError:
    """The error for a factor that cannot be given a value here."""
    return VllmcError("not-settable", reason)


def _read_field(name: str, value: JsonValue) -> Any:
    match name, value:
        case ("ranges", list()):
            return tuple(CompileRange.parse(str(text)) for text in value)
        case ("sizes", list()) if all(type(size) is int for size in value):
            return tuple(value)
        case ("splitting_ops", list()):
            return tuple(map(str, value))
        case ("dynamic_shapes", str()) if value in get_args(DynamicShapes):
            return value
        case ("layer_names", str()) if value in get_args(LayerNames):
            return value
        case ("experts", str()) if value in get_args(ExpertsKind):
            return value
        case ("split_kv_update", bool()):
            return value
        case ("quantize", None | str()) if value in (None, *get_args(Quantization)):
            return value
        case ("dtype", str()) if isinstance(getattr(torch, value, None), torch.dtype):
            return value
        case ("device", str()) if _DEVICE.fullmatch(value):
            system.device_properties(value)
            return value
        case ("backend", str()):
            return value
        case _:
            raise not_settable("this vllmc does not know the value")


def _read_pass(name: str, value: JsonValue) -> PassChoice | None:
    if value is None:
        return None
    tokens = value.get("tokens") if isinstance(value, dict) else None
    choice = PassChoice(name, None if tokens is None else CompileRange.parse(str(tokens)))
    if name not in PASSES or identity(choice) != value:
        raise not_settable("it is another pass here, or another version of it")
    return choice


def _read_option(group: OptionGroup, name: str, value: JsonValue) -> OptionValue:
    if _has_digest(value):
        raise not_settable("only a digest of its value is known: a path's or a function's")
    if isinstance(value, dict):
        raise not_settable("its value is a table, and -O sets none")
    if (group, name) == ("inductor", "cpp.march") and not system.runs_code_for(value):
        raise not_settable(f"this CPU may not run code for {value}")
    return check_option(group, name, value)


def _has_digest(value: JsonValue) -> bool:
    if isinstance(value, str):
        return _DIGEST.fullmatch(value) is not None
    if isinstance(value, dict):
        return any(map(_has_digest, value.values()))
    return isinstance(value, list) and any(map(_has_digest, value))
