"""How to have a factor of vLLM's as it was: what to set or to type. Imports no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Final

from vllmc.core.cache.key import REDACTED, JsonValue, canonical_json
from vllmc.core.diagnose.vllm_factors import ENVIRONMENT, HASHES

CONFIG, CODE, COMPILER = HASHES.values()

_FLAGS: Final[Mapping[str, str]] = {
    "model_config.model": "--model",
    "model_config.dtype": "--dtype",
    "model_config.max_model_len": "--max-model-len",
    "model_config.quantization": "--quantization",
    "model_config.revision": "--revision",
    "model_config.runner": "--runner",
    "model_config.model_impl": "--model-impl",
    "cache_config.block_size": "--block-size",
    "cache_config.cache_dtype": "--kv-cache-dtype",
    "scheduler_config.max_num_batched_tokens": "--max-num-batched-tokens",
    "scheduler_config.max_num_seqs": "--max-num-seqs",
    "parallel_config.tensor_parallel_size": "--tensor-parallel-size",
    "parallel_config.pipeline_parallel_size": "--pipeline-parallel-size",
    "parallel_config.data_parallel_size": "--data-parallel-size",
    "parallel_config.all2all_backend": "--all2all-backend",
    "lora_config.max_lora_rank": "--max-lora-rank",
    "lora_config.max_loras": "--max-loras",
}
_SWITCHES: Final[Mapping[str, str]] = {
    "model_config.trust_remote_code": "trust-remote-code",
    "parallel_config.enable_expert_parallel": "enable-expert-parallel",
    "parallel_config.enable_eplb": "enable-eplb",
    "parallel_config.enable_dbo": "enable-dbo",
}
_COMPILATION: Final = "compilation_config."
_FOR_INDUCTOR: Final = f"{_COMPILATION}inductor_compile_config"
# What vLLM works out itself, from the option named.
_DERIVED: Final[Mapping[str, str]] = {
    "compilation_config.compile_ranges_endpoints": "it follows from --max-num-batched-tokens",
    "parallel_config.world_size": "it follows from the sizes of the parallel groups",
}


def remedy(group: str, name: str, before: JsonValue) -> str:
    """What makes the factor `before` again; empty where nothing that is known does."""
    if REDACTED in canonical_json(before):
        return ""
    if group == ENVIRONMENT:
        return _variable(name, before)
    if group == CONFIG:
        return _option(name, before)
    return ""


def explanation(group: str, name: str) -> str:
    """What a factor is that a start does not set directly; empty where its name says it."""
    if group == CODE:
        if name.startswith("place."):
            return (
                "vLLM hashes the absolute path of each file: install the package at the same path"
            )
        if name == "forward":
            return "the function that is compiled, and its line"
        return "a source file that was traced: its contents differ"
    if group == COMPILER:
        if name == "torch_key":
            return "another build of torch"
        if name.startswith("system."):
            return "the device, or its CUDA, ROCm or Triton"
    if group == CONFIG:
        if name.startswith(_FOR_INDUCTOR):
            return "what vLLM hands to Inductor: its own choice, or that of --compilation-config"
        return _DERIVED.get(name, "the release of vLLM" if name == "version" else "")
    return ""


def _variable(name: str, before: JsonValue) -> str:
    if before is None:
        return f"unset {name}"
    if isinstance(before, bool):
        return f"export {name}={int(before)}"
    if isinstance(before, (str, int, float)):
        return f"export {name}={shlex.quote(str(before))}"
    return ""


def _option(name: str, before: JsonValue) -> str:
    if name == "version":
        return f"pip install vllm=={before}"
    if name in _DERIVED:
        return ""
    if isinstance(before, str):
        # `torch.bfloat16`, `CUDAGraphMode.NONE`
        before = before.removeprefix("torch.")
    if (flag := _FLAGS.get(name)) is not None:
        return f"leave out {flag}" if before is None else f"{flag} {shlex.quote(str(before))}"
    if (switch := _SWITCHES.get(name)) is not None:
        return f"--{switch}" if before else f"--no-{switch}"
    if name.startswith(_FOR_INDUCTOR):
        return _for_inductor(name.removeprefix(_FOR_INDUCTOR).removeprefix("."), before)
    if name.startswith(_COMPILATION) and not isinstance(before, dict):
        if isinstance(before, str) and before[:1].isupper() and "." in before:
            before = before.partition(".")[2]
        value: JsonValue = before
        for part in reversed(name.removeprefix(_COMPILATION).split(".")):
            value = {part: value}
        return f"--compilation-config {shlex.quote(json.dumps(value))}"
    return ""


def _for_inductor(option: str, before: JsonValue) -> str:
    """The argument for one option, of which the name may have dots, or for all of them."""
    if before is None:
        return f"leave {option or 'inductor_compile_config'} out of --compilation-config"
    value = {"inductor_compile_config": {option: before} if option else before}
    return f"--compilation-config {shlex.quote(json.dumps(value))}"
