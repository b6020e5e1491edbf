"""One toy decoder, compiled by vLLM's backend and by vllmc, and run as it is: a script.

    python beside_vllm.py DIRECTORY inductor|eager

Prints one line of JSON: by number of tokens, how far either is from the module as it is, or the
refusal. vLLM's config is set as in tests/core/diagnose/vllm/program.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.compilation.backends import VllmBackend
from vllm.compilation.decorators import support_torch_compile as by_vllm
from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context

from vllmc.core import CompileRange, CompileSpec, compiling
from vllmc.core import support_torch_compile as by_vllmc
from vllmc.core.errors import VllmcError

LAYERS, HIDDEN = 2, 16
OP = "beside::attention"
COUNTS = (1, 2, 4, 8, 9, 17, 64, 0, 65)

library = torch.library.Library("beside", "FRAGMENT")
library.define("attention(Tensor q, Tensor k, Tensor(a!) out, str name) -> ()")


def attention(q: Tensor, k: Tensor, out: Tensor, name: str) -> None:
    """Each token looks at those before: a splitting op that mixes rows."""
    scores = (q @ k.t()).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
    out.copy_(scores.softmax(-1) @ k)


library.impl("attention", attention, "CPU")
library.impl("attention", lambda q, k, out, name: None, "Meta")


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.qk = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.mlp = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k = self.qk(self.norm(x)).split([HIDDEN, HIDDEN], -1)
        q = q * torch.cos(positions)[:, None]
        out = torch.empty_like(q)
        torch.ops.beside.attention(q, k, out, self.name)
        x = x + out.view(-1, 4, HIDDEN // 4).flatten(1)
        return x + nn.functional.silu(self.mlp(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(f"layers.{index}") for index in range(LAYERS))
        self.requires_grad_(False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions)
        return x


@by_vllm(dynamic_arg_dims={"x": 0, "positions": 0})
class VllmDecoder(Decoder):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()


@by_vllmc(dynamic_arg_dims={"x": {0: "tokens"}, "positions": {0: "tokens"}})
class VllmcDecoder(Decoder):
    pass


def configuration(directory: Path, backend: str) -> VllmConfig:
    given = CompilationConfig(splitting_ops=[OP], cudagraph_mode=0)
    config = VllmConfig(compilation_config=given)
    config.scheduler_config.max_num_batched_tokens = 64
    compilation = config.compilation_config
    compilation.compile_ranges_endpoints = [8]
    config._set_compile_ranges()
    compilation.mode = CompilationMode.VLLM_COMPILE
    compilation.backend = backend
    compilation.compile_sizes = [4]
    compilation.cache_dir = str(directory / "vllm")
    for field in dataclasses.fields(compilation.pass_config):
        if getattr(compilation.pass_config, field.name) is True:
            setattr(compilation.pass_config, field.name, False)
    VllmBackend.configure_post_pass = lambda self: None
    return config


def distance(model: nn.Module, tokens: int, expected: Tensor) -> float | str:
    try:
        result = model(*batch(tokens))
    except (AssertionError, VllmcError) as error:
        return str(error).split("\n")[0]
    return (result - expected).abs().max().item()


def batch(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, HIDDEN, generator=generator), torch.arange(tokens)


def main(directory: Path, backend: str) -> None:
    config = configuration(directory, backend)
    eager = Decoder()
    spec = CompileSpec(
        ranges=(CompileRange(1, 8), CompileRange(9, 64)),
        sizes=(4,),
        splitting_ops=(OP,),
        backend=backend,
    )
    with compiling(spec, cache_dir=directory / "vllmc"):
        ours = VllmcDecoder()
    rows = {}
    with set_current_vllm_config(config), torch.no_grad():
        theirs = VllmDecoder(vllm_config=config)
        with set_forward_context({}, vllm_config=config):
            theirs(*batch(17))
            for tokens in COUNTS:
                expected = eager(*batch(tokens))
                rows[tokens] = [distance(model, tokens, expected) for model in (theirs, ours)]
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
