"""The name by which a layer's op finds its state (its KV cache) in the forward context."""

from __future__ import annotations

from typing import Literal, TypeAlias

from vllmc.core.torch_compat.opaque import OpaqueBase, register_value_type

LayerNameKind: TypeAlias = Literal["hoisted", "baked"]


class LayerName(OpaqueBase):
    """A layer's name as an opaque value: an input of the captured graph, not a constant in it.

    With a plain string, identical layers whose ops stay inside a compiled piece give one graph
    each; with a `LayerName` they give one graph in all.
    """

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerName) and other.value == self.value

    def __hash__(self) -> int:
        return hash((LayerName, self.value))

    def __repr__(self) -> str:
        return f"LayerName({self.value!r})"

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        """How generated code rebuilds the value (required of opaque value types)."""
        return repr(self), {"LayerName": LayerName}


LAYER_NAME_TYPE = register_value_type(LayerName, hoist=True)
"""`LayerName` as op schemas write it."""


def encode(name: str, kind: LayerNameKind) -> LayerName | str:
    """The form in which an attention module carries its name: `hoisted` or `baked`."""
    return LayerName(name) if kind == "hoisted" else name
