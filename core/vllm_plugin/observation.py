"""What vLLM hashed for one key, as its own functions were given and returned it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashed:
    """One thing that a config object hashed: its fields by name, or a text.

    `owner` is the config object, None where that is not known.
    """

    owner: Any
    content: Mapping[str, Any] | bytes
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigHash:
    """The hash of a whole config, and in their order all that went into it."""

    config: Any
    digest: str
    parts: tuple[Hashed, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """The function that is compiled, as far as the key of a whole model has it."""

    name: str
    line: int
    digest: str


@dataclass(slots=True, kw_only=True)
class Observation:
    """The parts of one key, filled in as vLLM makes them; None is what was not seen.

    `compiler` are the factors of Inductor, in vLLM's order. `traced` are the source files, and
    `model` and `path` (of its file) are those of a whole model alone. `missing` are functions of
    vLLM's that could not be looked at. `shared` says that the directory was chosen before this key
    was made, by another part of the model or by somebody, and is not named by it.
    """

    environment: Mapping[str, Any] | None = None
    config: ConfigHash | None = None
    compiler: Sequence[Any] | None = None
    forward: Forward | None = None
    traced: frozenset[str] = field(default_factory=frozenset)
    model: Any = None
    path: str = ""
    missing: tuple[str, ...] = ()
    shared: bool = False
