"""What a quantised model computes, in plain torch: an eager Transformers model whose linears have
dequantised weights, and whose inputs are quantised and brought back before each of them.

Written from the definitions alone: nothing here is vllmc's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB = 128
PROMPTS = tuple(
    tuple(torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (19, 5, 33)
)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
LARGEST = {"fp8-static": 448.0, "fp8-dynamic": 448.0, "int8-dynamic": 127.0}


def make_model(model_type: str) -> PreTrainedModel:
    """A tiny decoder with weights that vary enough for each token to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.3 if parameter.dim() > 1 else 0.2)
        # Else a tied embedding makes each token its own likeliest successor.
        model.get_input_embeddings().weight.mul_(0.2)
    return model.eval()


def rounded(x: torch.Tensor, scale: torch.Tensor, mode: str) -> torch.Tensor:
    """`x` as the numbers that a type of 8 bits with this scale has, in float64."""
    scaled = (x.detach().float() / scale).clamp(-LARGEST[mode], LARGEST[mode])
    # Of two numbers that are as near, both take the even one.
    nearest = scaled.round() if mode == "int8-dynamic" else scaled.to(torch.float8_e4m3fn)
    return nearest.double() * scale.double()


def scale_of(x: torch.Tensor, mode: str) -> torch.Tensor:
    """The scale, in float32, by which the largest element is the largest that the type has."""
    return x.detach().abs().amax().float() / LARGEST[mode]


def linears(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """What is quantised of a dense decoder: its linears but the head."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }


def logits_of(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """The logits `[T, vocab]` after each token of `prompt`, in float64."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].double()


def input_scales(
    model: PreTrainedModel, prompts: Iterable[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """The scale of what each linear is given while `model` runs `prompts`, by its path."""
    largest: dict[str, torch.Tensor] = {}

    def watch(path: str) -> object:
        def see(_: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
            scale = scale_of(args[0], "fp8-static")
            largest[path] = max(largest.get(path, scale), scale)

        return see

    hooks = [m.register_forward_pre_hook(watch(p)) for p, m in linears(model).items()]  # type: ignore[arg-type]
    for prompt in prompts:
        logits_of(model, prompt)
    for hook in hooks:
        hook.remove()
    return largest


@contextmanager
def quantized(
    model: PreTrainedModel, mode: str, scales: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Within it, `model` computes as a quantised one; `scales` are those of `fp8-static`.

    Products are in float64, and rounded once to the dtype that the model computes in.
    """
    found = linears(model)

    def exchange(path: str, linear: torch.nn.Module) -> None:
        weight = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
        weight = rounded(weight, scale_of(weight, mode), mode)

        def forward(x: torch.Tensor) -> torch.Tensor:
            scale = scales[path] if mode == "fp8-static" else scale_of(x, mode)
            product = rounded(x, scale, mode) @ weight.t()
            return (product if linear.bias is None else product + linear.bias).to(x.dtype)

        linear.forward = forward

    for path, linear in found.items():
        exchange(path, linear)
    try:
        yield
    finally:
        for linear in found.values():
            del linear.forward


QUANTIZATION_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "fp8 static": {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": ["lm_head"],
    },
    "fp8 dynamic": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
    "compressed static": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "tensor",
                    "symmetric": True,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "tensor",
                    "symmetric": True,
                    "dynamic": False,
                },
            }
        },
    },
    "compressed int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "strategy": "token",
                    "symmetric": True,
                    "dynamic": True,
                },
            }
        },
    },
}
"""What checkpoints of each layout say of themselves."""


def save_quantized(
    model: PreTrainedModel,
    directory: Path,
    layout: str,
    *,
    scales: Mapping[str, torch.Tensor] | None = None,
    kept: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Saves `model` as a checkpoint that was quantised before, and returns its tensors.

    `scales` are those of what its linears are given. Weights have a scale that is none of those
    which `scale_of` gives: it is twice as large.
    """
    dtype = torch.int8 if "int8" in layout else torch.float8_e4m3fn
    tensors = {name: t.detach().clone() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("lm_head")}
    for path in linears(model).keys() - set(kept):
        weight = tensors[f"{path}.weight"]
        scale = 2 * scale_of(weight, "int8-dynamic" if dtype is torch.int8 else "fp8-static")
        scaled = weight.float() / scale
        tensors[f"{path}.weight"] = (scaled.round() if dtype is torch.int8 else scaled).to(dtype)
        tensors[f"{path}.weight_scale"] = scale
        if scales is not None:
            tensors[f"{path}.input_scale"] = scales[path].view(1)
    directory.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    fields = model.config.to_dict() | {"quantization_config": QUANTIZATION_CONFIGS[layout]}
    (directory / "config.json").write_text(json.dumps(fields))
    return tensors
