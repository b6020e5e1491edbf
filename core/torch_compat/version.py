"""What the installed torch can do, told by its version: asking torch would import Dynamo."""

from __future__ import annotations

from typing import Final

import torch

_SHAPE_IDS: Final = (2, 11)


def supports_shape_ids(version: str = torch.__version__) -> bool:
    """Whether dimensions of several tensors can be given one unbacked symbol."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= _SHAPE_IDS
