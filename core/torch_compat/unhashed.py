"""The options of torch's configs that its own portable snapshot leaves out.

Apart from `config`, which says of each option where it came from and takes longer: vLLM's plugin
reads these while vLLM starts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from vllmc.core.torch_compat.config_modules import import_config, value_of
from vllmc.core.torch_compat.config_scope import EXCLUDED
from vllmc.core.torch_compat.config_values import stable
from vllmc.core.torch_compat.options import MODULES

if TYPE_CHECKING:
    from vllmc.core.cache.key import JsonValue

_GROUPS: Final = ("inductor", "functorch")


def unhashed_options(hashed: Collection[str]) -> dict[str, JsonValue]:
    """The options that may shape code and are not in `hashed`, which has names as `inductor.dce`.

    The names of the result are of that form. Aliases, and what is no factor of vllmc's own keys,
    are left out.
    """
    found: dict[str, JsonValue] = {}
    for group in _GROUPS:
        module = import_config(MODULES[group])
        for name, entry in module._config.items():
            known = f"{group}.{name}" in hashed or (group, name) in EXCLUDED
            if not known and entry.alias is None:
                found[f"{group}.{name}"] = stable(value_of(module, name))
    return found
