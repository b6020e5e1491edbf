"""Opaque types: Python objects that an op's schema takes as arguments.

torch can *hoist* an opaque value: Dynamo then makes it an input of the captured graph instead of a
constant in it, so that graphs which differ in the value only are one graph.
"""

from __future__ import annotations

from typing import Any

from torch._library.fake_class_registry import FakeScriptObject
from torch._library.opaque_object import get_opaque_type_name

from vllmc.core.torch_compat.minors import TORCH

OpaqueBase: Any = TORCH.opaque_base()
"""What opaque types inherit from."""


def register_value_type(cls: type, *, hoist: bool = True) -> str:
    """Registers `cls`, a subclass of `OpaqueBase`, as an opaque value type.

    The class needs `__eq__`, `__hash__` and `__fx_repr__`; Dynamo guards on equality. Returns the
    type's name as op schemas write it. Raises `TypeError` where one of the methods is missing.
    """
    TORCH.register_value_type(cls, hoist=hoist)
    return _name_of(cls)


def is_opaque_value(value: object) -> bool:
    """Whether `value` is an object of an opaque type, or its stand-in."""
    return TORCH.is_opaque_value(value)


def opaque_type_name(value: object) -> str:
    """The name of an opaque value's type, as op schemas write it. `ValueError` for others."""
    return _name_of(type(value))


def real_value(value: object) -> object:
    """The opaque value behind the stand-in that Dynamo gives a hoisted one; others as they are."""
    return value.real_obj if isinstance(value, FakeScriptObject) else value


def _name_of(cls: type) -> str:
    name: str = get_opaque_type_name(cls)
    return name
