"""The options of Inductor and functorch that `-O` sets: their names, and values of their type."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Literal,
    NoReturn,
    TypeAlias,
    Union,
    cast,
    get_args,
    get_origin,
)

from vllmc.core.errors import UsageError
from vllmc.core.torch_compat.config_modules import present_config

if TYPE_CHECKING:
    from vllmc.core.spec import OptionValue

OptionGroup: TypeAlias = Literal["inductor", "functorch"]

MODULES: Final[Mapping[str, str]] = types.MappingProxyType(
    {"inductor": "torch._inductor.config", "functorch": "torch._functorch.config"}
)
_PREFIX: Final = "functorch."
_CONSTANTS: Final = types.MappingProxyType(
    {"true": True, "false": False, "none": None, "null": None}
)
_SPELLED: Final = types.MappingProxyType(
    {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "none",
        list: "a list such as [1, 2]",
        tuple: "a list such as [1, 2]",
        set: "a list such as [1, 2]",
    }
)


def option_names(group: OptionGroup) -> frozenset[str]:
    """Every option of a config; nested ones with dots (`cpp.threads`)."""
    return frozenset(_config(group)._config)


def parse_option(text: str) -> tuple[OptionGroup, str, OptionValue]:
    """Reads `KEY=VALUE`, or `functorch.KEY=VALUE`.

    Raises `UsageError`: `bad-option` where there is no value or it does not fit the option's type,
    `unknown-option` with the nearest name that exists.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(
            "bad-option",
            f"'{text}' is not an option with a value",
            hint="write it as KEY=VALUE, for example -O max_autotune=true",
        )
    group: OptionGroup = "functorch" if key.startswith(_PREFIX) else "inductor"
    name = key.removeprefix(_PREFIX) if group == "functorch" else key
    return group, name, read_option(group, name, value)


def read_option(group: OptionGroup, name: str, text: str) -> OptionValue:
    """The value that `text` spells for an option. Raises what `parse_option` raises."""
    _require(group, name)
    text = text.strip()
    value = _json_like(text)
    kinds = _kinds(group, name)
    if not any(_admits(kind, value) for kind in kinds) and any(_admits(k, text) for k in kinds):
        # A text option may look like a number: cutlass.cutlass_instantiation_level=0.
        value = text
    return check_option(group, name, value)


def check_option(group: OptionGroup, name: str, value: Any) -> OptionValue:
    """`value` as the option takes it (a tuple where torch has one).

    Raises `UsageError`: `unknown-option`, or `bad-option` for a value of another type.
    """
    _require(group, name)
    kinds = _kinds(group, name)
    if not any(_admits(kind, value) for kind in kinds):
        takes = sorted({text for kind in kinds for text in _spelled(kind)})
        raise UsageError(
            "bad-option",
            f"{_shown(value)} is not a value of the option {_full(group, name)}",
            context={"option": _full(group, name), "value": value},
            hint=f"it takes {' or '.join(takes)}" if takes else "it cannot be set with -O",
        )
    if isinstance(value, (list, tuple)):
        container = next(c for c in (tuple, set, list) if any(_names(k, c) for k in (*kinds, list)))
        return cast("OptionValue", container(value))
    if type(value) is int and not any(_names(kind, int) for kind in kinds) and Any not in kinds:
        # 1 for 1.0 would be another value in the key.
        return float(value)
    return cast("OptionValue", value)


def _require(group: OptionGroup, name: str) -> None:
    if name in option_names(group):
        return
    full = _full(group, name)
    nearest = _nearest(full)
    raise UsageError(
        "unknown-option",
        f"there is no option '{full}' in {MODULES[group]}",
        context={"option": full} | ({"nearest": nearest} if nearest else {}),
        hint=f"did you mean {nearest}?"
        if nearest
        else f"the options are those of {MODULES[group]}",
    )


def _nearest(full: str) -> str | None:
    names = [*option_names("inductor"), *(_PREFIX + n for n in option_names("functorch"))]
    if close := difflib.get_close_matches(full, sorted(names), n=1):
        return close[0]
    # `threads` is meant as cpp.threads.
    by_last = {name.rpartition(".")[2]: name for name in sorted(names, reverse=True)}
    close = difflib.get_close_matches(full.rpartition(".")[2], sorted(by_last), n=1)
    return by_last[close[0]] if close else None


def _kinds(group: OptionGroup, name: str) -> tuple[Any, ...]:
    """The types that the option's annotation, default and present value have.

    All three, because an annotation is often missing (`x = None`) or narrower than its use.
    """
    module = _config(group)
    entry = module._config[name]
    current = module.get_config_copy().get(name) if entry.alias is None else getattr(module, name)
    kinds = (entry.value_type, type(current)) if entry.alias is None else (type(current),)
    untyped = all(kind is type(None) for kind in kinds)
    return (Any,) if untyped else kinds


def _admits(kind: Any, value: object) -> bool:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_admits(argument, value) for argument in get_args(kind))
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in get_args(kind))
    base = origin or kind
    if base is Any:
        return not isinstance(value, dict)
    if base in (list, tuple, set):
        return isinstance(value, (list, tuple))
    if base in (bool, str, type(None)):
        return type(value) is base
    if base in (int, float):
        return type(value) is int or (base is float and type(value) is float)
    # Tables, functions, classes: nothing that -O can spell.
    return False


def _names(kind: Any, container: type) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_names(argument, container) for argument in get_args(kind))
    return (get_origin(kind) or kind) is container


def _spelled(kind: Any) -> list[str]:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return [text for argument in get_args(kind) for text in _spelled(argument)]
    if origin is Literal:
        return [_shown(argument) for argument in get_args(kind)]
    spelled = _SPELLED.get(origin or kind)
    return [spelled] if spelled else []


def _json_like(text: str) -> Any:
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _shown(value: object) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        return repr(value)


def _full(group: OptionGroup, name: str) -> str:
    return f"{_PREFIX}{name}" if group == "functorch" else name


def _config(group: OptionGroup) -> Any:
    return present_config(MODULES[group])
