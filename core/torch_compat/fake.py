"""Tensors without storage: a 70B model is built, captured and compiled in under a gigabyte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


@contextlib.contextmanager
def fake_weights() -> Iterator[None]:
    """Within it, every tensor made is fake: shape, dtype and device, but no storage."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no storage."""
    return isinstance(tensor, FakeTensor)
