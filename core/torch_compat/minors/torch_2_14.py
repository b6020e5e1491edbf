"""torch 2.14."""

from __future__ import annotations

from vllmc.core.torch_compat.minors.newest import Newest


class Torch214(Newest):
    """It has all options that vllmc names."""

    absent = frozenset()
