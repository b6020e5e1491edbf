"""The adapter between Transformers' experts interface and vllmc's op for mixtures of experts.

A Transformers model whose configuration names `vllmc` as its experts implementation calls
`fused_experts` in each mixture layer. The op finds the experts by the layer's name in the forward
context; `experts_of` reads them from the module that has that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch

from vllmc.core.errors import VllmcError
from vllmc.core.models.place import place_in_class
from vllmc.kernels import moe as _moe_op  # noqa: F401  (defines the op)
from vllmc.kernels.experts import Experts
from vllmc.kernels.layer_name import LayerNameKind, encode

EXPERTS_NAME = "vllmc"
"""The experts implementation to name in a Transformers configuration."""

EXPERTS_NAME_ATTRIBUTE = "vllmc_experts_name"
"""The attribute of an experts module that holds its layer's name."""

_INTERFACE = "transformers.integrations.moe"
_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")


def register_experts() -> None:
    """Makes the implementation known to Transformers. Registering again changes nothing."""
    # Linking reads experts too, and does without the two seconds that this takes.
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, fused_experts)


def fused_experts(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What the experts of `module` make of `[T, H]`, given `[T, k]` and `[T, k]`: `[T, H]`.

    Raises `VllmcError` (`unsupported-model`) for what the op does not do: a norm after each
    expert, and experts that are spread over several devices.
    """
    if module.has_post_expert_norm:
        _refuse(type(module), "it normalises what each expert gives")
    if module._is_expert_parallel:
        _refuse(type(module), "its experts are spread over several devices")
    name = getattr(module, EXPERTS_NAME_ATTRIBUTE)
    packet = torch.ops.vllmc.fused_moe
    op = packet.str if isinstance(name, str) else packet.default
    result: torch.Tensor = op(hidden_states, top_k_index, top_k_weights, name)
    return result


# Dynamo runs such a function while it traces, so that the error arrives as it is.
@torch.compiler.assume_constant_result
def _refuse(module: type, cause: str) -> None:
    place = place_in_class(module)
    raise VllmcError(
        "unsupported-model",
        f"the experts of {module.__name__} cannot run on vllmc's op for them: {cause}",
        context={} if place is None else place.context(),
        hint="--experts grouped_mm runs them on Transformers' own ops",
    )


def attach_expert_names(model: torch.nn.Module, kind: LayerNameKind) -> tuple[str, ...]:
    """Gives each experts module of `model` its qualified name, as `fused_experts` reads it.

    Returns the names in the order of the modules.
    """
    names = []
    for name, module in model.named_modules():
        if has_experts(module):
            setattr(module, EXPERTS_NAME_ATTRIBUTE, encode(name, kind))
            names.append(name)
    return tuple(names)


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
