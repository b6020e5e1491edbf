"""What a quantised model computes, in plain torch: an eager Transformers model whose linears have
dequantised weights, and whose inputs are quantised and brought back before each of them.

Written from the definitions alone: nothing here is vllmc's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LARGEST = {"fp8-static": 448.0, "fp8-dynamic": 448.0, "int8-dynamic": 127.0}


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


def input_scales(model: PreTrainedModel, prompts: Iterable[Sequence[int]]) -> dict[str, torch.Tensor]:
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
def quantized(model: PreTrainedModel, mode: str, scales: Mapping[str, torch.Tensor]) -> Iterator[None]:
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
