"""The adapter between Transformers' attention interface and vllmc's attention op.

A Transformers model whose configuration names `vllmc` as its attention implementation calls
`attend` in each attention layer, an encoder that names `vllmc_encoder` calls `attend_both_ways`.
Whatever the op cannot do is refused by name, never ignored: Transformers builds no mask for an
implementation that it does not know, so a request that is dropped here would change the result
silently.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from vllmc.core.errors import VllmcError
from vllmc.core.models.place import place_in_class
from vllmc.kernels import attention as _attention_op  # noqa: F401  (defines the op)
from vllmc.kernels.layer_name import LayerNameKind, encode

ATTENTION_NAME = "vllmc"
"""The attention implementation to name in a Transformers configuration: causal attention."""

ENCODER_ATTENTION_NAME = "vllmc_encoder"
"""The one for encoders, in which each token attends to those before and after it."""

LAYER_NAME_ATTRIBUTE = "vllmc_layer_name"
"""The attribute of an attention module that holds its layer name."""

SPLIT_KV_UPDATE_ATTRIBUTE = "vllmc_split_kv_update"
"""The one that says whether an op before attention stores the keys and values."""

# Passed through by models to whatever attention runs; none changes what attention computes.
# Positions are applied by the model, dropout is off in eval, gradients are never taken.
_HARMLESS = frozenset(
    {
        "deterministic",
        "dropout",
        "logits_to_keep",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)


def register_attention() -> None:
    """Makes both implementations known to Transformers. Registering again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend)
    ALL_ATTENTION_FUNCTIONS.register(ENCODER_ATTENTION_NAME, attend_both_ways)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a flattened batch: `[1, Hq, T, Dqk]`, `[1, Hkv, T, Dqk]`, `[1, Hkv, T, Dv]`.

    Returns the output `[1, T, Hq, Dv]` and no weights, as the interface wants it. Raises
    `VllmcError` (`unsupported-model`) for what the op does not do: a mask, attention that is not
    causal, cross attention, and every keyword that is neither known to be harmless nor unset.
    """
    causal = kwargs.pop("is_causal", None)
    if causal is None:
        config = getattr(module, "config", None)
        causal = getattr(module, "is_causal", True) and getattr(config, "is_causal", True)
    if not causal:
        _refuse(type(module), "is_causal", "its attention is not causal")
    options = (scaling, sliding_window, softcap, s_aux)
    return _call_op(module, query, key, value, attention_mask, options, kwargs, causal=True)


def attend_both_ways(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `attend`, for an encoder: each token attends to those before and after it.

    A window w reaches to the w - 1 tokens on either side. Raises `VllmcError`
    (`unsupported-model`) for attention that is causal, and for what `attend` refuses besides.
    """
    causal = kwargs.pop("is_causal", None)
    if causal is None:
        causal = getattr(module, "is_causal", False)
    if causal:
        _refuse(type(module), "is_causal", "its attention is causal")
    options = (scaling, sliding_window, softcap, s_aux)
    return _call_op(module, query, key, value, attention_mask, options, kwargs, causal=False)


def _call_op(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    options: tuple[float | None, int | None, float | None, torch.Tensor | None],
    kwargs: dict[str, Any],
    *,
    causal: bool,
) -> tuple[torch.Tensor, None]:
    _refuse_other_attention(module, query, key, attention_mask, kwargs)
    scaling, *others = options
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    # Sizes one by one: a `torch.Size` in the graph could not cross a cut.
    output = torch.empty(
        (1, q.shape[1], q.shape[2], v.shape[3]), dtype=query.dtype, device=query.device
    )
    name = getattr(module, LAYER_NAME_ATTRIBUTE)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    packet = torch.ops.vllmc.unified_attention_with_output
    op = packet.str if isinstance(name, str) else packet.default
    # Where attention goes both ways nothing is stored.
    if causal and getattr(module, SPLIT_KV_UPDATE_ATTRIBUTE, False):
        update = torch.ops.vllmc.unified_kv_cache_update
        token = (update.str if isinstance(name, str) else update.default)(k, v, name)
        op(q, k, v, output, name, scale, *others, causal, kv_cache_dummy_dep=token)
    else:
        op(q, k, v, output, name, scale, *others, causal)
    return output, None


def _refuse_other_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    if attention_mask is not None:
        _refuse(type(module), "attention_mask", "it brings an attention mask of its own")
    if getattr(module, "is_cross_attention", False) or query.shape[2] != key.shape[2]:
        _refuse(type(module), "key", "it attends to other tokens than those of the batch")
    if query.shape[0] != 1:
        _refuse(type(module), "query", "it reshapes the flattened batch")
    for keyword, value in kwargs.items():
        if value is not None and value is not False and keyword not in _HARMLESS:
            _refuse(type(module), keyword, f"it asks for attention with '{keyword}'")
    if not hasattr(module, LAYER_NAME_ATTRIBUTE):
        _refuse(type(module), LAYER_NAME_ATTRIBUTE, "it has no layer name")


# Dynamo runs such a function while it traces, so that the error arrives as it is; it cannot trace
# the raising itself.
@torch.compiler.assume_constant_result
def _refuse(module: type, argument: str, cause: str) -> None:
    place = place_in_class(module)
    raise VllmcError(
        "unsupported-model",
        f"the attention of {module.__name__} cannot run on vllmc's attention op: {cause}",
        context={"argument": argument, **(place.context() if place is not None else {})},
        hint="docs/models.md lists what is known to work",
    )


def attach_layer_names(
    model: torch.nn.Module, kind: LayerNameKind, *, split_kv_update: bool = False
) -> tuple[str, ...]:
    """Gives each attention module of `model` its qualified name, as `attend` reads it.

    With `split_kv_update` the module's keys and values are stored by an op of their own.

    Attention modules are those whose class looks its attention function up in Transformers'
    interface. Returns the names in the order of the modules. The name is an attribute, not made in
    `forward`, so that regions of repeated layers can be compiled once.
    """
    names = []
    for name, module in model.named_modules():
        if _uses_interface(type(module)):
            setattr(module, LAYER_NAME_ATTRIBUTE, encode(name, kind))
            setattr(module, SPLIT_KV_UPDATE_ATTRIBUTE, split_kv_update)
            names.append(name)
    return tuple(names)


def _uses_interface(cls: type) -> bool:
    """Whether a method of `cls` names the interface: what all attention modules have in common.

    Class names and attributes (`layer_idx`, `is_causal`) differ between families.
    """
    # `PreTrainedModel` names the interface too, where it checks the implementation's name.
    bases = [base for base in cls.__mro__ if base is not PreTrainedModel]
    methods = [m for base in bases for m in vars(base).values() if inspect.isfunction(m)]
    functions = [inspect.unwrap(method) for method in methods]
    return any("ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names for f in functions)


def check_windows(
    model: str,
    layer_types: Sequence[str],
    windows: Sequence[int | None],
    *,
    sliding_window: int | None = None,
) -> None:
    """Checks the windows that the layers' ops were captured with against the configuration.

    `model` names the model, `layer_types` and `sliding_window` are its configuration's (empty and
    None where it has none), `windows` the captured ones in the order of the layers. A
    configuration with a window and no layer types means it for every layer, as in Transformers'
    `create_masks_for_generate`. Raises `VllmcError` (`unsupported-model`) where a layer is of a
    kind that is neither full nor sliding attention (chunked and sparse attention, recurrent
    layers), or where model and configuration disagree on a window: such a model leaves the window
    to the mask, which is never made.
    """
    if not layer_types:
        if sliding_window is None:
            return
        layer_types = ["sliding_attention"] * len(windows)
    if len(layer_types) != len(windows):
        raise _bad_layer(
            model, f"it has {len(windows)} attention layers and types for {len(layer_types)}"
        )
    for index, (kind, window) in enumerate(zip(layer_types, windows, strict=True)):
        if kind not in ("full_attention", "sliding_attention"):
            raise _bad_layer(model, f"its layer {index} is of the kind '{kind}'")
        if (window is not None) != (kind == "sliding_attention"):
            found = "no window" if window is None else f"a window of {window} tokens"
            raise _bad_layer(
                model, f"its layer {index} is of the kind '{kind}' and attends with {found}"
            )
        if window is not None and sliding_window not in (None, window):
            raise _bad_layer(
                model,
                f"its layer {index} attends with a window of {window} tokens where the "
                f"configuration says {sliding_window}",
            )


def _bad_layer(model: str, cause: str) -> VllmcError:
    return VllmcError(
        "unsupported-model",
        f"the model '{model}' cannot run on vllmc's attention op: {cause}",
        context={"model": model},
        hint="docs/models.md lists what is known to work",
    )
