"""What a start of vLLM's would hash, without starting it: `python -m vllmc.core.vllm_plugin.start`.

The arguments are those of `vllm serve`; nothing is loaded but the model's config. Prints a line of
JSON, behind whatever vLLM prints: the record of the key, or the error that vLLM has with them.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from vllmc.core.cache.key import JsonValue
from vllmc.core.diagnose.vllm_recorded_format import PRINTED
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

    install()
    observation = Observation()
    with observing(observation):
        vllm.envs.compile_factors()
        config.compute_hash()
        if config.compilation_config.backend != "eager":
            compilers.get_inductor_factors()
    observation.missing = missing(storing=False)
    record = key_record(observation)
    return record | {
        "compilation": compilation(config.compilation_config),
        "model": str(config.model_config.model) if config.model_config else "",
        "ranks": config.parallel_config.world_size,
        "disabled": bool(vllm.envs.VLLM_DISABLE_COMPILE_CACHE),
        "whole_model": bool(vllm.envs.VLLM_USE_AOT_COMPILE),
        "with_artifacts": bool(vllm.envs.VLLM_USE_MEGA_AOT_ARTIFACT),
    }


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
