"""vllmc's library: resolve, capture, split, plan, key, obtain, link.

What module authors use is here, imported when it is first asked for: torch takes a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllmc.core.declare.decorator import ignore_torch_compile, support_torch_compile
    from vllmc.core.declare.session import compiling, plainly
    from vllmc.core.spec import CompileRange, CompileSpec

_HOMES = {
    "CompileRange": "vllmc.core.spec",
    "CompileSpec": "vllmc.core.spec",
    "compiling": "vllmc.core.declare.session",
    "ignore_torch_compile": "vllmc.core.declare.decorator",
    "plainly": "vllmc.core.declare.session",
    "support_torch_compile": "vllmc.core.declare.decorator",
}

__all__ = [
    "CompileRange",
    "CompileSpec",
    "compiling",
    "ignore_torch_compile",
    "plainly",
    "support_torch_compile",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
