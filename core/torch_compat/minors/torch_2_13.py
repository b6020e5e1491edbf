"""torch 2.13."""

from __future__ import annotations

from typing import Any

from vllmc.core.torch_compat.minors.torch_2_14 import Torch214


class Torch213(Torch214):
    """Opaque types have names of their own, under which 2.14 warns."""

    absent = frozenset({("dynamo", "compiler.compile_on_one_rank")})
    keyed_files = ("codegen/aoti_runtime/interface.cpp", "script.ld")

    def opaque_base(self) -> Any:
        """See `Newest`."""
        from torch._opaque_base import OpaqueBase

        return OpaqueBase

    def register_value_type(self, cls: type, *, hoist: bool) -> None:
        """See `Newest`."""
        from torch._library.opaque_object import register_opaque_type

        register_opaque_type(cls, typ="value", hoist=hoist)

    def is_opaque_value(self, value: object) -> bool:
        """See `Newest`."""
        from torch._library.opaque_object import is_opaque_value

        return bool(is_opaque_value(value))
