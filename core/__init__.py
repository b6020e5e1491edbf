"""vllmc's library: resolve, capture, split, plan, key, obtain, link.

What others build on is imported from here: `from vllmc.core import support_torch_compile`. Each
name is loaded when it is first asked for. Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllmc.core.declare.decorator import ignore_torch_compile, support_torch_compile
    from vllmc.core.declare.session import compiling, plainly
    from vllmc.core.diagnose.live import watch_recompiles
    from vllmc.core.spec import CompileRange, CompileSpec
else:
    _HOMES: Final = {
        "CompileRange": "vllmc.core.spec",
        "CompileSpec": "vllmc.core.spec",
        "compiling": "vllmc.core.declare.session",
        "ignore_torch_compile": "vllmc.core.declare.decorator",
        "plainly": "vllmc.core.declare.session",
        "support_torch_compile": "vllmc.core.declare.decorator",
        "watch_recompiles": "vllmc.core.diagnose.live",
    }

    def __getattr__(name: str) -> Any:
        """A public name, from the module that has it."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)


__all__ = [
    "CompileRange",
    "CompileSpec",
    "compiling",
    "ignore_torch_compile",
    "plainly",
    "support_torch_compile",
    "watch_recompiles",
]
