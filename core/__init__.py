"""vllmc's library: resolve, capture, split, plan, key, obtain, link.

What others build on is imported from here: `from vllmc.core import watch_recompiles`. Each name
is loaded when it is first asked for. Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllmc.core.diagnose.live import watch_recompiles
else:
    _HOMES: Final = {
        "watch_recompiles": "vllmc.core.diagnose.live",
    }

    def __getattr__(name: str) -> Any:
        """A public name, from the module that has it."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = ["watch_recompiles"]
