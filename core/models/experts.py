"""The adapter between Transformers' experts interface and vllmc's op for mixtures of experts.

A Transformers model whose configuration names `vllmc` as its experts implementation calls
`fused_experts` in each mixture layer. The op finds the experts by the layer's name in the forward
context; `expert_modules` reads them from the module that has that name.
"""

from __future__ import annotations

import torch

from vllmc.core.errors import VllmcError
from vllmc.core.models.expert_modules import has_experts
from vllmc.core.models.place import place_in_class
from vllmc.kernels import moe as _moe_op  # noqa: F401  (defines the op)
from vllmc.kernels.layer_name import LayerNameKind, encode

EXPERTS_NAME = "vllmc"
"""The experts implementation to name in a Transformers configuration."""

EXPERTS_NAME_ATTRIBUTE = "vllmc_experts_name"
"""The attribute of an experts module that holds its layer's name."""


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
