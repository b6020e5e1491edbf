"""Tensors without storage: a 70B model is built, captured and compiled in under a gigabyte."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from vllmc.core.torch_compat.minors import TORCH


def fake_mode(shape_env: ShapeEnv, *, takes_real: bool = False) -> FakeTensorMode:
    """A mode in which tensors made are fake; it meets real ones only where it `takes_real`."""
    TORCH.before_fake_modes()
    return FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=takes_real)


@contextlib.contextmanager
def fake_weights() -> Iterator[None]:
    """Within it, every tensor made is fake: shape, dtype and device, but no storage."""
    with fake_mode(ShapeEnv()):
        yield


@contextlib.contextmanager
def like_weights(module: torch.nn.Module) -> Iterator[None]:
    """Within it, tensors made are fake if those of `module` are, so that they go together."""
    mode = next((p.fake_mode for p in module.parameters() if isinstance(p, FakeTensor)), None)
    with mode or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def faking(module: torch.nn.Module) -> Iterator[None]:
    """Within it, tensors made are fake, and `module` takes them, be its own fake or not."""
    mode = next((p.fake_mode for p in module.parameters() if isinstance(p, FakeTensor)), None)
    with mode or fake_mode(ShapeEnv(), takes_real=True):
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no storage."""
    return isinstance(tensor, FakeTensor)
