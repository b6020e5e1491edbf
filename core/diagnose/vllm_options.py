"""What set an option of Inductor or functorch that differs between two of vLLM's keys.

The plugin records the variables that torch's configs read. Which of them an option is read from is
told by the source of the torch that is installed here. Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from vllmc.core.cache.explain import Change
from vllmc.core.cache.key import REDACTED
from vllmc.core.diagnose.vllm_factors import VARIABLES, KeyFacts
from vllmc.core.torch_compat.config_source import variables_that_set
from vllmc.core.torch_compat.options import MODULES

_NAMES: Final[Mapping[str, str]] = {"inductor": "Inductor", "functorch": "functorch"}
# What vLLM sets itself before it hashes the options.
_SET_BY_VLLM: Final[Mapping[str, str]] = {
    "inductor.assume_32bit_indexing": "dynamic_shapes_config.assume_32_bit_indexing of "
    "--compilation-config",
    "functorch.bundled_autograd_cache": "VLLM_USE_MEGA_AOT_ARTIFACT",
}


def is_option(name: str) -> bool:
    """Whether a factor of the compiler is an option of torch's."""
    return name.partition(".")[0] in MODULES


def with_cause(change: Change, before: KeyFacts, after: KeyFacts) -> Change:
    """The change of an option with what set it, and how to have it as it was, where that is known.

    A variable is the cause where it differs between the two sides.
    """
    config, _, option = change.name.partition(".")
    readers = variables_that_set(MODULES[config], option)
    one, other = _variables(before), _variables(after)
    moved = [name for name in readers if one.get(name) != other.get(name)]
    if change.name in _SET_BY_VLLM:
        cause = f"it follows from {_SET_BY_VLLM[change.name]}"
    elif not one or not other:
        cause = f"set by {' or '.join([*readers, 'code that ran before'])}"
    elif moved:
        cause = f"set by {' and '.join(moved)}"
        change = replace(
            change,
            origin_before=_origin(moved, one) or change.origin_before,
            origin_after=_origin(moved, other) or change.origin_after,
            restore=_restoring(moved, one),
        )
    else:
        same = f"{' and '.join(readers)} is the same" if readers else "no variable sets it"
        cause = f"set by code that ran before, or torch's choice for the machine, as {same}"
    notes = [f"an option of {_NAMES[config]}: {cause}", change.note]
    return replace(change, note="; ".join(note for note in notes if note))


def _variables(facts: KeyFacts) -> dict[str, str]:
    return {f.name: str(f.value) for f in facts.fields if f.group == VARIABLES}


def _origin(names: list[str], values: Mapping[str, str]) -> str:
    return next((f"env:{name}" for name in names if name in values), "")


def _restoring(names: list[str], values: Mapping[str, str]) -> str:
    if any(REDACTED in values.get(name, "") for name in names):
        return ""
    return "; ".join(
        f"export {name}={shlex.quote(values[name])}" if name in values else f"unset {name}"
        for name in names
    )
