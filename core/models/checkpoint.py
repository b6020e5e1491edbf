"""Checkpoints whose weights are quantised already: what they say of it, their weights and scales.

Read are those with one scale for each weight, in any of three layouts that differ in their
`quantization_config` alone: AutoFP8's (`fp8`), that of compressed-tensors, and ModelOpt's. In all
of them a linear has the tensors `weight` (fp8 or int8), `weight_scale`, and where the scales of
activations are fixed `input_scale`; a quantised tensor q stands for `scale * q`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from vllmc.core.errors import VllmcError
from vllmc.core.models.errors import unsupported_model
from vllmc.core.models.model import OwnQuantization, Scales
from vllmc.core.spec import Quantization

WEIGHT_SCALE: Final = ".weight_scale"
"""How the name of a weight's scale ends, where it is that of its linear before."""

_INDEX: Final = "model.safetensors.index.json"
_INPUT_SCALE: Final = ".input_scale"
_SCALES: Final = (WEIGHT_SCALE, _INPUT_SCALE)
# Some are of the keys and values in a cache, which is not quantised here.
_NO_WEIGHTS: Final = (*_SCALES, ".k_scale", ".v_scale", ".kv_scale")

STORED_AS: Final[Mapping[Quantization, torch.dtype]] = {
    "fp8-static": torch.float8_e4m3fn,
    "fp8-dynamic": torch.float8_e4m3fn,
    "int8-dynamic": torch.int8,
}
"""The dtype of the quantised weights of each mode."""

_STATIC: Final[tuple[Quantization, ...]] = ("fp8-static", "fp8-dynamic")
_DYNAMIC: Final[tuple[Quantization, ...]] = ("fp8-dynamic", "fp8-static")
_INT8: Final[tuple[Quantization, ...]] = ("int8-dynamic",)


def read_quantization(name: str, fields: Mapping[str, Any]) -> OwnQuantization | None:
    """What a configuration's `quantization_config` says; None where it says nothing.

    Also for weights that Transformers brings back to a floating dtype. `name` is for errors. Raises
    `VllmcError` (`unsupported-model`) for other methods, and for fp8 and int8 with other scales
    than one for each weight: a program of plain linears would not be that of such a model.
    """
    kept: tuple[str, ...]
    match fields.get("quant_method"):
        case "fp8":
            if fields.get("weight_block_size"):
                raise _unsupported(name, "its weights have a scale for each block")
            modes = _STATIC if fields.get("activation_scheme") == "static" else _DYNAMIC
            kept = ("ignored_layers", "modules_to_not_convert")
        case "modelopt":
            if fields.get("quant_algo") != "FP8":
                raise _unsupported(name, f"quant_algo is {fields.get('quant_algo')}")
            modes = _STATIC
            kept = ("exclude_modules", "ignore")
        case "compressed-tensors":
            modes = _modes_of_groups(name, fields.get("config_groups"))
            kept = ("ignore",)
        case None | "mxfp4":
            return None
        case method:
            raise _unsupported(name, f"its quant_method is {method}")
    return OwnQuantization(
        modes=modes, kept=tuple(path for field in kept for path in _names(name, fields, field))
    )


def _names(name: str, fields: Mapping[str, Any], field: str) -> list[str]:
    """The modules that a field names, by patterns too."""
    names = fields.get(field) or []
    if not isinstance(names, list) or not all(isinstance(path, str) for path in names):
        raise _unsupported(name, f"{field} is no list of modules")
    for path in names:
        try:
            re.compile(path.removeprefix("re:") if path.startswith("re:") else "")
        except re.error as error:
            raise _unsupported(name, f"{field} has '{path}', and {error}") from error
    return names


def _modes_of_groups(name: str, groups: Any) -> tuple[Quantization, ...]:
    """The modes of a `config_groups` of compressed-tensors."""
    match [*groups.values()] if isinstance(groups, dict) else []:
        case [
            {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True},
                "input_activations": {"num_bits": 8, "type": given, "symmetric": True} as given_to,
            }
        ] if kind == given and kind in ("float", "int"):
            if kind == "int":
                return _INT8
            fixed = not given_to.get("dynamic") and given_to.get("strategy") == "tensor"
            return _STATIC if fixed else _DYNAMIC
    raise _unsupported(name, "not all of it is in 8 bits, with one scale for each weight")


def read_scales(directory: Path) -> dict[str, Scales]:
    """The scales of the checkpoint in `directory`, by the paths of its linears.

    Raises `VllmcError` (`bad-weights`).
    """
    found = {
        key: _number(key, tensor)
        for key, tensor in _tensors(directory, lambda key: key.endswith(_SCALES))
    }
    return {
        path: Scales(weight=scale, input=found.get(path + _INPUT_SCALE))
        for key, scale in found.items()
        if (path := key.removesuffix(WEIGHT_SCALE)) != key
    }


def read_weights(
    directory: Path, own: OwnQuantization, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights of the checkpoint in `directory`, with quantised ones brought to `dtype`.

    To quantise such a weight by its own scale gives the one that is stored, bit by bit: floating
    types tell more numbers apart than fp8 and int8. Not below 6e-5 in float16, where a weight may
    become its neighbour. Raises `VllmcError` (`bad-weights`).
    """
    stored = STORED_AS[own.modes[0]]
    scales = read_scales(directory)
    weights = {}
    for key, tensor in _tensors(directory, lambda key: not key.endswith(_NO_WEIGHTS)):
        path = key.removesuffix(".weight")
        if tensor.dtype is stored:
            if path not in scales:
                raise _bad_weights(key, f"it is in {tensor.dtype} and has no weight_scale")
            tensor = (tensor.to(torch.float32) * scales[path].weight).to(dtype)
        elif tensor.itemsize == 1 and tensor.dtype is not torch.bool:
            raise _bad_weights(
                key, f"it is in {tensor.dtype}, and config.json speaks of weights in {stored}"
            )
        weights[key] = tensor
    return weights


def _tensors(directory: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    index = directory / _INDEX
    try:
        names = (
            sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
            if index.is_file()
            else sorted(file.name for file in directory.glob("*.safetensors"))
        )
        for name in names:
            with safe_open(directory / name, framework="pt") as file:
                for key in filter(wanted, file.keys()):
                    yield key, file.get_tensor(key)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _bad_weights(directory.name, str(error)) from error


def _number(key: str, scale: torch.Tensor) -> float:
    if scale.numel() != 1:
        raise _bad_weights(
            key, f"there is one scale for each weight, and its shape is {[*scale.shape]}"
        )
    value = float(scale.to(torch.float32))
    if not 0 < value < math.inf:
        raise _bad_weights(key, f"a scale is a number above 0, and it is {value}")
    return value


def _unsupported(name: str, cause: str) -> VllmcError:
    return unsupported_model(
        name,
        f"its weights are quantised in a way that vllmc does not read: {cause}",
        hint="docs/quantization.md says which checkpoints it reads",
    )


def _bad_weights(what: str, cause: str) -> VllmcError:
    return VllmcError(
        "bad-weights",
        f"the quantised weights cannot be read: {what}",
        context={"cause": cause},
        hint="docs/quantization.md says what such a checkpoint holds",
    )
