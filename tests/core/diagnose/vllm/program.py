"""A model that vLLM compiles on a CPU, for the caches beside this file. `make.py` runs it.

vLLM's own backend splits it at the attention, compiles the pieces and writes the cache and the log.
With arguments of `vllm serve` the config is what vLLM makes of them.
What is taken from vLLM's hands is what needs its C extensions: its passes over the graph, and the
platform's refusal to compile by pieces.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

register = AutoConfig.register
AutoConfig.register = staticmethod(lambda *a, **k: register(*a, **{**k, "exist_ok": True}))

import vllm.config  # noqa: E402
import vllm.logger  # noqa: E402
from vllm.compilation.backends import VllmBackend  # noqa: E402
from vllm.compilation.decorators import support_torch_compile  # noqa: E402
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.forward_context import set_forward_context  # noqa: E402
from vllm.plugins import load_general_plugins  # noqa: E402

LAYERS, HIDDEN, PIECEWISE = 3, 16, 3

library = torch.library.Library("toy", "FRAGMENT")
library.define("attention(Tensor q, Tensor(a!) out, str name) -> ()")


def attention(q: Tensor, out: Tensor, name: str) -> None:
    out.copy_(q * 3)


library.impl("attention", attention, "CPU")
library.impl("attention", lambda q, out, name: None, "Meta")


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q = self.proj(x)
        out = torch.empty_like(q)
        torch.ops.toy.attention(q, out, self.name)
        return self.norm(out) + x


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Model(nn.Module):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        names = (f"model.layers.{index}.self_attn.attn" for index in range(LAYERS))
        self.layers = nn.ModuleList(map(Layer, names))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def configuration() -> VllmConfig:
    known = {field.name for field in dataclasses.fields(CompilationConfig)}
    is_old = "mode" not in known
    cudagraph = {"use_cudagraph": False} if is_old else {"cudagraph_mode": 0}
    op = "toy.attention" if is_old else "toy::attention"
    config = VllmConfig(compilation_config=CompilationConfig(splitting_ops=[op], **cudagraph))
    compilation = config.compilation_config
    setattr(compilation, "level" if is_old else "mode", PIECEWISE)
    compilation.backend = "" if is_old else "inductor"
    compilation.compile_sizes = []
    if tokens := os.environ.get("TOY_TOKENS"):
        config.scheduler_config.max_num_batched_tokens = int(tokens)
    compilation.cache_dir = os.environ.get("TOY_CACHE_DIR", "")
    for field in dataclasses.fields(compilation.pass_config):
        if getattr(compilation.pass_config, field.name) is True:
            setattr(compilation.pass_config, field.name, False)
    VllmBackend.configure_post_pass = lambda self: None
    return config


def served(arguments: list[str]) -> VllmConfig:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    VllmBackend.configure_post_pass = lambda self: None
    config = AsyncEngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()
    parallel = config.parallel_config
    # What an engine and a worker set of theirs, each in its own process.
    parallel.data_parallel_index = int(os.environ.get("TOY_REPLICA", "0"))
    if parallel.data_parallel_size > 1:
        parallel.reconfigure_for_independent_dp_rank()
    parallel.rank = int(os.environ.get("TOY_RANK", "0"))
    return config


def main() -> None:
    if hasattr(vllm.logger, "configure_logging"):
        vllm.logger.configure_logging(vllm.config.LoggingConfig())
    load_general_plugins()
    config = served(sys.argv[1:]) if sys.argv[1:] else configuration()
    with set_current_vllm_config(config), torch.no_grad():
        model = Model(vllm_config=config)
        with set_forward_context({}, vllm_config=config):
            model(torch.randn(8, HIDDEN))
        if getattr(model, "aot_compiled_fn", None) and os.environ["VLLM_USE_AOT_COMPILE"] == "1":
            model.save_aot_compiled_function()


if __name__ == "__main__":
    sys.exit(main())
