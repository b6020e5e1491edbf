"""What a start of vLLM's would hash, without starting it: `python -m vllmc.core.vllm_plugin.start`.

The arguments are those of `vllm serve`; nothing is loaded but the model's config. Prints a line of
JSON, behind whatever vLLM prints: the record of the key, or the error that vLLM has with them.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

from vllmc.core.cache.key import JsonValue
from vllmc.core.diagnose.vllm_recorded_format import PRINTED
from vllmc.core.torch_compat.config_modules import import_config
from vllmc.core.torch_compat.options import MODULES
from vllmc.core.vllm_plugin.hooks import install, missing, observing
from vllmc.core.vllm_plugin.observation import Observation
from vllmc.core.vllm_plugin.record import compilation, key_record

# Where releases have the parser of `vllm serve`.
_PARSERS = ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args")


def main(arguments: Sequence[str]) -> int:
    """Prints what is known of a start with these arguments."""
    try:
        found = start_record(arguments)
    except Exception as error:  # noqa: BLE001 - whatever vLLM says of the arguments is passed on
        found = {"error": f"{type(error).__name__}: {error}"}
    print(PRINTED + json.dumps(found))  # noqa: T201 - the answer
    return 0


def start_record(arguments: Sequence[str]) -> dict[str, JsonValue]:
    """The record of the key as far as it is known before a model is loaded."""
    import vllm.envs
    from vllm.engine.arg_utils import AsyncEngineArgs

    config = AsyncEngineArgs.from_cli_args(_parsed(arguments)).create_engine_config()
    import vllm.compilation.caching
    import vllm.compilation.compiler_interface as compilers

    directories = _directories(config.parallel_config)
    _as_in_an_engine(config)
    trees = _trees(config)
    install()
    observation = Observation()
    with observing(observation):
        vllm.envs.compile_factors()
        config.compute_hash()
        if config.compilation_config.backend != "eager":
            with _as_when_compiling(config) if "compile" in trees else nullcontext():
                compilers.get_inductor_factors()
    observation.missing = missing(storing=False)
    record = key_record(observation)
    return record | {
        "compilation": compilation(config.compilation_config),
        "model": str(config.model_config.model) if config.model_config else "",
        "ranks": directories,
        "trees": trees,
        "disabled": _disabled(config, trees),
        "beside": _beside(config),
    }


def _directories(parallel: Any) -> list[JsonValue]:
    """What the directories of this node's processes are called: rank and replica."""
    first = parallel.node_rank_within_dp * parallel.local_world_size
    replicas = range(parallel.data_parallel_size_local or 1)
    return [
        f"rank_{first + rank}_{parallel.data_parallel_rank + replica}"
        for replica in replicas
        for rank in range(parallel.local_world_size)
    ]


def _as_in_an_engine(config: Any) -> None:
    """Has the config as each engine of a model without experts has it: that of its only replica."""
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 and not config.model_config.is_moe:
        parallel.reconfigure_for_independent_dp_rank()


def _as_when_compiling(config: Any) -> AbstractContextManager[None]:
    """The option that vLLM sets while a model is traced and its pieces compiled."""
    wide = config.compilation_config.dynamic_shapes_config.assume_32_bit_indexing
    patched: AbstractContextManager[None] = import_config(MODULES["inductor"]).patch(
        assume_32bit_indexing=wide
    )
    return patched


def _trees(config: Any) -> list[JsonValue]:
    """The trees that the model's start looks in, in its order."""
    import vllm.compilation.compiler_interface as compilers
    import vllm.envs

    # Since 0.33 models that Transformers implements are compiled in pieces alone.
    has_choice = bool(signature(compilers.get_inductor_factors).parameters)
    in_pieces = has_choice and config.model_config.using_transformers_backend()
    if not vllm.envs.VLLM_USE_AOT_COMPILE or in_pieces:
        return ["compile"]
    return ["aot"] if vllm.envs.VLLM_USE_MEGA_AOT_ARTIFACT else ["aot", "compile"]


def _disabled(config: Any, trees: Sequence[JsonValue]) -> str:
    """What switches vLLM's cache off; empty where nothing does."""
    import vllm.compilation.compiler_interface as compilers
    import vllm.envs

    if vllm.envs.VLLM_DISABLE_COMPILE_CACHE:
        return "VLLM_DISABLE_COMPILE_CACHE"
    if "compile" not in trees:
        return ""
    if not compilers.is_compile_cache_enabled(config.compilation_config.inductor_compile_config):
        return "force_disable_caches, an option of Inductor,"
    speculative = config.speculative_config
    if speculative is not None and speculative.use_ngram_gpu() and not config.use_v2_model_runner:
        return "speculation by ngram_gpu"
    return ""


def _beside(config: Any) -> list[JsonValue]:
    """What is compiled beside the model, as far as the config says."""
    found: list[JsonValue] = []
    speculative = config.speculative_config
    draft = None if speculative is None else speculative.draft_model_config
    # Speculation without a model of its own has the model's config in the place of a draft's.
    if draft is not None and draft is not config.model_config:
        found.append(f"the draft model ({speculative.method})")
    if config.compilation_config.compile_mm_encoder:
        found.append("the multimodal encoder")
    return found


def _parsed(arguments: Sequence[str]) -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = _parser_maker()(FlexibleArgumentParser(prog="vllm serve"))
    parsed = parser.parse_args(list(arguments))
    if getattr(parsed, "model_tag", None) is not None:
        parsed.model = parsed.model_tag
    return parsed


def _parser_maker() -> Any:
    for name in _PARSERS:
        try:
            return importlib.import_module(name).make_arg_parser
        except (ImportError, AttributeError):
            continue
    raise RuntimeError("this vLLM has its command line where this vllmc does not find it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
