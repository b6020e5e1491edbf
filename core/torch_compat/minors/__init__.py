"""The torch that is installed, as far as its minor version decides: chosen here, once."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from vllmc.core.torch_compat.minors.newest import Newest
from vllmc.core.torch_compat.minors.torch_2_11 import Torch211
from vllmc.core.torch_compat.minors.torch_2_12 import Torch212
from vllmc.core.torch_compat.minors.torch_2_13 import Torch213
from vllmc.core.torch_compat.minors.torch_2_14 import Torch214
from vllmc.core.torch_compat.version import NEWEST, Minor, minor_of, refuse_older, standing

MINORS: Final[Mapping[Minor, type[Newest]]] = MappingProxyType(
    {
        (2, 11): Torch211,
        (2, 12): Torch212,
        (2, 13): Torch213,
        (2, 14): Torch214,
        NEWEST: Newest,
    }
)


def chosen(version: str) -> Newest:
    """What differs in this version of torch; a newer one than vllmc knows is taken for the newest.

    Raises `VllmcError` (`torch-too-old`) for one that lacks what vllmc needs.
    """
    refuse_older(version)
    return MINORS.get(minor_of(version), Newest)()


TORCH: Final = chosen(str(torch.__version__))
IS_NEWER: Final = standing(str(torch.__version__)) == "newer"
"""Whether the torch here is one that nobody has tried: see `vllmc.core.torch_compat.self_check`."""
