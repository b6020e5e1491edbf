"""Modules that hold a mixture's experts, as Transformers makes them. Imports no Transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch

from vllmc.kernels.experts import Experts

_INTERFACE = "transformers.integrations.moe"
_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")


def has_experts(module: object) -> bool:
    """Whether `module` holds experts: its `forward` is that of Transformers' decorator for them."""
    forward = inspect.getattr_static(type(module), "forward", None)
    return inspect.isfunction(forward) and "experts_interface" in forward.__code__.co_freevars


def expert_tensors(module: torch.nn.Module) -> Iterator[str]:
    """The names of the tensors of an experts module that the op reads."""
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        yield name
        if module.has_bias:
            yield f"{name}_bias"


def experts_of(module: torch.nn.Module) -> Experts:
    """The experts of an experts module, on its own memory."""
    tensors = {name: getattr(module, name).detach() for name in expert_tensors(module)}
    up = "gate_up_proj" if module.has_gate else "up_proj"
    # Transposed weights are `[E, H, N]` and `[E, I, H]`.
    weights = {
        name: tensors[name].mT if module.is_transposed else tensors[name]
        for name in (up, "down_proj")
    }
    return Experts(
        up=weights[up],
        down=weights["down_proj"],
        gate=module._apply_gate if module.has_gate else module.act_fn,
        gated_silu=module.has_gate and _is_gated_silu(module),
        up_bias=tensors.get(f"{up}_bias"),
        down_bias=tensors.get("down_proj_bias"),
    )


def experts_in(model: torch.nn.Module) -> dict[str, Experts]:
    """The experts of all layers of `model`, by the names that `attach_expert_names` gives them."""
    return {n: experts_of(m) for n, m in model.named_modules() if has_experts(m)}


def _is_gated_silu(module: torch.nn.Module) -> bool:
    """Whether the gate is Transformers' own, of the halves one after the other, with SiLU."""
    gate = type(module)._apply_gate
    activation = type(getattr(module, "act_fn", None))
    name = f"{activation.__module__}.{activation.__qualname__}"
    return gate.__module__ == _INTERFACE and name in _SILU
