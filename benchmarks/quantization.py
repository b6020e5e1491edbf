"""What quantising does to the logits of models with random weights.

    python benchmarks/quantization.py [--tokens 256] [--dtype bfloat16] [--layers 4] [MODEL ...]

Each model is run eagerly as it is, then in each mode, on one prompt of random tokens. Printed are
the error of the logits relative to their size (root mean squares), and how often the most probable
token stays the same. Random weights make almost equally probable tokens: of a trained model more
stay the same.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import get_args

import torch

from vllmc.core.declare.session import plainly
from vllmc.core.graph.capture import capture
from vllmc.core.job import resolve_spec
from vllmc.core.models.built import build_model
from vllmc.core.models.expert_modules import experts_in
from vllmc.core.models.model import Model
from vllmc.core.models.resolve import resolve
from vllmc.core.runtime.calibration import calibrate, random_prompts
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.runtime.workload import Limits, make_engine
from vllmc.core.spec import CompileSpec, Quantization
from vllmc.core.torch_compat.config import applied, vllmc_overrides

ONE = SamplingParams(max_new_tokens=1)


def main() -> None:
    """Prints a row for each model and mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["tiny-llama", "smollm2-135m", "gpt2"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    print("model", "mode", "error", "same token", sep="\t")
    for name in given.models:
        model = resolve(name, layers=given.layers)
        vocabulary = model.info.vocab_size
        assert vocabulary is not None
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(vocabulary, (given.tokens,), generator=generator).tolist()
        plain = logits(model, CompileSpec(dtype=given.dtype), prompt)
        for mode in get_args(Quantization):
            found = logits(model, CompileSpec(dtype=given.dtype, quantize=mode), prompt)
            error = float((found - plain).norm() / plain.norm())
            same = float((found.argmax(1) == plain.argmax(1)).double().mean())
            print(name, mode, f"{error:.1%}", f"{same:.0%}", sep="\t", flush=True)


def logits(model: Model, spec: CompileSpec, prompt: list[int]) -> torch.Tensor:
    """The logits `[T, vocab]` after each token of `prompt`, in float32."""
    spec = resolve_spec(spec, model)
    with applied(vllmc_overrides(spec)):
        attention = capture(model, build_model(model, spec), spec).attention
    vocabulary = model.info.vocab_size
    assert vocabulary is not None
    limits = Limits(
        vocab_size=vocabulary,
        max_position=model.info.max_position,
        dtype=getattr(torch, spec.dtype),
        device=spec.device,
    )
    static = partial(
        calibrate,
        prompts=random_prompts(limits),
        attention=attention,
        limits=limits,
        encoder=None,
    )
    entry = build_model(model, spec, "real", static if spec.quantize == "fp8-static" else None)
    found = []

    def step(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found.append(entry(ids, positions, torch.arange(ids.shape[1])))
        return found[-1][rows]

    engine = make_engine(
        step,
        attention,
        [[prompt]],
        ONE,
        limits,
        max_tokens=len(prompt),
        experts=experts_in(entry),
    )
    with plainly():
        engine.generate([prompt], ONE)
    return found[0].float()


if __name__ == "__main__":
    main()
