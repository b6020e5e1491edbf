"""What may be set, by a flag, the environment or a config file, and what was. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast

from vllmc.core.errors import UsageError

T = TypeVar("T")

Scope: TypeAlias = Literal["inductor", "functorch"]

SCOPES: tuple[Scope, ...] = ("inductor", "functorch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option that the environment and the config file may set, as well as a flag.

    Some are not for the file: what a directory holds must not say that it is trusted. `shapes`: it
    is one of those that shape the compilation, which a matrix file may set too.
    """

    name: str
    kind: Literal["text", "integer", "truth"] = "text"
    repeatable: bool = False
    separator: str = ","
    in_file: bool = True
    shapes: bool = False

    @property
    def variable(self) -> str:
        """Its environment variable; `separator` is between a repeatable option's values."""
        return f"VLLMC_{self.name.upper().replace('-', '_')}"


OPTIONS: tuple[Option, ...] = (
    Option(name="cache-dir", repeatable=True, separator=os.pathsep),
    Option(name="trust-unsigned", kind="truth", in_file=False),
    Option(name="trust-dir", in_file=False),
    Option(name="sign-key", in_file=False),
    Option(name="remote"),
    Option(name="device", shapes=True),
    Option(name="dtype", shapes=True),
    Option(name="compile-range", repeatable=True, shapes=True),
    Option(name="compile-size", kind="integer", repeatable=True, shapes=True),
    Option(name="dynamic-shapes", shapes=True),
    Option(name="layer-names", shapes=True),
    Option(name="experts", shapes=True),
    Option(name="splitting-op", repeatable=True, shapes=True),
    Option(name="pass", repeatable=True, shapes=True),
    Option(name="no-pass", repeatable=True, shapes=True),
    Option(name="split-kv-update", kind="truth", shapes=True),
    Option(name="quantize", shapes=True),
    Option(name="layers", kind="integer", shapes=True),
    Option(name="backend", shapes=True),
    Option(name="jobs", kind="integer"),
    Option(name="weights"),
    Option(name="guards"),
    Option(name="cuda-graphs"),
    Option(name="cuda-graph-size", kind="integer", repeatable=True),
    Option(name="summary"),
)


def option_named(name: str) -> Option:
    """The option of this name, which there is."""
    [option] = [option for option in OPTIONS if option.name == name]
    return option


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """An option's value as text, not yet checked, and its origin.

    `origin` is `flag`, `env:NAME`, `file:NAME:LINE` or `default`. An option that is not
    repeatable has one value.
    """

    values: tuple[str, ...]
    origin: str

    @property
    def value(self) -> str:
        """The value of an option that is not repeatable."""
        assert len(self.values) == 1, self
        return self.values[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawOption:
    """An Inductor or functorch option as given: `text` is read once its type is known.

    `name` is dotted below a table (`triton.descriptive_names`). Numbers and truth values of a
    config file stand here as `-O` would take them, lists as JSON.
    """

    scope: Scope
    name: str
    text: str
    origin: str


def choice(name: str, setting: Setting, choices: tuple[T, ...]) -> T:
    """The one of `choices` that the setting spells; raises `UsageError` (`bad-value`)."""
    if setting.value not in choices:
        raise UsageError(
            "bad-value",
            f"'{setting.value}' is no {name}",
            context={"origin": setting.origin},
            hint=f"--{name} takes one of {', '.join(map(str, choices))}",
        )
    return cast("T", setting.value)


def truth(name: str, setting: Setting) -> bool:
    """What a setting says that is true or false; raises `UsageError` (`bad-value`)."""
    return choice(name, setting, ("false", "true", "0", "1")) in ("true", "1")
