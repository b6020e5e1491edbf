"""The options of torch's configs that its own portable snapshot leaves out.

Apart from `config`, which says of each option where it came from and takes longer: vLLM's plugin
reads these while vLLM starts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

from vllmc.core.torch_compat.config_modules import import_config
from vllmc.core.torch_compat.config_scope import EXCLUDED
from vllmc.core.torch_compat.config_values import stable

if TYPE_CHECKING:
    from vllmc.core.cache.key import JsonValue

_MODULES: Final = (
    ("inductor", "torch._inductor.config"),
    ("functorch", "torch._functorch.config"),
)


def unhashed_options(hashed: Collection[str]) -> dict[str, JsonValue]:
    """The options that may shape code and are not in `hashed`, which has names as `inductor.dce`.

    The names of the result are of that form. Aliases, and what is no factor of vllmc's own keys,
    are left out.
    """
    found: dict[str, JsonValue] = {}
    for group, module_name in _MODULES:
        module = import_config(module_name)
        for name, entry in module._config.items():
            known = f"{group}.{name}" in hashed or (group, name) in EXCLUDED
            if not known and entry.alias is None:
                found[f"{group}.{name}"] = stable(_value(module, name))
    return found


def _value(module: Any, name: str) -> Any:
    if getattr(module._config[name], "deprecated", False):
        # Reading the attribute would warn.
        return module.get_config_copy()[name]
    return getattr(module, name)
