"""Models whose linears multiply quantised matrices.

Each linear that `linears_to_quantize` names is exchanged for a `QuantizedLinear`, in place. What
is read by several of them (the states that queries, keys and values are made of) has one scale,
which is one tensor in all of them: so the graph quantises it once, and a pass can fuse that with
what made it.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Final, TypeAlias

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vllmc.core.errors import VllmcError
from vllmc.core.models.building import model_of
from vllmc.core.models.checkpoint import STORED_AS
from vllmc.core.models.model import Scales
from vllmc.core.models.watched import groups_by_input
from vllmc.core.spec import Quantization
from vllmc.core.torch_compat.fake import like_weights
from vllmc.kernels import matmul as _matmul_op  # noqa: F401  (defines the op)
from vllmc.kernels.quant import LARGEST, SMALLEST_AMAX, quantized, scale_of

_MULTIPLE: Final = 16
"""What both sizes of a weight must be multiples of for the matrix units of a GPU."""

_EXPERT_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The fields by which configurations say how many experts a mixture has."""

Calibrate: TypeAlias = Callable[[torch.nn.Module, Collection[str]], Mapping[str, float]]
"""Runs an entry and says the largest magnitude of what each linear, by path, was given."""


class QuantizedLinear(torch.nn.Module):
    """A linear with a weight `[N, K]` in fp8 or int8, which quantises what it is given.

    `weight_scale` is `[1]` (float32), and so is `input_scale`; without that, each input has the
    scale that fits its largest element.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, in the dtype of `input`."""
        ops, dtype, x = torch.ops.vllmc, self.weight.dtype, input
        if x.dtype is dtype:
            _refuse_cast(dtype)
        if self.input_scale is None:
            q, scale = ops.dynamic_scaled_quant.default(x, dtype)
        else:
            scale = self.input_scale
            q = ops.static_scaled_quant.default(x, scale, dtype)
        return ops.scaled_mm.default(q, self.weight, scale, self.weight_scale, self.bias, x.dtype)


# Dynamo runs such a function while it traces, so that the error arrives as it is.
@torch.compiler.assume_constant_result
def _refuse_cast(dtype: torch.dtype) -> None:
    raise VllmcError(
        "cannot-quantize",
        f"the model brings what a linear is given to the linear's own dtype, which is now {dtype}",
        hint="run it without --quantize",
    )


def quantize(
    entry: torch.nn.Module,
    mode: Quantization,
    *,
    own: Mapping[str, Scales],
    kept: Collection[str] = (),
    calibrate: Calibrate | None = None,
) -> None:
    """Exchanges the linears of `entry`, which `build_entry` made; its weights may be fake.

    `own` are the scales of a checkpoint whose weights were quantised, by the linears' paths in it,
    `kept` the modules that it did not quantise (see `_is_kept`). Scales of activations are
    those that `calibrate` comes to, else the checkpoint's own, else 1. Raises `VllmcError`
    (`nothing-to-quantize`, `bad-weights`), and what `calibrate` raises.
    """
    model = model_of(entry)
    paths = linears_to_quantize(model, kept)
    if not paths:
        raise VllmcError(
            "nothing-to-quantize",
            f"{type(model).__name__} has no linear that --quantize could quantise",
            hint="docs/quantization.md says which linears are quantised",
        )
    own = {**own, **{p: own[name] for p in paths for name in _names(model, p) if name in own}}
    _require_scales(paths, own)
    input_scales = {}
    if mode == "fp8-static":
        input_scales = _input_scales(entry, paths, own, calibrate)
    for path, places in zip(paths, _places(model, paths), strict=True):
        linear = model.get_submodule(path)
        made = _quantized(linear, STORED_AS[mode], own.get(path), input_scales.get(path))
        # One that is held in several places stays one. Each is let go before the next is made.
        for place in places:
            model.set_submodule(place, made)
        del linear


def linears_to_quantize(model: torch.nn.Module, kept: Collection[str] = ()) -> list[str]:
    """The paths of the linears of `model` that are quantised, each once.

    These are the modules of the classes `torch.nn.Linear` and Transformers' `Conv1D` themselves,
    with both sizes of the weight multiples of 16, as matrix units want them. Left are

    - the head, which makes logits, and what makes one number for each token of the vocabulary;
    - the routers of mixtures of experts: what makes one number for each expert;
    - experts, whose weights are parameters of one module and no linears;
    - what a checkpoint left, if the weights were quantised already: `kept`.
    """
    config = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel):
        config = model.config.get_text_config(decoder=True)
        head = model.get_output_embeddings()
        outputs = {getattr(config, name, None) for name in _EXPERT_COUNTS}
    else:
        head = None
        outputs = {getattr(config, "vocab_size", None)}
    found = []
    for path, module in model.named_modules():
        if type(module) not in (torch.nn.Linear, Conv1D) or module is head:
            continue
        n, k = _weight(module).shape
        if (
            n % _MULTIPLE == 0
            and k % _MULTIPLE == 0
            and n not in outputs
            and not any(_is_kept(name, kept) for name in _names(model, path))
        ):
            found.append(path)
    return found


def _names(model: torch.nn.Module, path: str) -> tuple[str, ...]:
    """What a checkpoint may call the module at `path`, which is one with or without a head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return path, prefix + path, path.removeprefix(prefix)


def _is_kept(path: str, kept: Collection[str]) -> bool:
    """Whether a checkpoint names the module at `path`, or one that holds it.

    It names them by path, by a pattern with asterisks, or by `re:` and a regular expression.
    """
    parts = path.split(".")
    holders = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    return any(
        re.match(name.removeprefix("re:"), path) is not None
        if name.startswith("re:")
        else any(fnmatch.fnmatchcase(holder, name) for holder in holders)
        for name in kept
    )


def _weight(linear: torch.nn.Module) -> torch.Tensor:
    """The weight `[N, K]`; a `Conv1D` holds it the other way round."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if isinstance(linear, Conv1D) else weight


def _places(model: torch.nn.Module, paths: Collection[str]) -> list[list[str]]:
    """All the paths of each of the modules at `paths`."""
    found: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        found[id(module)].append(path)
    return [found[id(model.get_submodule(path))] for path in paths]


def _require_scales(paths: Collection[str], own: Mapping[str, Scales]) -> None:
    """Refuses a checkpoint that has the scales of some linears and not of others."""
    found = {
        "weight_scale": {path for path in paths if path in own},
        "input_scale": {path for path in paths if path in own and own[path].input is not None},
    }
    for name, those in found.items():
        missing = [path for path in paths if path not in those]
        if missing and (those or (own and name == "weight_scale")):
            raise VllmcError(
                "bad-weights",
                f"the checkpoint quantised its linears, but has no {name} of {missing[0]}",
                context={"missing": len(missing), "of": len(paths)},
                hint="name what was left unquantised in the quantization_config of config.json",
            )


def _input_scales(
    entry: torch.nn.Module,
    paths: Collection[str],
    own: Mapping[str, Scales],
    calibrate: Calibrate | None,
) -> dict[str, torch.Tensor]:
    """The scale of what each linear is given: one tensor for all that are given the same."""
    model = model_of(entry)
    largest = calibrate(entry, paths) if calibrate is not None else None
    device = next(model.parameters()).device
    scales: dict[str, torch.Tensor] = {}
    for group in groups_by_input(entry, model, paths, device):
        if largest is not None:
            amax = max(SMALLEST_AMAX, *(largest[path] for path in group))
            scale = amax / LARGEST[STORED_AS["fp8-static"]]
        else:
            # All of them, or none.
            known = [own[path].input for path in group if path in own]
            scale = max((s for s in known if s is not None), default=1.0)
        with like_weights(model):
            shared = torch.tensor([scale], dtype=torch.float32, device=device)
        scales |= dict.fromkeys(group, shared)
    return scales


def _quantized(
    linear: torch.nn.Module,
    dtype: torch.dtype,
    own: Scales | None,
    input_scale: torch.Tensor | None,
) -> QuantizedLinear:
    with torch.no_grad(), like_weights(linear):
        weight = _weight(linear)
        scale = scale_of(weight, dtype)
        if own is not None:
            scale = torch.tensor([own.weight], dtype=torch.float32, device=weight.device)
        bias = None if linear.bias is None else linear.bias.detach()
        return QuantizedLinear(quantized(weight, scale, dtype), scale, input_scale, bias)
